//! Which algorithm a call takes, and what its rank puts into the stream.

use std::collections::HashMap;
use std::sync::Arc;

use unisum_algorithms::{self as plans, Algorithm, Shape};
use unisum_engine::device::{
    Candidate, DeviceFigures, DeviceFold, DeviceProgram, DeviceSource, Memory, Operand, Operation,
    Place, Totals, candidates, multimem_seconds, one_launch_seconds,
};
use unisum_kernels::cuda::SOURCES_MAX;
use unisum_link::{Call, Rank};

use super::multimem::PIECE_BYTES;
use super::page::ONE_LAUNCH_BYTES;
use crate::collective::key::Key;

/// What the devices of one host are taken for. Nothing is measured yet.
const FIGURES: DeviceFigures = DeviceFigures::NVLINK4;
/// Programs kept: training repeats the same few shapes.
const CAPACITY: usize = 128;

/// What all ranks know of a call.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Form {
    /// The same on all ranks; it does not say whether calls are in place.
    pub(super) key: Key,
    /// Whether infinite and NaN results are looked for.
    pub(super) watched: bool,
    /// One for all ranks, or one for each.
    pub(super) shapes: Arc<[Shape]>,
}

/// Choices and programs, kept for the calls that come again.
#[derive(Debug)]
pub(super) struct Programs {
    /// An index into the names of all algorithms.
    fixed: Option<usize>,
    /// By what can be done in one launch, too.
    chosen: HashMap<(Form, Launches), Choice>,
    known: HashMap<Use, Arc<DeviceProgram>>,
}

/// A form, which ranks' calls are in place, and the algorithm.
type Use = (Form, Arc<[bool]>, usize);

/// By which kernels a call's type and operation can be done in one launch, if it is an all-reduce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Launches {
    pub(super) staged: bool,
    pub(super) multimem: bool,
}

/// How a call is executed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    /// Its number among those of the collective.
    index: usize,
    slice_bytes: usize,
    pub(super) way: Way,
}

/// How the operations of a call reach the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// As a queue of them.
    Queue,
    /// An all-reduce in one launch, as the algorithm would do it.
    OneLaunch,
    /// An all-reduce in the switch, a launch for each piece. It has no algorithm.
    Multimem,
}

impl Choice {
    /// What ranks tell each other of it.
    pub(super) const fn number(self) -> u8 {
        match self.way {
            Way::Multimem => Call::IN_SWITCH,
            Way::Queue | Way::OneLaunch => self.index as u8,
        }
    }
}

/// The name of the way that has no algorithm.
const MULTIMEM: &str = "multimem";

/// The algorithm whose bits an all-reduce in one launch has.
const ONE_SHOT: &str = "one-shot";

impl Programs {
    pub(super) fn new(fixed: Option<usize>) -> Self {
        Self { fixed, chosen: HashMap::new(), known: HashMap::new() }
    }

