//! The lines of the epoch log.

use super::json::{self, Fields, Value};

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Head(Head),
    View(ViewLine),
    Step(StepLine),
}

/// The first line: whose log it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// The process's number in all views.
    pub(crate) process: u64,
    /// What decides which algorithms are chosen, as a user would write it.
    pub(crate) settings: String,
}

/// The process has made a communicator of a view.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    pub(crate) steps: Option<u64>,
    /// By rank, the step that the change interrupted; `None` outside of steps. Empty in the job's
    /// first view.
    pub(crate) places: Vec<Option<u64>>,
}

/// A step has ended that a change of view interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepLine {
    pub(crate) step: u64,
    /// The epoch in which it ended.
    pub(crate) epoch: u64,
    /// Whether it was made again; otherwise, it was committed.
    pub(crate) redone: bool,
    /// Over so many ranks its gradients are averages.
    pub(crate) divisor: u64,
    /// The ranks that voted on it, by the numbers of their processes.
    pub(crate) processes: Vec<u64>,
}

const FORMAT: u64 = 1;
const REDONE: &str = "redone";
const COMMITTED: &str = "committed";

impl Line {
    /// The line, without its end.
    pub(crate) fn encode(&self) -> String {
        match self {
            Self::Head(Head { process, settings }) => {
                let settings = json::quoted(settings);
                format!("{{\"epoch_log\":{FORMAT},\"process\":{process},\"settings\":{settings}}}")
            }
            Self::View(view) => {
                let ViewLine { epoch, processes, from, lost, joined, layer, steps, places } = view;
                let [processes, lost, joined] = [processes, lost, joined].map(|it| list(it));
                let places: Vec<String> = places.iter().map(|it| or_null(*it)).collect();
                let (steps, places) = (or_null(*steps), list(&places));
                format!(
                    "{{\"epoch\":{epoch},\"processes\":{processes},\"from\":{from},\
                     \"lost\":{lost},\"joined\":{joined},\"layer\":{layer},\"steps\":{steps},\
                     \"in_steps\":{places}}}"
                )
            }
            Self::Step(StepLine { step, epoch, redone, divisor, processes }) => {
                let ended = if *redone { REDONE } else { COMMITTED };
                let processes = list(processes);
                format!(
                    "{{\"step\":{step},\"epoch\":{epoch},\"ended\":\"{ended}\",\
                     \"divisor\":{divisor},\"processes\":{processes}}}"
                )
            }
        }
    }

    /// The line that the text is.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(text: &str) -> Result<Self, String> {
        let mut fields = Taken(json::object(text)?);
        let line = if fields.has("epoch_log") {
            let format = fields.number("epoch_log")?;
            if format != FORMAT {
                return Err(format!("a log of format {format}, where {FORMAT} is known"));
            }
            let (process, settings) = (fields.number("process")?, fields.text("settings")?);
            Self::Head(Head { process, settings })
        } else if fields.has("step") {
            let ended = fields.text("ended")?;
            if ![REDONE, COMMITTED].contains(&&*ended) {
                return Err(format!("`ended` is `{ended}`, not {REDONE} or {COMMITTED}"));
            }
            Self::Step(StepLine {
                step: fields.number("step")?,
                epoch: fields.number("epoch")?,
                redone: ended == REDONE,
                divisor: fields.number("divisor")?,
                processes: fields.numbers("processes")?,
            })
        } else {
            Self::View(ViewLine {
                epoch: fields.number("epoch")?,
                processes: fields.numbers("processes")?,
                from: fields.number("from")?,
                lost: fields.numbers("lost")?,
                joined: fields.numbers("joined")?,
                layer: fields.number("layer")?,
                steps: fields.number_or_null("steps")?,
                places: fields.numbers_or_null("in_steps")?,
            })
        };
        match fields.0.first() {
            Some((name, _)) => Err(format!("`{name}` is unknown here")),
            None => Ok(line),
        }
    }
}

fn or_null(number: Option<u64>) -> String {
    number.map_or_else(|| "null".to_owned(), |it| it.to_string())
}

fn list(items: &[impl ToString]) -> String {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    format!("[{}]", items.join(","))
}

/// The fields that nobody has taken yet.
struct Taken(Fields);

impl Taken {
    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(known, _)| known == name)
    }

    fn take(&mut self, name: &str) -> Result<Value, String> {
        let at = self.0.iter().position(|(known, _)| known == name);
        let at = at.ok_or_else(|| format!("`{name}` is missing"))?;
        Ok(self.0.remove(at).1)
    }

    fn number(&mut self, name: &str) -> Result<u64, String> {
        let number = self.number_or_null(name)?;
        number.ok_or_else(|| format!("`{name}` is no number"))
    }

    fn number_or_null(&mut self, name: &str) -> Result<Option<u64>, String> {
        match self.take(name)? {
            Value::Number(number) => Ok(Some(number)),
            Value::Null => Ok(None),
            _ => Err(format!("`{name}` is no number")),
        }
    }

    fn text(&mut self, name: &str) -> Result<String, String> {
        match self.take(name)? {
            Value::Text(text) => Ok(text),
            _ => Err(format!("`{name}` is no text")),
        }
    }

    fn numbers(&mut self, name: &str) -> Result<Vec<u64>, String> {
        let numbers = self.numbers_or_null(name)?;
        let numbers: Option<Vec<u64>> = numbers.into_iter().collect();
        numbers.ok_or_else(|| format!("`{name}` is no list of numbers"))
    }

    fn numbers_or_null(&mut self, name: &str) -> Result<Vec<Option<u64>>, String> {
        let wrong = || format!("`{name}` is no list of numbers");
        let Value::List(list) = self.take(name)? else { return Err(wrong()) };
        let number = |value: Value| match value {
            Value::Number(number) => Ok(Some(number)),
            Value::Null => Ok(None),
            _ => Err(wrong()),
        };
        list.into_iter().map(number).collect()
    }
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
            ("redone", "maybe", "`ended` is `maybe`, not redone or committed"),
            ("[1]", "[null]", "`processes` is no list of numbers"),
            ("[1]", "1", "`processes` is no list of numbers"),
            ("3", "\"3\"", "`divisor` is no number"),
            ("\"divisor\"", "\"quotient\"", "`divisor` is missing"),
            ("{", "{\"more\":1,", "`more` is unknown here"),
        ] {
            let text = step.replace(what, by);
            assert_eq!(Line::decode(&text), Err(why.to_owned()), "{text}");
        }
        let head = "{\"epoch_log\":2,\"process\":0,\"settings\":\"\"}";
        let why = "a log of format 2, where 1 is known".to_owned();
        assert_eq!(Line::decode(head), Err(why));
        assert_eq!(Line::decode("{}"), Err("`epoch` is missing".to_owned()));
    }
}
