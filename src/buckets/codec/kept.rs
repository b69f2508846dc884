//! Values that are kept for parameters from step to step, apart from any layout of buckets.

use std::collections::BTreeMap;
use std::ops::Range;

use thiserror::Error;

/// `f32` values that belong to ranges of elements of parameters, by the parameters' names.
///
/// What is saved in a checkpoint, and what moves when buckets are laid out anew. It knows no rank,
/// no world and no bucket.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Kept(BTreeMap<String, Vec<Stretch>>);

/// Values of the elements of one parameter from `start` on.
#[derive(Clone, Debug, PartialEq)]
struct Stretch {
    start: usize,
    values: Vec<f32>,
}

/// The bytes are not those of a saved state.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the saved state can't be read: {0}")]
pub(crate) struct UnreadableState(pub(crate) &'static str);

impl Kept {
    /// Keeps `values` for the elements of `parameter` from `start` on, in place of older ones.
    /// Whether a whole range of these is gone now.
    pub(crate) fn put(&mut self, parameter: &str, start: usize, values: &[f32]) -> bool {
        let stretch = Stretch { start, values: values.to_vec() };
        let stretches = self.0.entry(parameter.into()).or_default();
        let elements = stretch.elements();
        let is_covered = |old: &Stretch| {
            elements.start <= old.elements().start && old.elements().end <= elements.end
        };
        let known = stretches.len();
        stretches.retain(|old| !is_covered(old));
        let replaces = stretches.len() < known;
        stretches.push(stretch);
        replaces
    }

    /// Multiplies all that is kept.
    pub(crate) fn scale(&mut self, factor: f32) {
        let values = self.0.values_mut().flatten().flat_map(|stretch| &mut stretch.values);
        values.for_each(|value| *value *= factor);
    }

    /// Writes what is kept for the elements of `parameter` from `start` on to `to`. Other elements
    /// of `to` stay as they are.
    pub(crate) fn copy_to(&self, parameter: &str, start: usize, to: &mut [f32]) {
        let wanted = start..start + to.len();
        for stretch in self.0.get(parameter).into_iter().flatten() {
            let Some(both) = overlap(&wanted, &stretch.elements()) else { continue };
            let from = &stretch.values[both.start - stretch.start..both.end - stretch.start];
            to[both.start - start..both.end - start].copy_from_slice(from);
        }
    }

    /// The bytes of a checkpoint: how many stretches there are; for each of them the length of the
    /// name, the name, the first element, the count and the values. Little endian.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let stretches = self.0.values().map(Vec::len).sum::<usize>() as u64;
        let mut bytes = [&MAGIC[..], &stretches.to_le_bytes()].concat();
        for (parameter, stretches) in &self.0 {
            for Stretch { start, values } in stretches {
                bytes.extend((parameter.len() as u64).to_le_bytes());
                bytes.extend(parameter.as_bytes());
                bytes.extend((*start as u64).to_le_bytes());
                bytes.extend((values.len() as u64).to_le_bytes());
                bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
        }
        bytes
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// Says why the bytes are no such thing.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, UnreadableState> {
        let mut rest = bytes;
        if take(&mut rest, MAGIC.len())? != MAGIC {
            return Err(UnreadableState("it is of another kind or version"));
        }
        let mut kept = Self::default();
        for _ in 0..take_count(&mut rest)? {
            let length = take_count(&mut rest)?;
            let parameter = str::from_utf8(take(&mut rest, length)?)
                .map_err(|_| UnreadableState("a name is not UTF-8"))?;
            let start = take_count(&mut rest)?;
            let count = take_count(&mut rest)?;
            let size = count.checked_mul(4).ok_or(CUT_OFF)?;
            start.checked_add(count).ok_or(UnreadableState("a range has no end"))?;
            let (values, _) = take(&mut rest, size)?.as_chunks();
            let values: Vec<f32> = values.iter().copied().map(f32::from_le_bytes).collect();
            if kept.put(parameter, start, &values) {
                return Err(UnreadableState("it has a range twice"));
            }
        }
        if rest.is_empty() { Ok(kept) } else { Err(UnreadableState("more bytes than it says")) }
    }
}

impl Stretch {
    fn elements(&self) -> Range<usize> {
        self.start..self.start + self.values.len()
    }
}

/// What two ranges share, if anything.
fn overlap(first: &Range<usize>, second: &Range<usize>) -> Option<Range<usize>> {
    let both = first.start.max(second.start)..first.end.min(second.end);
    (!both.is_empty()).then_some(both)
}

/// The next `count` bytes of a saved state.
pub(crate) fn take<'a>(rest: &mut &'a [u8], count: usize) -> Result<&'a [u8], UnreadableState> {
    let (taken, after) = rest.split_at_checked(count).ok_or(CUT_OFF)?;
    *rest = after;
    Ok(taken)
}

