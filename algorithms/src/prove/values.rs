//! Symbolic values: which inputs were folded, and in which order.

use std::collections::HashMap;

use crate::Rank;

/// A value; equal numbers are equal expressions.
pub(super) type Value = u32;

/// All values met so far. Value r is the input of rank r; every other one is a fold of earlier
/// ones.
///
/// A fold of two commutes but does not associate, as IEEE addition does; a fold of more is one
/// fused operation on its operands in rank order. So equal values have equal bits, and no hash can
/// collide.
#[derive(Debug)]
pub(super) struct Values {
    world: usize,
    folds: HashMap<Box<[Value]>, Value>,
    /// For each value the inputs in it, a bit per rank.
    inputs: Vec<Box<[u64]>>,
}

impl Values {
    pub(super) fn new(world: usize) -> Self {
        let input = |rank: Rank| {
            let mut bits = vec![0; world.div_ceil(64)];
            bits[rank / 64] = 1 << (rank % 64);
            bits.into_boxed_slice()
        };
        Self { world, folds: HashMap::new(), inputs: (0..world).map(input).collect() }
    }

    /// Folds `operands`, which are in rank order.
    ///
    /// # Errors
    /// An input that is in more than one of them.
    pub(super) fn fold(&mut self, operands: &mut [Value]) -> Result<Value, Rank> {
        if let [a, b] = operands
            && a > b
        {
            std::mem::swap(a, b);
        }
        if let Some(&known) = self.folds.get(&*operands) {
            return Ok(known);
        }
        let mut union = vec![0u64; self.world.div_ceil(64)];
        for &operand in operands.iter() {
            for (word, (all, &new)) in
                union.iter_mut().zip(&self.inputs[operand as usize]).enumerate()
            {
                if *all & new != 0 {
                    return Err(word * 64 + (*all & new).trailing_zeros() as usize);
                }
                *all |= new;
            }
        }
        let value = self.inputs.len() as Value; // memory ends long before the numbers do
        self.inputs.push(union.into_boxed_slice());
        self.folds.insert(operands.into(), value);
        Ok(value)
    }

    /// The first input that is not in `value`.
    pub(super) fn missing(&self, value: Value) -> Option<Rank> {
        let has = |rank: &Rank| self.inputs[value as usize][rank / 64] >> (rank % 64) & 1 == 1;
        (0..self.world).find(|rank| !has(rank))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folds_commute_but_do_not_associate() {
        let mut values = Values::new(3);
        let ab = values.fold(&mut [0, 1]).unwrap();
        assert_eq!(values.fold(&mut [1, 0]), Ok(ab));
        let bc = values.fold(&mut [1, 2]).unwrap();
        let (left, right) =
            (values.fold(&mut [ab, 2]).unwrap(), values.fold(&mut [0, bc]).unwrap());
        let fused = values.fold(&mut [0, 1, 2]).unwrap();
        assert!(left != right && left != fused && right != fused);
        assert_eq!(values.missing(ab), Some(2));
        assert_eq!(values.missing(fused), None);
        assert_eq!(values.fold(&mut [ab, bc]), Err(1));
    }
}
