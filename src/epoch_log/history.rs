//! What a job has done, as its processes have logged it, for a job that repeats it.
//!
//! A change of view that interrupted a step has one place in the sequence of a layer's collectives:
//! behind those of the last step that any rank saw decided. Ranks that had not seen that still were
//! in this step, which then committed; the others were in the next one, which was made again. What
//! was reduced before the change left no trace. So whoever repeats it changes the view there.

use std::collections::BTreeMap;
use std::path::Path;

use super::EXTENSION;
use super::line::{Head, Line, ViewLine};

/// The changes of view of a job, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct History {
    settings: String,
    founders: Vec<u64>,
    changes: Vec<Change>,
}

/// A change of view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) epoch: u64,
    pub(crate) processes: Vec<u64>,
    /// The view before, and who was in it.
    pub(crate) from: u64,
    pub(crate) before: Vec<u64>,
    /// The layer of the epoch before whose steps are counted, if it is known.
    layer: Option<u64>,
    steps: Option<u64>,
    places: Vec<Option<u64>>,
}

/// Where a process is as it asks what is to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Before the first collective of this step.
    Before(u64),
    /// Behind its last one.
    After(u64),
}

impl Change {
    /// Whether it interrupted no step.
    pub(crate) fn is_between(&self) -> bool {
        self.places.iter().all(Option::is_none)
    }

    /// The step that it interrupted on a process.
    pub(crate) fn place(&self, process: u64) -> Option<u64> {
        let rank = self.processes.iter().position(|it| *it == process)?;
        self.places[rank]
    }

    /// The newcomers.
    pub(crate) fn joined(&self) -> impl Iterator<Item = u64> {
        self.processes.iter().copied().filter(|it| !self.before.contains(it))
    }

    /// The ranks of the view before that are lost.
    pub(crate) fn lost_ranks(&self) -> Vec<usize> {
        let before = self.before.iter().enumerate();
        before.filter(|(_, it)| !self.processes.contains(it)).map(|(rank, _)| rank).collect()
    }
}

impl History {
    /// Reads the logs of a folder.
    ///
    /// # Errors
    /// If they can't be read, contradict each other, or tell of what can't be repeated.
    pub(crate) fn read(folder: &Path) -> Result<Self, String> {
        let failed = |error| format!("reading epoch logs in {}: {error}", folder.display());
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|it| it == EXTENSION) {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                files.push((name, std::fs::read(&path).map_err(failed)?));
            }
        }
        files.sort();
        Self::of(&files).map_err(|why| format!("the epoch logs in {}: {why}", folder.display()))
    }

    /// What these files, with their names, tell.
    ///
    /// # Errors
    /// As [`History::read`].
    pub(crate) fn of(files: &[(String, Vec<u8>)]) -> Result<Self, String> {
        let mut heads: Vec<(String, Head)> = Vec::new();
        let mut views: BTreeMap<u64, (String, ViewLine)> = BTreeMap::new();
        for (name, bytes) in files {
            let Some((head, lines)) = parse(name, bytes)? else { continue };
            if let Some((other, first)) = heads.first()
                && first.settings != head.settings
            {
                return Err(format!(
                    "{other} is of a job with {}, {name} of one with {}",
                    first.settings, head.settings
                ));
            }
            if let Some((other, _)) = heads.iter().find(|(_, it)| it.process == head.process) {
                return Err(format!("{other} and {name} are both of process {}", head.process));
            }
            heads.push((name.clone(), head));
            for (place, line) in lines {
                merge(&mut views, place, line)?;
            }
        }
        let settings = heads.first().map(|(_, it)| it.settings.clone());
        let settings = settings.ok_or("there are none, or none that says whose it is")?;
        let mut views = views.into_values();
        let (place, first) = views.next().ok_or("they tell of no view")?;
        if first.epoch != 1 || !first.places.is_empty() {
            return Err(format!("{place} tells of the first view there is, which is not epoch 1"));
        }
        Ok(Self { settings, changes: changes(&first, views)?, founders: first.processes })
    }

    /// What decided which algorithms were chosen.
    pub(crate) fn settings(&self) -> &str {
        &self.settings
    }

    /// The processes of the first view.
    pub(crate) fn founders(&self) -> &[u64] {
        &self.founders
    }

    /// The change that ends an epoch.
    pub(crate) fn next(&self, epoch: u64) -> Option<&Change> {
        self.changes.iter().find(|it| it.epoch > epoch)
    }

    /// The change with which a process entered the job.
    pub(crate) fn entrance(&self, process: u64) -> Option<&Change> {
        self.changes.iter().find(|it| it.joined().any(|joined| joined == process))
    }

    /// Whether a process changes the view at this moment, with the `layer`th layer of the epoch.
    ///
    /// # Errors
    /// If it has missed a change.
    pub(crate) fn is_due(
        &self,
        (epoch, layer): (u64, u64),
        process: u64,
        moment: Moment,
    ) -> Result<bool, String> {
        let Some((next, steps)) = self.next_of(epoch, layer) else { return Ok(false) };
        match moment {
            Moment::Before(step) if step > steps || step == steps && next.is_between() => {
                let (epoch, process) = (next.epoch, process);
                Err(format!(
                    "epoch {epoch} began after {steps} steps there, and process {process} begins \
                     another one"
                ))
            }
            Moment::Before(step) => {
                let ends = !next.processes.contains(&process);
                Ok(step == steps && (ends || next.place(process) == Some(steps)))
            }
            Moment::After(step) => Ok(step + 1 == steps && next.place(process) == Some(step)),
        }
    }

    /// Whether the program let newcomers in, or made another view, behind this step.
    pub(crate) fn turns_after(&self, (epoch, layer): (u64, u64), step: u64) -> bool {
        let next = self.next_of(epoch, layer);
        next.is_some_and(|(next, steps)| next.is_between() && steps == step + 1)
    }

    fn next_of(&self, epoch: u64, layer: u64) -> Option<(&Change, u64)> {
        let next = self.next(epoch).filter(|it| it.layer == Some(layer))?;
        Some((next, next.steps?))
    }
}

