/* Ranks of a world, each a process: worlds SCENARIO. The environment says which rank this is; a
 * directory for what they have to tell each other otherwise is in TEST_DIRECTORY. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

static unisum_comm *comm;
static uint32_t rank, world;

static void join(void) {
    OK(unisum_connect_from_environment(&comm));
    OK(unisum_comm_rank(comm, &rank));
    OK(unisum_comm_world(comm, &world));
}

static void leave(void) { OK(unisum_comm_free(comm)); }

static void pause_ms(long ms) {
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static void path_of(char *path, size_t size, const char *name) {
    snprintf(path, size, "%s/%s", getenv("TEST_DIRECTORY"), name);
}

/* Says that this rank has come to a point; waits until somebody has. */
static void reach(const char *point) {
    char path[4096];
    path_of(path, sizeof path, point);
    CHECK(mkdir(path, 0700) == 0);
}

static void await(const char *point) {
    char path[4096];
    path_of(path, sizeof path, point);
    for (int left = 60000; access(path, F_OK) != 0; left--) {
        CHECK(left > 0);
        pause_ms(1);
    }
}

/* Elements of any type, of small whole numbers. */
static size_t size_of(uint32_t dtype) {
    switch (dtype) {
    case UNISUM_F64: case UNISUM_I64: case UNISUM_U64: return 8;
    case UNISUM_F32: case UNISUM_I32: case UNISUM_U32: return 4;
    case UNISUM_F16: case UNISUM_BF16: case UNISUM_I16: case UNISUM_U16: return 2;
    default: return 1;
    }
}

/* One, as each type writes it. */
static uint64_t one_of(uint32_t dtype) {
    switch (dtype) {
    case UNISUM_F16: return 0x3c00;
    case UNISUM_BF16: return 0x3f80;
    case UNISUM_F32: return 0x3f800000;
    case UNISUM_F64: return 0x3ff0000000000000;
    case UNISUM_F8E4M3: return 0x38;
    case UNISUM_F8E5M2: return 0x3c;
    default: return 1;
    }
}

static void every_dtype(void) {
    char data[8 * 100];
    for (uint32_t dtype = UNISUM_F16; dtype <= UNISUM_BOOL; dtype++) {
        uint64_t one = one_of(dtype), zero = 0;
        size_t size = size_of(dtype);
        for (size_t i = 0; i < 100; i++)
            memcpy(data + i * size, rank == 1 && i % 2 ? &one : &zero, size);
        OK(unisum_all_reduce(comm, data, 100, dtype, UNISUM_MAX));
        for (size_t i = 0; i < 100; i++)
            CHECK(memcmp(data + i * size, i % 2 ? &one : &zero, size) == 0);
    }
}

enum { BLOCK = 1000 };

