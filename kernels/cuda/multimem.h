// An all-reduce that the switch between the devices does (NVLink SHARP): every rank copies its
// elements to memory that a multicast address stands for, on all devices at once. Then each loads
// the sums of a part from there, and stores them to all.
//
// A block takes the same elements on all ranks, and each rank the same part of them, so that blocks
// with the same index only wait for one another. They meet twice: before the first load of a sum,
// and before the first result is copied out. When a launch has ended on a rank, nobody reads or
// writes its memory for that launch any more, so that the next one may use it at once.

#pragma once

#include "meet.h"
#include "memory.h"
#include "operations.h"

/// How many vectors a thread reads before it writes the first.
enum : u32 { VECTORS_AHEAD = 4 };

/// Writes to an address are seen at others that stand for the same memory, and the other way round.
INLINE void unite_addresses() { asm volatile("fence.proxy.alias;" ::: "memory"); }

/// The sums of the vectors of all devices, in an order that nobody promises.
template <class E> INLINE uint4 load_sums(const void *all, u64 at);

template <> INLINE uint4 load_sums<F32>(const void *all, u64 at) {
    float x, y, z, w;
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x), "=f"(y), "=f"(z), "=f"(w)
                 : "l"((const u8 *)all + at)
                 : "memory");
    return uint4{bits_of(x), bits_of(y), bits_of(z), bits_of(w)};
}

/// 16-bit floats are added in f32, and rounded once.
#define LOAD_SUMS(E, type)                                                                         \
    template <> INLINE uint4 load_sums<E>(const void *all, u64 at) {                               \
        uint4 sums;                                                                                \
        asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4." type                 \
                     " {%0, %1, %2, %3}, [%4];"                                                    \
                     : "=r"(sums.x), "=r"(sums.y), "=r"(sums.z), "=r"(sums.w)                      \
                     : "l"((const u8 *)all + at)                                                   \
                     : "memory");                                                                  \
        return sums;                                                                               \
    }

LOAD_SUMS(F16, "f16x2")
LOAD_SUMS(Bf16, "bf16x2")

/// Bits are bits: no other type stores as much.
INLINE void store_to_all(void *all, u64 at, uint4 vector) {
    asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                     (u8 *)all + at),
                 "f"(float_of(vector.x)), "f"(float_of(vector.y)), "f"(float_of(vector.z)),
                 "f"(float_of(vector.w))
                 : "memory");
}

/// What `put` does with what `get` gives for each of these vectors, by their first bytes; the
/// threads of the block share them.
template <class Get, class Put> INLINE void for_vectors(u64 begin, u64 end, Get get, Put put) {
    for (u64 first = begin + threadIdx.x; first < end; first += VECTORS_AHEAD * blockDim.x) {
        uint4 vector[VECTORS_AHEAD];
#pragma unroll
        for (u32 i = 0; i < VECTORS_AHEAD; i++) {
            const u64 at = first + i * blockDim.x;
            if (at < end) vector[i] = get(at * VECTOR);
        }
#pragma unroll
        for (u32 i = 0; i < VECTORS_AHEAD; i++) {
            const u64 at = first + i * blockDim.x;
            if (at < end) put(at * VECTOR, vector[i]);
        }
    }
}

/// The elements of a vector, each as `change` leaves the wide one.
template <class E, class Change> INLINE uint4 changed(const uint4 &vector, Change change) {
    constexpr u32 LANES = VECTOR / E::BYTES;
    typedef Lanes<typename E::Raw, E::BYTES, LANES> Memory;
    typename E::Raw lane[LANES];
#pragma unroll
    for (u32 i = 0; i < LANES; i++) {
        lane[i] = E::narrow(change(E::widen(Memory::lane(vector, i))));
    }
    return Memory::packed(lane);
}

template <class E> INLINE bool has_nonfinite(const uint4 &vector) {
    constexpr u32 LANES = VECTOR / E::BYTES;
    bool found = false;
#pragma unroll
    for (u32 i = 0; i < LANES; i++) {
        found |= E::is_nonfinite(Lanes<typename E::Raw, E::BYTES, LANES>::lane(vector, i));
    }
    return found;
}

INLINE u64 lesser(u64 left, u64 right) { return left < right ? left : right; }

template <class E> INLINE void multimem(const Multimem &task) {
    typedef typename E::Wide Wide;
    const u64 bytes = task.count * E::BYTES;
    const u64 vectors = (bytes + VECTOR - 1) / VECTOR;
    const u64 of_block = (vectors + gridDim.x - 1) / gridDim.x;
    const u64 begin = lesser(of_block * blockIdx.x, vectors);
    const u64 end = lesser(begin + of_block, vectors);
    const u64 of_rank = (end - begin + task.ranks - 1) / task.ranks;
    const u64 part = lesser(begin + of_rank * task.rank, end);
    const Sum<E> operation(Terms::of(task));

    for_vectors(
        begin, end,
        [&](u64 at) { return load_part<E::BYTES>(task.from, at, bytes - at); },
        [&](u64 at, const uint4 &vector) {
            const auto scale = [&](Wide wide) { return E::scaled(wide, operation.factor); };
            const bool scales = task.flags & UNISUM_SCALES;
            store<VECTOR>(task.own, at, scales ? changed<E>(vector, scale) : vector);
        });
    unite_addresses();
    if (!meet<0>(task, 2 * task.call - 1)) return;
    unite_addresses();
    for_vectors(
        part, lesser(part + of_rank, end), [&](u64 at) { return load_sums<E>(task.all, at); },
        [&](u64 at, const uint4 &sums) {
            const bool divides = task.flags & UNISUM_DIVIDES;
            // Also, every NaN becomes the same one.
            const auto finish = [&](Wide wide) {
                return divides ? E::over(wide, operation.divisor) : wide;
            };
            store_to_all(task.all, at, changed<E>(sums, finish));
        });
    unite_addresses();
    if (!meet<1>(task, 2 * task.call)) return;
    unite_addresses();
    bool nonfinite = false;
    for_vectors(
        begin, end, [&](u64 at) { return load<VECTOR>(task.own, at); },
        [&](u64 at, const uint4 &vector) {
            store_part<E::BYTES>(task.to, at, bytes - at, vector);
            nonfinite |= has_nonfinite<E>(vector);
        });
    if (nonfinite && task.flags & UNISUM_WATCHES) store_relaxed(task.nonfinite, 1);
}