/// With the file and the line that it is from.
type Placed<T> = (String, T);
/// Whose log a file is, and the views that it tells of.
type Told = (Head, Vec<Placed<ViewLine>>);

/// The head, and the views that a file tells of. `None` if its process got no further than the
/// head.
fn parse(name: &str, bytes: &[u8]) -> Result<Option<Told>, String> {
    // A process that was killed may have left a last line without an end.
    let whole = bytes.iter().rposition(|it| *it == b'\n').unwrap_or(0);
    let mut head = None;
    let mut views: Vec<Placed<ViewLine>> = Vec::new();
    for (number, line) in bytes[..whole].split(|it| *it == b'\n').enumerate() {
        let place = format!("{name}, line {}", number + 1);
        if line.is_empty() && whole == 0 {
            return Ok(None);
        }
        let text = std::str::from_utf8(line).map_err(|error| format!("{place}: {error}"))?;
        match (Line::decode(text).map_err(|why| format!("{place}: {why}"))?, &head) {
            (Line::Head(it), None) => head = Some(it),
            (Line::Head(_), Some(_)) => return Err(format!("{place}: another log begins here")),
            (_, None) => return Err(format!("{place}: it does not say whose log this is")),
            (Line::Step(_), Some(_)) => {}
            (Line::View(view), Some(head)) => {
                let before = views.last().map(|(_, it)| it);
                check(&view, head.process, before).map_err(|why| format!("{place}: {why}"))?;
                views.push((place, view));
            }
        }
    }
    Ok(head.map(|head| (head, views)))
}

/// What a view has to be that a process writes behind another one.
fn check(view: &ViewLine, own: u64, before: Option<&ViewLine>) -> Result<(), String> {
    let ViewLine { epoch, processes, from, steps, places, .. } = view;
    let last = before.map_or(0, |it| it.epoch);
    if *from != last || *epoch <= last {
        return Err(format!("epoch {epoch} from epoch {from}, behind epoch {last}"));
    }
    if !processes.contains(&own) {
        return Err(format!("process {own} is not in its own epoch {epoch}"));
    }
    let mut sorted = processes.clone();
    sorted.sort_unstable();
    if sorted.windows(2).any(|it| it[0] == it[1]) {
        return Err(format!("epoch {epoch} has a process twice"));
    }
    let is_first = *epoch == 1;
    if places.len() != if is_first { 0 } else { processes.len() } {
        return Err(format!("epoch {epoch} tells where {} processes were", places.len()));
    }
    let fits = |place: u64| {
        steps.is_some_and(|it| place == it || place.checked_add(1).is_some_and(|next| next == it))
    };
    if let Some(place) = places.iter().flatten().find(|it| !fits(**it)) {
        return Err(format!(
            "a process was in step {place}, of {} that were decided",
            told(*steps)
        ));
    }
    let Some(before) = before else { return Ok(()) };
    let without = |all: &[u64], others: &[u64]| -> Vec<u64> {
        all.iter().copied().filter(|it| !others.contains(it)).collect()
    };
    if view.lost != without(&before.processes, processes)
        || view.joined != without(processes, &before.processes)
    {
        return Err(format!("epoch {epoch} is not what its `lost` and `joined` say"));
    }
    Ok(())
}

