//! Which gradient lies where in which bucket. Pure; all ranks derive or receive the same layout.

use std::ops::Range;

use bytes::{Buf, BufMut};
use unisum_kernels::Dtype;

use super::parameter::Parameter;

/// Gradients begin at multiples of this: a line of the cache, and enough for any vector.
const ALIGN_BYTES: usize = 64;

/// A bucket of a share of what is left travels while the rest is computed if computing takes
/// 1 / (1 - share) as long as communication: 4/3 here. A smaller share would ask for less, and
/// launch more buckets: with this one, sizes fall from 25 MiB to 1 in 12.
const TAIL: usize = 4;

/// Where each gradient lies. Buckets are launched in ascending order.
///
/// A layout can be saved ([`Layout::to_bytes`]) and passed to
/// [`Builder::layout`](super::Builder::layout), so that a rank that resumes or joins has the same
/// buckets as the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    version: u32,
    buckets: Vec<BucketPlan>,
    homes: Vec<Home>,
}

/// One bucket: gradients of one type, back to back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BucketPlan {
    pub(super) dtype: Dtype,
    /// In the order in which they are expected to be ready.
    pub(super) parameters: Vec<usize>,
    /// Elements, with those that pad.
    pub(super) len: usize,
}

/// Where a parameter's gradient lies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Home {
    pub(super) bucket: usize,
    pub(super) elements: Range<usize>,
}

/// How large buckets get, in bytes. A parameter that is larger has a bucket of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) bytes: usize,
    /// Of the first bucket, so that communication begins early, and of the last, which nothing
    /// hides. Towards the end buckets get smaller until they are of this size: each holds at most
    /// a [`TAIL`]th of what is not reduced when it begins.
    pub(super) end_bytes: usize,
    /// Each bucket has a multiple of so many aligned pieces: one for each rank where buckets are
    /// sharded.
    pub(super) pieces: usize,
}

impl Limits {
    pub(super) const DEFAULT: Self = Self { bytes: 25 << 20, end_bytes: 1 << 20, pieces: 1 };
}

impl Layout {
    /// Buckets for parameters that become ready in `order`, which names each of them once.
    pub(super) fn new(
        version: u32,
        parameters: &[Parameter],
        order: &[usize],
        limits: Limits,
    ) -> Self {
        let mut left: usize = parameters.iter().map(Parameter::bytes).sum();
        let mut closed: Vec<Vec<usize>> = Vec::new();
        let mut open: Vec<(Dtype, usize, Vec<usize>)> = Vec::new();
        let mut is_last = false;
        for &index in order {
            let (dtype, bytes) = (parameters[index].dtype(), parameters[index].bytes());
            if !is_last && left <= limits.end_bytes {
                is_last = true;
                closed.extend(open.drain(..).map(|(_, _, members)| members));
            }
            let place = open.iter().position(|(of, _, _)| *of == dtype);
            let place = place.unwrap_or_else(|| {
                open.push((dtype, 0, Vec::new()));
                open.len() - 1
            });
            let (_, size, members) = &mut open[place];
            let limit = if closed.is_empty() {
                limits.end_bytes
            } else {
                limits.end_bytes.max((*size + left) / TAIL).min(limits.bytes)
            };
            if !members.is_empty() && *size + bytes > limit {
                closed.push(std::mem::take(members));
                *size = 0;
            }
            left -= bytes;
            *size += bytes;
            members.push(index);
            if *size >= limit {
                closed.push(open.swap_remove(place).2);
            }
        }
        closed.extend(open.into_iter().map(|(_, _, members)| members));
        // A bucket is complete with its last member: that is the order of launching.
        let mut ranks = vec![0; parameters.len()];
        order.iter().enumerate().for_each(|(rank, &index)| ranks[index] = rank);
        closed.sort_by_key(|members| members.last().map(|&last| ranks[last]));
        Self::of(version, parameters, closed, limits.pieces)
    }

