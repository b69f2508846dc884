/* Averages gradients over all ranks, in memory that ranks of this host share.
 *
 * cc all_reduce.c -o all_reduce $(pkg-config --cflags --libs unisum)
 * mpirun -n 4 ./all_reduce
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unisum.h>

static void check(unisum_status status) {
    if (status != UNISUM_OK) {
        fprintf(stderr, "%s: %s\n", unisum_status_name(status), unisum_last_error()->text);
        exit(1);
    }
}

int main(void) {
    enum { COUNT = 1 << 20 };
    unisum_comm *comm;
    uint32_t rank, world;
    void *memory;

    check(unisum_connect_from_environment(&comm));
    check(unisum_comm_rank(comm, &rank));
    check(unisum_comm_world(comm, &world));
    if (rank == 0) { /* how the ranks found each other, in the first line */
        char told[512];
        check(unisum_comm_describe(comm, told, sizeof told, NULL));
        fprintf(stderr, "%.*s\n", (int)strcspn(told, "\n"), told);
    }
    check(unisum_allocate(comm, COUNT * sizeof(float), &memory));

    float *gradients = memory;
    for (size_t i = 0; i < COUNT; i++)
        gradients[i] = (float)rank;
    check(unisum_all_reduce(comm, gradients, COUNT, UNISUM_F32, UNISUM_AVERAGE));
    printf("rank %u of %u: the average is %g\n", rank, world, gradients[0]);

    check(unisum_free(memory));
    check(unisum_comm_free(comm));
    return 0;
}
