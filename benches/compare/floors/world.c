#define _GNU_SOURCE
#include "world.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <signal.h>
#include <unistd.h>

enum { PAUSES = 40, YIELDS = 6, COMBINED_AT_ONCE = 20000 };

struct board {
    struct meeting meeting;
    _Alignas(64) double values[MOST_RANKS][COMBINED_AT_ONCE];
};

static struct board *board;
static const struct library *members;
static uint32_t board_round;

void need(int condition, const char *what)
{
    if (!condition) {
        perror(what);
        exit(1);
    }
}

void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static long futex(_Atomic uint32_t *word, int operation, uint32_t value)
{
    return syscall(SYS_futex, word, operation, value, NULL, NULL, 0);
}

static int reached(struct meeting *meeting, uint32_t goal)
{
    /* Acquire: what the others wrote before they arrived is seen. */
    uint32_t arrivals = atomic_load_explicit(&meeting->arrivals, memory_order_acquire);
    return (int32_t)(arrivals - goal) >= 0;
}

static void sleep_until(struct meeting *meeting, uint32_t round)
{
    atomic_fetch_add(&meeting->sleepers, 1);
    for (;;) {
        uint32_t complete = atomic_load(&meeting->complete);
        if ((int32_t)(complete - round) >= 0)
            break;
        futex(&meeting->complete, FUTEX_WAIT, complete);
    }
    atomic_fetch_sub(&meeting->sleepers, 1);
}

void meet(struct meeting *meeting, uint32_t *round, uint32_t ranks)
{
    uint32_t goal = ++*round * ranks;
    /* Sequentially consistent, as are `complete` and `sleepers`: either the last to arrive sees a
     * sleeper, or the sleeper sees the round complete. */
    if (atomic_fetch_add(&meeting->arrivals, 1) + 1 == goal) {
        atomic_store(&meeting->complete, *round);
        if (atomic_load(&meeting->sleepers) > 0)
            futex(&meeting->complete, FUTEX_WAKE, INT32_MAX);
        return;
    }
    for (int at = 0; at < PAUSES; at++) {
        if (reached(meeting, goal))
            return;
        pause_briefly();
    }
    for (int at = 0; at < YIELDS; at++) {
        sched_yield();
        if (reached(meeting, goal))
            return;
    }
    sleep_until(meeting, *round);
}

void *shared_memory(size_t bytes)
{
    int protection = PROT_READ | PROT_WRITE;
    void *memory = mmap(NULL, bytes, protection, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    need(memory != MAP_FAILED, "mmap");
    return memory;
}

int fork_ranks(int ranks)
{
    pid_t parent = getpid();
    fflush(stdout);
    for (int rank = 1; rank < ranks; rank++) {
        pid_t child = fork();
        need(child >= 0, "fork");
        if (child == 0) {
            /* No rank outlives the first one. */
            need(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 && getppid() == parent, "prctl");
            return rank;
        }
    }
    return 0;
}

int end_ranks(int rank)
{
    int failed = 0, status;
    if (rank == 0)
        while (wait(&status) > 0)
            failed |= status != 0;
    return failed;
}

static void combine_part(double *values, size_t count, int sum)
{
    memcpy(board->values[members->rank], values, count * sizeof *values);
    meet(&board->meeting, &board_round, (uint32_t)members->ranks);
    for (size_t at = 0; at < count; at++)
        for (int rank = 0; rank < members->ranks; rank++) {
            double other = board->values[rank][at];
            if (rank == 0)
                values[at] = other;
            else if (sum)
                values[at] += other;
            else if (other > values[at])
                values[at] = other;
        }
    /* Nobody writes again before all have read. */
    meet(&board->meeting, &board_round, (uint32_t)members->ranks);
}

static void combine(double *values, size_t count, int sum)
{
    for (size_t at = 0; at < count; at += COMBINED_AT_ONCE) {
        size_t rest = count - at;
        combine_part(values + at, rest < COMBINED_AT_ONCE ? rest : COMBINED_AT_ONCE, sum);
    }
}

void world_prepare(struct library *library)
{
    board = shared_memory(sizeof *board);
    members = library;
    library->combine = combine;
}