    fn of(version: u32, parameters: &[Parameter], buckets: Vec<Vec<usize>>, pieces: usize) -> Self {
        let mut homes = vec![Home::default(); parameters.len()];
        let mut plan = |(bucket, members): (usize, Vec<usize>)| {
            let dtype = parameters[members[0]].dtype();
            let align = ALIGN_BYTES / dtype.bytes();
            let mut len = 0;
            for &index in &members {
                let elements = len..len + parameters[index].count();
                len = elements.end.next_multiple_of(align);
                homes[index] = Home { bucket, elements };
            }
            BucketPlan { dtype, parameters: members, len: len.next_multiple_of(align * pieces) }
        };
        let buckets = buckets.into_iter().enumerate().map(&mut plan).collect();
        Self { version, buckets, homes }
    }

    /// 0 for the layout derived from the list of parameters, 1 for the one derived from the
    /// observed order.
    pub const fn version(&self) -> u32 {
        self.version
    }

    /// The parameters of each bucket, by their index in the list.
    pub fn buckets(&self) -> impl ExactSizeIterator<Item = &[usize]> {
        self.buckets.iter().map(|bucket| &bucket.parameters[..])
    }

    pub(super) fn plans(&self) -> &[BucketPlan] {
        &self.buckets
    }

    pub(super) fn home(&self, parameter: usize) -> &Home {
        &self.homes[parameter]
    }

