//! One operation of this rank, on buffers that lie where they were asked for.

use std::ops::{Deref, DerefMut, Range};

use unisum::{Buffer, Buffers, Collective, Communicator, ReduceOp};

use crate::Result;
use crate::args::Memory;
use crate::check::Pattern;
use crate::collective::{Case, Layout, Piece, Place, Source};
use crate::device::{Device, OnDevice};
use crate::value::Value;

/// This rank's buffers for several operations.
pub(crate) struct Operands<T> {
    /// Nothing in place.
    apart: Data<T>,
    data: Data<T>,
}

impl<T: Value> Operands<T> {
    /// Buffers that are large enough for each of these cases, all in the same place.
    ///
    /// # Errors
    /// If there is no memory.
    pub(crate) fn allocate(comm: &Communicator, memory: Memory, cases: &[Case]) -> Result<Self> {
        let (mut apart, mut data) = (0, 0);
        for case in cases {
            let Layout { input, output } = case.layout(comm.rank());
            match case.place {
                Place::In => data = data.max(input.end).max(output.end),
                Place::Out => (apart, data) = (apart.max(input.end), data.max(output.end)),
            }
        }
        let apart = Data::allocate(comm, memory, apart)?;
        Ok(Self { apart, data: Data::allocate(comm, memory, data)? })
    }

    /// The operation of a case on these buffers, or on buffers of a device of the same lengths.
    ///
    /// # Errors
    /// If the device has no memory.
    pub(crate) fn operation<'a>(
        &'a mut self,
        case: Case,
        rank: usize,
        op: Option<ReduceOp>,
        device: Option<&'a Device>,
    ) -> Result<Operation<'a, T>> {
        let layout = case.layout(rank);
        let Layout { input, output } = &layout;
        let (apart, data) = match case.place {
            Place::In => (None, &mut self.data[..input.end.max(output.end)]),
            Place::Out => (Some(&mut self.apart[..input.end]), &mut self.data[..output.end]),
        };
        let lengths = (apart.as_ref().map(|apart| apart.len()), data.len());
        let on_device =
            device.map(|it| OnDevice::allocate(it, lengths.0, lengths.1)).transpose()?;
        Ok(Operation { call: case.call(rank, op), case, rank, op, layout, apart, data, on_device })
    }
}

/// A call that can be made again and again.
pub(crate) struct Operation<'a, T> {
    pub(crate) case: Case,
    pub(crate) op: Option<ReduceOp>,
    pub(crate) call: Collective,
    rank: usize,
    layout: Layout,
    /// The input, if it lies apart.
    apart: Option<&'a mut [T]>,
    data: &'a mut [T],
    /// If it is these that the call is made on.
    pub(crate) on_device: Option<OnDevice<'a, T>>,
}

impl<T: Value> Operation<'_, T> {
    /// Makes the call; on a device, it is only enqueued.
    ///
    /// # Errors
    /// If it fails.
    pub(crate) fn run(&mut self, comm: &Communicator) -> Result<()> {
        if let Some(on_device) = &mut self.on_device {
            return on_device.run(&self.call);
        }
        let buffers = match &self.apart {
            Some(input) => Buffers::OutOfPlace(input, self.data),
            None => Buffers::InPlace(self.data),
        };
        comm.run(&self.call, buffers)?;
        Ok(())
    }

    /// Fills the buffers with values that stay the same, however often the call is made: none may
    /// overflow or fade into subnormal numbers on the way, which would change the time.
    ///
    /// # Errors
    /// If they are on a device, which fails.
    pub(crate) fn settle(&mut self) -> Result<()> {
        let value = T::fixed_point(self.op.unwrap_or(ReduceOp::Sum));
        self.data.fill(value);
        if let Some(input) = &mut self.apart {
            input.fill(value);
        }
        self.send()
    }

    /// Fills the input with what this rank puts in.
    ///
    /// # Errors
    /// If it is on a device, which fails.
    pub(crate) fn fill(&mut self, pattern: &Pattern<T>) -> Result<()> {
        let input = self.apart.as_deref_mut().unwrap_or(self.data);
        pattern.fill(&mut input[self.layout.input.clone()], Source::Rank(self.rank));
        self.send()
    }

    fn send(&mut self) -> Result<()> {
        match &mut self.on_device {
            Some(on_device) => on_device.send(self.apart.as_deref(), self.data),
            None => Ok(()),
        }
    }

    /// Waits for the result, if it is on a device, and copies it from there.
    ///
    /// # Errors
    /// If the device or an operation has failed.
    pub(crate) fn fetch(&mut self) -> Result<()> {
        match &self.on_device {
            Some(on_device) => on_device.fetch(self.apart.as_deref_mut(), self.data),
            None => Ok(()),
        }
    }

    /// How many elements came out wrong, or were changed although nothing comes out there.
    pub(crate) fn wrong(&self, pattern: &Pattern<T>) -> u64 {
        let Layout { input, output } = &self.layout;
        let mut wrong = 0;
        let mut at = output.start;
        for Piece { from, elements } in self.case.result(self.rank) {
            let end = at + elements.len();
            wrong += pattern.wrong(&self.data[at..end], from, elements.start);
            at = end;
        }
        let (put_in, overwritten) = match &self.apart {
            Some(apart) => (&**apart, 0..0),
            None => (&*self.data, output.clone()),
        };
        let mine = Source::Rank(self.rank);
        for kept in without(input, &overwritten) {
            wrong += pattern.wrong(&put_in[kept.clone()], mine, kept.start - input.start);
        }
        wrong
    }
}