fn told(steps: Option<u64>) -> String {
    steps.map_or_else(|| "an unknown number".to_owned(), |it| it.to_string())
}

/// What several processes tell of a view has to be the same.
fn merge(
    views: &mut BTreeMap<u64, Placed<ViewLine>>,
    place: String,
    view: ViewLine,
) -> Result<(), String> {
    let epoch = view.epoch;
    let Some((other, known)) = views.get_mut(&epoch) else {
        views.insert(epoch, (place, view));
        return Ok(());
    };
    let is_same = (&known.processes, known.steps, &known.places)
        == (&view.processes, view.steps, &view.places);
    if !is_same || known.from == view.from && known.layer != view.layer {
        return Err(format!("{other} and {place} tell of two different epochs {epoch}"));
    }
    // Whoever was in a later view before knows its layers.
    if view.from > known.from {
        (*other, *known) = (place, view);
    }
    Ok(())
}

/// The changes that a job can repeat: views that no program has seen are left out.
fn changes(
    first: &ViewLine,
    views: impl Iterator<Item = Placed<ViewLine>>,
) -> Result<Vec<Change>, String> {
    let mut changes: Vec<Change> = Vec::new();
    let (mut before, mut since) = (first.processes.clone(), first.epoch);
    let (mut lost, mut passing): (Vec<u64>, Option<ViewLine>) = (Vec::new(), None);
    for (place, view) in views {
        let are_in_steps = view.places.iter().flatten().count();
        if are_in_steps > 0 && are_in_steps < view.places.len() {
            // All meet in the program, in the next view.
            if view.places.iter().any(|it| it.is_some() && *it == view.steps) {
                return Err(format!("{place}: {OUTSIDE}"));
            }
            passing.get_or_insert(view);
            continue;
        }
        let stay: Vec<u64> =
            before.iter().copied().filter(|it| view.processes.contains(it)).collect();
        let (old, new) = view.processes.split_at(stay.len().min(view.processes.len()));
        if old != stay || new.iter().any(|it| lost.contains(it)) {
            return Err(format!("{place}: epoch {} can't follow {since}", view.epoch));
        }
        if are_in_steps == 0 && stay.len() < before.len() {
            return Err(format!("{place}: {OUTSIDE}"));
        }
        let left = passing.take().unwrap_or_else(|| view.clone());
        // Steps go on in the layer that they were in.
        let layer = match left.from == since {
            true => Some(left.layer),
            false => (are_in_steps > 0).then_some(0),
        };
        lost.extend(before.iter().filter(|it| !view.processes.contains(it)));
        changes.push(Change {
            epoch: view.epoch,
            from: std::mem::replace(&mut since, view.epoch),
            processes: view.processes.clone(),
            before: std::mem::replace(&mut before, view.processes),
            layer,
            steps: view.steps,
            places: view.places,
        });
    }
    Ok(changes)
}

