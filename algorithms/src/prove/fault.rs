//! Faults of plans.

use std::fmt;
use std::ops::Range;

use crate::{Pattern, Rank};

/// Why plans do not implement their collective. Rounds count from 0 and index the rank's plan.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are what their names say, and `Display` spells each of them out
pub enum Fault {
    /// A rank has a different number of rounds than rank 0.
    Rounds { rank: Rank, rounds: usize, expected: usize },
    /// A transfer with the rank itself or a rank beyond the world.
    Partner { rank: Rank, round: usize, other: Rank },
    /// A range that is not part of the space, or one that ends before it starts.
    Bounds { rank: Rank, round: usize, elements: Range<usize> },
    /// A store from no or several sources.
    StoreSources { rank: Rank, round: usize, sources: usize },
    /// A reduce whose sources are missing, repeated or not in rank order.
    ReduceSources { rank: Rank, round: usize, from: Vec<Rank> },
    /// Two arrivals of one step in the same elements.
    ArrivalsOverlap { rank: Rank, round: usize, elements: Range<usize> },
    /// A store into elements that the same step sends.
    StoreIntoSent { rank: Rank, round: usize, elements: Range<usize> },
    /// A mark that says something untrue about the group.
    Mark { rank: Rank, round: usize, pattern: Pattern, why: &'static str },
    /// The two ends of a transfer mean different elements.
    Elements {
        from: Rank,
        sent_in: usize,
        sent: Range<usize>,
        to: Rank,
        expected_in: usize,
        expected: Range<usize>,
    },
    /// The two ends of a transfer are in different rounds.
    RoundsDiffer { from: Rank, sent_in: usize, to: Rank, expected_in: usize },
    /// An element is sent or folded that has no value on this rank.
    NoValue { rank: Rank, round: usize, element: usize },
    /// An input is folded into a value that already contains it.
    CountedTwice { rank: Rank, round: usize, input: Rank, element: usize },
    /// Values are folded that together are not in rank order.
    RankOrder { rank: Rank, round: usize, element: usize },
    /// A rank ends without an input to an element that it wants.
    Missing { rank: Rank, input: Rank, element: usize },
    /// A rank ends with all inputs, folded in another order than on another rank.
    Order { rank: Rank, than: Rank, element: usize },
    /// No rank can go on; `rank` is the first that has not finished.
    Deadlock { rank: Rank, round: usize, window: usize },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rounds { rank, rounds, expected } => {
                write!(f, "rank {rank} has {rounds} rounds where rank 0 has {expected}")
            }
            Self::Partner { rank, round, other } => {
                write!(f, "rank {rank} round {round}: no transfer is possible with rank {other}")
            }
            Self::Bounds { rank, round, elements } => {
                write!(f, "rank {rank} round {round}: elements {elements:?} are not in the space")
            }
            Self::StoreSources { rank, round, sources } => {
                write!(f, "rank {rank} round {round}: store from {sources} sources instead of one")
            }
            Self::ReduceSources { rank, round, from } => write!(
                f,
                "rank {rank} round {round}: sources {from:?} are not distinct ranks in order"
            ),
            Self::ArrivalsOverlap { rank, round, elements } => write!(
                f,
                "rank {rank} round {round}: another arrival overlaps elements {elements:?}"
            ),
            Self::StoreIntoSent { rank, round, elements } => {
                write!(f, "rank {rank} round {round}: store into sent elements {elements:?}")
            }
            Self::Mark { rank, round, pattern, why } => {
                write!(f, "rank {rank} round {round}: marked {pattern:?}, but {why}")
            }
            _ => self.fmt_outcome(f),
        }
    }
}

impl Fault {
    /// The faults that show only when the plans of several ranks meet.
    fn fmt_outcome(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Elements { from, sent_in, sent, to, expected_in, expected } => write!(
                f,
                "rank {from} round {sent_in} sends elements {sent:?} \
                 where rank {to} round {expected_in} expects {expected:?}"
            ),
            Self::RoundsDiffer { from, sent_in, to, expected_in } => write!(
                f,
                "rank {from} sends in round {sent_in} what rank {to} expects in round {expected_in}"
            ),
            Self::CountedTwice { rank, round, input, element } => write!(
                f,
                "rank {rank} round {round}: input {input} counted twice in element {element}"
            ),
            Self::Missing { rank, input, element } => {
                write!(f, "rank {rank} ends without the input of rank {input} in element {element}")
            }
            Self::Order { rank, than, element } => {
                write!(f, "rank {rank} folds element {element} in another order than rank {than}")
            }
            Self::RankOrder { rank, round, element } => {
                write!(f, "rank {rank} round {round}: element {element} is not in rank order")
            }
            Self::NoValue { rank, round, element } => {
                write!(f, "rank {rank} round {round}: element {element} has no value there")
            }
            Self::Deadlock { rank, round, window } => {
                write!(f, "rank {rank} round {round}: deadlock with a window of {window} steps")
            }
            _ => write!(f, "{self:?}"), // all others are told by `fmt`
        }
    }
}

impl std::error::Error for Fault {}