/// What is left of a range before and behind another.
fn without(all: &Range<usize>, taken: &Range<usize>) -> [Range<usize>; 2] {
    if taken.is_empty() {
        return [all.clone(), 0..0];
    }
    let (start, end) = (taken.start.clamp(all.start, all.end), taken.end.clamp(all.start, all.end));
    [all.start..start, end..all.end]
}

/// A buffer in the memory that was asked for.
pub(crate) enum Data<T> {
    Registered(Buffer<T>),
    Private(Vec<T>),
}

impl<T: Value> Data<T> {
    /// Room for `count` elements.
    ///
    /// # Errors
    /// If there is no memory.
    pub(crate) fn allocate(comm: &Communicator, memory: Memory, count: usize) -> Result<Self> {
        Ok(match memory {
            Memory::Registered => Self::Registered(comm.allocate(count)?),
            // The device's are made for each operation: these are what the host has of them.
            Memory::Private | Memory::Device => {
                let mut data = Vec::new();
                data.try_reserve_exact(count)?;
                data.resize(count, T::fixed_point(ReduceOp::Sum));
                Self::Private(data)
            }
        })
    }
}

impl<T> Deref for Data<T>
where
    Buffer<T>: Deref<Target = [T]>,
{
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Registered(buffer) => buffer,
            Self::Private(data) => data,
        }
    }
}

impl<T> DerefMut for Data<T>
where
    Buffer<T>: DerefMut<Target = [T]>,
{
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::Registered(buffer) => buffer,
            Self::Private(data) => data,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::Kind;

    /// Has `look` see each rank's operation of each collective, filled but not run.
    fn every_operation(place: Place, mut look: impl FnMut(&mut Operation<'_, i32>, &Pattern<i32>)) {
        for kind in Kind::ALL.into_iter().filter(|kind| kind.moves_elements()) {
            for rank in 0..3 {
                let case = Case { kind, root: 1, place, ranks: 3, count: 300 };
                let data = || Data::Private(vec![0; 300]);
                let mut operands = Operands { apart: data(), data: data() };
                let op = kind.reduces().then_some(ReduceOp::Sum);
                let mut operation = operands.operation(case, rank, op, None).unwrap();
                let pattern = Pattern::new(op, 3, 7);
                operation.fill(&pattern).unwrap();
                look(&mut operation, &pattern);
            }
        }
    }

    #[test]
    fn a_call_that_does_nothing_is_wrong_wherever_something_should_come() {
        for place in [Place::In, Place::Out] {
            every_operation(place, |operation, pattern| {
                let own = Source::Rank(operation.rank);
                let result = operation.case.result(operation.rank);
                let has_it_already = place == Place::In && result.iter().all(|it| it.from == own);
                let complete = has_it_already || operation.layout.output.is_empty();
                assert_eq!(operation.wrong(pattern) == 0, complete, "{:?}", operation.case);
            });
        }
    }

    #[test]
    fn a_changed_input_is_wrong() {
        every_operation(Place::Out, |operation, pattern| {
            let before = operation.wrong(pattern);
            let Some(last) = operation.apart.as_mut().and_then(|input| input.last_mut()) else {
                return;
            };
            *last += 1;
            assert_eq!(operation.wrong(pattern), before + 1, "{:?}", operation.case);
        });
    }

    #[test]
    fn what_is_left_of_an_input_lies_on_either_side_of_the_output() {
        assert_eq!(without(&(0..9), &(3..6)), [0..3, 6..9]);
        assert_eq!(without(&(3..6), &(0..9)), [3..3, 6..6]);
        assert_eq!(without(&(0..9), &(4..4)), [0..9, 0..0]);
    }
}
