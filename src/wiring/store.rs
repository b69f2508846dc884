//! Rendezvous through a key-value store of the program: rank 0 writes one key, the others read it.
//!
//! The value is one line: `unisum-store1 at TOKEN ADDRESS…` once rank 0 listens (the token is `-`
//! if rank 0 has one that must not be published), `unisum-store1 failed WHY` if it could not, and
//! `unisum-store1 over` once all ranks have read it, so that a later start with the same store does
//! not take it for its own.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use unisum_kernels::Panic;

use crate::{Error, ErrorKind};
use unisum_control::elastic::Record;
use unisum_control::interface::{ADDRESSES_MAX, without_scope};
use unisum_control::launcher::Token;
use unisum_link::warning::legible;

/// A key-value store that all ranks of a job can access, for
/// [`Builder::store`](crate::Builder::store): the store of a launcher or of a framework, such as
/// torch's `TCPStore`.
///
/// [`Builder::connect`](crate::Builder::connect) and [`Builder::join`](crate::Builder::join) call
/// both methods, on the thread that calls them. An elastic job, which keeps its members record
/// there, also calls them later, from any thread, when its view changes and when it ends. Values
/// are short texts. One of them is the job's secret token, so whoever can read the store can join
/// the job.
pub trait Store: Send + Sync {
    /// Stores `value` under `key`, replacing an earlier value.
    ///
    /// # Errors
    /// The reason, as text.
    fn set(&self, key: &str, value: &[u8]) -> Result<(), String>;

    /// Returns the value under `key`. Blocks until there is one, for at most `timeout`.
    ///
    /// # Errors
    /// The reason, as text, including that the time is up.
    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, String>;
}

/// The key of a store by which the ranks of a job find each other.
#[derive(Clone)]
pub(crate) struct StoreEntry {
    store: Arc<dyn Store>,
    key: String,
}

/// What rank 0 wrote.
#[derive(Debug)]
pub(crate) struct Published {
    /// The job's token, unless rank 0 keeps its own to itself.
    pub(crate) token: Option<Token>,
    /// Where rank 0 listens, the best address first.
    pub(crate) addresses: Vec<SocketAddr>,
}

/// A value, as it was written.
#[derive(Debug)]
enum Value {
    At(Published),
    Failed(String),
    Over,
}

const MAGIC: &str = "unisum-store1";
/// In place of a token that is not told.
const NO_TOKEN: &str = "-";
/// How long it may stay written that rank 0 failed before that is final: it may be of an earlier
/// start.
const FAILED_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two looks at a value that an earlier start left.
const PAUSE: Duration = Duration::from_millis(20);

impl StoreEntry {
    pub(crate) fn new(store: Arc<dyn Store>, key: &str) -> Self {
        Self { store, key: key.to_owned() }
    }

    /// Says where rank 0 listens, and the job's token if the others are to take it from here.
    ///
    /// # Errors
    /// The store's words.
    pub(crate) fn publish(
        &self,
        token: Option<&Token>,
        addresses: &[SocketAddr],
    ) -> Result<(), String> {
        let mut line = format!("{MAGIC} at {}", token.map_or(NO_TOKEN, Token::secret));
        addresses.iter().for_each(|&it| line.push_str(&format!(" {}", without_scope(it))));
        self.set(&line)
    }

    /// The entry of the members record.
    pub(crate) fn of_members(&self) -> Self {
        Self { store: self.store.clone(), key: format!("{}.members", self.key) }
    }

    /// Writes the members record, and the job's token if others are to take it from here; what was
    /// written.
    ///
    /// # Errors
    /// The store's words.
    pub(crate) fn publish_record(
        &self,
        token: Option<&Token>,
        record: &Record,
    ) -> Result<String, String> {
        let token = token.map_or(NO_TOKEN, Token::secret);
        let written = format!("{MAGIC} members {token}\n{}", record.encode().trim_end());
        self.set(&written)?;
        Ok(written)
    }

    /// Says that the job of a members record has ended, unless another one has been written
    /// meanwhile.
    pub(crate) fn retract(&self, written: &str, timeout: Duration) {
        if self.get(timeout).is_ok_and(|now| now.trim_ascii_end() == written.as_bytes()) {
            self.close();
        }
    }

