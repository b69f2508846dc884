// How ranks tell each other that something has happened, and how long they wait for it.

#pragma once

#include "abi.h"
#include "device.h"

enum : u32 {
    /// The abort word, which is behind a slow bus, is looked at only every so many turns.
    ABORT_EVERY = 64,
    /// From here on, a waiting thread sleeps between its looks.
    SPINS = 4096,
    SLEEP_NANOSECONDS = 200,
};

/// After look number `turn` at a flag: whether to look again.
INLINE bool keeps_waiting(u32 turn, const u32 *abort) {
    if (turn >= SPINS) pause(SLEEP_NANOSECONDS);
    return turn % ABORT_EVERY != 0 || !abort || !load_relaxed(abort);
}

INLINE bool is_stopped(const u32 *stopped) { return stopped && load_relaxed(stopped); }

INLINE void stop(u32 *stopped) {
    if (stopped) store_relaxed(stopped, 1);
}

INLINE void signal(const Signal &task) {
    if (is_stopped(task.stopped)) return;
    for (u64 i = thread_index(); i < task.count; i += thread_count()) {
        store_release(task.flag[i], task.value[i]);
    }
}

INLINE void wait(const Wait &task) {
    for (u64 i = thread_index(); i < task.count; i += thread_count()) {
        for (u32 turn = 1; (i32)(load_acquire(task.flag[i]) - task.value[i]) < 0; turn++) {
            if (!keeps_waiting(turn, task.abort)) return stop(task.stopped);
        }
    }
}
