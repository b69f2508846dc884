/* Ranks as forked processes that share memory, and a way to wait for each other: what the
 * reference programs stand on. */
#ifndef COMPARE_WORLD_H
#define COMPARE_WORLD_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "../drivers/rule.h"

enum { MOST_RANKS = 64 };

/* A point that all ranks pass together, again and again. */
struct meeting {
    _Alignas(64) _Atomic uint32_t arrivals; /* so far, over all rounds */
    _Alignas(64) _Atomic uint32_t complete; /* rounds that all ranks have reached; the futex */
    _Alignas(64) _Atomic uint32_t sleepers;
};

/* Counts up; the last to arrive wakes those who sleep, the others wait for it: 40 pauses, a few
 * yields, then a futex. `round` is the caller's own count of its meetings and goes up by one. */
void meet(struct meeting *meeting, uint32_t *round, uint32_t ranks);

/* Zeroed memory that children share. Ends the program if there is none. */
void *shared_memory(size_t bytes);

/* Forks `ranks` - 1 children; gives each process its rank. */
int fork_ranks(int ranks);

/* Rank 0 waits for the others and gives the program's exit status. */
int end_ranks(int rank);

/* Fills in `combine`, over shared memory; call it before the ranks fork. */
void world_prepare(struct library *library);

void pause_briefly(void);

/* Ends the program if `condition` does not hold. */
void need(int condition, const char *what);

#endif