    /// The algorithm that is fixed, if one is.
    pub(super) fn fixed(&self) -> Option<&'static str> {
        self.fixed.and_then(|index| crate::algorithms().get(index).copied())
    }

    pub(super) fn fix(&mut self, index: Option<usize>) {
        self.fixed = index;
        self.chosen.clear();
    }

    /// The algorithm of a call: the same on all ranks.
    ///
    /// # Errors
    /// Says why there is none.
    pub(super) fn choice(
        &mut self,
        form: &Form,
        rank: Rank,
        launches: Launches,
    ) -> Result<Choice, String> {
        let asked = (form.clone(), launches);
        if let Some(known) = self.chosen.get(&asked) {
            return Ok(*known);
        }
        if self.chosen.len() >= CAPACITY {
            self.chosen.clear();
        }
        let choice = self.choose(form, rank, launches)?;
        self.chosen.insert(asked, choice);
        Ok(choice)
    }

    fn choose(&self, form: &Form, rank: Rank, launches: Launches) -> Result<Choice, String> {
        let world = form.shapes[0].world();
        let ranked = ranked(form, rank);
        let named = self.fixed();
        let fixed = ranked.iter().find(|it| Some(it.algorithm.name()) == named);
        let best = fixed.or_else(|| ranked.first()).ok_or_else(|| {
            format!("no algorithm folds the elements of {world} ranks, {SOURCES_MAX} at a time")
        })?;
        let bytes = form.shapes[0].elements() * form.key.element_bytes;
        let is_all_reduce = form.shapes[0].collective == plans::PlanKind::AllReduce;
        let may_launch = launches.staged
            && is_all_reduce
            && bytes <= ONE_LAUNCH_BYTES
            && fixed.is_none_or(|it| it.algorithm.name() == ONE_SHOT);
        let mut ways = vec![(Way::Queue, best.seconds)];
        if may_launch {
            ways.push((Way::OneLaunch, one_launch_seconds(world, bytes, &FIGURES)));
        }
        // Whoever names an algorithm wants its bits.
        if launches.multimem && is_all_reduce && named.is_none() && bytes > 0 {
            ways.push((Way::Multimem, multimem_seconds(world, bytes, PIECE_BYTES, &FIGURES)));
        }
        prefer_multimem(&mut ways);
        let (way, _) = ways.into_iter().min_by(|(_, a), (_, b)| a.total_cmp(b)).expect("the queue");
        let name = if way == Way::OneLaunch { ONE_SHOT } else { best.algorithm.name() };
        let list = plans::algorithms(form.shapes[0].collective);
        let index = list.iter().position(|it| it.name() == name);
        let index = index.expect("a candidate is one of the list, and so is a one-shot");
        Ok(Choice { index, slice_bytes: best.slice_bytes, way })
    }

    /// What the fastest algorithm takes by the model.
    pub(super) fn fastest_seconds(form: &Form, rank: Rank) -> f64 {
        ranked(form, rank).first().map_or(f64::INFINITY, |best| best.seconds)
    }

    /// The name of an algorithm that was chosen.
    pub(super) fn name(form: &Form, choice: Choice) -> &'static str {
        if choice.way == Way::Multimem {
            return MULTIMEM;
        }
        plans::algorithms(form.shapes[0].collective)[choice.index].name()
    }

    /// What this rank does for a call in which these ranks' calls are in place.
    pub(super) fn program(
        &mut self,
        form: &Form,
        rank: Rank,
        in_place: &[bool],
        choice: Choice,
    ) -> Arc<DeviceProgram> {
        let key = (form.clone(), in_place.into(), choice.index);
        if let Some(known) = self.known.get(&key) {
            return known.clone();
        }
        if self.known.len() >= CAPACITY {
            self.known.clear();
        }
        let algorithm = plans::algorithms(form.shapes[0].collective)[choice.index];
        let source = source(form, rank, in_place, (algorithm, choice.slice_bytes));
        let mut program = match in_place.len() {
            1 if form.watched => alone(&source),
            _ => DeviceProgram::build(&source),
        };
        drop_wait(&mut program);
        let program = Arc::new(program);
        self.known.insert(key, program.clone());
        program
    }
}

/// The algorithms for calls in which no rank's is in place, the fastest first.
fn ranked(form: &Form, rank: Rank) -> Vec<Candidate> {
    let apart = vec![false; form.shapes[0].world()];
    let first = plans::algorithms(form.shapes[0].collective)[0];
    candidates(&source(form, rank, &apart, (first, usize::MAX)), &FIGURES, SOURCES_MAX)
}

/// A rank of its own that looks at its result: a fold of one operand, which others have not.
fn alone(source: &DeviceSource<'_>) -> DeviceProgram {
    let begin = |memory| Place { memory, start: 0 };
    let from = Operand { rank: 0, place: begin(Memory::Input) };
    let fold = DeviceFold {
        sources: vec![from],
        to: begin(Memory::Output),
        bytes: source.shapes[0].elements() * source.element_bytes,
        divides: source.average,
        scales: source.scales,
        watches: true,
    };
    DeviceProgram {
        operations: vec![Operation::Fold(fold)],
        scratch: vec![0],
        sent: vec![Totals::default()],
        received: vec![Totals::default()],
        watched_by: vec![0],
        watches_for: vec![0],
    }
}

/// For tests of calls that are smaller than those for which the switch pays, in builds with
/// assertions only.
fn prefer_multimem(ways: &mut Vec<(Way, f64)>) {
    let is_asked = cfg!(debug_assertions) && std::env::var_os("UNISUM_TEST_MULTIMEM").is_some();
    if is_asked && ways.iter().any(|(way, _)| *way == Way::Multimem) {
        ways.retain(|(way, _)| *way == Way::Multimem);
    }
}

/// For the test that shows that each wait is needed: leaves out the wait that
/// `UNISUM_TEST_DROPPED_WAIT` numbers, in builds with assertions only.
fn drop_wait(program: &mut DeviceProgram) {
    if !cfg!(debug_assertions) {
        return;
    }
    let Ok(text) = std::env::var("UNISUM_TEST_DROPPED_WAIT") else { return };
    let is_wait = |operation: &Operation| matches!(operation, Operation::Wait(_));
    let positions = (0..program.operations.len()).filter(|&it| is_wait(&program.operations[it]));
    let dropped = text.parse().ok().and_then(|number| positions.clone().nth(number));
    if let Some(position) = dropped {
        program.operations.remove(position);
    }
}

fn source<'a>(
    form: &'a Form,
    rank: Rank,
    in_place: &'a [bool],
    (algorithm, slice_bytes): (&'a dyn Algorithm, usize),
) -> DeviceSource<'a> {
    let Key { element_bytes, average, scales, .. } = form.key;
    let shapes = &form.shapes;
    DeviceSource { algorithm, shapes, rank, element_bytes, average, scales, in_place, slice_bytes }
}
