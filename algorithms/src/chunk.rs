//! Division of a range of elements.

use std::ops::Range;

/// Part `i` of `parts` nearly equal parts of `range`; together they cover it exactly.
///
/// Large parts begin at a multiple of 16 elements (a cache line of 4-byte elements), so that vector
/// kernels see aligned data; parts so small that this would unbalance them do not.
///
/// # Panics
/// If `parts` is 0 or `i` is not below it.
pub fn chunk(range: &Range<usize>, parts: usize, i: usize) -> Range<usize> {
    let part = split(range, parts, i);
    if range.len() / parts < ALIGN_FROM {
        return part;
    }
    let align = |at: usize| {
        if at == range.start || at == range.end { at } else { at / ALIGN * ALIGN }
    };
    align(part.start)..align(part.end)
}

/// Part `i` of `parts` parts of `range` whose lengths differ by one at most.
pub(crate) fn split(range: &Range<usize>, parts: usize, i: usize) -> Range<usize> {
    assert!(i < parts, "part {i} of {parts}");
    let (whole, rest) = (range.len() / parts, range.len() % parts);
    let cut = |i: usize| range.start + whole * i + rest * i / parts;
    cut(i)..cut(i + 1)
}

/// The length of the slices that `len` elements are cut into: nearly equal, at most `max_elements`
/// each.
pub(crate) fn slice_len(len: usize, max_elements: usize) -> usize {
    let max = max_elements.max(1);
    let even = len.div_ceil(len.div_ceil(max).max(1));
    let aligned = even.next_multiple_of(ALIGN);
    if even >= ALIGN_FROM && aligned <= max { aligned } else { even }
}

/// Slice `k` of `elements`, empty beyond the last one.
pub(crate) fn nth_slice(elements: &Range<usize>, max_elements: usize, k: usize) -> Range<usize> {
    if elements.len() <= max_elements {
        return if k == 0 { elements.clone() } else { elements.end..elements.end };
    }
    let len = slice_len(elements.len(), max_elements);
    let start = elements.end.min(elements.start + k * len);
    start..elements.end.min(start + len)
}

/// How many slices [`nth_slice`] cuts `len` elements into.
pub(crate) fn slice_count(len: usize, max_elements: usize) -> usize {
    if len <= max_elements { len.min(1) } else { len.div_ceil(slice_len(len, max_elements)) }
}

const ALIGN: usize = 16;
/// Parts from this length on are aligned: the longest is then at most 1.6 % longer than the mean.
const ALIGN_FROM: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_cover_the_range_and_stay_balanced(
            start in 0usize..100, len in 0usize..200_000, parts in 1usize..70,
        ) {
            let range = start..start + len;
            let mut at = start;
            for i in 0..parts {
                let part = chunk(&range, parts, i);
                prop_assert_eq!(part.start, at);
                let slack = if len / parts < ALIGN_FROM { 1 } else { ALIGN };
                prop_assert!(part.len().abs_diff(len / parts) <= slack);
                at = part.end;
            }
            prop_assert_eq!(at, range.end);
        }

        #[test]
        fn slices_cover_the_range_and_respect_the_limit(
            start in 0usize..100, len in 0usize..20_000, max in 1usize..5_000,
        ) {
            let range = start..start + len;
            let mut at = start;
            for k in 0..slice_count(len, max) {
                let part = nth_slice(&range, max, k);
                prop_assert_eq!(part.start, at);
                prop_assert!(!part.is_empty() && part.len() <= max);
                at = part.end;
            }
            prop_assert_eq!(at, range.end);
            prop_assert!(slice_count(len, max) <= len.div_ceil(max));
        }
    }

    #[test]
    fn large_chunks_begin_at_a_multiple_of_16() {
        for i in 0..7 {
            assert_eq!(chunk(&(0..100_003), 7, i).start % ALIGN, 0);
        }
    }
}
