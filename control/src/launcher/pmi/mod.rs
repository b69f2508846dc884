//! PMI-1, the protocol between Hydra's `mpiexec` and the ranks it starts: a key-value store and a
//! barrier over all ranks.
//!
//! This is the part without sockets: `Exchange` takes the server's lines and gives the client's.
//! One rank puts a value, all meet in a barrier, and the others get it.
//!
//! Source: the wire protocol as MPICH's "PMI-1 wire protocol" documentation describes it.

mod connection;

pub(super) use connection::{loaded_mpi, share};

/// One exchange with the server, from `init` to `finalize`.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// What this rank puts; `None` if it gets.
    value: Option<String>,
    space: String,
    awaited: Awaited,
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Send this line and read the answer to it.
    Send(String),
    /// All is said. `Some` if a value was got.
    Done(Option<Vec<u8>>),
}

/// Which answer comes next.
#[derive(Debug)]
enum Awaited {
    Init,
    Limits,
    Space,
    Put,
    Barrier,
    Value,
    /// With what was got.
    End(Option<Vec<u8>>),
}

const KEY: &str = "unisum";

impl Exchange {
    /// Puts `value`, or gets what another rank puts.
    pub(crate) fn new(value: Option<&[u8]>) -> Self {
        Self { value: value.map(escape), space: String::new(), awaited: Awaited::Init }
    }

    /// The first line.
    pub(crate) fn begin(&self) -> String {
        "cmd=init pmi_version=1 pmi_subversion=1\n".to_owned()
    }

    /// Takes the answer to the line that was sent last.
    ///
    /// # Errors
    /// In words, if the answer is another than the protocol has, or a refusal.
    pub(crate) fn answer(&mut self, line: &str) -> Result<Step, String> {
        let answer = Answer { line: line.strip_suffix('\n').unwrap_or(line) };
        let space = &self.space;
        let barrier = || "cmd=barrier_in\n".to_owned();
        let (awaited, line) = match &self.awaited {
            Awaited::Init => {
                answer.expect("response_to_init")?;
                (Awaited::Limits, "cmd=get_maxes\n".to_owned())
            }
            Awaited::Limits => {
                answer.expect("maxes")?;
                self.check_length(answer.field("vallen_max"))?;
                (Awaited::Space, "cmd=get_my_kvsname\n".to_owned())
            }
            Awaited::Space => {
                answer.expect("my_kvsname")?;
                let name = answer.field("kvsname").ok_or_else(|| answer.unexpected("kvsname"))?;
                self.space = name.to_owned();
                match &self.value {
                    None => (Awaited::Barrier, barrier()),
                    Some(value) => {
                        (Awaited::Put, format!("cmd=put kvsname={name} key={KEY} value={value}\n"))
                    }
                }
            }
            Awaited::Put => {
                answer.expect("put_result")?;
                (Awaited::Barrier, barrier())
            }
            Awaited::Barrier => {
                answer.expect("barrier_out")?;
                match &self.value {
                    None => (Awaited::Value, format!("cmd=get kvsname={space} key={KEY}\n")),
                    Some(_) => (Awaited::End(None), finalize()),
                }
            }
            Awaited::Value => {
                answer.expect("get_result")?;
                let value = answer.field("value").and_then(unescape);
                let value = value.ok_or_else(|| answer.unexpected("value"))?;
                (Awaited::End(Some(value)), finalize())
            }
            Awaited::End(value) => {
                answer.expect("finalize_ack")?;
                return Ok(Step::Done(value.clone()));
            }
        };
        self.awaited = awaited;
        Ok(Step::Send(line))
    }

    fn check_length(&self, limit: Option<&str>) -> Result<(), String> {
        let limit: usize = limit.and_then(|text| text.parse().ok()).unwrap_or(MAX_VALUE_BYTES);
        match &self.value {
            // The limit counts a final zero.
            Some(value) if value.len() >= limit => Err(format!(
                "mpiexec takes values of less than {limit} bytes, and what is to be told has {}",
                value.len()
            )),
            _ => Ok(()),
        }
    }
}

/// Ends the exchange: without it, mpiexec takes the end of any rank for a crash, and kills all.
fn finalize() -> String {
    "cmd=finalize\n".to_owned()
}

/// A line of the server: `cmd=NAME` and further `FIELD=TEXT`, without blanks in them.
struct Answer<'a> {
    line: &'a str,
}

