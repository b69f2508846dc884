// How threads read and write memory: 16 bytes at once where the pointers allow it.

#pragma once

#include "device.h"

/// Bytes that a thread reads at once.
enum : u32 { VECTOR = 16 };

template <u32 BYTES> struct Unit;
template <> struct Unit<1> { typedef u8 Type; };
template <> struct Unit<2> { typedef u16 Type; };
template <> struct Unit<4> { typedef u32 Type; };
template <> struct Unit<8> { typedef u64 Type; };
template <> struct Unit<16> { typedef uint4 Type; };

template <u32 BYTES> INLINE typename Unit<BYTES>::Type load(const void *from, u64 at) {
    return *global((const typename Unit<BYTES>::Type *)((const u8 *)from + at));
}

template <u32 BYTES> INLINE void store(void *to, u64 at, typename Unit<BYTES>::Type value) {
    *global((typename Unit<BYTES>::Type *)((u8 *)to + at)) = value;
}

/// As many lanes as there are in a vector, or one.
template <class Raw, u32 BYTES, u32 LANES> struct Lanes {
    typedef uint4 Packed;

    static INLINE uint4 load(const void *from, u64 at) { return ::load<VECTOR>(from, at); }

    /// `i` is known to the compiler: nothing is indexed at run time.
    static INLINE Raw lane(const uint4 &packed, u32 i) {
        const u32 word[4] = {packed.x, packed.y, packed.z, packed.w};
        if (BYTES == 8) return (Raw)((u64)word[2 * i % 4 + 1] << 32 | word[2 * i % 4]);
        return word[i * BYTES / 4 % 4] >> (i * BYTES % 4 * 8) & MASK;
    }

    static INLINE uint4 packed(const Raw (&lane)[LANES]) {
        u32 word[4] = {0, 0, 0, 0};
#pragma unroll
        for (u32 i = 0; i < LANES; i++) {
            if (BYTES == 8) {
                word[2 * i % 4] = (u32)lane[i];
                word[2 * i % 4 + 1] = (u32)((u64)lane[i] >> 32);
            } else {
                word[i * BYTES / 4 % 4] |= ((u32)lane[i] & MASK) << (i * BYTES % 4 * 8);
            }
        }
        return uint4{word[0], word[1], word[2], word[3]};
    }

    static INLINE void store(const Raw (&lane)[LANES], void *to, u64 at) {
        ::store<VECTOR>(to, at, packed(lane));
    }

  private:
    enum : u32 { MASK = BYTES >= 4 ? ~0u : (1u << (BYTES % 4 * 8)) - 1 };
};

template <class Raw, u32 BYTES> struct Lanes<Raw, BYTES, 1> {
    typedef Raw Packed;

    static INLINE Raw load(const void *from, u64 at) { return ::load<BYTES>(from, at); }
    static INLINE Raw lane(Raw packed, u32) { return packed; }
    static INLINE void store(const Raw (&lane)[1], void *to, u64 at) {
        ::store<BYTES>(to, at, (typename Unit<BYTES>::Type)lane[0]);
    }
};

/// A range of `count` units: some at the start, whole vectors, and some at the end, fewer than a
/// vector has. Without a common alignment, all are at the start.
struct Split {
    u64 head;
    u64 vectors;
    u64 tail;

    /// `address` is where the range begins in one of the memories; `differs` has a bit of the lower
    /// four for each in which another memory's address is not the same.
    INLINE Split(u64 address, u64 differs, u64 count, u32 unit_bytes) {
        const bool alike = differs % VECTOR == 0;
        const u64 before = (VECTOR - address % VECTOR) % VECTOR / unit_bytes;
        const u32 in_vector = VECTOR / unit_bytes;
        head = alike && before < count ? before : count;
        vectors = (count - head) / in_vector;
        tail = (count - head) % in_vector;
    }
};

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
