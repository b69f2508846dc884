#define _GNU_SOURCE
#include "rule.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { MOST_OPERATIONS = 20000, MOST_WARMUPS = 50, LEAST_OPERATIONS = 3, PATTERN_PERIOD = 1021 };

/* An operation this slow gets no more warm-up than the checked one before it. */
static const double SLOW_S = 0.1;
static const double WARMUP_S = 0.1;

static double clock_s(clockid_t id)
{
    struct timespec time;
    clock_gettime(id, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

double seconds_now(void)
{
    return clock_s(CLOCK_MONOTONIC);
}

struct usage {
    double cpu_s;
    double voluntary_switches;
};

static struct usage usage_now(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    struct usage usage = { clock_s(CLOCK_PROCESS_CPUTIME_ID), (double)used.ru_nvcsw };
    return usage;
}

/* Anonymous and shared memory of this process, shared pages in proportion (proc_pid_smaps(5)). */
static double resident_kib(void)
{
    FILE *file = fopen("/proc/self/smaps_rollup", "r");
    char line[256];
    double total = 0, part;
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "Pss_Anon: %lf", &part) == 1 || sscanf(line, "Pss_Shmem: %lf", &part) == 1)
            total += part;
    if (file)
        fclose(file);
    return total;
}

const char *argument(int argc, char **argv, const char *name, const char *fallback)
{
    for (int at = 1; at + 1 < argc; at++)
        if (strncmp(argv[at], "--", 2) == 0 && strcmp(argv[at] + 2, name) == 0)
            return argv[at + 1];
    return fallback;
}

static int has_flag(int argc, char **argv, const char *flag)
{
    for (int at = 1; at < argc; at++)
        if (strcmp(argv[at], flag) == 0)
            return 1;
    return 0;
}

struct job job_from_arguments(int argc, char **argv)
{
    struct job job = { .mode = MODE_SPEED };
    const char *late = argument(argc, argv, "late-ms", NULL);
    if (late) {
        job.mode = MODE_LATE;
        job.late_s = atof(late) * 1e-3;
    } else if (has_flag(argc, argv, "--startup")) {
        job.mode = MODE_STARTUP;
    } else if (has_flag(argc, argv, "--resident")) {
        job.mode = MODE_RESIDENT;
    }
    job.seconds = atof(argument(argc, argv, "seconds", "0.2"));
    job.limit = atof(argument(argc, argv, "limit", "60"));
    const char *rest = argument(argc, argv, "sizes", "8");
    const int room = sizeof job.sizes / sizeof job.sizes[0];
    while (*rest && job.size_count < room) {
        char *end;
        job.sizes[job.size_count++] = strtoull(rest, &end, 10) / sizeof(float) * sizeof(float);
        rest = *end == ',' ? end + 1 : "";
    }
    return job;
}

void job_begin(struct job *job)
{
    job->resident_before_kib = job->mode == MODE_RESIDENT ? resident_kib() : 0;
    job->begin_s = seconds_now();
}

/* Small whole numbers that differ by rank and position: their sum is exact in any order. */
static float contribution(int rank, size_t position, unsigned seed)
{
    return (float)((position % PATTERN_PERIOD * 7 + (size_t)rank * 13 + seed) % 101);
}

static void fill_pattern(const struct library *library, float *data, size_t count, unsigned seed)
{
    for (size_t at = 0; at < count; at++)
        data[at] = contribution(library->rank, at, seed);
}

static double wrong_elements(const struct library *library, const float *data, size_t count,
                             unsigned seed)
{
    float expected[PATTERN_PERIOD];
    for (size_t at = 0; at < PATTERN_PERIOD; at++) {
        expected[at] = 0;
        for (int rank = 0; rank < library->ranks; rank++)
            expected[at] += contribution(rank, at, seed);
    }
    double wrong = 0;
    for (size_t at = 0; at < count; at++)
        wrong += data[at] != expected[at % PATTERN_PERIOD];
    return wrong;
}

static void align(const struct library *library)
{
    double nothing = 0;
    library->combine(&nothing, 1, 0);
}

