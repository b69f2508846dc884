//! Who gives which elements to whom when shards are laid out anew. Pure; all ranks derive the same.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::{Buf, BufMut};
use unisum_link::Rank;

/// Elements of a parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) parameter: usize,
    pub(super) elements: Range<usize>,
}

/// What a rank has of one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Had {
    pub(super) version: u64,
    pub(super) extents: Vec<Extent>,
}

/// What a rank tells of its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Card {
    pub(super) vectors: u64,
    /// The type of the elements, as on the wire.
    pub(super) dtype: u8,
    /// Whether it is state of the buckets' parameters, as far as the rank knows.
    pub(super) fits: bool,
    /// The number of the copies that the rank knows all ranks to have.
    pub(super) copied: u64,
    /// Its own shards first, then whatever else it has.
    pub(super) had: Vec<Had>,
}

/// Elements that keep or change their rank when shards are laid out anew
/// ([`Buckets::reshard`](super::Buckets::reshard)).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShardMove {
    /// The parameter, by its index in the list.
    pub parameter: usize,
    /// Which of its elements.
    pub elements: Range<usize>,
    /// The rank whose state they come from, often the same one; `None` if nobody has them any more.
    pub from: Option<Rank>,
    /// The rank in whose shard they are now.
    pub to: Rank,
}

/// The same, with where the sender has them: its own shards are 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) told: ShardMove,
    pub(super) holding: usize,
}

impl Move {
    /// Whether the elements change their rank.
    pub(super) fn travels(&self) -> bool {
        self.told.from.is_some_and(|from| from != self.told.to)
    }
}

impl Card {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.put_u64_le(self.vectors);
        bytes.put_u64_le(self.dtype.into());
        bytes.put_u64_le(self.fits.into());
        bytes.put_u64_le(self.copied);
        for Had { version, extents } in &self.had {
            bytes.put_u64_le(*version);
            bytes.put_u64_le(extents.len() as u64);
            for Extent { parameter, elements } in extents {
                bytes.put_u64_le(*parameter as u64);
                bytes.put_u64_le(elements.start as u64);
                bytes.put_u64_le(elements.end as u64);
            }
        }
        bytes
    }

    /// What another rank told, if these are its parameters.
    pub(super) fn decode(mut bytes: &[u8], counts: &[usize]) -> Option<Self> {
        let mut number = || bytes.try_get_u64_le().ok();
        let (vectors, dtype, fits) = (number()?, number()?.try_into().ok()?, number()? != 0);
        let copied = number()?;
        let mut card = Self { vectors, dtype, fits, copied, had: Vec::new() };
        while let Some(version) = number() {
            let mut extents = Vec::new();
            for _ in 0..number()? {
                let (parameter, start, end) = (number()?, number()?, number()?);
                let (parameter, elements) = (parameter as usize, start as usize..end as usize);
                let is_right = elements.start < elements.end
                    && counts.get(parameter).is_some_and(|&count| elements.end <= count);
                extents.push(is_right.then_some(Extent { parameter, elements })?);
            }
            card.had.push(Had { version, extents });
        }
        Some(card)
    }
}

/// Whose elements of which parameter, by parameter: (elements, rank, holding).
type Sources = Vec<Vec<(Range<usize>, Rank, usize)>>;

fn sources(counts: &[usize], cards: &[Card], version: u64) -> Sources {
    let mut sources: Sources = vec![Vec::new(); counts.len()];
    for (rank, card) in cards.iter().enumerate() {
        for (holding, had) in card.had.iter().enumerate().filter(|(_, it)| it.version == version) {
            for Extent { parameter, elements } in &had.extents {
                sources[*parameter].push((elements.clone(), rank, holding));
            }
        }
    }
    sources
}

/// How many elements somebody has.
fn covered(sources: &Sources) -> usize {
    let of_parameter = |sources: &Vec<(Range<usize>, Rank, usize)>| {
        let mut ranges: Vec<_> = sources.iter().map(|it| it.0.clone()).collect();
        ranges.sort_by_key(|it| it.start);
        let (mut covered, mut end) = (0, 0);
        for range in ranges {
            covered += range.end.saturating_sub(end.max(range.start));
            end = end.max(range.end);
        }
        covered
    };
    sources.iter().map(of_parameter).sum()
}

