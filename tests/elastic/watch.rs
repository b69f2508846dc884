//! What the harness knows of a job: what the journals of its processes say, each compared with all
//! others.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

/// A process of the job, as its journal tells.
#[derive(Debug)]
pub(crate) struct Process {
    journal: PathBuf,
    read: u64,
    /// Its number in views, once it is in one.
    pub(crate) number: Option<u64>,
    /// When the harness killed it.
    pub(crate) killed: Option<u64>,
    /// The epoch and number of its last step, and when that ended.
    pub(crate) epoch: u64,
    pub(crate) step: u64,
    pub(crate) stepped: u64,
    pub(crate) has_started: bool,
    pub(crate) is_over: bool,
    /// Between its first step and its last, and how much of that it took longer than usual.
    pub(crate) first: Option<u64>,
    pub(crate) lines: Vec<String>,
}

/// A step that took the job into another view, on one process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Passage {
    pub(crate) process: usize,
    pub(crate) epoch: u64,
    /// Ends of the step before and of this one.
    pub(crate) before: u64,
    pub(crate) ended: u64,
}

/// A journal, and what was seen in all of them.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    pub(crate) processes: Vec<Process>,
    /// The divisor and the hash of each step, and a process that told them.
    steps: BTreeMap<u64, (String, usize)>,
    pub(crate) views: BTreeMap<u64, Vec<u64>>,
    pub(crate) passages: Vec<Passage>,
    /// How the steps ended that deaths interrupted, by process.
    pub(crate) ends: BTreeMap<String, usize>,
    /// Between the ends of two steps in one view.
    pub(crate) usual: Vec<u64>,
}

type Checked = Result<(), String>;

impl Watch {
    pub(crate) fn add(&mut self, directory: &Path, pid: i32) {
        self.processes.push(Process {
            journal: directory.join(format!("{pid}.journal")),
            read: 0,
            number: None,
            killed: None,
            epoch: 0,
            step: 0,
            stepped: 0,
            has_started: false,
            is_over: false,
            first: None,
            lines: Vec::new(),
        });
    }

    /// The newest view, as far as any process is in one.
    pub(crate) fn view(&self) -> (u64, &[u64]) {
        self.views.last_key_value().map_or((0, &[]), |(epoch, view)| (*epoch, view))
    }

    /// Those that the harness has not killed.
    pub(crate) fn living(&self) -> impl Iterator<Item = usize> {
        (0..self.processes.len()).filter(|it| self.processes[*it].killed.is_none())
    }

    /// Reads on in all journals.
    ///
    /// # Errors
    /// If something is not as it has to be.
    pub(crate) fn read(&mut self) -> Checked {
        for process in 0..self.processes.len() {
            if self.processes[process].lines.len() > 400 {
                self.processes[process].lines.drain(..200);
            }
            for line in self.processes[process].news() {
                self.take(process, &line).map_err(|why| format!("process {process}: {why}"))?;
            }
        }
        while self.steps.len() > 5000 {
            self.steps.pop_first();
        }
        Ok(())
    }

    fn take(&mut self, index: usize, line: &str) -> Checked {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words[at].parse::<u64>().unwrap();
        let time = number(words.len() - 1);
        let process = &mut self.processes[index];
        process.lines.push(line.to_owned());
        match words[0] {
            "started" => process.has_started = true,
            "process" => process.number = Some(number(1)),
            "view" => {
                let members = words[2].split(',').map(|it| it.parse().unwrap()).collect();
                return self.take_view(number(1), members);
            }
            "step" => {
                let (step, epoch) = (number(1), number(2));
                let result = format!("{} {}", words[3], words[4]);
                return self.take_step(index, (step, epoch), result, time);
            }
            "redone" | "committed" | "outside" => {
                *self.ends.entry(words[0].to_owned()).or_default() += 1;
            }
            "over" => process.is_over = true,
            // Those that are cut off say so.
            "error" if process.killed.is_some() => {}
            "error" => return Err(line.to_owned()),
            other => panic!("unknown: {other}"),
        }
        Ok(())
    }

    /// Nobody else is in the view, and nobody is missing but those that were killed.
    fn take_view(&mut self, epoch: u64, members: Vec<u64>) -> Checked {
        if let Some(known) = self.views.get(&epoch) {
            let is_same = *known == members;
            return is_same
                .then_some(())
                .ok_or_else(|| format!("epoch {epoch} has two views, {known:?} and {members:?}"));
        }
        let killed = |it: &Process| it.killed.is_some();
        let dead: BTreeSet<u64> =
            self.processes.iter().filter(|it| killed(it)).filter_map(|it| it.number).collect();
        let unnamed = self.processes.iter().filter(|it| it.number.is_none());
        // A newcomer that was killed before it could tell who it was.
        let hidden = unnamed.filter(|it| killed(it)).count();
        let known: BTreeSet<u64> = self.processes.iter().filter_map(|it| it.number).collect();
        if let Some((_, before)) = self.views.range(..epoch).next_back() {
            let lost = before.iter().filter(|it| !members.contains(it) && !dead.contains(it));
            let lost: Vec<&u64> = lost.collect();
            if lost.iter().any(|it| known.contains(it)) || lost.len() > hidden {
                return Err(format!("wrong blame: {lost:?} of {before:?} are alive, and left out"));
            }
        }
        self.views.insert(epoch, members);
        Ok(())
    }

    /// A step is one and the same on all that take it, and none is left out.
    fn take_step(
        &mut self,
        index: usize,
        (step, epoch): (u64, u64),
        result: String,
        time: u64,
    ) -> Checked {
        let is_dead = self.processes[index].killed.is_some();
        let known = self.steps.entry(step).or_insert_with(|| (result.clone(), index));
        // What only those saw that are dead did not happen: the others make the step again.
        let is_forgotten = self.processes[known.1].killed.is_some();
        if !is_dead && is_forgotten {
            *known = (result.clone(), index);
        }
        if known.0 != result && !is_dead {
            let (other, process) = known;
            return Err(format!("step {step} is {result}, and {other} of process {process}"));
        }
        let process = &mut self.processes[index];
        let is_first = process.first.is_none();
        if !is_first && step != process.step + 1 {
            // A rank that was behind has the state of the others.
            let text = format!("step {step} after step {}", process.step);
            if step <= process.step || process.epoch == epoch {
                return Err(text);
            }
        }
        match process.first {
            None => process.first = Some(time),
            Some(_) if epoch > process.epoch => {
                let before = process.stepped;
                self.passages.push(Passage { process: index, epoch, before, ended: time });
            }
            Some(_) => self.usual.push(time - process.stepped),
        }
        (process.step, process.epoch, process.stepped) = (step, epoch, time);
        Ok(())
    }
}

impl Process {
    /// When it ended the first step after `time`.
    pub(crate) fn first_after(&self, time: u64) -> u64 {
        let steps = self.lines.iter().rev().filter(|it| it.starts_with("step "));
        let ends = steps.map(|it| it.rsplit(' ').next().unwrap().parse::<u64>().unwrap());
        ends.take_while(|it| *it > time).last().unwrap_or(0)
    }

    /// The lines that it has written since.
    fn news(&mut self) -> Vec<String> {
        let Ok(mut file) = File::open(&self.journal) else { return Vec::new() };
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(self.read)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        let whole = bytes.iter().rposition(|it| *it == b'\n').map_or(0, |it| it + 1);
        self.read += whole as u64;
        let text = std::str::from_utf8(&bytes[..whole]).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}