/* One operation on known data: its time on the slowest rank; adds up what came out wrong. */
static double checked(const struct library *library, float *data, size_t count, double *wrong)
{
    static unsigned seed;
    fill_pattern(library, data, count, ++seed);
    align(library);
    double start = seconds_now();
    library->all_reduce(data, count);
    double time = seconds_now() - start;
    double mine = wrong_elements(library, data, count, seed);
    library->combine(&time, 1, 0);
    library->combine(&mine, 1, 1);
    *wrong += mine;
    return time;
}

/* Operations back to back: each one's time on its slowest rank, and what all ranks used. */
static struct usage timed(const struct library *library, float *data, size_t count, double *times,
                          int operations)
{
    struct usage before = usage_now();
    /* All start together, so that the first operation waits for nobody's looking up its usage. */
    align(library);
    for (int at = 0; at < operations; at++) {
        double start = seconds_now();
        library->all_reduce(data, count);
        times[at] = seconds_now() - start;
    }
    struct usage after = usage_now();
    double used[2] = { after.cpu_s - before.cpu_s,
                       after.voluntary_switches - before.voluntary_switches };
    library->combine(times, (size_t)operations, 0);
    library->combine(used, 2, 1);
    struct usage all = { used[0], used[1] };
    return all;
}

static int fitting(double time_s, double one_s, int least, int most)
{
    double fit = time_s / (one_s > 1e-9 ? one_s : 1e-9);
    return fit < least ? least : fit > most ? most : (int)fit;
}

static double mean(const double *values, int count)
{
    double sum = 0;
    for (int at = 0; at < count; at++)
        sum += values[at];
    return sum / count;
}

static int by_value(const void *left, const void *right)
{
    double difference = *(const double *)left - *(const double *)right;
    return (difference > 0) - (difference < 0);
}

/* Nearest rank, in microseconds; the times are ascending. */
static double quantile_us(const double *times, int count, double share)
{
    int rank = (int)(share * count);
    rank += rank < share * count;
    return times[(rank < 1 ? 1 : rank) - 1] * 1e6;
}

static void print_row(const struct library *library, size_t bytes, double *times, int operations,
                      struct usage used, double wrong)
{
    qsort(times, (size_t)operations, sizeof *times, by_value);
    double median_us = quantile_us(times, operations, 0.5);
    double algbw = (double)bytes / median_us * 1e-3;
    double busbw = algbw * 2 * (library->ranks - 1) / library->ranks;
    printf("{\"collective\":\"all_reduce\",\"transport\":\"%s\",\"algorithm\":\"%s\","
           "\"automatic\":true,\"ranks\":%d,\"bytes\":%zu,\"count\":%zu,\"dtype\":\"f32\","
           "\"op\":\"sum\",\"memory\":\"%s\",\"iterations\":%d,",
           library->transport, library->algorithm, library->ranks, bytes, bytes / sizeof(float),
           library->memory, operations);
    printf("\"min_us\":%.4f,\"p50_us\":%.4f,\"p99_us\":%.4f,\"max_us\":%.4f,"
           "\"algbw_GBps\":%.6g,\"busbw_GBps\":%.6g,\"wrong\":%.0f,\"cpu_seconds\":%.9g,"
           "\"cpu_seconds_per_GB\":%.6g,\"voluntary_switches\":%.0f}\n",
           times[0] * 1e6, median_us, quantile_us(times, operations, 0.99),
           times[operations - 1] * 1e6, algbw, busbw, wrong, used.cpu_s,
           used.cpu_s / ((double)bytes * operations * 1e-9), used.voluntary_switches);
    fflush(stdout);
}

static void measure(const struct job *job, const struct library *library, float *data, size_t bytes)
{
    static double times[MOST_OPERATIONS];
    size_t count = bytes / sizeof(float);
    double wrong = 0;
    double estimate = checked(library, data, count, &wrong);
    /* Zeros stay zeros, whatever the number of operations in place. */
    memset(data, 0, bytes);
    if (estimate < SLOW_S) {
        timed(library, data, count, &estimate, 1);
        int warmups = fitting(WARMUP_S, estimate, 1, MOST_WARMUPS);
        timed(library, data, count, times, warmups);
        estimate = mean(times, warmups);
    }
    int operations = fitting(job->seconds, estimate, LEAST_OPERATIONS, MOST_OPERATIONS);
    struct usage used = timed(library, data, count, times, operations);
    if (estimate < SLOW_S)
        checked(library, data, count, &wrong);
    if (library->rank == 0)
        print_row(library, bytes, times, operations, used, wrong);
}

