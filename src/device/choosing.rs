//! Which algorithm a call on device memory takes.

use unisum_algorithms::{Shape, Topology};
use unisum_kernels::cuda::{multimem_kernel, staged_kernel};
use unisum_kernels::{Dtype, Element, Fold, ReduceOp};
use unisum_link::{CollectiveKind, Rank};

use super::program::{Choice, Form, Launches, Programs};
use super::{DeviceCommunicator, State, hierarchy};
use crate::collective::key::Key;
use crate::collective::{Blocks, Collective};
use crate::execution::member::Member;
use crate::execution::programs;

impl DeviceCommunicator {
    /// The algorithm that this collective uses on buffers of `count` elements (the longer of input
    /// and output): the same on all ranks. If calls are staged, it is the hosts'.
    ///
    /// `"one-shot"` stands for two ways that give the same bits: a queue of a few operations, and,
    /// for all-reduces of up to 1 MiB of the frequent types and operations, a single launch.
    /// `"multimem"` is no algorithm and can't be fixed: the switch between the devices adds.
    pub fn choice<T: Element>(&self, collective: &Collective, count: usize) -> &'static str {
        let mut state = self.lock();
        let fold = collective.fold(T::DTYPE);
        let fixed = state.programs.fixed();
        let (kind, hierarchy) = (collective.kind(), state.hierarchy.as_mut());
        if hierarchy.is_some_and(|it| it.takes(kind, &fold, count, fixed)) {
            return hierarchy::NAME;
        }
        if state.direct.is_none() {
            let staging = state.staging.as_ref();
            return staging.map_or("none", |it| it.communicator().choice::<T>(collective, count));
        }
        if collective.kind() == CollectiveKind::Barrier {
            return "direct"; // Each rank has a flag for each other.
        }
        let form = self.typical_form(collective, T::DTYPE, count);
        let choice = self.choose(&mut state, &form, (fold.op, fold.dtype));
        choice.map_or("none", |choice| Programs::name(&form, choice))
    }

    /// What a collective takes on the devices by the model of them, in seconds, with buffers of
    /// `count` elements. Cost: compiles every algorithm; keep the answer.
    pub(super) fn reckoned(&self, collective: &Collective, dtype: Dtype, count: usize) -> f64 {
        let form = self.typical_form(collective, dtype, count);
        Programs::fastest_seconds(&form, self.rank())
    }

    /// What all ranks know of a typical call.
    fn typical_form(&self, collective: &Collective, dtype: Dtype, count: usize) -> Form {
        Form::typical(collective, dtype, count, (self.rank(), &self.topology()))
    }

    fn topology(&self) -> Topology {
        let one = || Topology::flat(1);
        let of = |member: &Member| member.core.runner.choice.topology().clone();
        self.host().member.as_ref().map_or_else(one, of)
    }

    pub(super) fn choose(
        &self,
        state: &mut State,
        form: &Form,
        (op, dtype): (ReduceOp, Dtype),
    ) -> Result<Choice, String> {
        let direct = state.direct.as_ref().filter(|direct| direct.blocks_max > 0);
        let has_multimem = direct.is_some_and(|direct| direct.multimem.is_some());
        let launches = Launches {
            staged: direct.is_some() && staged_kernel(op, dtype).is_some(),
            multimem: has_multimem && multimem_kernel(op, dtype, form.key.scales).is_some(),
        };
        state.programs.choice(form, self.rank(), launches)
    }

    /// What all ranks know of a call; of an all-to-all with counts by pair, from all counts.
    pub(super) fn form(&self, key: Key, fold: &Fold, counts: Option<&[Vec<usize>]>) -> Form {
        let topology = self.topology();
        let shapes = match counts {
            None => vec![programs::shape(&key, self.rank(), &topology)],
            Some(counts) => {
                let sends = |from: Rank| -> &[usize] { &counts[from] };
                let receives = |to: Rank| counts.iter().map(|row| row[to]).collect::<Vec<_>>();
                let shape =
                    |rank| Shape::pairs(topology.clone(), rank, sends(rank), &receives(rank));
                (0..counts.len()).map(shape).collect()
            }
        };
        Form { key, watched: fold.watch, shapes: shapes.into() }
    }
}

impl Form {
    /// What all ranks know of a call with buffers of `count` elements, whose counts by rank, if
    /// there are any, nobody knows of the others.
    pub(super) fn typical(
        collective: &Collective,
        dtype: Dtype,
        count: usize,
        (rank, topology): (Rank, &Topology),
    ) -> Self {
        let (world, fold) = (topology.world(), collective.fold(dtype));
        let key = collective.typical_key(world, dtype, count);
        let blocks = match &key.blocks {
            Blocks::Pairs(..) => Blocks::Even(count.div_ceil(world)),
            known => known.clone(),
        };
        let average = fold.op == ReduceOp::Average && collective.kind().reduces();
        let (scales, ordered) = (fold.factor.is_some(), false);
        let key = Key { blocks, average, scales, ordered, in_place: false, ..key };
        let shapes = [programs::shape(&key, rank, topology)].into();
        Self { key, watched: fold.watch, shapes }
    }
}
