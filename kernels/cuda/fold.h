// Folds: each thread reads the same bytes of all sources, combines them and writes the result.

#pragma once

#include "memory.h"
#include "operations.h"

/// How many sources are read before the first of them is needed.
template <u32 LANES> INLINE constexpr u32 ahead() { return LANES > 8 || LANES == 1 ? 2 : 4; }

/// Folds the lanes at byte `at` of all sources, `LANES` of `LANE_BYTES` each.
template <u32 LANE_BYTES, u32 LANES, class Operation, u32 SOURCES_MAX, class Pointer>
INLINE void fold_lanes(const Operation &operation, Pointer const (&from)[SOURCES_MAX], u32 sources,
                       u64 at, typename Operation::Raw (&lane)[LANES]) {
    typedef Lanes<typename Operation::Raw, LANE_BYTES, LANES> Memory;
    constexpr u32 AHEAD = ahead<LANES>();
    typename Operation::Wide wide[LANES];
#pragma unroll
    for (u32 i = 0; i < LANES; i++) wide[i] = operation.start();
#pragma unroll 1
    for (u32 source = 0; source < sources; source += AHEAD) {
        typename Memory::Packed packed[AHEAD];
#pragma unroll
        for (u32 j = 0; j < AHEAD; j++) {
            if (source + j < sources) packed[j] = Memory::load(from[source + j], at);
        }
#pragma unroll
        for (u32 j = 0; j < AHEAD; j++) {
            if (source + j >= sources) break;
#pragma unroll
            for (u32 i = 0; i < LANES; i++) {
                const typename Operation::Raw next = Memory::lane(packed[j], i);
                wide[i] = operation.combine(wide[i], operation.lift(next));
            }
        }
    }
    operation.finish(wide);
#pragma unroll
    for (u32 i = 0; i < LANES; i++) lane[i] = operation.lower(wide[i]);
}

template <u32 LANES, class Operation>
INLINE bool any_nonfinite(const Operation &operation,
                          const typename Operation::Raw (&lane)[LANES]) {
    bool found = false;
#pragma unroll
    for (u32 i = 0; i < LANES; i++) found |= operation.is_nonfinite(lane[i]);
    return found;
}

template <u32 LANE_BYTES, u32 LANES, class Operation>
INLINE bool fold_and_store(const Operation &operation, const Fold &task, u64 at) {
    typename Operation::Raw lane[LANES];
    fold_lanes<LANE_BYTES>(operation, task.from, task.sources, at, lane);
    Lanes<typename Operation::Raw, LANE_BYTES, LANES>::store(lane, task.to, at);
    return any_nonfinite(operation, lane);
}

template <class Operation> INLINE void fold(const Fold &task) {
    constexpr u32 BYTES = Operation::BYTES, LANE_BYTES = Operation::LANE_BYTES;
    const Operation operation(Terms::of(task));
    u64 differs = 0;
    for (u32 i = 0; i < task.sources; i++) differs |= (u64)task.from[i] ^ (u64)task.to;
    const Split split((u64)task.to, differs, task.count, BYTES);
    const u64 begin = split.head * BYTES;
    const u64 behind = split.vectors * VECTOR;
    bool nonfinite = false;
    for (u64 i = thread_index(); i < split.vectors; i += thread_count()) {
        const u64 at = begin + i * VECTOR;
        nonfinite |= fold_and_store<LANE_BYTES, VECTOR / LANE_BYTES>(operation, task, at);
    }
    for (u64 i = thread_index(); i < split.head + split.tail; i += thread_count()) {
        const u64 at = i * BYTES + (i < split.head ? 0 : behind);
        nonfinite |= fold_and_store<BYTES, 1>(operation, task, at);
    }
    if (nonfinite && task.flags & UNISUM_WATCHES) store_relaxed(task.nonfinite, 1);
}