static size_t largest(const struct job *job)
{
    size_t most = 0;
    for (int at = 0; at < job->size_count; at++)
        most = job->sizes[at] > most ? job->sizes[at] : most;
    return most;
}

static void sweep(const struct job *job, const struct library *library)
{
    float *data = library->allocate(largest(job));
    double start = seconds_now();
    for (int at = 0; at < job->size_count; at++) {
        double elapsed = seconds_now() - start;
        library->combine(&elapsed, 1, 0);
        if (elapsed > job->limit) {
            if (library->rank == 0)
                printf("{\"skipped_from\":%zu,\"reason\":\"%.0f s spent on smaller sizes\"}\n",
                       job->sizes[at], elapsed);
            return;
        }
        measure(job, library, data, job->sizes[at]);
    }
}

/* Processor time of one operation that this rank enters so late. */
static double operation_cpu_s(const struct library *library, float *data, size_t count,
                              double late_s)
{
    align(library);
    double before = usage_now().cpu_s;
    if (late_s > 0)
        usleep((useconds_t)(late_s * 1e6));
    library->all_reduce(data, count);
    return usage_now().cpu_s - before;
}

static void come_late(const struct job *job, const struct library *library)
{
    size_t count = largest(job) / sizeof(float);
    float *data = library->allocate(count * sizeof(float));
    memset(data, 0, count * sizeof(float));
    double late_s = library->rank == library->ranks - 1 ? job->late_s : 0;
    operation_cpu_s(library, data, count, 0);
    double in_time = operation_cpu_s(library, data, count, 0);
    double burnt = operation_cpu_s(library, data, count, late_s) - in_time;
    if (late_s > 0 || burnt < 0)
        burnt = 0;
    double most = burnt, total = burnt;
    library->combine(&most, 1, 0);
    library->combine(&total, 1, 1);
    if (library->rank == 0)
        printf("{\"ranks\":%d,\"late_ms\":%.0f,\"waiting_cpu_ms_mean\":%.4f,"
               "\"waiting_cpu_ms_max\":%.4f}\n",
               library->ranks, job->late_s * 1e3, total / (library->ranks - 1) * 1e3, most * 1e3);
}

/* The begin of each rank's init to the end of its first all-reduce; two views of it. */
static void start_up(const struct job *job, const struct library *library)
{
    double connected_s = seconds_now();
    float *data = library->allocate(8);
    data[0] = data[1] = 1;
    library->all_reduce(data, 2);
    double end_s = seconds_now();
    double slowest[2] = { connected_s - job->begin_s, end_s - connected_s };
    double ends[2] = { job->begin_s, end_s };
    library->combine(slowest, 2, 0);
    library->combine(ends, 2, 0);
    if (library->rank == 0)
        printf("{\"ranks\":%d,\"connect_ms\":%.4f,\"first_all_reduce_ms\":%.4f,"
               "\"last_start_to_first_all_reduce_ms\":%.4f}\n",
               library->ranks, slowest[0] * 1e3, slowest[1] * 1e3, (ends[1] - ends[0]) * 1e3);
}

/* The sizes once more, then a moment of quiet in which an observer reads /proc. */
static void reside(const struct job *job, const struct library *library)
{
    double before_kib = job->resident_before_kib;
    library->combine(&before_kib, 1, 1);
    if (library->rank == 0)
        printf("{\"resident_before_KiB\":%.1f}\n", before_kib / library->ranks);
    sweep(job, library);
    align(library);
    usleep(500000);
    align(library);
}

void job_run(const struct job *job, const struct library *library)
{
    switch (job->mode) {
    case MODE_SPEED: sweep(job, library); break;
    case MODE_LATE: come_late(job, library); break;
    case MODE_STARTUP: start_up(job, library); break;
    case MODE_RESIDENT: reside(job, library); break;
    }
    fflush(stdout);
}
