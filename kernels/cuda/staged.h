// An all-reduce of little data in one launch: every rank copies its elements to memory that the
// others read, signals them, waits for them, and folds the elements of all ranks.
//
// A block takes the same elements on all ranks, so that blocks with the same index only wait for
// one another. Two launches in a row use different halves of the staging memory, A and B: a rank
// that writes to A again has waited, with B, for signals that the others have sent after the launch
// in which they read A. So nobody has to say that it has read.

#pragma once

#include "fold.h"

/// Reads up to a vector, of which `bytes` bytes from `at` on are there; the rest are zeros.
template <u32 UNIT_BYTES> INLINE uint4 load_part(const void *from, u64 at, u64 bytes) {
    if (bytes >= VECTOR && ((u64)from + at) % VECTOR == 0) return load<VECTOR>(from, at);
    u32 word[4] = {0, 0, 0, 0};
#pragma unroll
    for (u32 i = 0; i < VECTOR; i += UNIT_BYTES) {
        if (i >= bytes) break;
        const u64 unit = load<UNIT_BYTES>(from, at + i);
        word[i / 4] |= (u32)unit << (i % 4 * 8);
        if (UNIT_BYTES == 8) word[i / 4 + 1] = (u32)(unit >> 32);
    }
    return uint4{word[0], word[1], word[2], word[3]};
}

template <u32 UNIT_BYTES> INLINE void store_part(void *to, u64 at, u64 bytes, uint4 vector) {
    if (bytes >= VECTOR && ((u64)to + at) % VECTOR == 0) return store<VECTOR>(to, at, vector);
    const u32 word[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (u32 i = 0; i < VECTOR; i += UNIT_BYTES) {
        if (i >= bytes) break;
        u64 unit = word[i / 4] >> (i % 4 * 8);
        if (UNIT_BYTES == 8) unit |= (u64)word[i / 4 + 1] << 32;
        store<UNIT_BYTES>(to, at + i, (typename Unit<UNIT_BYTES>::Type)unit);
    }
}

/// Signals the blocks with this index at all ranks, and waits for them; whether all came.
INLINE bool meet(const Staged &task) {
    SHARED(u32, silent);
    SHARED(u32, aborted);
    if (threadIdx.x == 0) {
        // Read by one thread: another block may set it meanwhile.
        silent = is_stopped(task.stopped);
        aborted = 0;
    }
    // Also, the block has written all that the others read.
    synchronize_block();
    if (silent) return false;
    for (u32 rank = threadIdx.x; rank < task.ranks; rank += blockDim.x) {
        if (rank != task.rank) store_release(task.theirs[rank] + blockIdx.x, task.call);
    }
    for (u32 rank = threadIdx.x; rank < task.ranks; rank += blockDim.x) {
        if (rank == task.rank) continue;
        const u64 *flag = task.mine[rank] + blockIdx.x;
        for (u32 turn = 1; load_acquire(flag) < task.call; turn++) {
            if (keeps_waiting(turn, task.abort)) continue;
            aborted = 1;
            stop(task.stopped);
            break;
        }
    }
    synchronize_block();
    return !aborted;
}

template <class Operation> INLINE void staged(const Staged &task) {
    typedef typename Operation::Raw Raw;
    constexpr u32 UNIT = Operation::BYTES, LANE = Operation::LANE_BYTES, LANES = VECTOR / LANE;
    const u64 bytes = task.count * UNIT;
    const u64 first = thread_index() * VECTOR, step = thread_count() * VECTOR;
    for (u64 at = first; at < bytes; at += step) {
        store<VECTOR>(task.staging[task.rank], at, load_part<UNIT>(task.from, at, bytes - at));
    }
    if (!meet(task)) return;
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