static void each_collective(void) {
    uint32_t total = world * (world + 1) / 2;
    size_t all = (size_t)world * BLOCK;
    int32_t *input = malloc(all * sizeof *input), *output = malloc(all * sizeof *output);
    CHECK(input && output);
    for (size_t i = 0; i < all; i++)
        input[i] = (int32_t)(rank + 1), output[i] = -1;

    memcpy(output, input, BLOCK * sizeof *output);
    OK(unisum_all_reduce(comm, output, BLOCK, UNISUM_I32, UNISUM_SUM));
    CHECK(output[0] == (int32_t)total && output[BLOCK - 1] == (int32_t)total);
    memcpy(output, input, BLOCK * sizeof *output);
    OK(unisum_reduce(comm, output, BLOCK, UNISUM_I32, UNISUM_PRODUCT, world - 1));
    CHECK(output[5] == (rank == world - 1 ? (world == 2 ? 2 : 24) : (int32_t)rank + 1));
    memcpy(output, input, BLOCK * sizeof *output);
    OK(unisum_broadcast(comm, output, BLOCK, UNISUM_I32, 1));
    CHECK(output[BLOCK - 1] == 2);

    OK(unisum_all_gather(comm, input, output, BLOCK, UNISUM_I32));
    for (size_t i = 0; i < all; i++)
        CHECK(output[i] == (int32_t)(i / BLOCK) + 1);
    memset(output, 0, all * sizeof *output);
    memcpy(output + rank * BLOCK, input, BLOCK * sizeof *output);
    OK(unisum_all_gather(comm, UNISUM_IN_PLACE, output, BLOCK, UNISUM_I32));
    for (size_t i = 0; i < all; i++)
        CHECK(output[i] == (int32_t)(i / BLOCK) + 1);

    OK(unisum_reduce_scatter(comm, input, output, BLOCK, UNISUM_I32, UNISUM_SUM));
    CHECK(output[0] == (int32_t)total && output[BLOCK - 1] == (int32_t)total);
    memcpy(output, input, all * sizeof *output);
    OK(unisum_reduce_scatter(comm, UNISUM_IN_PLACE, output, BLOCK, UNISUM_I32, UNISUM_SUM));
    CHECK(output[rank * BLOCK] == (int32_t)total);
    OK(unisum_all_to_all(comm, input, output, BLOCK, UNISUM_I32));
    for (size_t i = 0; i < all; i++)
        CHECK(output[i] == (int32_t)(i / BLOCK) + 1);
    memcpy(output, input, all * sizeof *output);
    OK(unisum_all_to_all(comm, UNISUM_IN_PLACE, output, BLOCK, UNISUM_I32));
    CHECK(output[all - 1] == (int32_t)world);

    OK(unisum_gather(comm, input, rank == 0 ? output : NULL, BLOCK, UNISUM_I32, 0));
    CHECK(rank != 0 || output[all - 1] == (int32_t)world);
    for (size_t i = 0; i < all; i++)
        input[i] = (int32_t)(i / BLOCK);
    OK(unisum_scatter(comm, rank == 0 ? input : NULL, output, BLOCK, UNISUM_I32, 0));
    CHECK(output[0] == (int32_t)rank && output[BLOCK - 1] == (int32_t)rank);
    OK(unisum_barrier(comm));
    free(input);
    free(output);
}

/* Blocks of rank + 1 elements; scaled sums; Inf and NaN told. */
static void structures(void) {
    size_t counts[64], receives[64], all = 0;
    float input[64 * 64], output[64 * 64];
    CHECK(world <= 64);
    for (uint32_t i = 0; i < world; i++) {
        counts[i] = i + 1, receives[i] = rank + 1;
        all += counts[i];
    }
    for (size_t i = 0; i < all || i < (size_t)world * (rank + 1); i++)
        input[i] = (float)rank;
    unisum_collective asked = {.kind = UNISUM_ALL_GATHER, .counts = counts};
    unisum_buffers buffers = {input, rank + 1, output, all};
    OK(unisum_run(comm, &asked, UNISUM_F32, &buffers, NULL));
    for (size_t i = 0, from = 0; from < world; i += ++from)
        CHECK(output[i] == (float)from && output[i + from] == (float)from);
    asked = (unisum_collective){
        .kind = UNISUM_ALL_TO_ALL, .counts = counts, .receive_counts = receives};
    buffers = (unisum_buffers){input, all, output, (size_t)world * (rank + 1)};
    OK(unisum_run(comm, &asked, UNISUM_F32, &buffers, NULL));
    CHECK(output[rank] == 0 && output[(size_t)world * (rank + 1) - 1] == (float)(world - 1));

    bool nonfinite = true;
    float data[10] = {1, 2, 3};
    asked = (unisum_collective){.kind = UNISUM_ALL_REDUCE, .op = UNISUM_SUM,
        .flags = UNISUM_SCALED | UNISUM_DETECT_NONFINITE, .scale = 0.5};
    buffers = (unisum_buffers){UNISUM_IN_PLACE, 0, data, 10};
    OK(unisum_run(comm, &asked, UNISUM_F32, &buffers, &nonfinite));
    CHECK(!nonfinite && data[2] == 1.5f * (float)world);
    if (rank == 1)
        data[3] = 1.0f / 0.0f;
    OK(unisum_run(comm, &asked, UNISUM_F32, &buffers, &nonfinite));
    CHECK(nonfinite);

    float small[3] = {1, 1, 1}, other[2] = {(float)rank, 0};
    unisum_buffers tensors[2] = {{UNISUM_IN_PLACE, 0, small, 3}, {UNISUM_IN_PLACE, 0, other, 2}};
    asked = (unisum_collective){.kind = UNISUM_ALL_REDUCE, .op = UNISUM_AVERAGE};
    OK(unisum_run_batch(comm, &asked, UNISUM_F32, tensors, 2, NULL));
    CHECK(small[2] == 1 && other[0] == (float)(world - 1) / 2);
}

