// What the hardware offers. Tests compile the kernels for the host, with versions of their own
// (kernels/tests/cuda/host.h).

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;

#ifdef UNISUM_ON_HOST
#include "host.h"
#else

#define INLINE __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define PARAMETER const __grid_constant__
/// A word that the threads of a block share.
#define SHARED(type, name) __shared__ type name

INLINE float f16_to_f32(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
    return value;
}

/// To nearest even; what is too large becomes infinity.
INLINE u32 f32_to_f16(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

INLINE u32 bits_of(float value) { return __float_as_uint(value); }
INLINE u64 bits_of(double value) { return (u64)__double_as_longlong(value); }
INLINE float float_of(u32 bits) { return __uint_as_float(bits); }
INLINE double double_of(u64 bits) { return __longlong_as_double((i64)bits); }

/// Everything that happened before in this thread's view is visible to whoever acquires `value`.
INLINE void store_release(u32 *flag, u32 value) {
    asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

INLINE void store_release(u64 *flag, u64 value) {
    asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

INLINE u32 load_acquire(const u32 *flag) {
    u32 value;
    asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

INLINE u64 load_acquire(const u64 *flag) {
    u64 value;
    asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
    return value;
}

/// Orders nothing: for words that only say that something is over.
INLINE u32 load_relaxed(const u32 *word) {
    u32 value;
    asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

INLINE void store_relaxed(u32 *word, u32 value) {
    asm volatile("st.relaxed.sys.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

/// All threads of the block come here, and see what the others have done before.
INLINE void synchronize_block() { __syncthreads(); }

INLINE void pause(u32 nanoseconds) { asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds)); }

/// Tells the compiler that a pointer leads to global memory, so that it need not find out.
template <class T> INLINE T *global(T *pointer) {
    __builtin_assume(__isGlobal(pointer));
    return pointer;
}

#endif

INLINE u64 thread_index() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }
INLINE u64 thread_count() { return (u64)gridDim.x * blockDim.x; }
