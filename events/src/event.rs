//! What is recorded.

/// Something that a thread of a rank did.
///
/// Communicators are numbered as in errors (0 is the job's). Collectives, element types and
/// algorithms are the numbers that calls carry on the wire; `number` counts the collectives of a
/// communicator, those included that try algorithms. Peers are ranks of the communicator whose call
/// the thread is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A collective began, with its algorithm.
    CallEntered {
        /// Of which communicator.
        communicator: u32,
        /// Which collective of it.
        number: u32,
        /// Which kind.
        collective: u8,
        /// The element type.
        dtype: u8,
        /// The algorithm, as an index among those of its collective.
        algorithm: u8,
        /// Elements.
        count: u64,
    },
    /// An action of the compiled plan began: a run of transfers, or a step of a group that shares
    /// memory.
    StepBegun {
        /// Which action of the program.
        action: u32,
    },
    /// A message to a peer was handed over entirely: its memory is this rank's again.
    Sent {
        /// To which rank.
        peer: u32,
        /// Payload.
        bytes: u64,
    },
    /// A message of a peer has arrived entirely.
    Received {
        /// From which rank.
        peer: u32,
        /// Payload.
        bytes: u64,
    },
    /// The thread goes to sleep until a peer does something.
    Blocked {
        /// The first rank that is waited for, if that is known.
        on: Option<u32>,
    },
    /// It goes on.
    Woken,
    /// The collective ended well.
    CallCompleted {
        /// Of which communicator.
        communicator: u32,
        /// Which collective of it.
        number: u32,
    },
    /// The collective ended with an error.
    CallAborted {
        /// Of which communicator.
        communicator: u32,
        /// Which collective of it.
        number: u32,
    },
}

const NOBODY: u32 = u32::MAX;

impl Event {
    /// As words: the kind and small fields, two numbers, a large one.
    #[inline]
    pub(crate) fn words(self) -> [u64; 3] {
        let pair = |one: u32, other: u32| u64::from(one) << 32 | u64::from(other);
        match self {
            Self::CallEntered { communicator, number, collective, dtype, algorithm, count } => {
                let bytes = [1, collective, dtype, algorithm, 0, 0, 0, 0];
                [u64::from_le_bytes(bytes), pair(communicator, number), count]
            }
            Self::StepBegun { action } => [2, action.into(), 0],
            Self::Sent { peer, bytes } => [3, peer.into(), bytes],
            Self::Received { peer, bytes } => [4, peer.into(), bytes],
            Self::Blocked { on } => [5, on.unwrap_or(NOBODY).into(), 0],
            Self::Woken => [6, 0, 0],
            Self::CallCompleted { communicator, number } => [7, pair(communicator, number), 0],
            Self::CallAborted { communicator, number } => [8, pair(communicator, number), 0],
        }
    }

    /// From words; `None` of what is no event.
    pub(crate) fn from_words([first, second, third]: [u64; 3]) -> Option<Self> {
        let [kind, collective, dtype, algorithm, ..] = first.to_le_bytes();
        let (communicator, number) = ((second >> 32) as u32, second as u32);
        let peer = second as u32;
        Some(match kind {
            1 => {
                let count = third;
                Self::CallEntered { communicator, number, collective, dtype, algorithm, count }
            }
            2 => Self::StepBegun { action: peer },
            3 => Self::Sent { peer, bytes: third },
            4 => Self::Received { peer, bytes: third },
            5 => Self::Blocked { on: Some(peer).filter(|&peer| peer != NOBODY) },
            6 => Self::Woken,
            7 => Self::CallCompleted { communicator, number },
            8 => Self::CallAborted { communicator, number },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_back_from_their_words() {
        let (communicator, number, count) = (u32::MAX, 7, u64::MAX);
        let all = [
            Event::CallEntered {
                communicator,
                number,
                collective: 9,
                dtype: 255,
                algorithm: 3,
                count,
            },
            Event::StepBegun { action: 12 },
            Event::Sent { peer: 1, bytes: u64::MAX },
            Event::Received { peer: 0, bytes: 0 },
            Event::Blocked { on: Some(65_535) },
            Event::Blocked { on: None },
            Event::Woken,
            Event::CallCompleted { communicator: 1, number: u32::MAX },
            Event::CallAborted { communicator, number },
        ];
        for event in all {
            assert_eq!(Event::from_words(event.words()), Some(event));
        }
        assert_eq!(Event::from_words([0; 3]), None);
        assert_eq!(Event::from_words([9, 0, 0]), None);
    }
}