static void collectives(void) {
    join();
    every_dtype();
    each_collective();
    structures();
    void *memory;
    OK(unisum_allocate(comm, 1 << 20, &memory));
    memset(memory, 1, 1 << 20);
    OK(unisum_all_reduce(comm, memory, 1 << 20, UNISUM_U8, UNISUM_SUM));
    CHECK(((uint8_t *)memory)[(1 << 20) - 1] == world);
    OK(unisum_free(memory));
    leave();
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int called;

static void call_back(void *work) {
    OK(unisum_work_wait(work, 0, NULL));
    OK(unisum_barrier(comm)); /* a callback may call what the others have to take part in */
    pthread_mutex_lock(&lock);
    called++;
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
}

static void asynchronous(void) {
    join();
    float data[100];
    for (int i = 0; i < 100; i++)
        data[i] = 1;
    unisum_collective sum = {.kind = UNISUM_ALL_REDUCE, .op = UNISUM_SUM};
    unisum_buffers buffers = {UNISUM_IN_PLACE, 0, data, 100};
    unisum_work *work;
    bool ended = true;
    if (rank == 1)
        await("timed_out");
    OK(unisum_start(comm, &sum, UNISUM_F32, &buffers, &work));
    OK(unisum_work_on_end(work, call_back, work));
    if (rank == 0) { /* nothing comes of it before rank 1 has started its own */
        EXPECT(UNISUM_IN_PROGRESS, unisum_work_wait(work, 0.02, NULL));
        OK(unisum_work_test(work, &ended));
        CHECK(!ended);
        reach("timed_out");
    }
    OK(unisum_work_wait(work, 60, NULL));
    CHECK(data[99] == (float)world);
    pthread_mutex_lock(&lock);
    while (called == 0)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    OK(unisum_work_free(work));
    /* Several under way, freed without having been waited for: then they have ended. */
    unisum_work *works[5];
    float many[5][10] = {{0}};
    for (int i = 0; i < 5; i++) {
        buffers = (unisum_buffers){UNISUM_IN_PLACE, 0, many[i], 10};
        many[i][9] = (float)i;
        OK(i % 2 ? unisum_start(comm, &sum, UNISUM_F32, &buffers, &works[i])
                 : unisum_start_batch(comm, &sum, UNISUM_F32, &buffers, 1, &works[i]));
    }
    for (int i = 5; i-- > 0;) {
        OK(unisum_work_free(works[i]));
        CHECK(many[i][9] == (float)i * (float)world);
    }
    leave();
}

static void groups(void) {
    join();
    unisum_comm *group, *none = comm, *copy;
    uint32_t number, ranks[1] = {world - 1};
    OK(unisum_comm_split(comm, rank % 2, -(int64_t)rank, &group));
    float sum = (float)rank;
    OK(unisum_all_reduce(group, &sum, 1, UNISUM_F32, UNISUM_MAX));
    CHECK(sum == (float)(world - 2 + rank % 2));
    OK(unisum_comm_world(group, &number));
    CHECK(number == world / 2);
    OK(unisum_comm_subset(comm, ranks, 1, &none));
    CHECK((none != NULL) == (rank == world - 1));
    OK(unisum_comm_duplicate(comm, &copy));
    OK(unisum_barrier(copy));
    OK(unisum_comm_free(copy));
    if (none)
        OK(unisum_comm_free(none));
    OK(unisum_comm_free(group));

    unisum_messenger *post;
    OK(unisum_messenger_create(comm, &post));
    uint32_t next = (rank + 1) % world, before = (rank + world - 1) % world;
    enum { LONG = 100000 };
    static double out[LONG], in[LONG];
    out[LONG - 1] = rank;
    unisum_message messages[2] = {{UNISUM_SEND, next, 7, out, LONG},
                                  {UNISUM_RECEIVE, before, 7, in, LONG}};
    OK(unisum_exchange(post, messages, 2, UNISUM_F64));
    CHECK(in[LONG - 1] == before);
    messages[1].data = out;
    REFUSED(UNISUM_INVALID_ARGUMENT, "overlap", unisum_exchange(post, messages, 2, UNISUM_F64));
    EXPECT(UNISUM_CONFIGURATION, unisum_send(post, out, 1, UNISUM_F64, world, 1));
    OK(rank % 2 ? unisum_receive(post, in, 3, UNISUM_F64, before, 1)
                : unisum_send(post, out, 3, UNISUM_F64, next, 1));
    OK(unisum_barrier(comm));
    OK(unisum_messenger_free(post));
    leave();
}

static int updates;

static int update(void *user, const unisum_step_report *report, void *const *gradients,
                  const size_t *counts, size_t parameters) {
    CHECK(user == &updates && parameters == 2 && counts[1] == 6 && report->participants > 0);
    CHECK(((const double *)gradients[1])[5] == 3);
    updates++;
    return 0;
}

static void training(void) {
    join();
    size_t shape[2] = {2, 3}, large[1] = {50000};
    unisum_parameter parameters[2] = {{"large", large, 1, UNISUM_F32, 0},
                                      {"small", shape, 2, UNISUM_F64, 0}};
    unisum_bucket_options options = {.flags = UNISUM_UNEVEN_INPUTS, .bucket_bytes = 65536};
    unisum_buckets *buckets;
    OK(unisum_buckets_create(comm, parameters, 2, &options, &buckets));
    static float values[50000];
    values[49999] = (float)rank;
    /* The last rank has two steps more than the others. */
    for (uint32_t step = 0; step < (rank == world - 1 ? 5 : 3); step++) {
        void *memory;
        size_t count;
        OK(unisum_buckets_begin(buckets));
        OK(unisum_buckets_view(buckets, 1, &memory, &count));
        for (size_t i = 0; i < count; i++)
            ((double *)memory)[i] += 3;
        OK(unisum_buckets_ready(buckets, 1));
        OK(unisum_buckets_put(buckets, 0, values, 50000));
        unisum_step_report report;
        OK(unisum_buckets_wait(buckets, &report));
        CHECK(report.participants == (step < 3 ? world : 1));
        OK(unisum_buckets_gradient(buckets, 0, &memory, &count));
        float average = step < 3 ? (float)(world - 1) / 2 : (float)rank;
        CHECK(count == 50000 && ((float *)memory)[49999] == average);
    }
    OK(unisum_buckets_join(buckets, update, &updates));
    CHECK(updates == (rank == world - 1 ? 0 : 2));
    OK(unisum_buckets_free(buckets));
    leave();
}

/* a ∘ b = (a.x b.x, a.x b.y + a.y): maps x → a.x x + a.y one after another, of 16 bits each. */
static int compose(void *user, void *accumulator, const void *other, size_t count) {
    CHECK(user == &called);
    uint32_t *into = accumulator;
    const uint32_t *from = other;
    for (size_t i = 0; i < count; i++) {
        uint32_t x = into[i] & 0xffff, y = into[i] >> 16;
        uint32_t factor = from[i] & 0xffff, offset = from[i] >> 16;
        into[i] = (x * factor & 0xffff) | (x * offset + y) << 16;
    }
    return 0;
}

static int refuse(void *user, void *accumulator, const void *other, size_t count) {
    (void)accumulator, (void)other, (void)count;
    return *(uint32_t *)user == 1 ? 7 : 0;
}

static void reductions(void) {
    join();
    unisum_reduction *composed, *refused;
    enum { COUNT = 100000 };
    static uint32_t data[COUNT];
    OK(unisum_reduction_create(UNISUM_U32, compose, &called, false, &composed));
    unisum_collective collective = {.kind = UNISUM_ALL_REDUCE, .reduction = composed};
    unisum_buffers buffers = {UNISUM_IN_PLACE, 0, data, COUNT};
    for (int asynchronous = 0; asynchronous < 2; asynchronous++) {
        uint32_t x = 1, y = 0;
        for (uint32_t other = 0; other < world; other++) {
            uint32_t factor = 2 * other + 3, offset = other + 5;
            y = (x * offset + y) & 0xffff, x = x * factor & 0xffff;
        }
        for (size_t i = 0; i < COUNT; i++)
            data[i] = (2 * rank + 3) | (rank + 5) << 16;
        if (asynchronous) {
            unisum_work *work;
            OK(unisum_start(comm, &collective, UNISUM_U32, &buffers, &work));
            /* The work keeps what it calls. */
            OK(unisum_reduction_free(composed));
            OK(unisum_work_wait(work, -1, NULL));
            OK(unisum_work_free(work));
        } else {
            OK(unisum_run(comm, &collective, UNISUM_U32, &buffers, NULL));
        }
        for (size_t i = 0; i < COUNT; i++)
            CHECK(data[i] == (x | y << 16));
    }
    EXPECT(UNISUM_INVALID_HANDLE, unisum_run(comm, &collective, UNISUM_U32, &buffers, NULL));
    /* Here nothing has begun; then a function fails on one rank, and the call on all. */
    OK(unisum_reduction_create(UNISUM_U32, refuse, &rank, true, &refused));
    collective.reduction = refused;
    collective.op = UNISUM_SUM;
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_run(comm, &collective, UNISUM_U32, &buffers, NULL));
    collective.op = 0, collective.flags = UNISUM_DETECT_NONFINITE;
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_run(comm, &collective, UNISUM_U32, &buffers, NULL));
    collective.flags = 0, collective.kind = UNISUM_ALL_GATHER;
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_run(comm, &collective, UNISUM_U32, &buffers, NULL));
    collective.kind = UNISUM_ALL_REDUCE;
    EXPECT(UNISUM_CONFIGURATION, unisum_run(comm, &collective, UNISUM_F32, &buffers, NULL));
    OK(unisum_barrier(comm));
    /* A rank that needs nothing of the one that failed may hear of it in its next call. */
    unisum_status status = unisum_run(comm, &collective, UNISUM_U32, &buffers, NULL);
    if (rank != 1 && status == UNISUM_OK)
        status = unisum_barrier(comm);
    CHECK(status == UNISUM_CALLBACK_FAILED);
    CHECK(strstr(unisum_last_error()->text, "the reduction gave 7"));
    const unisum_error *error = unisum_last_error();
    CHECK(error->rank_count == 1 && error->ranks[0] == 1);
    OK(unisum_reduction_free(refused));
    leave();
}

