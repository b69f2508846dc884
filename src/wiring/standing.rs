//! What the ranks of an elastic job tell each other as they enter a view: how far each is.

use bytes::{Buf, BufMut};

/// Where a rank is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Position {
    /// In the program, outside of any step.
    Program,
    /// In the step of this index.
    Step(u64),
}

/// A step of gradient buckets of which it is known how it ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decided {
    /// The index of the step.
    pub(crate) step: u64,
    /// The votes of all ranks together.
    pub(crate) ballot: Vec<u8>,
}

/// How far a rank is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) position: Position,
    /// The last step that this rank saw decided.
    pub(crate) decided: Option<Decided>,
}

/// What becomes of a step that a change of view interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// A rank saw all ranks vote, so all had complete results: the step ends as they voted.
    /// `is_passed` if a rank has gone on to the next step, or to something else.
    Commits { ballot: Vec<u8>, is_passed: bool },
    /// Nobody did: those that are left make it again.
    Redone,
}

impl Standing {
    /// What becomes of step `step`, which this rank is in, as all ranks of the new view stand. The
    /// same on all ranks that are in it.
    pub(crate) fn judge(all: &[Self], step: u64) -> Verdict {
        let decided = all.iter().filter_map(|it| it.decided.as_ref());
        let Some(Decided { ballot, .. }) = decided.into_iter().find(|it| it.step == step) else {
            return Verdict::Redone;
        };
        let is_passed = all.iter().any(|it| it.position != Position::Step(step));
        Verdict::Commits { ballot: ballot.clone(), is_passed }
    }

    /// How many steps of their gradient buckets the ranks of a view saw decided; `None` if it does
    /// not show.
    pub(crate) fn decided_steps(all: &[Self]) -> Option<u64> {
        let decided = all.iter().filter_map(|it| Some(it.decided.as_ref()?.step + 1)).max();
        // Before the first vote, all are in the same step.
        decided.or_else(|| all.iter().filter_map(Self::place).min())
    }

    /// The step that this rank is in.
    pub(crate) const fn place(&self) -> Option<u64> {
        match self.position {
            Position::Program => None,
            Position::Step(step) => Some(step),
        }
    }

    /// Whether all ranks are in steps, so that they can go on with them.
    pub(crate) fn are_together(all: &[Self]) -> bool {
        all.iter().all(|it| it.position != Position::Program)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self.position {
            Position::Program => bytes.put_u8(0),
            Position::Step(step) => {
                bytes.put_u8(1);
                bytes.put_u64_le(step);
            }
        }
        if let Some(Decided { step, ballot }) = &self.decided {
            bytes.put_u64_le(*step);
            bytes.put_slice(ballot);
        }
        bytes
    }

    pub(crate) fn decode(mut bytes: &[u8]) -> Option<Self> {
        let position = match bytes.try_get_u8().ok()? {
            0 => Position::Program,
            1 => Position::Step(bytes.try_get_u64_le().ok()?),
            _ => return None,
        };
        let mut decided = None;
        if !bytes.is_empty() {
            let step = bytes.try_get_u64_le().ok()?;
            decided = Some(Decided { step, ballot: bytes.to_vec() });
        }
        Some(Self { position, decided })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(position: Position, decided: Option<u64>) -> Standing {
        let decided = decided.map(|step| Decided { step, ballot: vec![step as u8, 7] });
        Standing { position, decided }
    }

    #[test]
    fn standings_survive_the_wire() {
        for position in [Position::Program, Position::Step(0), Position::Step(u64::MAX)] {
            for decided in [None, Some(0), Some(41)] {
                let standing = at(position, decided);
                assert_eq!(Standing::decode(&standing.encode()), Some(standing));
            }
        }
        for bytes in [&b""[..], b"\x02", b"\x01short", b"\x00short"] {
            assert_eq!(Standing::decode(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn a_step_is_committed_if_anybody_saw_it_decided() {
        use Position::{Program, Step};
        let behind = at(Step(5), Some(4));
        let judge =
            |others: &[Standing]| Standing::judge(&[&[behind.clone()][..], others].concat(), 5);
        let commits = |is_passed| Verdict::Commits { ballot: vec![5, 7], is_passed };
        assert_eq!(judge(&[]), Verdict::Redone);
        assert_eq!(judge(&[behind.clone(), at(Step(5), None)]), Verdict::Redone);
        assert_eq!(judge(&[at(Program, Some(4))]), Verdict::Redone);
        assert_eq!(judge(&[at(Step(5), Some(5))]), commits(false));
        assert_eq!(judge(&[at(Step(5), Some(5)), at(Step(6), Some(5))]), commits(true));
        assert_eq!(judge(&[at(Program, Some(5))]), commits(true));
    }

    #[test]
    fn who_is_in_the_program_is_not_in_a_step() {
        use Position::{Program, Step};
        assert!(Standing::are_together(&[at(Step(5), None), at(Step(6), Some(5))]));
        assert!(!Standing::are_together(&[at(Step(5), None), at(Program, Some(5))]));
    }
}
