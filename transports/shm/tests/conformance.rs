//! The suite that every transport passes, over shared memory.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod common;

use unisum_link::conformance::Mesh;
use unisum_shm::Candidate;

unisum_link::conformance_tests!(Mesh {
    connect: |world| common::ends(world, std::convert::identity),
    sees_peer_death: false,
});

/// The transfers between two ranks again, where the kernel forbids reading other processes.
mod without_private_reads {
    use super::*;

    const MESH: Mesh = Mesh {
        connect: |world| common::ends(world, Candidate::without_private_reads),
        sees_peer_death: false,
    };

    unisum_link::conformance_tests!(@cases MESH;
        messages_arrive_in_order
        every_size_arrives
        saturated_directions_do_not_deadlock
        many_peers_at_once
        transfers_may_be_posted_ahead
        mismatched_calls_name_both
        abort_leaves_the_region_alone
        a_dropped_peer_hangs_nobody
        nothing_taken_back_is_received
        deposits_survive_fast_and_slow_members
        groups_fold_private_regions_over_staging_buffers
    );
}