/* Plain gradient descent on shards equals the same on whole gradients. */
static void sharding(void) {
    join();
    size_t shapes[3][1] = {{1000}, {33}, {70001}};
    unisum_parameter parameters[3] = {{"a", shapes[0], 1, UNISUM_F32, 0},
                                      {"b", shapes[1], 1, UNISUM_F32, 0},
                                      {"c", shapes[2], 1, UNISUM_F32, 0}};
    unisum_bucket_options options = {.flags = UNISUM_SHARDED, .bucket_bytes = 16384,
                                     .end_bucket_bytes = 16384};
    unisum_buckets *buckets;
    unisum_weights *weights;
    void *memory;
    const void *averages;
    size_t count, bucket_count, covered = 0;
    OK(unisum_buckets_create(comm, parameters, 3, &options, &buckets));
    OK(unisum_weights_create(buckets, &weights));
    OK(unisum_buckets_count(buckets, &bucket_count));
    CHECK(bucket_count >= 2);
    for (size_t parameter = 0; parameter < 3; parameter++) {
        OK(unisum_weights_get(weights, parameter, &memory, &count));
        CHECK(count == shapes[parameter][0]);
        for (size_t i = 0; i < count; i++)
            ((float *)memory)[i] = (float)parameter;
    }
    OK(unisum_buckets_begin(buckets));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_buckets_shard(buckets, 0, &averages, &count));
    for (size_t parameter = 0; parameter < 3; parameter++) {
        OK(unisum_buckets_view(buckets, parameter, &memory, &count));
        for (size_t i = 0; i < count; i++)
            ((float *)memory)[i] = (float)(rank + i % 8);
        OK(unisum_buckets_ready(buckets, parameter));
    }
    OK(unisum_buckets_wait(buckets, NULL));
    for (size_t bucket = 0; bucket < bucket_count; bucket++) {
        unisum_shard_piece pieces[3] = {{9, 9, 9, 9}};
        size_t shard_count, piece_count;
        OK(unisum_buckets_shard(buckets, bucket, &averages, &count));
        OK(unisum_weights_shard(weights, bucket, &memory, &shard_count));
        CHECK(count == shard_count);
        for (size_t i = 0; i < count; i++)
            ((float *)memory)[i] -= ((const float *)averages)[i];
        OK(unisum_buckets_shard_pieces(buckets, bucket, pieces, 3, &piece_count));
        CHECK(piece_count <= 3);
        for (size_t i = 0; i < piece_count; i++) {
            CHECK(pieces[i].at + pieces[i].count <= count);
            covered += pieces[i].count;
        }
    }
    CHECK(covered > 0);
    OK(unisum_buckets_gather(buckets, weights));
    float middle = (float)(world - 1) / 2;
    for (size_t parameter = 0; parameter < 3; parameter++) {
        OK(unisum_weights_get(weights, parameter, &memory, &count));
        for (size_t i = 0; i < count; i++)
            CHECK(((float *)memory)[i] == (float)parameter - (middle + (float)(i % 8)));
    }
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_weights_get(weights, 3, &memory, &count));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_weights_shard(weights, 99, &memory, &count));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_buckets_shard(buckets, 99, &averages, &count));
    OK(unisum_weights_free(weights));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_weights_free(weights));
    OK(unisum_buckets_free(buckets));
    leave();
}

