//! What members say to each other.

use crate::{Member, View};

/// A proposer's claim to be heard: the higher wins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ballot {
    /// From 1; 0 is below all ballots.
    pub round: u32,
    /// The proposer's rank in the view that is to be left.
    pub rank: u32,
}

/// An acceptor's answer to [`Message::Prepare`].
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Promise {
    /// What it has accepted already: this may have been decided.
    pub accepted: Option<(Ballot, View)>,
    /// Members that it has lost or wants out.
    pub out: Vec<Member>,
}

/// What members say to each other. Messages of an epoch that is over are answered by the view that
/// took its place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Message {
    /// To the coordinator: the view is to change.
    Wish {
        /// The sender's view, as it may be news.
        view: View,
        /// Members that the sender has lost or wants out.
        out: Vec<Member>,
        /// Whether newcomers may enter.
        admits: bool,
    },
    /// A process asks to be let in. Any member may be asked.
    Join(Member),
    /// A proposer asks for a promise to follow no lower ballot.
    Prepare {
        /// The view that is to be left, as it may be news.
        view: View,
        /// The proposer's ballot.
        ballot: Ballot,
    },
    /// The promise.
    Promised {
        /// Of the view that is to be left.
        epoch: u64,
        /// The ballot that is followed.
        ballot: Ballot,
        /// What the proposer has to know.
        promise: Promise,
    },
    /// A higher ballot is followed.
    Refused {
        /// Of the view that is to be left.
        epoch: u64,
        /// The ballot that is followed.
        ballot: Ballot,
    },
    /// A proposer asks to accept the next view.
    Accept {
        /// The proposer's ballot.
        ballot: Ballot,
        /// The next view.
        next: View,
    },
    /// It is accepted.
    Accepted {
        /// Of the view that is to be left.
        epoch: u64,
        /// The ballot that is followed.
        ballot: Ballot,
    },
    /// A view that was decided.
    Decided(View),
}