    /// The layout as bytes, to be stored with a checkpoint: the version, then for each bucket the
    /// number of its parameters and their indices, all u32 in little endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.put_u32_le(self.version);
        bytes.put_u32_le(self.buckets.len() as u32);
        for bucket in &self.buckets {
            bytes.put_u32_le(bucket.parameters.len() as u32);
            bucket.parameters.iter().for_each(|&index| bytes.put_u32_le(index as u32));
        }
        bytes
    }

    /// Reads what [`Layout::to_bytes`] wrote.
    pub(super) fn from_bytes(
        mut bytes: &[u8],
        parameters: &[Parameter],
        pieces: usize,
    ) -> Result<Self, String> {
        let mut next = || bytes.try_get_u32_le().map_err(|_| "a layout that is cut off");
        let (version, count) = (next()?, next()?);
        let mut is_placed = vec![false; parameters.len()];
        let mut buckets = Vec::new();
        for bucket in 0..count {
            let members = next()?;
            let mut indices: Vec<usize> = Vec::new();
            for _ in 0..members {
                let index = next()? as usize;
                let parameter = parameters.get(index).ok_or_else(|| {
                    format!("a layout with parameter {index} of {}", parameters.len())
                })?;
                if std::mem::replace(&mut is_placed[index], true) {
                    return Err(format!("a layout that has {parameter} twice"));
                }
                let first = indices.first().map_or(parameter, |&first| &parameters[first]);
                if first.dtype() != parameter.dtype() {
                    return Err(format!("a layout with {first} and {parameter} in one bucket"));
                }
                indices.push(index);
            }
            if indices.is_empty() {
                return Err(format!("a layout whose bucket {bucket} is empty"));
            }
            buckets.push(indices);
        }
        if let Some(missing) = is_placed.iter().position(|is_placed| !is_placed) {
            return Err(format!("a layout without {}", parameters[missing]));
        }
        if !bytes.is_empty() {
            return Err(format!("a layout with {} bytes too many", bytes.len()));
        }
        Ok(Self::of(version, parameters, buckets, pieces))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { bytes: 1000, end_bytes: 200, pieces: 1 };

    fn parameters(of: &[(usize, Dtype)]) -> Vec<Parameter> {
        let new = |(index, &(count, dtype)): (usize, &(usize, Dtype))| {
            Parameter::new(index.to_string(), &[count], dtype)
        };
        of.iter().enumerate().map(new).collect()
    }

    fn members(layout: &Layout) -> Vec<&[usize]> {
        layout.buckets().collect()
    }

    #[test]
    fn the_ends_are_small_and_the_middle_is_filled() {
        let list = parameters(&[(10, Dtype::F32); 200]);
        let order: Vec<usize> = (0..200).rev().collect();
        let layout = Layout::new(0, &list, &order, LIMITS);
        // 40 bytes each: 5 in the first bucket, 25 in the next, then a quarter of what is left,
        // until that is as little as in the first.
        let lens: Vec<usize> = layout.buckets().map(<[usize]>::len).collect();
        assert_eq!(lens, [5, 25, 25, 25, 25, 23, 18, 13, 10, 7, 6, 5, 5, 3, 5]);
        assert_eq!(members(&layout)[0], [199, 198, 197, 196, 195]);
        assert_eq!(members(&layout)[14], [4, 3, 2, 1, 0]);
    }

    #[test]
    fn a_large_parameter_is_alone_and_types_are_apart() {
        let list = parameters(&[
            (10, Dtype::F32),
            (5000, Dtype::F32),
            (10, Dtype::F32),
            (10, Dtype::Bf16),
            (100, Dtype::F32),
        ]);
        let layout = Layout::new(0, &list, &[4, 3, 2, 1, 0], LIMITS);
        assert_eq!(members(&layout), [[4], [3], [2], [1], [0]]);
    }

    proptest! {
        #[test]
        fn every_gradient_has_a_place_of_its_own(
            kinds in prop::collection::vec((0_usize..2000, 0_usize..3), 0..40),
            seed in any::<u64>(),
            bytes in 1_usize..10_000,
            end_bytes in 1_usize..3_000,
            pieces in 1_usize..9,
        ) {
            let types = [Dtype::F32, Dtype::Bf16, Dtype::F64];
            let of: Vec<_> = kinds.iter().map(|&(count, kind)| (count, types[kind])).collect();
            let list = parameters(&of);
            let mut order: Vec<usize> = (0..list.len()).collect();
            order.sort_by_key(|&index| (index as u64 + 1).wrapping_mul(seed | 1));
            let limits = Limits { bytes, end_bytes, pieces };
            let layout = Layout::new(1, &list, &order, limits);
            let mut seen = vec![0; list.len()];
            for (bucket, plan) in layout.plans().iter().enumerate() {
                prop_assert_eq!(plan.len % (pieces * ALIGN_BYTES / plan.dtype.bytes()), 0);
                let mut end = 0;
                for &index in &plan.parameters {
                    seen[index] += 1;
                    let home = layout.home(index);
                    prop_assert_eq!(home.bucket, bucket);
                    prop_assert_eq!(list[index].dtype(), plan.dtype);
                    prop_assert_eq!(home.elements.len(), list[index].count());
                    prop_assert!(home.elements.start >= end && home.elements.end <= plan.len);
                    prop_assert_eq!(home.elements.start * plan.dtype.bytes() % ALIGN_BYTES, 0);
                    end = home.elements.end;
                }
                let size: usize = plan.parameters.iter().map(|&index| list[index].bytes()).sum();
                prop_assert!(size <= bytes.max(end_bytes) || plan.parameters.len() == 1);
            }
            prop_assert!(seen.iter().all(|&times| times == 1));
            let again = Layout::from_bytes(&layout.to_bytes(), &list, pieces);
            prop_assert_eq!(again, Ok(layout));
        }

        #[test]
        fn bytes_from_anywhere_are_a_layout_or_an_error(
            bytes in prop::collection::vec(0_u8..4, 0..80),
        ) {
            let list = parameters(&[(3, Dtype::F32), (4, Dtype::F32), (5, Dtype::F16)]);
            if let Ok(layout) = Layout::from_bytes(&bytes, &list, 2) {
                prop_assert_eq!(layout.to_bytes(), bytes);
            }
        }
    }
}