/* What is saved of buckets is used by others. */
static void saving(void) {
    join();
    size_t shape[1] = {5000};
    unisum_parameter parameters[2] = {{"a", shape, 1, UNISUM_F32, 0},
                                      {"b", shape, 1, UNISUM_F32, 0}};
    unisum_bucket_options options = {.encoding = UNISUM_BF16, .bucket_bytes = 20000,
                                     .end_bucket_bytes = 20000};
    unisum_buckets *buckets;
    unsigned char layout[256], again[256], *kept;
    size_t length, same, kept_length, count;
    void *memory;
    const void *shard;
    OK(unisum_buckets_create(comm, parameters, 2, &options, &buckets));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_buckets_shard(buckets, 0, &shard, &count));
    for (int step = 0; step < 2; step++) {
        OK(unisum_buckets_begin(buckets));
        /* In an order of its own. */
        for (size_t parameter = 0; parameter < 2; parameter++) {
            OK(unisum_buckets_view(buckets, parameter, &memory, &count));
            for (size_t i = 0; i < count; i++)
                ((float *)memory)[i] = 1.001f;
            OK(unisum_buckets_ready(buckets, parameter));
        }
        OK(unisum_buckets_wait(buckets, NULL));
    }
    OK(unisum_buckets_rescale(buckets, 0.5f));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_buckets_rescale(buckets, 0));
    OK(unisum_buckets_layout(buckets, layout, sizeof layout, &length));
    CHECK(length > 8 && length <= sizeof layout);
    OK(unisum_buckets_save(buckets, NULL, 0, &kept_length));
    kept = malloc(kept_length);
    CHECK(kept && kept_length > 0);
    OK(unisum_buckets_save(buckets, kept, kept_length, &same));
    CHECK(same == kept_length);
    OK(unisum_buckets_free(buckets));
    options.layout = layout, options.layout_bytes = length;
    OK(unisum_buckets_create(comm, parameters, 2, &options, &buckets));
    OK(unisum_buckets_restore(buckets, kept, kept_length));
    EXPECT(UNISUM_CONFIGURATION, unisum_buckets_restore(buckets, kept, kept_length - 1));
    OK(unisum_buckets_layout(buckets, again, sizeof again, &same));
    CHECK(same == length && memcmp(layout, again, length) == 0);
    OK(unisum_buckets_free(buckets));
    options.layout_bytes = length - 1;
    EXPECT(UNISUM_MISMATCH, unisum_buckets_create(comm, parameters, 2, &options, &buckets));
    free(kept);
    leave();
}

