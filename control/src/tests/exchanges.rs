//! Exchanges of blobs between several ranks in one process.

use super::*;
use crate::message::BLOB_BYTES_MAX;

#[test]
fn blobs_reach_every_rank() {
    for world in [1, 2, 5, 16] {
        let controls = match world {
            1 => vec![Control::start(config(0, 1, at(0))).unwrap()],
            _ => start(world, &[]).0,
        };
        for round in 0..3 {
            exchange(&controls, round);
        }
        assert!(controls.iter().all(|control| control.session() == controls[0].session()));
        assert!(controls.iter().all(|control| control.verdict().is_none()));
    }
}

#[test]
fn blobs_reach_the_ranks_that_they_are_for() {
    for world in [1, 2, 5, 16] {
        let controls = match world {
            1 => vec![Control::start(config(0, 1, at(0))).unwrap()],
            _ => start(world, &[]).0,
        };
        thread::scope(|scope| {
            for (rank, control) in controls.iter().enumerate() {
                scope.spawn(move || {
                    let blobs = (0..world).map(|to| vec![rank as u8; 10 * to]).collect();
                    // Some ranks have the same for all.
                    let same = |rank: usize| rank % 3 == 1;
                    let share = match same(rank) {
                        true => Share::Same(vec![rank as u8; 5]),
                        false => Share::Each(blobs),
                    };
                    let expected = (0..world)
                        .map(|from| vec![from as u8; if same(from) { 5 } else { 10 * rank }]);
                    assert!(control.exchange(share).unwrap().into_iter().eq(expected));
                });
            }
        });
        exchange(&controls, 1);
    }
}

#[test]
fn the_largest_blob_passes_and_a_larger_one_is_refused() {
    let (controls, _) = start(2, &[]);
    thread::scope(|scope| {
        for control in &controls {
            scope.spawn(|| control.exchange(vec![7; BLOB_BYTES_MAX]).unwrap());
        }
    });
    let error = controls[0].exchange(vec![7; BLOB_BYTES_MAX + 1]).unwrap_err();
    assert!(matches!(error, ControlError::Blob(_)));
    let each = Share::Each(vec![vec![7; BLOB_BYTES_MAX / 2 + 1]; 2]);
    assert!(matches!(controls[0].exchange(each), Err(ControlError::Blob(_))));
}
