/* All-reduce of an MPI library: one source for Open MPI and MPICH. */
#define _GNU_SOURCE
#include <mpi.h>
#include <stdlib.h>
#include <unistd.h>

#include "rule.h"

enum { END_S = 5 };

static void all_reduce(float *data, size_t count)
{
    MPI_Allreduce(MPI_IN_PLACE, data, (int)count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
}

static void combine(double *values, size_t count, int sum)
{
    MPI_Op op = sum ? MPI_SUM : MPI_MAX;
    MPI_Allreduce(MPI_IN_PLACE, values, (int)count, MPI_DOUBLE, op, MPI_COMM_WORLD);
}

static float *allocate(size_t bytes)
{
    void *data = NULL;
    if (posix_memalign(&data, 4096, bytes) != 0)
        MPI_Abort(MPI_COMM_WORLD, 1);
    return data;
}

int main(int argc, char **argv)
{
    struct job job = job_from_arguments(argc, argv);
    struct library library = { .transport = argument(argc, argv, "transport", "shm"),
                               .algorithm = "library's choice",
                               .memory = "private",
                               .all_reduce = all_reduce,
                               .combine = combine,
                               .allocate = allocate };
    job_begin(&job);
    MPI_Init(NULL, NULL);
    MPI_Comm_rank(MPI_COMM_WORLD, &library.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &library.ranks);
    job_run(&job, &library);
    /* MPICH over UCX's TCP at times never comes back from its end. All results are out by then;
     * the signal ends the process, and the report tells. */
    alarm(END_S);
    MPI_Finalize();
    return 0;
}
