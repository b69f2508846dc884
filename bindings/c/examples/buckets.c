/* Trains nothing, in buckets: gradients are reduced while others are still being computed.
 *
 * cc buckets.c -o buckets $(pkg-config --cflags --libs unisum)
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
    unisum_comm *comm;
    unisum_buckets *buckets;
    uint32_t rank;
    const size_t weight[] = {256, 128}, bias[] = {128};
    const unisum_parameter parameters[] = {
        {.name = "weight", .shape = weight, .dimensions = 2, .dtype = UNISUM_F32},
        {.name = "bias", .shape = bias, .dimensions = 1, .dtype = UNISUM_F32},
    };

    check(unisum_connect_from_environment(&comm));
    check(unisum_comm_rank(comm, &rank));
    if (rank == 0) { /* how the ranks found each other, in the first line */
        char told[512];
        check(unisum_comm_describe(comm, told, sizeof told, NULL));
        fprintf(stderr, "%.*s\n", (int)strcspn(told, "\n"), told);
    }
    check(unisum_buckets_create(comm, parameters, 2, NULL, &buckets));
    for (int step = 0; step < 3; step++) {
        unisum_step_report report;
        check(unisum_buckets_begin(buckets));
        for (size_t parameter = 2; parameter-- > 0;) { /* backward: the last one first */
            void *memory;
            size_t count;
            check(unisum_buckets_view(buckets, parameter, &memory, &count));
            float *gradient = memory;
            for (size_t i = 0; i < count; i++)
                gradient[i] += (float)(rank + 1);
            check(unisum_buckets_ready(buckets, parameter));
        }
        check(unisum_buckets_wait(buckets, &report));
        void *memory;
        check(unisum_buckets_gradient(buckets, 0, &memory, NULL));
        const float *average = memory;
        printf("rank %u, step %d: %g of %u ranks\n", rank, step, average[0], report.participants);
    }
    check(unisum_buckets_free(buckets));
    check(unisum_comm_free(comm));
    return 0;
}