static int set(void *user, const char *key, const void *value, size_t length) {
    char draft[4096], path[4096];
    CHECK(user == &called);
    path_of(draft, sizeof draft, "draft");
    path_of(path, sizeof path, key);
    FILE *file = fopen(draft, "wb");
    CHECK(file && fwrite(value, 1, length, file) == length && fclose(file) == 0);
    return rename(draft, path);
}

static int get(void *user, const char *key, double timeout_s, void *value, size_t capacity,
               size_t *length) {
    char path[4096];
    CHECK(user == &called && timeout_s > 0);
    path_of(path, sizeof path, key);
    FILE *file;
    for (double left = timeout_s; !(file = fopen(path, "rb")); left -= 0.002) {
        if (left <= 0)
            return ETIMEDOUT;
        pause_ms(2);
    }
    *length = fread(value, 1, capacity, file);
    return fclose(file);
}

static void by_store(void) {
    unisum_config *config;
    unisum_store store = {set, get, &called};
    unsetenv("UNISUM_RENDEZVOUS");
    unsetenv("UNISUM_TOKEN");
    setenv("HOME", "/nonexistent", 1);
    unsetenv("XDG_CONFIG_HOME");
    OK(unisum_config_create(&config));
    OK(unisum_config_set_store(config, &store));
    OK(unisum_config_set(config, "UNISUM_RANK", getenv("UNISUM_RANK")));
    for (int start = 0; start < 2; start++) {
        OK(unisum_connect(config, &comm));
        OK(unisum_barrier(comm));
        OK(unisum_comm_free(comm));
    }
    OK(unisum_config_free(config));
}