    /// The members record, and the job's token if it is there. Blocks as the store does, for
    /// `timeout` at most if it keeps to it.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn look_up_record(
        &self,
        timeout: Duration,
    ) -> Result<(Option<Token>, Record), String> {
        let doing = self.doing("reading");
        let bytes = self.get(timeout).map_err(|why| format!("{doing}: {why}"))?;
        let text = std::str::from_utf8(&bytes).unwrap_or_default();
        let (head, record) = text.split_once('\n').unwrap_or_default();
        if head == format!("{MAGIC} over") {
            return Err(format!("{doing}: the job that it names has ended"));
        }
        let token = match head.strip_prefix(&format!("{MAGIC} members ")) {
            Some(NO_TOKEN) => None,
            Some(token) => Some(Token::told(token).map_err(|why| format!("{doing}: {why}"))?),
            None => return Err(format!("{doing}: it is not what an elastic job writes")),
        };
        let record = Record::decode(record).map_err(|why| format!("{doing}: {why}"))?;
        Ok((token, record))
    }

    /// Says that rank 0 could not start, so that nobody waits for it.
    pub(crate) fn fail(&self, why: &str) {
        self.tell(&format!("{MAGIC} failed {}", why.replace('\n', " ")));
    }

    /// Says that nobody is to join any more by what was published.
    pub(crate) fn close(&self) {
        self.tell(&format!("{MAGIC} over"));
    }

    /// Writes what others can do without.
    fn tell(&self, line: &str) {
        if let Err(why) = self.set(line) {
            unisum_link::warning!("{}: {why}", self.doing("writing"));
        }
    }

    fn set(&self, line: &str) -> Result<(), String> {
        let set = || self.store.set(&self.key, format!("{line}\n").as_bytes());
        Panic::catch(set).unwrap_or_else(|panic| Err(format!("it panicked: {}", panic.text())))
    }

    fn get(&self, timeout: Duration) -> Result<Vec<u8>, String> {
        let get = || self.store.get(&self.key, timeout);
        Panic::catch(get).unwrap_or_else(|panic| Err(format!("it panicked: {}", panic.text())))
    }

    /// What rank 0 wrote. Blocks until it has, `timeout` at most if the store keeps to it.
    ///
    /// # Errors
    /// [`ErrorKind::Rendezvous`]: the store's words, a value that rank 0 did not write, or why rank
    /// 0 could not start.
    pub(crate) fn look_up(&self, timeout: Duration) -> Result<Published, Error> {
        let until = Instant::now() + timeout;
        let mut failed_since = None;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let bytes = self.get(left).map_err(|why| {
                let within = timeout.as_secs_f64();
                let is_late = Instant::now() >= until;
                let when = if is_late { ": has rank 0 started?" } else { "" };
                let doing = self.doing("reading");
                let failed = self.failed(format!("{doing}, within {within} s: {why}{when}"));
                if is_late { failed.of_absent() } else { failed }
            })?;
            match self.parse(&bytes)? {
                Value::At(published) => return Ok(published),
                Value::Failed(why) if is_final(&mut failed_since, until) => {
                    return Err(self.failed(format!("rank 0 could not start: {why}")));
                }
                Value::Over if Instant::now() >= until => {
                    let text = "it is still that of an earlier start that is over: rank 0 has \
                                written none for this one";
                    return Err(self.failed(format!("{}: {text}", self.doing("reading"))));
                }
                Value::Over | Value::Failed(_) => thread::sleep(PAUSE),
            }
        }
    }

    fn parse(&self, bytes: &[u8]) -> Result<Value, Error> {
        let text = std::str::from_utf8(bytes).unwrap_or_default();
        parse(text).ok_or_else(|| {
            let is_ours = text.starts_with("unisum-store") && !text.starts_with(MAGIC);
            let what = match is_ours {
                true => "another version of unisum has written it".to_owned(),
                false => format!(
                    "its {} bytes are not what rank 0 writes: another program uses the key, or \
                     the store returns something else than was stored",
                    bytes.len()
                ),
            };
            self.failed(format!("{}: {what}", self.doing("reading")))
        })
    }

    fn doing(&self, what: &str) -> String {
        format!("{what} `{}` in the store", self.key)
    }

    fn failed(&self, text: String) -> Error {
        Error::new(ErrorKind::Rendezvous, text).caused_by(vec![0])
    }
}

impl fmt::Debug for StoreEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreEntry").field("key", &self.key).finish_non_exhaustive()
    }
}

/// Whether a failure that was seen first at `since` is that of this start.
fn is_final(since: &mut Option<Instant>, until: Instant) -> bool {
    let now = Instant::now();
    now >= until || now - *since.get_or_insert(now) >= FAILED_TIMEOUT
}

fn parse(text: &str) -> Option<Value> {
    let rest = text.strip_suffix('\n').filter(|line| !line.contains('\n'))?;
    let rest = rest.strip_prefix(MAGIC)?.strip_prefix(' ')?;
    if rest == "over" {
        return Some(Value::Over);
    }
    if let Some(why) = rest.strip_prefix("failed ") {
        // Whoever can write there may have written it.
        return Some(Value::Failed(legible(why).into_owned()));
    }
    let mut words = rest.strip_prefix("at ")?.split(' ');
    let token = match words.next()? {
        NO_TOKEN => None,
        token => Some(Token::told(token).ok()?),
    };
    let addresses: Vec<SocketAddr> = words.map(|word| word.parse().ok()).collect::<Option<_>>()?;
    let is_known = (1..=ADDRESSES_MAX).contains(&addresses.len());
    is_known.then_some(Value::At(Published { token, addresses }))
}

