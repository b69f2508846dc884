// The kernels as a library for the host, with what runs them: the threads of a grid one after the
// other, or, where those of a block wait for one another, a block after the other.

#include <cstddef>
#include <thread>
#include <vector>

#include "unisum.cu"

template <class Task>
static void launch(void (*kernel)(Task), u32 blocks, u32 threads, const Task *task) {
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) kernel(*task);
    }
}

extern "C" void host_launch_staged(void (*kernel)(Staged), u32 blocks, u32 threads,
                                   const Staged *task) {
    for (u32 i = 0; i < blocks; i++) {
        Block shared;
        pthread_barrier_init(&shared.barrier, nullptr, threads);
        std::vector<std::thread> running;
        for (u32 j = 0; j < threads; j++) {
            running.emplace_back([=, &shared] {
                block = &shared;
                gridDim.x = blocks, blockDim.x = threads, blockIdx.x = i, threadIdx.x = j;
                kernel(*task);
            });
        }
        for (std::thread &thread : running) thread.join();
        pthread_barrier_destroy(&shared.barrier);
    }
}

#define LAUNCH(name, task)                                                                         \
    extern "C" void host_launch_##name(void (*kernel)(task), u32 blocks, u32 threads,             \
                                       const task *given) {                                        \
        launch<task>(kernel, blocks, threads, given);                                              \
    }

LAUNCH(fold, Fold)
LAUNCH(copy, Copy)
LAUNCH(copies, Copies)
LAUNCH(signal, Signal)
LAUNCH(wait, Wait)

extern "C" const u64 host_layout[] = {
    sizeof(Fold),
    offsetof(Fold, to),
    offsetof(Fold, from),
    offsetof(Fold, count),
    offsetof(Fold, divisor),
    offsetof(Fold, factor),
    offsetof(Fold, nonfinite),
    offsetof(Fold, sources),
    offsetof(Fold, flags),
    sizeof(Copy),
    offsetof(Copy, to),
    offsetof(Copy, from),
    offsetof(Copy, bytes),
    sizeof(Copies),
    offsetof(Copies, copy),
    offsetof(Copies, count),
    sizeof(Signal),
    offsetof(Signal, flag),
    offsetof(Signal, value),
    offsetof(Signal, count),
    offsetof(Signal, stopped),
    sizeof(Wait),
    offsetof(Wait, flag),
    offsetof(Wait, value),
    offsetof(Wait, count),
    offsetof(Wait, abort),
    offsetof(Wait, stopped),
    sizeof(Staged),
    offsetof(Staged, to),
    offsetof(Staged, from),
    offsetof(Staged, staging),
    offsetof(Staged, theirs),
    offsetof(Staged, mine),
    offsetof(Staged, count),
    offsetof(Staged, call),
    offsetof(Staged, divisor),
    offsetof(Staged, factor),
    offsetof(Staged, nonfinite),
    offsetof(Staged, abort),
    offsetof(Staged, stopped),
    offsetof(Staged, flags),
    offsetof(Staged, rank),
    offsetof(Staged, ranks),
    sizeof(Multimem),
    offsetof(Multimem, to),
    offsetof(Multimem, from),
    offsetof(Multimem, own),
    offsetof(Multimem, all),
    offsetof(Multimem, theirs),
    offsetof(Multimem, mine),
    offsetof(Multimem, count),
    offsetof(Multimem, call),
    offsetof(Multimem, divisor),
    offsetof(Multimem, factor),
    offsetof(Multimem, nonfinite),
    offsetof(Multimem, abort),
    offsetof(Multimem, stopped),
    offsetof(Multimem, flags),
    offsetof(Multimem, rank),
    offsetof(Multimem, ranks),
};
