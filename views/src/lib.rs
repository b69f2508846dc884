//! Views: who is in an elastic job, epoch by epoch, agreed on by the members themselves.
//!
//! A [`View`] is an epoch and an ordered list of [`Member`]s; a rank is a place in that list. When
//! a member is lost, asked out, or wants in, the others agree on the next view by single-decree
//! Paxos: the acceptors of epoch e + 1 are the members of view e, the proposer is the first of them
//! that is not lost. A quorum is a strict majority of view e, or exactly half of it if that half
//! has the first member. Any two quorums share a member, so no epoch ever has two views, and of two
//! halves of a job that can't reach each other one goes on at most.
//!
//! The crate does no I/O and knows no clock: [`Participant`] takes what happened and says what to
//! send. It has no dependencies. `tests/model.rs` checks it exhaustively for small worlds,
//! `tests/simulation.rs` on a virtual clock for larger ones.
//!
//! Source: Lamport, "Paxos Made Simple", 2001; views and epochs as in Birman and Joseph,
//! "Exploiting Virtual Synchrony in Distributed Systems", SOSP 1987.

mod message;
mod participant;
mod view;
mod wire;

pub use message::{Ballot, Message, Promise};
pub use participant::{Output, Participant, Standing, Timer, Wait};
pub use view::{Member, View};
pub use wire::{Malformed, decode, encode};
