// Copies of any alignment.

#pragma once

#include "abi.h"
#include "memory.h"

template <u32 BYTES> INLINE void copy_units(const Copy &task, u64 begin, u64 count) {
    for (u64 i = thread_index(); i < count; i += thread_count()) {
        const u64 at = begin + i * BYTES;
        store<BYTES>(task.to, at, load<BYTES>(task.from, at));
    }
}

/// By 16 bytes if both pointers are aligned alike, else by 4, else by the byte.
INLINE void copy(const Copy &task) {
    const u64 address = (u64)task.to;
    const u64 differs = address ^ (u64)task.from;
    const u32 wide = differs % 16 == 0 ? 16 : differs % 4 == 0 ? 4 : 1;
    const u64 aligned = (wide - address % wide) % wide;
    const u64 head = aligned < task.bytes ? aligned : task.bytes;
    const u64 units = (task.bytes - head) / wide;
    if (wide == 16) copy_units<16>(task, head, units);
    else if (wide == 4) copy_units<4>(task, head, units);
    else copy_units<1>(task, head, units);
    if (wide > 1) {
        const u64 end = head + units * wide;
        copy_units<1>(task, 0, head);
        copy_units<1>(task, end, task.bytes - end);
    }
}
