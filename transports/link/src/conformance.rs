//! The conformance suite that every transport passes.
//!
//! A transport's test describes how to create its links as a [`Mesh`] and calls
//! [`conformance_tests!`](crate::conformance_tests), which makes one `#[test]` of each case. The
//! cases are plain functions that panic on failure; each rank is a thread of the process.

mod endings;
mod groups;
mod memory;
mod pairs;
mod parking;
mod port;
mod taken_back;

pub use endings::{
    a_dropped_peer_hangs_nobody, abort_leaves_the_region_alone, mismatched_calls_name_both,
};
pub use groups::{
    deposits_survive_fast_and_slow_members, group_mismatch_reaches_every_member,
    group_parks_end_by_deadline_and_by_wake, groups_fold_private_regions_over_staging_buffers,
    groups_fold_registered_regions, late_members_are_named,
};
pub use memory::Memory;
pub use pairs::{
    calls_follow_each_other, every_size_arrives, every_type_and_operation_folds_from_its_slot,
    many_peers_at_once, messages_arrive_in_order, retracted_receives_leave_no_trace,
    saturated_directions_do_not_deadlock, transfers_may_be_posted_ahead,
};
pub use parking::{
    armed_links_signal_their_descriptor, parks_end_by_data, parks_end_by_deadline,
    parks_end_by_wake,
};
pub use taken_back::{nothing_taken_back_is_an_input, nothing_taken_back_is_received};

use crate::Link;

/// One rank's end of the mesh under test.
#[derive(Debug)]
pub struct End {
    /// The connected link.
    pub link: Box<dyn Link>,
    /// Allocates registered memory of this rank (`bytes` to memory), if the transport has any.
    pub registered: Option<fn(&dyn std::any::Any, usize) -> Memory>,
    /// The argument for `registered`: the rank's heap.
    pub heap: Box<dyn std::any::Any + Send>,
}

impl End {
    /// The end of a transport that has no registered memory.
    pub fn new(link: Box<dyn Link>) -> Self {
        Self { link, registered: None, heap: Box::new(()) }
    }
}

/// How to connect the ranks of a world over the transport under test.
#[derive(Clone, Copy, Debug)]
pub struct Mesh {
    /// Connects `world` ranks; the index is the rank. Empty where the machine lacks what the
    /// transport needs: the case then runs nothing.
    pub connect: fn(world: usize) -> Vec<End>,
    /// Whether a link detects by itself that the process at the other end is gone.
    pub sees_peer_death: bool,
}

/// Makes one `#[test]` of each case of the suite, for the [`Mesh`] that the expression gives.
#[macro_export]
macro_rules! conformance_tests {
    ($mesh:expr) => {
        $crate::conformance_tests!(@cases $mesh;
            messages_arrive_in_order
            every_size_arrives
            every_type_and_operation_folds_from_its_slot
            saturated_directions_do_not_deadlock
            many_peers_at_once
            transfers_may_be_posted_ahead
            calls_follow_each_other
            retracted_receives_leave_no_trace
            mismatched_calls_name_both
            parks_end_by_deadline
            parks_end_by_wake
            parks_end_by_data
            armed_links_signal_their_descriptor
            abort_leaves_the_region_alone
            a_dropped_peer_hangs_nobody
            nothing_taken_back_is_received
            nothing_taken_back_is_an_input
            deposits_survive_fast_and_slow_members
            groups_fold_registered_regions
            groups_fold_private_regions_over_staging_buffers
            group_mismatch_reaches_every_member
            late_members_are_named
            group_parks_end_by_deadline_and_by_wake
        );
    };
    (@cases $mesh:expr; $($case:ident)*) => {
        $(
            #[test]
            fn $case() {
                $crate::conformance::$case(&$mesh);
            }
        )*
    };
}