const OUTSIDE: &str = "a rank was lost, or a view left, outside of steps of gradient buckets, \
    which can't be repeated";

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "{\"epoch_log\":1,\"process\":0,\"settings\":\"s\"}\n";

    /// The log of a process, which is what begins it and these views.
    fn log(process: u64, views: &[ViewLine]) -> (String, Vec<u8>) {
        let head = Line::Head(Head { process, settings: "s".into() });
        let lines = std::iter::once(head).chain(views.iter().cloned().map(Line::View));
        let text: String = lines.map(|it| it.encode() + "\n").collect();
        (format!("{process}.jsonl"), text.into_bytes())
    }

    fn first(world: u64) -> ViewLine {
        ViewLine { epoch: 1, processes: (0..world).collect(), ..ViewLine::default() }
    }

    /// The view behind `before`, with these processes and places.
    fn next(before: &ViewLine, epoch: u64, places: &[(u64, Option<u64>)]) -> ViewLine {
        let processes: Vec<u64> = places.iter().map(|it| it.0).collect();
        let without = |all: &[u64], others: &[u64]| {
            all.iter().copied().filter(|it| !others.contains(it)).collect::<Vec<u64>>()
        };
        ViewLine {
            epoch,
            from: before.epoch,
            lost: without(&before.processes, &processes),
            joined: without(&processes, &before.processes),
            layer: 1,
            steps: Some(17),
            places: places.iter().map(|it| it.1).collect(),
            processes,
        }
    }

    fn refusal(files: &[(String, Vec<u8>)]) -> String {
        History::of(files).unwrap_err()
    }

    #[test]
    fn every_process_knows_where_it_changes_the_view() {
        let one = first(4);
        let two = next(&one, 2, &[(0, Some(17)), (2, Some(16)), (3, Some(17))]);
        let files =
            [log(0, &[one.clone(), two]), log(1, std::slice::from_ref(&one)), log(3, &[one])];
        let history = History::of(&files).unwrap();
        assert_eq!((history.settings(), history.founders()), ("s", &[0, 1, 2, 3][..]));
        assert_eq!(history.next(1).unwrap().lost_ranks(), [1]);
        assert_eq!(history.next(2), None);
        for (process, due) in [
            (0, Moment::Before(17)),
            (1, Moment::Before(17)),
            (2, Moment::After(16)),
            (3, Moment::Before(17)),
        ] {
            for moment in
                [15, 16, 17].into_iter().flat_map(|it| [Moment::Before(it), Moment::After(it)])
            {
                let is_due = history.is_due((1, 1), process, moment);
                assert_eq!(is_due, Ok(moment == due), "process {process}, {moment:?}");
                assert_eq!(history.is_due((1, 2), process, moment), Ok(false), "another layer");
                assert_eq!(history.is_due((2, 0), process, moment), Ok(false), "the last epoch");
            }
            assert!(history.is_due((1, 1), process, Moment::Before(18)).is_err());
        }
    }

    #[test]
    fn a_view_that_few_processes_saw_is_one() {
        let one = first(4);
        // Process 0 saw epoch 2 and was lost in it.
        let two = next(&one, 2, &[(0, Some(17)), (2, Some(16)), (3, Some(17))]);
        let three = next(&one, 3, &[(2, Some(16)), (3, Some(17))]);
        let files = [log(0, &[one.clone(), two]), log(2, &[one, three])];
        let history = History::of(&files).unwrap();
        let (second, third) = (history.next(1).unwrap(), history.next(2).unwrap());
        assert_eq!((second.epoch, third.epoch), (2, 3));
        assert_eq!((second.lost_ranks(), third.lost_ranks()), (vec![1], vec![0]));
        assert_eq!(history.is_due((2, 0), 0, Moment::Before(17)), Ok(true), "it ends here");
        assert_eq!(history.is_due((2, 0), 2, Moment::After(16)), Ok(true));
    }

    #[test]
    fn newcomers_enter_behind_the_step_that_they_entered_behind() {
        let one = first(2);
        // A rank let them in while another was in the step still.
        let two = next(&one, 2, &[(0, None), (1, Some(16)), (9, None)]);
        let three = ViewLine { layer: 0, ..next(&two, 3, &[(0, None), (1, None), (9, None)]) };
        let theirs = ViewLine { from: 0, lost: vec![], joined: vec![0, 1, 9], ..three.clone() };
        let files = [log(0, &[one, two, three]), log(9, &[theirs])];
        let history = History::of(&files).unwrap();
        assert_eq!(history.next(1).unwrap().epoch, 3);
        assert_eq!(history.entrance(9).map(|it| (it.from, &it.before[..])), Some((1, &[0, 1][..])));
        assert_eq!(history.entrance(1), None);
        assert!(history.turns_after((1, 1), 16));
        assert!(!history.turns_after((1, 1), 15) && !history.turns_after((1, 2), 16));
        assert_eq!(history.is_due((1, 1), 1, Moment::After(16)), Ok(false));
        assert!(history.is_due((1, 1), 1, Moment::Before(17)).is_err(), "it let nobody in");
    }

    #[test]
    fn a_last_line_without_an_end_does_not_count() {
        let one = first(2);
        let (name, whole) = log(0, &[one.clone(), next(&one, 2, &[(0, Some(17))])]);
        let history = |bytes: &[u8]| History::of(&[(name.clone(), bytes.to_vec())]);
        let ends: Vec<usize> = (0..whole.len()).filter(|it| whole[*it] == b'\n').collect();
        let changes = |bytes: &[u8]| history(bytes).map(|it| it.changes.len());
        assert_eq!(changes(&whole), Ok(1));
        for end in 0..whole.len() {
            match changes(&whole[..end]) {
                Ok(count) => assert!(count == 0 && end > ends[1], "{end}"),
                Err(why) => assert!(end <= ends[1] && why.contains("no"), "{end}: {why}"),
            }
        }
    }

    #[test]
    fn what_is_no_log_is_refused_with_its_place() {
        let file = |text: String| vec![("0.jsonl".to_owned(), text.into_bytes())];
        let refused = [
            (vec![], "there are none, or none that says whose it is"),
            (file(HEAD.into()), "they tell of no view"),
            (file(format!("{HEAD}x\n")), "0.jsonl, line 2: expected value at column 1"),
            (file(format!("{HEAD}\n")), "0.jsonl, line 2: EOF while parsing a value at column 0"),
            (file(format!("{HEAD}{HEAD}")), "0.jsonl, line 2: another log begins here"),
            (
                file(HEAD[1..].into()),
                "0.jsonl, line 1: invalid type: string \"epoch_log\", expected a map at column 11",
            ),
        ];
        for (files, why) in refused {
            assert_eq!(refusal(&files), why);
        }
        let bytes = [HEAD.as_bytes(), b"\xff\n"].concat();
        assert!(
            refusal(&[("0.jsonl".into(), bytes)]).starts_with("0.jsonl, line 2: invalid utf-8")
        );
        let without = log(0, &[first(1)]).1.split_off(HEAD.len());
        let why = "0.jsonl, line 1: it does not say whose log this is";
        assert_eq!(refusal(&[("0.jsonl".into(), without)]), why);
    }

    #[test]
    fn logs_that_contradict_each_other_or_themselves_are_refused() {
        let one = first(3);
        let two = next(&one, 2, &[(0, Some(17)), (2, Some(16))]);
        let alone = |view: ViewLine| refusal(&[log(0, &[one.clone(), view])]);
        let says = |changed: ViewLine, why: &str| {
            let refused = alone(changed);
            assert!(refused.contains(why), "{refused}");
        };
        says(ViewLine { from: 0, ..two.clone() }, "line 3: epoch 2 from epoch 0, behind epoch 1");
        says(ViewLine { epoch: 1, ..two.clone() }, "epoch 1 from epoch 1, behind epoch 1");
        says(ViewLine { lost: vec![], ..two.clone() }, "is not what its `lost` and `joined` say");
        says(ViewLine { places: vec![], ..two.clone() }, "tells where 0 processes were");
        says(next(&one, 2, &[(2, Some(17))]), "process 0 is not in its own epoch 2");
        says(next(&one, 2, &[(0, Some(17)), (0, Some(17))]), "epoch 2 has a process twice");
        says(next(&one, 2, &[(0, Some(15))]), "a process was in step 15, of 17 that were decided");
        says(ViewLine { steps: None, ..two.clone() }, "of an unknown number that were decided");
        says(next(&one, 2, &[(2, Some(17)), (0, Some(17))]), "line 3: epoch 2 can't follow 1");
        says(next(&one, 2, &[(0, None), (2, None)]), "which can't be repeated");
        says(next(&one, 2, &[(0, None), (2, Some(17))]), "which can't be repeated");
        let back = next(&two, 3, &[(0, None), (2, None), (1, None)]);
        let files = [log(0, &[one.clone(), two.clone(), back])];
        assert!(refusal(&files).contains("line 4: epoch 3 can't follow 2"), "lost ones come back");

        let both =
            |theirs: &[ViewLine]| refusal(&[log(0, &[one.clone(), two.clone()]), log(2, theirs)]);
        let differs = "0.jsonl, line 3 and 2.jsonl, line 3 tell of two different epochs 2";
        let others = next(&one, 2, &[(0, Some(17)), (2, Some(17))]);
        assert_eq!(both(&[one.clone(), others]), differs);
        assert_eq!(both(&[one.clone(), ViewLine { layer: 2, ..two.clone() }]), differs);
        let smaller = both(&[first(4)]);
        assert_eq!(smaller, "0.jsonl, line 2 and 2.jsonl, line 2 tell of two different epochs 1");
        let (name, bytes) = log(0, std::slice::from_ref(&one));
        let twice = refusal(&[("copy".into(), bytes.clone()), (name, bytes.clone())]);
        assert_eq!(twice, "copy and 0.jsonl are both of process 0");
        let other = String::from_utf8(log(1, std::slice::from_ref(&one)).1)
            .unwrap()
            .replace("\"s\"", "\"t\"");
        let mixed = refusal(&[("a".into(), bytes), ("b".into(), other.into_bytes())]);
        assert_eq!(mixed, "a is of a job with s, b of one with t");
        let theirs = ViewLine { from: 0, joined: vec![0, 2], lost: vec![], ..two.clone() };
        let late = refusal(&[log(0, &[theirs])]);
        assert_eq!(late, "0.jsonl, line 2 tells of the first view there is, which is not epoch 1");
    }
}
