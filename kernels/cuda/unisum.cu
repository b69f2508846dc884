// The kernels of collectives on device memory. They give the same bits as those of the host, which
// `kernels/src/op.rs` defines. Each takes one struct by value (abi.h), and runs with any number of
// blocks and threads in one dimension.

#include "copy.h"
#include "flags.h"
#include "fold.h"
#include "staged.h"

#define FOLD(name, ...)                                                                            \
    KERNEL unisum_fold_##name(PARAMETER Fold task) { fold<__VA_ARGS__>(task); }

#define NUMBERS(dtype, ...)                                                                        \
    FOLD(sum_##dtype, Sum<__VA_ARGS__>)                                                            \
    FOLD(min_##dtype, Extreme<__VA_ARGS__, false>)                                                 \
    FOLD(max_##dtype, Extreme<__VA_ARGS__, true>)

#define NUMBERS_AND_PRODUCT(dtype, ...)                                                            \
    NUMBERS(dtype, __VA_ARGS__)                                                                    \
    FOLD(prod_##dtype, Product<__VA_ARGS__>)

NUMBERS_AND_PRODUCT(f16, F16)
NUMBERS_AND_PRODUCT(bf16, Bf16)
NUMBERS_AND_PRODUCT(f32, F32)
NUMBERS_AND_PRODUCT(f64, F64)
NUMBERS_AND_PRODUCT(f8e4m3, F8E4M3)
NUMBERS_AND_PRODUCT(f8e5m2, F8E5M2)

// Averages and extremes depend on the sign; products do not.
NUMBERS(i8, Integer<i8, true>)
NUMBERS(i16, Integer<i16, true>)
NUMBERS(i32, Integer<i32, true>)
NUMBERS(i64, Integer<i64, true>)
NUMBERS_AND_PRODUCT(u8, Integer<u8, false>)
NUMBERS_AND_PRODUCT(u16, Integer<u16, false>)
NUMBERS_AND_PRODUCT(u32, Integer<u32, false>)
NUMBERS_AND_PRODUCT(u64, Integer<u64, false>)

// For integers of any width, whose bytes are counted, and for truth values.
FOLD(bitand_u8, Bitwise<Bytes, Bit::And>)
FOLD(bitor_u8, Bitwise<Bytes, Bit::Or>)
FOLD(bitxor_u8, Bitwise<Bytes, Bit::Xor>)
FOLD(bitand_bool, Bitwise<Truths, Bit::And>)
FOLD(bitor_bool, Bitwise<Truths, Bit::Or>)
FOLD(bitxor_bool, Bitwise<Truths, Bit::Xor>)

#define STAGED(name, ...)                                                                          \
    KERNEL unisum_staged_##name(PARAMETER Staged task) { staged<__VA_ARGS__>(task); }

// The frequent ones: others take a fold between signals and waits.
STAGED(sum_f16, Sum<F16>)
STAGED(sum_bf16, Sum<Bf16>)
STAGED(sum_f32, Sum<F32>)
STAGED(sum_f64, Sum<F64>)
STAGED(sum_i32, Sum<Integer<i32, true>>)
STAGED(sum_i64, Sum<Integer<i64, true>>)
STAGED(min_f32, Extreme<F32, false>)
STAGED(max_f32, Extreme<F32, true>)
STAGED(min_i32, Extreme<Integer<i32, true>, false>)
STAGED(max_i32, Extreme<Integer<i32, true>, true>)
STAGED(min_i64, Extreme<Integer<i64, true>, false>)
STAGED(max_i64, Extreme<Integer<i64, true>, true>)

KERNEL unisum_copy(PARAMETER Copy task) { copy(task); }

KERNEL unisum_copies(PARAMETER Copies task) {
    for (u32 i = 0; i < task.count; i++) copy(task.copy[i]);
}

KERNEL unisum_signal(PARAMETER Signal task) { signal(task); }

KERNEL unisum_wait(PARAMETER Wait task) { wait(task); }
