/* Floors of memory: copies past the cache, copies within it, reading, and reading another
 * process's memory, on one core and on all of them at once. */
#define _GNU_SOURCE
#include <sched.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "floor.h"
#include "world.h"

enum { REPEATS = 9 };
static const size_t LARGE = 64 << 20, CACHED = 512 << 10;

/* Keeps what was read from being optimised away. */
static volatile uint64_t sink;

static void copy_past_cache(char *to, const char *from, size_t bytes)
{
#if defined(__AVX2__)
    for (size_t at = 0; at < bytes; at += 32)
        _mm256_stream_si256((__m256i *)(void *)(to + at),
                            _mm256_load_si256((const __m256i *)(const void *)(from + at)));
    _mm_sfence();
#elif defined(__x86_64__)
    for (size_t at = 0; at < bytes; at += 16)
        _mm_stream_si128((__m128i *)(void *)(to + at),
                         _mm_load_si128((const __m128i *)(const void *)(from + at)));
    _mm_sfence();
#else
    memcpy(to, from, bytes);
#endif
}

static void copy_in_cache(char *to, const char *from, size_t bytes)
{
    for (int at = 0; at < 128; at++) {
        memcpy(to, from, bytes);
        /* Not all of the copies are one. */
        __asm__ volatile("" : : "r"(to) : "memory");
    }
}

static void read_all(char *to, const char *from, size_t bytes)
{
    (void)to;
    const uint64_t *words = (const uint64_t *)(const void *)from;
    uint64_t sum = 0;
    for (size_t at = 0; at < bytes / sizeof *words; at++)
        sum += words[at];
    sink = sum;
}

struct measured {
    const char *name;
    void (*work)(char *to, const char *from, size_t bytes);
    size_t bytes;
    int times;
};

static void stay_on(int core)
{
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(core, &cores);
    /* A core that is not ours leaves the choice to the kernel. */
    (void)sched_setaffinity(0, sizeof cores, &cores);
}

/* The work on `cores` cores at once: GB/s together, median over the slowest one's times. */
static void on_cores(const struct measured *it, int cores, const char *suffix)
{
    struct meeting *meeting = shared_memory(sizeof *meeting);
    double (*times)[REPEATS] = shared_memory(sizeof(double) * REPEATS * (size_t)cores);
    int me = fork_ranks(cores);
    stay_on(me);
    char *from = shared_memory(it->bytes), *to = shared_memory(it->bytes);
    memset(from, 1, it->bytes);
    memset(to, 2, it->bytes);
    uint32_t round = 0;
    for (int at = 0; at < REPEATS; at++) {
        meet(meeting, &round, (uint32_t)cores);
        double start = seconds_now();
        it->work(to, from, it->bytes);
        times[me][at] = seconds_now() - start;
    }
    meet(meeting, &round, (uint32_t)cores);
    if (me > 0)
        _exit(0);
    need(end_ranks(me) == 0, "a child failed");
    double slowest[REPEATS];
    for (int at = 0; at < REPEATS; at++) {
        slowest[at] = 0;
        for (int rank = 0; rank < cores; rank++)
            slowest[at] = times[rank][at] > slowest[at] ? times[rank][at] : slowest[at];
    }
    char name[64];
    snprintf(name, sizeof name, "%s_%s", it->name, suffix);
    double bytes = (double)it->bytes * it->times * cores;
    print_floor(name, bytes / median(slowest, REPEATS) * 1e-9, "GB/s");
}

/* Reads a child's memory. Source: process_vm_readv(2). */
static void read_of_process(size_t bytes, const char *name)
{
    char *theirs = malloc(bytes), *mine = malloc(bytes);
    need(theirs && mine, "malloc");
    memset(theirs, 1, bytes);
    memset(mine, 2, bytes);
    struct meeting *meeting = shared_memory(sizeof *meeting);
    uint32_t round = 0;
    pid_t child = fork();
    need(child >= 0, "fork");
    if (child == 0) {
        /* Written by the child, so that the pages are its own. */
        memset(theirs, 3, bytes);
        meet(meeting, &round, 2);
        meet(meeting, &round, 2);
        _exit(0);
    }
    meet(meeting, &round, 2);
    double times[REPEATS];
    for (int at = 0; at < REPEATS; at++) {
        struct iovec local = { mine, bytes }, remote = { theirs, bytes };
        double start = seconds_now();
        ssize_t got = process_vm_readv(child, &local, 1, &remote, 1, 0);
        times[at] = seconds_now() - start;
        need(got == (ssize_t)bytes && mine[bytes - 1] == 3, "process_vm_readv");
    }
    meet(meeting, &round, 2);
    need(end_ranks(0) == 0, "the child failed");
    print_floor(name, (double)bytes / median(times, REPEATS) * 1e-9, "GB/s");
    free(theirs);
    free(mine);
}

int main(void)
{
    int cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
    cores = cores > MOST_RANKS ? MOST_RANKS : cores;
    const struct measured all[] = { { "nt_copy", copy_past_cache, LARGE, 1 },
                                    { "cached_copy", copy_in_cache, CACHED, 128 },
                                    { "read", read_all, LARGE, 1 } };
    for (size_t at = 0; at < sizeof all / sizeof all[0]; at++) {
        on_cores(&all[at], 1, "1_core");
        on_cores(&all[at], cores, "all_cores");
    }
    read_of_process(1 << 20, "process_vm_readv_1M");
    read_of_process(LARGE, "process_vm_readv_64M");
    return 0;
}
