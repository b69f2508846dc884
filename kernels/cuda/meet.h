// Where the blocks of a kernel wait for those of the same kernel at other ranks.

#pragma once

#include "flags.h"

/// Signals the blocks with this index at all ranks that this one has come to `value`, and waits
/// until they have; whether all came. A kernel in which ranks meet more than once numbers these
/// meetings: each has words and waiting threads of its own.
template <u32 NUMBER, class Task> INLINE bool meet(const Task &task, u64 value) {
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
        if (rank != task.rank) store_release(task.theirs[rank] + blockIdx.x, value);
    }
    const u32 first = (threadIdx.x + NUMBER * UNISUM_RANKS_MAX) % blockDim.x;
    for (u32 rank = first; rank < task.ranks; rank += blockDim.x) {
        if (rank == task.rank) continue;
        const u64 *flag = task.mine[rank] + blockIdx.x;
        for (u32 turn = 1; load_acquire(flag) < value; turn++) {
            if (keeps_waiting(turn, task.abort)) continue;
            aborted = 1;
            stop(task.stopped);
            break;
        }
    }
    synchronize_block();
    return !aborted;
}
