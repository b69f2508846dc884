// An all-reduce of little data in one launch: every rank copies its elements to memory that the
// others read, signals them, waits for them, and folds the elements of all ranks.
//
// A block takes the same elements on all ranks, so that blocks with the same index only wait for
// one another. Two launches in a row use different halves of the staging memory, A and B: a rank
// that writes to A again has waited, with B, for signals that the others have sent after the launch
// in which they read A. So nobody has to say that it has read.

#pragma once

#include "fold.h"
#include "meet.h"

template <class Operation> INLINE void staged(const Staged &task) {
    typedef typename Operation::Raw Raw;
    constexpr u32 UNIT = Operation::BYTES, LANE = Operation::LANE_BYTES, LANES = VECTOR / LANE;
    const u64 bytes = task.count * UNIT;
    const u64 first = thread_index() * VECTOR, step = thread_count() * VECTOR;
    for (u64 at = first; at < bytes; at += step) {
        store<VECTOR>(task.staging[task.rank], at, load_part<UNIT>(task.from, at, bytes - at));
    }
    if (!meet<0>(task, task.call)) return;
    const Operation operation(Terms::of(task));
    bool nonfinite = false;
    for (u64 at = first; at < bytes; at += step) {
        Raw lane[LANES];
        fold_lanes<LANE>(operation, task.staging, task.ranks, at, lane);
        store_part<UNIT>(task.to, at, bytes - at, Lanes<Raw, LANE, LANES>::packed(lane));
        // The zeros that fill the last vector up stay finite unless a factor makes every element
        // nonfinite.
        nonfinite |= any_nonfinite(operation, lane);
    }
    if (nonfinite && task.flags & UNISUM_WATCHES) store_relaxed(task.nonfinite, 1);
}