static void *abort_soon(void *nothing) {
    await("waiting");
    OK(unisum_comm_abort(comm, "the loss is NaN"));
    return nothing;
}

/* All but rank 0 wait; a thread of rank 0 aborts. Works, messages and later calls end alike. */
static void aborting(void) {
    join();
    float data[10] = {0};
    unisum_collective sum = {.kind = UNISUM_ALL_REDUCE, .op = UNISUM_SUM};
    unisum_buffers buffers = {UNISUM_IN_PLACE, 0, data, 10};
    unisum_messenger *post;
    unisum_work *work = NULL;
    pthread_t thread;
    OK(unisum_messenger_create(comm, &post));
    if (rank == 0) {
        CHECK(pthread_create(&thread, NULL, abort_soon, NULL) == 0);
        EXPECT(UNISUM_ABORTED, unisum_receive(post, data, 10, UNISUM_F32, 1, 1));
        CHECK(pthread_join(thread, NULL) == 0);
    } else {
        OK(unisum_start(comm, &sum, UNISUM_F32, &buffers, &work));
        if (rank == 1)
            reach("waiting");
        REFUSED(UNISUM_ABORTED, "the loss is NaN", unisum_work_wait(work, 30, NULL));
        const unisum_error *error = unisum_last_error();
        CHECK(error->rank_count == 1 && error->ranks[0] == 0 && error->rank == rank);
        CHECK(error->operation && strstr(error->operation, "all_reduce") && error->steps > 0);
        OK(unisum_work_free(work));
    }
    REFUSED(UNISUM_ABORTED, "the loss is NaN", unisum_barrier(comm));
    EXPECT(UNISUM_ABORTED, unisum_receive(post, data, 10, UNISUM_F32, 1 - (rank == 1), 1));
    OK(unisum_messenger_free(post));
    leave();
}

/* Rank 1 ends without a word; the others hear who was lost. */
static void dying(void) {
    join();
    OK(unisum_barrier(comm));
    if (rank == 1)
        _exit(0);
    EXPECT(UNISUM_RANK_LOST, unisum_barrier(comm));
    const unisum_error *error = unisum_last_error();
    CHECK(error->rank_count == 1 && error->ranks[0] == 1 && error->rank == rank);
    leave();
}

/* What was sent and received in all; nothing with this rank itself. */
static uint64_t payload_of(const unisum_stats *stats) {
    uint64_t bytes = 0;
    CHECK(stats->size == sizeof *stats && stats->peer_count == world);
    for (uint32_t peer = 0; peer < world; peer++) {
        CHECK(peer != rank || stats->peers[peer]->sent + stats->peers[peer]->received == 0);
        bytes += stats->peers[peer]->sent + stats->peers[peer]->received;
    }
    return bytes;
}

