// The kernels for which the switch between the devices adds. They are apart from the others, since
// devices before compute capability 9.0 refuse a module that has such instructions.

#include "multimem.h"

#define MULTIMEM(name, ...)                                                                        \
    KERNEL unisum_multimem_sum_##name(PARAMETER Multimem task) { multimem<__VA_ARGS__>(task); }

MULTIMEM(f16, F16)
MULTIMEM(bf16, Bf16)
MULTIMEM(f32, F32)
