//! Symbolic values: which inputs were folded, and in which order.

use std::collections::HashMap;

use crate::Rank;

/// A value; equal numbers are equal expressions.
pub(super) type Value = u32;

/// No value: what a rank has of elements that it neither began with nor got.
pub(super) const HOLE: Value = Value::MAX;

/// Why values can't be folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// This input is in more than one of them.
    Twice(Rank),
    /// One of them is no value.
    Hole,
    /// Their inputs in this order are not in rank order.
    Order,
}

/// All values met so far. Value r is the input of rank r; every other one is a fold of earlier
/// ones.
///
/// A fold of two commutes but does not associate, as IEEE addition does; a fold of more is one
/// fused operation on its operands in rank order. So equal values have equal bits, and no hash can
/// collide. In rank order no fold commutes, and every one has to keep its inputs in order.
#[derive(Debug)]
pub(super) struct Values {
    world: usize,
    in_rank_order: bool,
    folds: HashMap<Box<[Value]>, Value>,
    /// For each value the inputs in it, a bit per rank.
    inputs: Vec<Box<[u64]>>,
}

impl Values {
    /// With `in_rank_order` every fold has to keep its inputs in rank order.
    pub(super) fn new(world: usize, in_rank_order: bool) -> Self {
        let input = |rank: Rank| {
            let mut bits = vec![0; world.div_ceil(64)];
            bits[rank / 64] = 1 << (rank % 64);
            bits.into_boxed_slice()
        };
        let inputs = (0..world).map(input).collect();
        Self { world, in_rank_order, folds: HashMap::new(), inputs }
    }

    /// Folds `operands`, which are in the order of the ranks that hold them.
    pub(super) fn fold(&mut self, operands: &mut [Value]) -> Result<Value, Unfit> {
        if operands.contains(&HOLE) {
            return Err(Unfit::Hole);
        }
        if let [a, b] = operands
            && a > b
            && !self.in_rank_order
        {
            std::mem::swap(a, b);
        }
        if let Some(&known) = self.folds.get(&*operands) {
            return Ok(known);
        }
        let mut union = vec![0u64; self.world.div_ceil(64)];
        for &operand in operands.iter() {
            let inputs = &self.inputs[operand as usize];
            if let Some(twice) = first(union.iter().zip(inputs).map(|(all, new)| all & new)) {
                return Err(Unfit::Twice(twice));
            }
            if self.in_rank_order && last(&union) > first(inputs.iter().copied()) {
                return Err(Unfit::Order);
            }
            union.iter_mut().zip(inputs).for_each(|(all, new)| *all |= new);
        }
        let value = self.inputs.len() as Value; // memory ends long before the numbers do
        self.inputs.push(union.into_boxed_slice());
        self.folds.insert(operands.into(), value);
        Ok(value)
    }

    /// The first of `inputs`, a bit per rank, that is not in `value`.
    pub(super) fn missing(&self, value: Value, inputs: &[u64]) -> Option<Rank> {
        match self.inputs.get(value as usize) {
            Some(there) => first(inputs.iter().zip(there).map(|(all, there)| all & !there)),
            None => first(inputs.iter().copied()),
        }
    }
}

/// The lowest rank whose bit is set.
fn first(words: impl Iterator<Item = u64>) -> Option<Rank> {
    let mut words = words.enumerate().filter(|(_, word)| *word != 0);
    words.next().map(|(at, word)| at * 64 + word.trailing_zeros() as usize)
}

/// The highest rank whose bit is set.
fn last(words: &[u64]) -> Option<Rank> {
    let at = words.iter().rposition(|word| *word != 0)?;
    Some(at * 64 + words[at].ilog2() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folds_commute_but_do_not_associate() {
        let mut values = Values::new(3, false);
        let ab = values.fold(&mut [0, 1]).unwrap();
        assert_eq!(values.fold(&mut [1, 0]), Ok(ab));
        let bc = values.fold(&mut [1, 2]).unwrap();
        let (left, right) =
            (values.fold(&mut [ab, 2]).unwrap(), values.fold(&mut [0, bc]).unwrap());
        let fused = values.fold(&mut [0, 1, 2]).unwrap();
        assert!(left != right && left != fused && right != fused);
        assert_eq!(values.missing(ab, &[0b111]), Some(2));
        assert_eq!(values.missing(ab, &[0b011]), None);
        assert_eq!(values.missing(HOLE, &[0b110]), Some(1));
        assert_eq!(values.missing(fused, &[0b111]), None);
        assert_eq!(values.fold(&mut [ab, bc]), Err(Unfit::Twice(1)));
        assert_eq!(values.fold(&mut [0, HOLE]), Err(Unfit::Hole));
    }

    #[test]
    fn in_rank_order_folds_associate_only_over_neighbours() {
        let mut values = Values::new(70, true);
        assert_eq!(values.fold(&mut [1, 0]), Err(Unfit::Order));
        let ab = values.fold(&mut [0, 1]).unwrap();
        let late = values.fold(&mut [2, 66]).unwrap();
        assert!(values.fold(&mut [ab, late]).is_ok());
        assert_eq!(values.fold(&mut [late, 65]), Err(Unfit::Order));
        assert_eq!(values.fold(&mut [late, ab]), Err(Unfit::Order));
    }
}