static void check_description(void) {
    unisum_description *it;
    OK(unisum_comm_description(comm, &it));
    CHECK(it->size == sizeof *it && strcmp(it->transport, "tcp") == 0 && it->origin[0] != 0);
    CHECK(it->joined_in_s > 0 && it->rank_count == world && it->cost_count > 0);
    CHECK(it->ranks[rank]->pid == (uint64_t)getpid() && it->ranks[rank]->address_count > 0);
    CHECK(strstr(it->text, it->ranks[rank]->addresses[0]) && strstr(it->text, it->costs[0]->what));
    CHECK(it->costs[0]->latency_s > 0 && it->costs[0]->source[0] != 0);
    size_t end = 0;
    for (size_t i = 0; i < it->algorithm_count; i++) {
        const unisum_algorithm_range *range = it->algorithms[i];
        CHECK(strcmp(range->algorithm, "ring") == 0 && range->above == end);
        end = range->up_to;
    }
    CHECK(end > 1 << 20);
    OK(unisum_free(it));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_free(it));
    /* What is a job's own is not known of a group, and not made up. */
    unisum_comm *group;
    OK(unisum_comm_split(comm, 0, 0, &group));
    OK(unisum_comm_description(group, &it));
    CHECK(it->rank_count == 0 && it->ranks == NULL && it->joined_in_s < 0);
    OK(unisum_comm_free(group));
    /* It does not need what it describes. */
    CHECK(strstr(it->text, "over tcp"));
    OK(unisum_free(it));
}

/* Rank 0 asks what it is doing while it waits for the others. */
static void observing(void) {
    unisum_config *config;
    unisum_stats *before, *stats;
    unisum_work *work;
    static float data[20000];
    unisum_collective sum = {.kind = UNISUM_ALL_REDUCE, .op = UNISUM_SUM};
    unisum_buffers buffers = {UNISUM_IN_PLACE, 0, data, 20000};
    OK(unisum_config_create(&config));
    /* Ranks that share memory read it without transfers. */
    OK(unisum_config_set(config, "UNISUM_TRANSPORT", "tcp"));
    OK(unisum_connect(config, &comm));
    OK(unisum_config_free(config));
    OK(unisum_comm_rank(comm, &rank));
    OK(unisum_comm_world(comm, &world));
    OK(unisum_comm_set_algorithm(comm, "ring"));
    check_description();
    OK(unisum_barrier(comm));
    OK(unisum_comm_stats(comm, &before));
    CHECK(before->running == NULL && before->running_steps == 0);
    if (rank != 0)
        await("seen");
    OK(unisum_start(comm, &sum, UNISUM_F32, &buffers, &work));
    for (bool seen = rank != 0; !seen; pause_ms(1)) {
        OK(unisum_comm_stats(comm, &stats));
        seen = stats->running && stats->running_steps > 0;
        CHECK(!seen || (strstr(stats->running, "all_reduce") && strstr(stats->running, "20000")));
        OK(unisum_free(stats));
    }
    if (rank == 0)
        reach("seen");
    OK(unisum_work_wait(work, -1, NULL));
    OK(unisum_work_free(work));
    OK(unisum_comm_stats(comm, &stats));
    CHECK(stats->calls == before->calls + 1 && stats->running == NULL);
    CHECK(rank != 0 || (stats->sleeps > before->sleeps && stats->slept_s > before->slept_s));
    /* A ring passes all parts but one on to the next rank, twice. */
    CHECK(payload_of(stats) - payload_of(before) == 2 * 2 * (world - 1) * sizeof data / world);
    OK(unisum_free(before));
    OK(unisum_free(stats));
    leave();
}

/* Ranks call different things. */
static void differing(void) {
    join();
    float data[10] = {0};
    EXPECT(UNISUM_MISMATCH,
           unisum_all_reduce(comm, data, 9 + (rank == 1), UNISUM_F32, UNISUM_SUM));
    EXPECT(UNISUM_ABORTED, unisum_barrier(comm));
    leave();
}

int main(int count, char **arguments) {
    const struct {
        const char *name;
        void (*run)(void);
    } all[] = {
        {"collectives", collectives}, {"asynchronous", asynchronous}, {"groups", groups},
        {"training", training},       {"store", by_store},            {"aborting", aborting},
        {"dying", dying},             {"differing", differing}, {"reductions", reductions},
        {"sharding", sharding},       {"saving", saving},             {"observing", observing},
    };
    CHECK(count == 2);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (strcmp(all[i].name, arguments[1]) == 0) {
            all[i].run();
            puts("as it should be");
            return 0;
        }
    }
    fprintf(stderr, "no scenario %s\n", arguments[1]);
    return 2;
}
