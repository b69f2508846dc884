/* What the floor programs print. */
#ifndef COMPARE_FLOOR_H
#define COMPARE_FLOOR_H

#include <stdio.h>
#include <stdlib.h>

static inline void print_floor(const char *name, double value, const char *unit)
{
    printf("{\"floor\":\"%s\",\"value\":%.6g,\"unit\":\"%s\"}\n", name, value, unit);
    fflush(stdout);
}

static inline int ascending(const void *left, const void *right)
{
    double difference = *(const double *)left - *(const double *)right;
    return (difference > 0) - (difference < 0);
}

static inline double median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, ascending);
    return values[count / 2];
}

#endif