impl<'a> Answer<'a> {
    fn field(&self, name: &str) -> Option<&'a str> {
        let mut fields = self.line.split(' ').filter_map(|field| field.split_once('='));
        fields.find_map(|(field, text)| (field == name).then_some(text))
    }

    fn expect(&self, command: &str) -> Result<(), String> {
        if self.field("cmd") != Some(command) {
            return Err(self.unexpected(command));
        }
        // Answers that can't be refusals have none.
        match self.field("rc") {
            None | Some("0") => Ok(()),
            Some(_) => Err(format!("mpiexec refused: `{}`", self.shown())),
        }
    }

    fn unexpected(&self, expected: &str) -> String {
        format!("mpiexec answered `{}` where PMI-1 has `{expected}`", self.shown())
    }

    fn shown(&self) -> String {
        self.line.chars().take(MAX_SHOWN_CHARS).flat_map(char::escape_default).collect()
    }
}

/// As a word: blanks, `=` and line ends would end a value.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b".:[]-_".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02x}"));
        }
    }
    text
}

fn unescape(text: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok()?;
        let is_hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        bytes.push(u8::from_str_radix(digits, 16).ok().filter(|_| is_hex)?);
        rest = after;
    }
    Some(bytes)
}

/// Where the server names no limit.
const MAX_VALUE_BYTES: usize = 256;
const MAX_SHOWN_CHARS: usize = 120;

#[cfg(test)]
mod tests {
    use super::*;

    const VALUE: &[u8] = b"unisum-store1 at 0123456789abcdef [fe80::1]:4000 \xff%=\n";

    /// A server of one rank: what the exchange says and ends with.
    fn play(mut exchange: Exchange, answers: &[&str]) -> (Vec<String>, Result<Step, String>) {
        let mut said = vec![exchange.begin()];
        for answer in answers {
            match exchange.answer(answer) {
                Ok(Step::Send(line)) => said.push(line),
                end => return (said, end),
            }
        }
        panic!("there is no end after {said:?}");
    }

    const OPENING: [&str; 3] = [
        "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0\n",
        "cmd=maxes kvsname_max=256 keylen_max=64 vallen_max=1024\n",
        "cmd=my_kvsname kvsname=kvs_7\n",
    ];

    #[test]
    fn what_one_rank_puts_another_gets() {
        let barrier = "cmd=barrier_out\n";
        let put = "cmd=put_result rc=0 msg=success\n";
        let answers = [&OPENING[..], &[put, barrier, "cmd=finalize_ack\n"]].concat();
        let (said, end) = play(Exchange::new(Some(VALUE)), &answers);
        assert_eq!(end, Ok(Step::Done(None)));
        let value = said[3].strip_prefix("cmd=put kvsname=kvs_7 key=unisum value=").unwrap();
        assert_eq!(said[4..], ["cmd=barrier_in\n", "cmd=finalize\n"]);
        let got = format!("cmd=get_result rc=0 msg=success value={value}");
        let answers = [&OPENING[..], &[barrier, &got, "cmd=finalize_ack\n"]].concat();
        let (said, end) = play(Exchange::new(None), &answers);
        assert_eq!(end, Ok(Step::Done(Some(VALUE.to_vec()))));
        assert_eq!(said[4], "cmd=get kvsname=kvs_7 key=unisum\n");
    }

    #[test]
    fn refusals_and_other_protocols_are_errors_that_quote_the_answer() {
        let barrier = "cmd=barrier_out";
        for (answers, words) in [
            (vec![""], "answered ``"),
            (vec!["cmd=response_to_init rc=-1"], "refused: `cmd=response_to_init rc=-1`"),
            (vec!["    24cmd=fullinit-response;"], "answered `    24cmd"),
            (vec![OPENING[0], "cmd=maxes vallen_max=30"], "less than 30 bytes"),
            (vec![OPENING[0], OPENING[1], "cmd=my_kvsname"], "where PMI-1 has `kvsname`"),
            ([&OPENING[..], &["cmd=put_result rc=1 msg=key_exists"]].concat(), "key_exists"),
        ] {
            let (_, end) = play(Exchange::new(Some(VALUE)), &answers);
            let error = end.unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        for got in ["rc=-1 msg=key_unisum_not_found value=unknown", "rc=0", "rc=0 value=%4"] {
            let got = format!("cmd=get_result {got}");
            let (_, end) = play(Exchange::new(None), &[&OPENING[..], &[barrier, &got]].concat());
            assert!(end.unwrap_err().contains("get_result"), "{got}");
        }
    }

    #[test]
    fn any_bytes_survive_as_a_word() {
        let all: Vec<u8> = (0..=255).collect();
        let word = escape(&all);
        assert_eq!(unescape(&word), Some(all));
        assert!(word.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'='));
        for broken in ["%", "%1", "%+1", "%zz"] {
            assert_eq!(unescape(broken), None, "{broken}");
        }
    }
}
