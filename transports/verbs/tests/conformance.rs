//! The suite that every transport passes, over the machine's RDMA device.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod common;

use unisum_link::conformance::Mesh;
use unisum_verbs::VerbsConfig;

unisum_link::conformance_tests!(Mesh {
    connect: |world| common::ends(world, &common::config()),
    // A peer that receives only and dies can't be seen: that is the control connection's job.
    sees_peer_death: false,
});

/// The transfers again, over one connection for everything.
mod one_pair {
    use super::*;

    const MESH: Mesh = Mesh {
        connect: |world| {
            common::ends(world, &VerbsConfig { pairs_per_peer: 1, ..common::config() })
        },
        sees_peer_death: false,
    };

    unisum_link::conformance_tests!(@cases MESH;
        messages_arrive_in_order
        every_size_arrives
        saturated_directions_do_not_deadlock
        transfers_may_be_posted_ahead
        mismatched_calls_name_both
    );
}