/// The version of which most elements are there; of several the latest. 0 if there is none.
pub(super) fn choose(counts: &[usize], cards: &[Card]) -> u64 {
    let versions: BTreeSet<u64> =
        cards.iter().flat_map(|it| &it.had).map(|it| it.version).collect();
    let most = versions.into_iter().max_by_key(|&it| (covered(&sources(counts, cards, it)), it));
    most.unwrap_or(0)
}

/// How elements of a version come to those that own them now, in the order of the owners.
pub(super) fn moves(
    counts: &[usize],
    cards: &[Card],
    version: u64,
    owners: &[(Rank, Extent)],
) -> Vec<Move> {
    let sources = sources(counts, cards, version);
    let mut moves: Vec<Move> = Vec::new();
    for (to, Extent { parameter, elements }) in owners {
        let ends = sources[*parameter].iter().flat_map(|(it, _, _)| [it.start, it.end]);
        let inside = ends.filter(|it| elements.start < *it && *it < elements.end);
        let cuts: BTreeSet<usize> = inside.chain([elements.start, elements.end]).collect();
        let cuts: Vec<usize> = cuts.into_iter().collect();
        for (&start, &end) in cuts.iter().zip(&cuts[1..]) {
            let has =
                sources[*parameter].iter().filter(|(it, _, _)| it.start <= start && end <= it.end);
            // What is there already stays; else those that own it give it, and copies come last.
            let source = has.min_by_key(|(_, rank, holding)| (rank != to, *holding, *rank));
            let (from, holding) = source.map_or((None, 0), |&(_, rank, it)| (Some(rank), it));
            if let Some(Move { told, holding: before }) = moves.last_mut()
                && (told.parameter, told.elements.end, told.from) == (*parameter, start, from)
                && (told.to, *before) == (*to, holding)
            {
                told.elements.end = end;
                continue;
            }
            let (parameter, elements, to) = (*parameter, start..end, *to);
            moves.push(Move { told: ShardMove { parameter, elements, from, to }, holding });
        }
    }
    moves
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extent((parameter, start, end): (usize, usize, usize)) -> Extent {
        Extent { parameter, elements: start..end }
    }

    fn had(version: u64, extents: &[(usize, usize, usize)]) -> Had {
        Had { version, extents: extents.iter().copied().map(extent).collect() }
    }

    fn card(had: Vec<Had>) -> Card {
        Card { vectors: 2, dtype: 3, fits: true, copied: 8, had }
    }

    #[test]
    fn cards_survive_the_wire_and_fit_the_parameters() {
        let card = card(vec![had(7, &[(0, 0, 5), (2, 1, 3)]), had(6, &[])]);
        let encoded = card.encode();
        assert_eq!(Card::decode(&encoded, &[5, 0, 3]), Some(card));
        assert_eq!(Card::decode(&encoded, &[5, 0, 2]), None);
        assert_eq!(Card::decode(&encoded, &[5, 0]), None);
        assert_eq!(Card::decode(&encoded[..encoded.len() - 8], &[5, 0, 3]), None);
        assert_eq!(Card::decode(&[], &[5]), None);
    }

    #[test]
    fn a_whole_earlier_version_comes_before_a_part_of_a_later_one() {
        let counts = [10];
        // Rank 1 of three is gone: its copy of version 6 is on rank 2, now rank 1.
        let first = card(vec![had(7, &[(0, 0, 4)]), had(6, &[(0, 0, 4)]), had(6, &[(0, 8, 10)])]);
        let last = card(vec![had(7, &[(0, 8, 10)]), had(6, &[(0, 8, 10)]), had(6, &[(0, 4, 8)])]);
        let cards = [first.clone(), last];
        assert_eq!(choose(&counts, &cards), 6);
        let owners = [(0, extent((0, 0, 5))), (1, extent((0, 5, 10)))];
        let told: Vec<_> = moves(&counts, &cards, 6, &owners)
            .into_iter()
            .map(|it| (it.told.elements, it.told.from, it.told.to, it.holding))
            .collect();
        let expected = [
            (0..4, Some(0), 0, 1),
            (4..5, Some(1), 0, 2),
            (5..8, Some(1), 1, 2),
            (8..10, Some(1), 1, 1),
        ];
        assert_eq!(told, expected);
        // Without it, of the later one what there is.
        let cards = [first, card(vec![])];
        assert_eq!(choose(&counts, &cards), 6, "six elements are more than four");
        let cards = [card(vec![had(7, &[(0, 0, 4)]), had(6, &[(0, 0, 4)])]), card(vec![])];
        assert_eq!(choose(&counts, &cards), 7);
        let last = moves(&counts, &cards, 7, &owners).pop().unwrap();
        assert_eq!((last.told.elements, last.told.from), (5..10, None));
        assert_eq!(choose(&counts, &[card(vec![])]), 0);
    }

    proptest! {
        /// Own shards may lack elements; copies of the same version and of others are beside them.
        #[test]
        fn every_element_comes_once_and_from_one_that_has_it(
            counts in proptest::collection::vec(0..40_usize, 1..5),
            ranges in proptest::collection::vec(
                ((0..4_usize, 0..3_usize), 0..5_usize, 0..40_usize, 0..40_usize),
                0..30,
            ),
            owners in 1..6_usize,
        ) {
            let versions = [3, 3, 2];
            let mut cards = vec![card(versions.map(|it| had(it, &[])).into()); 4];
            for ((rank, holding), parameter, a, b) in ranges {
                let count = counts.get(parameter).copied().unwrap_or(0);
                let (a, b) = (a.min(b).min(count), a.max(b).min(count));
                if a < b {
                    cards[rank].had[holding].extents.push(extent((parameter, a, b)));
                }
            }
            let mut owned = Vec::new();
            for (parameter, &count) in counts.iter().enumerate() {
                let each = count.div_ceil(owners);
                let range = |it: usize| (it * each).min(count)..((it + 1) * each).min(count);
                let of = (0..owners).map(|it| (it, Extent { parameter, elements: range(it) }));
                owned.extend(of.filter(|(_, it)| !it.elements.is_empty()));
            }
            let has = |(rank, holding): (usize, usize), parameter: usize, at: usize| {
                let had: &Had = &cards[rank].had[holding];
                had.extents.iter().any(|it| it.parameter == parameter && it.elements.contains(&at))
            };
            // Whoever chooses, no other version has more.
            let there = |version| {
                let at = |(parameter, &count): (usize, &usize)| {
                    let is_there = |at: &usize| {
                        let holdings = (0..4).flat_map(|rank| (0..3).map(move |it| (rank, it)));
                        holdings.filter(|it| versions[it.1] == version)
                            .any(|it| has(it, parameter, *at))
                    };
                    (0..count).filter(is_there).count()
                };
                counts.iter().enumerate().map(at).sum::<usize>()
            };
            prop_assert_eq!(choose(&counts, &cards), if there(2) > there(3) { 2 } else { 3 });
            let mut seen: Vec<Vec<usize>> = counts.iter().map(|&it| vec![0; it]).collect();
            for Move { told, holding } in moves(&counts, &cards, 3, &owned) {
                for at in told.elements {
                    seen[told.parameter][at] += 1;
                    let has = |it| has(it, told.parameter, at);
                    let of_rank = |rank| (0..2).find(|it| has((rank, *it)));
                    if let Some(from) = told.from {
                        prop_assert!(versions[holding] == 3 && has((from, holding)));
                        let is_owned = (0..4).any(|it| has((it, 0)));
                        prop_assert!(holding == 0 || from == told.to || !is_owned);
                    }
                    prop_assert!(told.from.is_some() || (0..4).all(|it| of_rank(it).is_none()));
                    let stays = told.to < 4 && of_rank(told.to).is_some();
                    prop_assert!(!stays || told.from == Some(told.to));
                }
            }
            prop_assert!(seen.iter().flatten().all(|&it| it == 1));
        }
    }
}
