//! A view, and which sets of its members are quorums.

use std::fmt;

/// One start of one process. A process that comes back is another member.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member(pub u64);

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "m{:x}", self.0)
    }
}

/// Who is in the job during an epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct View {
    /// The first is 1; each change adds 1. 0 stands for no view.
    pub epoch: u64,
    /// The members by rank: those that stay keep their order, newcomers follow.
    pub members: Vec<Member>,
}

impl View {
    /// The view in which a job starts.
    pub const fn first(members: Vec<Member>) -> Self {
        Self { epoch: 1, members }
    }

    /// The member's rank, if it is in the view.
    pub fn rank(&self, member: Member) -> Option<usize> {
        self.members.iter().position(|&it| it == member)
    }

    /// Whether a member is in the view.
    pub fn has(&self, member: Member) -> bool {
        self.members.contains(&member)
    }

    /// Whether those of the view for which `is_there` holds may decide for all of it: more than
    /// half, or half with the first member.
    pub fn is_quorum(&self, is_there: impl Fn(Member) -> bool) -> bool {
        let there = self.members.iter().filter(|&&member| is_there(member)).count();
        let has_first = self.members.first().is_some_and(|&member| is_there(member));
        2 * there > self.members.len() || 2 * there == self.members.len() && has_first
    }

    /// The view after this one: without those in `out`, with those in `join` that are new.
    pub(crate) fn next(
        &self,
        out: impl Fn(Member) -> bool,
        join: impl IntoIterator<Item = Member>,
    ) -> Self {
        let mut members = self.members.clone();
        members.retain(|&member| !out(member));
        for member in join {
            if !self.has(member) {
                members.push(member);
            }
        }
        Self { epoch: self.epoch + 1, members }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every two quorums of a view share a member: that is all that safety rests on.
    #[test]
    fn any_two_quorums_meet() {
        for world in 1..=9_u64 {
            let view = View::first((0..world).map(Member).collect());
            let is_quorum = |set: u64| view.is_quorum(|Member(it)| set >> it & 1 == 1);
            let quorums: Vec<u64> = (0..1 << world).filter(|&set| is_quorum(set)).collect();
            assert!(quorums.contains(&((1 << world) - 1)));
            for (a, b) in quorums.iter().flat_map(|a| quorums.iter().map(move |b| (a, b))) {
                assert_ne!(a & b, 0, "world {world}: {a:b} and {b:b}");
            }
        }
    }

    #[test]
    fn of_two_halves_the_one_with_the_first_member_goes_on() {
        let view = View::first((0..4).map(Member).collect());
        assert!(view.is_quorum(|Member(it)| it < 2));
        assert!(!view.is_quorum(|Member(it)| it >= 2));
        assert!(view.is_quorum(|Member(it)| it >= 1));
    }

    #[test]
    fn those_that_stay_keep_their_order_and_newcomers_follow() {
        let view = View::first([4, 1, 3].map(Member).into());
        let next = view.next(|it| it == Member(1), [Member(3), Member(9)]);
        assert_eq!(next, View { epoch: 2, members: [4, 3, 9].map(Member).into() });
    }
}