/// The next number of a saved state.
pub(crate) fn take_u64(rest: &mut &[u8]) -> Result<u64, UnreadableState> {
    let bytes = take(rest, 8)?.try_into().expect("as many were taken");
    Ok(u64::from_le_bytes(bytes))
}

fn take_count(rest: &mut &[u8]) -> Result<usize, UnreadableState> {
    usize::try_from(take_u64(rest)?).map_err(|_| CUT_OFF)
}

const CUT_OFF: UnreadableState = UnreadableState("it is cut off");
const MAGIC: &[u8; 8] = b"unikept1";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kept() -> impl Strategy<Value = Kept> {
        let stretch = ("[a-c.é]{0,3}", 0..20_usize, prop::collection::vec(-1.0_f32..1.0, 0..9));
        prop::collection::vec(stretch, 0..6).prop_map(|stretches| {
            let mut kept = Kept::default();
            for (parameter, start, values) in &stretches {
                kept.put(parameter, *start, values);
            }
            kept
        })
    }

    #[test]
    fn what_is_kept_is_found_by_its_elements_whatever_the_pieces() {
        let mut kept = Kept::default();
        kept.put("w", 2, &[2.0, 3.0, 4.0]);
        kept.put("w", 5, &[5.0]);
        kept.put("v", 0, &[9.0]);
        let mut found = [0.5; 8];
        kept.copy_to("w", 0, &mut found);
        assert_eq!(found, [0.5, 0.5, 2.0, 3.0, 4.0, 5.0, 0.5, 0.5]);
        let mut found = [0.5; 2];
        kept.copy_to("w", 4, &mut found);
        assert_eq!(found, [4.0, 5.0]);
        kept.copy_to("w", 100, &mut found);
        kept.copy_to("u", 0, &mut found);
        assert_eq!(found, [4.0, 5.0]);
    }

    #[test]
    fn a_range_that_is_there_twice_is_refused() {
        let mut kept = Kept::default();
        kept.put("w", 0, &[1.0]);
        kept.put("w", 4, &[2.0]);
        let mut bytes = kept.to_bytes();
        let start = bytes.len() - 4 - 8 - 8;
        for (at, is_twice) in [(4, false), (1, false), (0, true)] {
            bytes[start] = at;
            let twice = UnreadableState("it has a range twice");
            let read = Kept::from_bytes(&bytes);
            assert_eq!(read.err(), is_twice.then_some(twice), "from {at}");
        }
    }

    proptest! {
        #[test]
        fn bytes_bring_back_what_was_kept(kept in kept()) {
            prop_assert_eq!(Kept::from_bytes(&kept.to_bytes()), Ok(kept));
        }

        #[test]
        fn bytes_that_are_cut_off_or_continued_are_refused(
            kept in kept(),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = kept.to_bytes();
            prop_assert!(Kept::from_bytes(&bytes[..cut.index(bytes.len())]).is_err());
            bytes.push(0);
            prop_assert!(Kept::from_bytes(&bytes).is_err());
        }

        #[test]
        fn any_bytes_are_read_or_refused(
            kept in kept(),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let mut bytes = kept.to_bytes();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(read) = Kept::from_bytes(&bytes) {
                let again = Kept::from_bytes(&read.to_bytes()).expect("it was written");
                prop_assert_eq!(again.to_bytes(), read.to_bytes());
            }
        }
    }
}