/// For the fuzz targets: how many addresses a value has, `Some(1)` also if it says something else;
/// `None` if it says nothing.
#[cfg(any(test, fuzzing))]
pub(super) fn addresses_in(text: &str) -> Option<usize> {
    parse(text).map(|value| match value {
        Value::At(published) => published.addresses.len(),
        Value::Failed(_) | Value::Over => 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::sync::Mutex;

    /// Answers at once, whatever the time-out.
    #[derive(Default)]
    struct Memory(Mutex<HashMap<String, Vec<u8>>>);

    impl Store for Memory {
        fn set(&self, key: &str, value: &[u8]) -> Result<(), String> {
            assert_ne!(key, "panics", "this panic is part of a test");
            self.0.lock().unwrap().insert(key.to_owned(), value.to_owned());
            Ok(())
        }

        fn get(&self, key: &str, _: Duration) -> Result<Vec<u8>, String> {
            self.0.lock().unwrap().get(key).cloned().ok_or_else(|| format!("no {key} there"))
        }
    }

    const SOON: Duration = Duration::from_millis(50);

    fn entry(key: &str) -> (Arc<Memory>, StoreEntry) {
        let store = Arc::new(Memory::default());
        (store.clone(), StoreEntry::new(store, key))
    }

    #[test]
    fn what_is_published_is_looked_up() {
        let (_, entry) = entry("key");
        let told: Vec<SocketAddr> =
            ["10.0.0.1:4000", "[fe80::1%3]:4000"].map(|text| text.parse().unwrap()).into();
        let token = Token::told("0123456789abcdef0123456789abcdef").unwrap();
        for token in [Some(&token), None] {
            entry.publish(token, &told).unwrap();
            let found = entry.look_up(SOON).unwrap();
            assert_eq!(found.token.as_ref().map(Token::as_bytes), token.map(Token::as_bytes));
            // The number of an interface is the writer's.
            let expected = [told[0], "[fe80::1]:4000".parse().unwrap()];
            assert_eq!(found.addresses, expected);
        }
    }

    #[test]
    fn what_is_over_is_waited_out_and_a_failed_start_is_told() {
        let (store, entry) = entry("key");
        entry.close();
        let error = entry.look_up(SOON).unwrap_err().to_string();
        assert!(error.contains("earlier start"), "{error}");
        let later = entry.clone();
        let writer = thread::spawn(move || {
            thread::sleep(SOON);
            later.publish(None, &["127.0.0.1:1".parse().unwrap()]).unwrap();
        });
        entry.look_up(Duration::from_secs(60)).unwrap();
        writer.join().unwrap();
        entry.fail("no\nport");
        let error = entry.look_up(SOON).unwrap_err().to_string();
        assert!(error.contains("rank 0 could not start: no port"), "{error}");
        store.set("key", format!("{MAGIC} failed \u{1b}[2Jfor\rged\n").as_bytes()).unwrap();
        let error = entry.look_up(SOON).unwrap_err().to_string();
        assert!(error.contains("could not start: \\u{1b}[2Jfor\\rged"), "{error:?}");
    }

    #[test]
    fn what_rank_0_did_not_write_is_a_clear_error() {
        let (store, entry) = entry("key");
        let error = entry.look_up(SOON).unwrap_err();
        assert!(error.to_string().contains("reading `key` in the store"), "{error}");
        assert!(error.to_string().contains("no key there"), "{error}");
        assert_eq!((error.kind(), error.failed_ranks()), (ErrorKind::Rendezvous, &[0][..]));
        for (value, why) in [
            (&b""[..], "its 0 bytes are not"),
            (b"\xff\xfe", "its 2 bytes are not"),
            (b"unisum-store1 at -\n", "are not"),
            (b"unisum-store1 at - 127.0.0.1:1", "are not"),
            (b"unisum-store1 at short 127.0.0.1:1\n", "are not"),
            (b"unisum-store1 at - 127.0.0.1\n", "are not"),
            (b"unisum-store1 overs\n", "are not"),
            (b"unisum-store1 failed so\nunisum-store1 over\n", "are not"),
            (b"unisum-store2 at - 127.0.0.1:1\n", "another version"),
        ] {
            store.set("key", value).unwrap();
            let error = entry.look_up(SOON).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_store_that_panics_is_an_error() {
        let (_, entry) = entry("panics");
        let error = entry.publish(None, &["127.0.0.1:1".parse().unwrap()]).unwrap_err();
        assert!(error.contains("it panicked: ") && error.contains("part of a test"), "{error}");
    }
}
