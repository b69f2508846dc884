//! The lines of the epoch log: each an object of JSON.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum Line {
    Head(Head),
    View(ViewLine),
    Step(StepLine),
}

/// The first line: whose log it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "HeadLine", into = "HeadLine")]
pub(crate) struct Head {
    /// The process's number in all views.
    pub(crate) process: u64,
    /// What decides which algorithms are chosen, as a user would write it.
    pub(crate) settings: String,
}

/// The process has made a communicator of a view.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ViewLine {
    pub(crate) epoch: u64,
    /// By rank.
    pub(crate) processes: Vec<u64>,
    /// The epoch that the process was in before; 0 for its first.
    pub(crate) from: u64,
    /// Who was there and is not any more, and who is new, as that process saw it.
    pub(crate) lost: Vec<u64>,
    pub(crate) joined: Vec<u64>,
    /// So many layers of gradient buckets were made in the epoch before. The last one counts.
    pub(crate) layer: u64,
    /// So many of its steps were decided, if that is known.
    // Named, it may be null, but not missing.
    #[serde(deserialize_with = "Option::deserialize")]
    pub(crate) steps: Option<u64>,
    /// By rank, the step that the change interrupted; `None` outside of steps. Empty in the job's
    /// first view.
    #[serde(rename = "in_steps")]
    pub(crate) places: Vec<Option<u64>>,
}

/// A step has ended that a change of view interrupted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StepLine {
    pub(crate) step: u64,
    /// The epoch in which it ended.
    pub(crate) epoch: u64,
    /// Whether it was made again; otherwise, it was committed.
    #[serde(rename = "ended", serialize_with = "write_ended", deserialize_with = "read_ended")]
    pub(crate) redone: bool,
    /// Over so many ranks its gradients are averages.
    pub(crate) divisor: u64,
    /// The ranks that voted on it, by the numbers of their processes.
    pub(crate) processes: Vec<u64>,
}

const FORMAT: u64 = 1;

/// A head as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeadLine {
    epoch_log: u64,
    process: u64,
    settings: String,
}

impl From<Head> for HeadLine {
    fn from(Head { process, settings }: Head) -> Self {
        Self { epoch_log: FORMAT, process, settings }
    }
}

impl From<HeadLine> for Head {
    fn from(HeadLine { process, settings, .. }: HeadLine) -> Self {
        Self { process, settings }
    }
}

/// How a step ended, as it is written.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Ended {
    Redone,
    Committed,
}

fn write_ended<S: Serializer>(redone: &bool, to: S) -> Result<S::Ok, S::Error> {
    if *redone { Ended::Redone } else { Ended::Committed }.serialize(to)
}

fn read_ended<'a, D: Deserializer<'a>>(from: D) -> Result<bool, D::Error> {
    Ended::deserialize(from).map(|ended| matches!(ended, Ended::Redone))
}

impl Line {
    /// The line, without its end.
    pub(crate) fn encode(&self) -> String {
        serde_json::to_string(self).expect("numbers, texts and lists of them")
    }

    /// The line that the text is.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(text: &str) -> Result<Self, String> {
        let fields: Map<String, Value> = parsed(text)?;
        match fields.get("epoch_log") {
            Some(format) if *format != FORMAT => {
                Err(format!("a log of format {format}, where {FORMAT} is known"))
            }
            Some(_) => parsed(text).map(Self::Head),
            None if fields.contains_key("step") => parsed(text).map(Self::Step),
            None => parsed(text).map(Self::View),
        }
    }
}

/// What a line of JSON says.
///
/// # Errors
/// What is wrong with it, and where in the line: which one it is, the caller knows.
fn parsed<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| {
        let (why, column) = (error.to_string(), error.column());
        let place = format!(" at line {} column {column}", error.line());
        let why = why.strip_suffix(&place).unwrap_or(&why);
        format!("{why} at column {column}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_survive_being_written() {
        let head = Head { process: 7, settings: "UNISUM_TRANSPORT=\"own\"".into() };
        let view = ViewLine {
            epoch: 4,
            processes: vec![0, 3, 1 << 31],
            from: 2,
            lost: vec![1, 2],
            joined: vec![1 << 31],
            layer: 1,
            steps: Some(17),
            places: vec![Some(16), None, Some(17)],
        };
        let step =
            StepLine { step: 17, epoch: 4, redone: true, divisor: 3, processes: vec![0, 3, 5] };
        let first = ViewLine { epoch: 1, processes: vec![0], ..ViewLine::default() };
        let committed = StepLine { redone: false, ..step.clone() };
        for line in [
            Line::Head(head),
            Line::View(view),
            Line::View(first),
            Line::Step(step),
            Line::Step(committed),
        ] {
            let text = line.encode();
            assert_eq!(Line::decode(&text), Ok(line), "{text}");
        }
    }

    #[test]
    fn lines_are_what_the_documentation_shows() {
        let page = include_str!("../../docs/elastic.md");
        let shown: Vec<&str> = page.lines().filter(|it| it.starts_with("{\"")).collect();
        assert_eq!(shown.len(), 4, "{shown:?}");
        for line in shown {
            assert_eq!(Line::decode(line).map(|it| it.encode()).as_deref(), Ok(line));
        }
    }

    #[test]
    fn what_is_no_line_is_refused() {
        let step = "{\"step\":1,\"epoch\":2,\"ended\":\"redone\",\"divisor\":3,\"processes\":[1]}";
        assert!(Line::decode(step).is_ok());
        for (what, by, why) in [
            (
                "redone",
                "maybe",
                "unknown variant `maybe`, expected `redone` or `committed` at column 35",
            ),
            ("[1]", "[null]", "invalid type: null, expected u64 at column 66"),
            ("[1]", "1", "invalid type: integer `1`, expected a sequence at column 62"),
            ("3", "\"3\"", "invalid type: string \"3\", expected u64 at column 50"),
            ("3", "-3", "invalid value: integer `-3`, expected u64 at column 49"),
            (
                "\"divisor\"",
                "\"quotient\"",
                "unknown field `quotient`, expected one of `step`, `epoch`, `ended`, `divisor`, \
                 `processes` at column 47",
            ),
            (",\"divisor\":3", "", "missing field `divisor` at column 53"),
            ("\"divisor\"", "\"epoch\":3,\"divisor\"", "duplicate field `epoch` at column 44"),
        ] {
            let text = step.replace(what, by);
            assert_eq!(Line::decode(&text), Err(why.to_owned()), "{text}");
        }
        let head = "{\"epoch_log\":2,\"process\":0,\"settings\":\"\"}";
        let why = "a log of format 2, where 1 is known".to_owned();
        assert_eq!(Line::decode(head), Err(why));
        assert_eq!(Line::decode("{}"), Err("missing field `epoch` at column 2".to_owned()));
    }
}
