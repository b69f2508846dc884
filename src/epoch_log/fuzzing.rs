//! What must hold of epoch logs, whatever is in them.

use unisum_link::fuzzing::Target;

use super::{Head, History, Line, Moment, StepLine, ViewLine};

pub(crate) const TARGETS: &[Target] = &[
    Target { name: "epoch_log_line", check: check_line, seeds: line_seeds },
    Target { name: "epoch_logs", check: check_logs, seeds: logs_seeds },
];

/// A line that is accepted says the same when it is written again.
fn check_line(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let Ok(line) = Line::decode(&text) else { return };
    assert_eq!(Line::decode(&line.encode()), Ok(line));
}

/// Logs that are accepted, which are told apart by an empty byte, tell every process of a view
/// which of its changes is next, and of none what it takes no part in.
fn check_logs(bytes: &[u8]) {
    let files = bytes.split(|it| *it == 0).enumerate();
    let files: Vec<_> = files.map(|(at, it)| (at.to_string(), it.to_vec())).collect();
    let Ok(history) = History::of(&files) else { return };
    assert!(!history.founders().is_empty());
    let (mut epoch, mut processes) = (1, history.founders().to_vec());
    while let Some(next) = history.next(epoch) {
        assert!(next.epoch > epoch && next.before == processes);
        assert!(!next.is_between() || next.lost_ranks().is_empty());
        for &process in &next.before {
            let _ = history.is_due((epoch, 1), process, Moment::Before(u64::MAX));
            let _ = history.is_due((epoch, 1), process, Moment::After(u64::MAX - 1));
        }
        assert!(next.joined().all(|it| history.entrance(it) == Some(next)));
        (epoch, processes) = (next.epoch, next.processes.clone());
    }
}

fn lines() -> [Line; 4] {
    let first = ViewLine { epoch: 1, processes: vec![0, 1, 2], ..ViewLine::default() };
    let second = ViewLine {
        epoch: 2,
        processes: vec![0, 2],
        from: 1,
        lost: vec![1],
        joined: vec![],
        layer: 1,
        steps: Some(17),
        places: vec![Some(17), Some(16)],
    };
    let step = StepLine { step: 17, epoch: 2, redone: true, divisor: 2, processes: vec![0, 2] };
    let head = Head { process: 0, settings: "UNISUM_REPRODUCIBLE=1".into() };
    [Line::Head(head), Line::View(first), Line::View(second), Line::Step(step)]
}

fn line_seeds() -> Vec<Vec<u8>> {
    lines().iter().map(|line| line.encode().into_bytes()).collect()
}

fn logs_seeds() -> Vec<Vec<u8>> {
    let log: String = lines().iter().map(|line| line.encode() + "\n").collect();
    let other = log.replace("\"process\":0", "\"process\":2");
    vec![log.clone().into_bytes(), format!("{log}\0{other}").into_bytes()]
}
