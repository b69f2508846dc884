/* The measuring rule that all drivers and reference programs share; allreduce-bench has the same.
 *
 * In place, sum of float32, warm-up, no barrier between operations, an operation counts as its
 * slowest rank: every rank keeps its times, and the ranks take the largest one by one afterwards.
 * Rank 0 prints one JSON object per line with the keys of `allreduce-bench --format json`.
 */
#ifndef COMPARE_RULE_H
#define COMPARE_RULE_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What a driver offers; every function is collective unless it says otherwise. */
struct library {
    const char *transport;
    const char *algorithm;
    const char *memory;
    int rank;
    int ranks;
    /* Sums `count` floats in place. */
    void (*all_reduce)(float *data, size_t count);
    /* Replaces each value by its maximum (`sum` 0) or its sum over the ranks. */
    void (*combine)(double *values, size_t count, int sum);
    /* Gives a buffer for `all_reduce`. */
    float *(*allocate)(size_t bytes);
};

enum mode { MODE_SPEED, MODE_LATE, MODE_STARTUP, MODE_RESIDENT };

/* What the command line asks for. */
struct job {
    enum mode mode;
    size_t sizes[64];
    int size_count;
    double seconds;  /* to measure each size for */
    double limit;    /* larger sizes are left out after so many seconds in all */
    double late_s;   /* MODE_LATE: the last rank comes so late */
    double begin_s;  /* when the process began, before the library's init */
    double resident_before_kib;
};

/* Reads `--sizes 8,64 --seconds S --limit S [--late-ms MS | --startup | --resident]`, leaves other
 * words alone. Not collective; call it before the library's init. */
struct job job_from_arguments(int argc, char **argv);

/* Notes when the library's init begins. Not collective. */
void job_begin(struct job *job);

/* Does the job. */
void job_run(const struct job *job, const struct library *library);

/* Value of `--name` in the arguments, or the fallback. */
const char *argument(int argc, char **argv, const char *name, const char *fallback);

double seconds_now(void);

#ifdef __cplusplus
}
#endif
#endif
