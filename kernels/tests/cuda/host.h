// What the kernels' source needs, for g++ instead of a compiler for devices.

#pragma once

#include <cstring>
#include <pthread.h>
#include <time.h>

#define INLINE inline
#define KERNEL extern "C" void
#define PARAMETER const

struct Dimension {
    u32 x;
};
static thread_local Dimension blockIdx, threadIdx, gridDim, blockDim;

/// What the threads of a block share.
struct Block {
    pthread_barrier_t barrier;
    u32 words[8];
};
static thread_local Block *block;

#define SHARED(type, name) type &name = block->words[__COUNTER__]
inline void synchronize_block() { pthread_barrier_wait(&block->barrier); }

struct alignas(16) uint4 {
    u32 x, y, z, w;
};

template <class To, class From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "only the type changes");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

inline float f16_to_f32(u32 bits) { return bits_as<_Float16>((u16)bits); }
inline u32 f32_to_f16(float value) { return bits_as<u16>((_Float16)value); }
inline u32 bits_of(float value) { return bits_as<u32>(value); }
inline u64 bits_of(double value) { return bits_as<u64>(value); }
inline float float_of(u32 bits) { return bits_as<float>(bits); }
inline double double_of(u64 bits) { return bits_as<double>(bits); }

inline void store_release(u32 *flag, u32 value) {
    __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}
inline void store_release(u64 *flag, u64 value) {
    __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}
inline u64 load_acquire(const u64 *flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
inline u32 load_acquire(const u32 *flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
inline u32 load_relaxed(const u32 *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
inline void store_relaxed(u32 *word, u32 value) {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}
inline void pause(u32 nanoseconds) {
    const timespec time = {0, (long)nanoseconds};
    nanosleep(&time, nullptr);
}

template <class T> inline T *global(T *pointer) { return pointer; }
