/* Reference: all-reduce in shared memory with as little traffic as there can be.
 *
 * Up to 4 KiB each rank puts its data in a slot, all meet once, and everybody sums all slots;
 * two sets of slots take turns, so that one meeting is enough. Above, rank i owns slice i of all
 * buffers: it sums a block of it from all buffers while it is in cache and stores the sum in all of
 * them. Two meetings: everybody's data is there, everybody's slice is done.
 */
#include <stdlib.h>
#include <string.h>

#include "world.h"

enum { SLOT_BYTES = 4096, BLOCK = 2048, GRAIN = 16, MOST_SLOT_FLOATS = SLOT_BYTES / sizeof(float) };

struct arena {
    struct meeting meeting;
    _Alignas(4096) float slots[2][MOST_RANKS][MOST_SLOT_FLOATS];
};

static struct arena *arena;
static struct library library;
static float *buffers[MOST_RANKS];
static uint32_t round_of_mine;

static void meet_all(void)
{
    meet(&arena->meeting, &round_of_mine, (uint32_t)library.ranks);
}

static void one_shot(float *restrict data, size_t count)
{
    float (*slots)[MOST_SLOT_FLOATS] = arena->slots[round_of_mine % 2];
    memcpy(slots[library.rank], data, count * sizeof *data);
    meet_all();
    memcpy(data, slots[0], count * sizeof *data);
    for (int rank = 1; rank < library.ranks; rank++) {
        const float *restrict other = slots[rank];
        for (size_t at = 0; at < count; at++)
            data[at] += other[at];
    }
}

static void add_two(float *restrict into, const float *restrict a, const float *restrict b,
                    size_t count)
{
    for (size_t at = 0; at < count; at++)
        into[at] += a[at] + b[at];
}

static void add_one(float *restrict into, const float *restrict a, size_t count)
{
    for (size_t at = 0; at < count; at++)
        into[at] += a[at];
}

static void sum_block(size_t from, size_t count)
{
    static _Alignas(64) float sum[BLOCK];
    memcpy(sum, buffers[0] + from, count * sizeof *sum);
    int rank = 1;
    for (; rank + 1 < library.ranks; rank += 2)
        add_two(sum, buffers[rank] + from, buffers[rank + 1] + from, count);
    if (rank < library.ranks)
        add_one(sum, buffers[rank] + from, count);
    for (rank = 0; rank < library.ranks; rank++)
        memcpy(buffers[rank] + from, sum, count * sizeof *sum);
}

/* Where slice `rank` begins: at a cache line. */
static size_t slice_begin(size_t count, int rank)
{
    size_t lines = (count + GRAIN - 1) / GRAIN;
    size_t begin = lines * (size_t)rank / (size_t)library.ranks * GRAIN;
    return begin < count ? begin : count;
}

static void all_reduce(float *data, size_t count)
{
    /* The parity of meetings chooses the slots, which one-shot's single meeting flips. */
    if (count <= MOST_SLOT_FLOATS) {
        one_shot(data, count);
        return;
    }
    meet_all();
    size_t end = slice_begin(count, library.rank + 1);
    for (size_t at = slice_begin(count, library.rank); at < end; at += BLOCK)
        sum_block(at, end - at < BLOCK ? end - at : BLOCK);
    meet_all();
}

static float *allocate(size_t bytes)
{
    (void)bytes;
    return buffers[library.rank];
}

int main(int argc, char **argv)
{
    struct job job = job_from_arguments(argc, argv);
    library = (struct library){ .transport = "shm",
                                .algorithm = "one-pass",
                                .memory = "registered",
                                .ranks = atoi(argument(argc, argv, "ranks", "2")),
                                .all_reduce = all_reduce,
                                .allocate = allocate };
    need(library.ranks >= 1 && library.ranks <= MOST_RANKS, "--ranks 1 to 64");
    size_t bytes = SLOT_BYTES;
    for (int at = 0; at < job.size_count; at++)
        bytes = job.sizes[at] > bytes ? job.sizes[at] : bytes;
    job_begin(&job);
    arena = shared_memory(sizeof *arena);
    world_prepare(&library);
    for (int rank = 0; rank < library.ranks; rank++)
        buffers[rank] = shared_memory(bytes);
    library.rank = fork_ranks(library.ranks);
    job_run(&job, &library);
    return end_ranks(library.rank);
}
