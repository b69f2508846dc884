/* Ranks with a CUDA device each: device SCENARIO. The driver is loaded for memory and streams of
 * the program's own, as a program of CUDA's would have them. */
#include <dlfcn.h>

#include "check.h"

typedef unsigned long long address;

static int (*cuDevicePrimaryCtxRetain)(void **, int);
static int (*cuDevicePrimaryCtxRelease)(int);
static int (*cuCtxSetCurrent)(void *);
static int (*cuStreamCreate)(void **, unsigned);
static int (*cuStreamDestroy)(void *);
static int (*cuMemAlloc)(address *, size_t);
static int (*cuMemFree)(address);
static int (*cuMemcpyHtoDAsync)(address, const void *, size_t, void *);
static int (*cuMemcpyDtoHAsync)(void *, address, size_t, void *);
static int (*cuStreamSynchronize)(void *);

static void *function(void *library, const char *name) {
    void *found = dlsym(library, name);
    CHECK(found != NULL);
    return found;
}

#define LOAD(name, symbol) *(void **)&name = function(library, symbol)

static void load(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    CHECK(library != NULL);
    LOAD(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
    LOAD(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2");
    LOAD(cuCtxSetCurrent, "cuCtxSetCurrent");
    LOAD(cuStreamCreate, "cuStreamCreate");
    LOAD(cuStreamDestroy, "cuStreamDestroy_v2");
    LOAD(cuMemAlloc, "cuMemAlloc_v2");
    LOAD(cuMemFree, "cuMemFree_v2");
    LOAD(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2");
    LOAD(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2");
    LOAD(cuStreamSynchronize, "cuStreamSynchronize");
}

static unisum_comm *comm;
static unisum_device *device;
static uint32_t rank, world;
static void *stream;

enum { COUNT = 60 };

static address allocate(void) {
    address memory;
    CHECK(cuMemAlloc(&memory, COUNT * sizeof(float)) == 0);
    return memory;
}

static void put(address memory, const float *values, size_t count) {
    CHECK(cuMemcpyHtoDAsync(memory, values, count * sizeof *values, stream) == 0);
    CHECK(cuStreamSynchronize(stream) == 0);
}

static void get(address memory, float *values, size_t count) {
    CHECK(cuMemcpyDtoHAsync(values, memory, count * sizeof *values, stream) == 0);
    CHECK(cuStreamSynchronize(stream) == 0);
}

/* Element i of rank r. */
static float value(uint32_t r, size_t i) { return (float)(r * 100 + i); }

static float sum(size_t i) {
    float all = 0;
    for (uint32_t r = 0; r < world; r++) all += value(r, i);
    return all;
}

static void run(unisum_collective what, address in, size_t in_count, address out, size_t count) {
    unisum_buffers buffers = {(void *)in, in_count, (void *)out, count};
    OK(unisum_device_run(device, &what, UNISUM_F32, &buffers, stream));
}

/* What every rank has after a collective: element i is expected(i). */
static void compare(address memory, size_t count, float (*expected)(size_t)) {
    float values[COUNT];
    get(memory, values, count);
    for (size_t i = 0; i < count; i++) CHECK(values[i] == expected(i));
}

static float of_root(size_t i) { return value(1, i); }
static float own_block(size_t i) { return sum(rank * (COUNT / world) + i); }
static float gathered(size_t i) { return value(i / (COUNT / world), i % (COUNT / world)); }
static float transposed(size_t i) {
    size_t each = COUNT / world;
    return value(i / each, rank * each + i % each);
}
static float scattered(size_t i) { return value(1, rank * (COUNT / world) + i); }
static float own(size_t i) { return value(rank, i); }

static void collectives(void) {
    const size_t each = COUNT / world;
    const bool is_root = rank == 1;
    float values[COUNT];
    address in = allocate(), out = allocate();
    for (size_t i = 0; i < COUNT; i++) values[i] = value(rank, i);
    put(in, values, COUNT);

    run((unisum_collective){.kind = UNISUM_ALL_REDUCE, .op = UNISUM_SUM}, in, COUNT, out, COUNT);
    compare(out, COUNT, sum);
    run((unisum_collective){.kind = UNISUM_BROADCAST, .root = 1}, in, is_root ? COUNT : 0, out,
        COUNT);
    compare(out, COUNT, of_root);
    run((unisum_collective){.kind = UNISUM_REDUCE_SCATTER, .op = UNISUM_SUM}, in, COUNT, out, each);
    compare(out, each, own_block);
    run((unisum_collective){.kind = UNISUM_ALL_GATHER}, in, each, out, COUNT);
    compare(out, COUNT, gathered);
    run((unisum_collective){.kind = UNISUM_ALL_TO_ALL}, in, COUNT, out, COUNT);
    compare(out, COUNT, transposed);
    run((unisum_collective){.kind = UNISUM_REDUCE, .op = UNISUM_SUM, .root = 1}, in, COUNT, out,
        is_root ? COUNT : 0);
    if (is_root) compare(out, COUNT, sum);
    run((unisum_collective){.kind = UNISUM_GATHER, .root = 1}, in, each, out, is_root ? COUNT : 0);
    if (is_root) compare(out, COUNT, gathered);
    run((unisum_collective){.kind = UNISUM_SCATTER, .root = 1}, in, is_root ? COUNT : 0, out, each);
    compare(out, each, scattered);
    compare(in, COUNT, own);

    /* Blocks of other lengths: nothing of rank 0, and as much of the others. */
    size_t counts[16] = {0};
    for (uint32_t r = 1; r < world; r++) counts[r] = 5;
    run((unisum_collective){.kind = UNISUM_ALL_GATHER, .counts = counts}, in, counts[rank], out,
        5 * (world - 1));
    get(out, values, 5 * (world - 1));
    for (size_t i = 0; i < 5 * (world - 1); i++) CHECK(values[i] == value(1 + i / 5, i % 5));

    /* In place, said in both ways; and nobody goes on before everybody has come. */
    unisum_collective average = {.kind = UNISUM_ALL_REDUCE, .op = UNISUM_AVERAGE};
    unisum_buffers here = {UNISUM_IN_PLACE, 0, (void *)in, COUNT};
    OK(unisum_device_run(device, &average, UNISUM_F32, &here, stream));
    here.input = here.output;
    here.input_count = COUNT;
    OK(unisum_device_run(device, &average, UNISUM_F32, &here, stream));
    unisum_collective barrier = {.kind = UNISUM_BARRIER};
    unisum_buffers nothing = {UNISUM_IN_PLACE, 0, NULL, 0};
    OK(unisum_device_run(device, &barrier, UNISUM_U8, &nothing, stream));
    OK(unisum_device_synchronize(device, stream, -1));
    get(in, values, COUNT);
    for (size_t i = 0; i < COUNT; i++) CHECK(values[i] == sum(i) / (float)world);

    /* What is infinite is found once. */
    bool found = true;
    unisum_collective watched = {
        .kind = UNISUM_ALL_REDUCE, .op = UNISUM_SUM, .flags = UNISUM_DETECT_NONFINITE};
    OK(unisum_device_run(device, &watched, UNISUM_F32, &here, stream));
    OK(unisum_device_take_nonfinite(device, stream, 30, &found));
    CHECK(!found);
    values[7] = rank == 1 ? 1.0f / 0.0f : 0;
    put(in, values, COUNT);
    OK(unisum_device_run(device, &watched, UNISUM_F32, &here, stream));
    OK(unisum_device_take_nonfinite(device, stream, 30, &found));
    CHECK(found);
    OK(unisum_device_take_nonfinite(device, stream, 30, &found));
    CHECK(!found);
    CHECK(cuMemFree(in) == 0 && cuMemFree(out) == 0);
}

/* Wrong use; the communicator stays usable. */
static void refusals(void) {
    address memory = allocate();
    unisum_collective all_reduce = {.kind = UNISUM_ALL_REDUCE, .op = UNISUM_SUM};
    unisum_buffers good = {UNISUM_IN_PLACE, 0, (void *)memory, COUNT};
    unisum_buffers null = {UNISUM_IN_PLACE, 0, NULL, COUNT};
    REFUSED(UNISUM_INVALID_ARGUMENT, "the output is NULL",
            unisum_device_run(device, &all_reduce, UNISUM_F32, &null, stream));
    unisum_buffers odd = {UNISUM_IN_PLACE, 0, (void *)(memory + 1), COUNT - 1};
    REFUSED(UNISUM_INVALID_ARGUMENT, "not aligned",
            unisum_device_run(device, &all_reduce, UNISUM_F32, &odd, stream));
    unisum_buffers overlap = {(void *)memory, 8, (void *)(memory + 16), 8};
    REFUSED(UNISUM_INVALID_ARGUMENT, "buffers overlap",
            unisum_device_run(device, &all_reduce, UNISUM_F32, &overlap, stream));
    REFUSED(UNISUM_INVALID_HANDLE, "another kind",
            unisum_device_run((unisum_device *)comm, &all_reduce, UNISUM_F32, &good, stream));
    REFUSED(UNISUM_INVALID_ARGUMENT, "is no dtype",
            unisum_device_run(device, &all_reduce, 99, &good, stream));
    REFUSED(UNISUM_INVALID_ARGUMENT, "NULL", unisum_device_create(comm, 0, NULL));
    REFUSED(UNISUM_INVALID_ARGUMENT, "a timeout of",
            unisum_device_synchronize(device, stream, 0.0 / 0.0));
    unisum_device *none = NULL;
    REFUSED(UNISUM_CONFIGURATION, "there is no device 77", unisum_device_create(comm, 77, &none));
    CHECK(none == NULL);
    /* Memory of the host on one rank is refused on all. */
    static float host[COUNT];
    unisum_buffers elsewhere = good;
    if (rank == 1) elsewhere.output = host;
    REFUSED(UNISUM_CONFIGURATION, "no address of CUDA memory",
            unisum_device_run(device, &all_reduce, UNISUM_F32, &elsewhere, stream));
    CHECK(unisum_last_error()->rank_count == 1 && unisum_last_error()->ranks[0] == 1);
    REFUSED(UNISUM_CONFIGURATION, "fastest", unisum_device_set_algorithm(device, "fastest"));
    OK(unisum_device_set_algorithm(device, "ring"));
    OK(unisum_device_run(device, &all_reduce, UNISUM_F32, &good, stream));
    OK(unisum_device_set_algorithm(device, NULL));
    if (rank == 0) all_reduce.op = UNISUM_MAX;
    REFUSED(UNISUM_MISMATCH, "max", unisum_device_run(device, &all_reduce, UNISUM_F32, &good, stream));
    all_reduce.op = UNISUM_SUM;
    OK(unisum_device_run(device, &all_reduce, UNISUM_F32, &good, stream));
    OK(unisum_device_synchronize(device, stream, 30));
    char text[300];
    size_t length;
    OK(unisum_device_describe(device, text, sizeof text, &length));
    CHECK(strstr(text, "read each other's memory") != NULL && length == strlen(text));
    uint32_t count = 0;
    OK(unisum_device_count(&count));
    CHECK(count == world);
    CHECK(cuMemFree(memory) == 0);
}

/* Element i of rank r's gradient for parameter p, in step s. */
static float gradient_value(uint32_t r, int s, size_t p, size_t i) {
    return (float)(r * 8 + (uint32_t)s * 4 + p + i % 5);
}

static float mean(int s, size_t p, size_t i) {
    float all = 0;
    for (uint32_t r = 0; r < world; r++) all += gradient_value(r, s, p, i);
    return all / (float)world;
}

/* Gradient buckets: what kernels would write is copied into the streams here. */
static void buckets(void) {
    enum { WEIGHT = 300, BIAS = 9 };
    const size_t weight_shape[] = {20, 15}, bias_shape[] = {BIAS};
    const size_t counts[] = {WEIGHT, BIAS};
    unisum_parameter model[] = {
        {.name = "weight", .shape = weight_shape, .dimensions = 2, .dtype = UNISUM_F32},
        {.name = "bias", .shape = bias_shape, .dimensions = 1, .dtype = UNISUM_F32},
    };
    unisum_bucket_options options = {.bucket_bytes = 1000, .end_bucket_bytes = 100};
    unisum_device_buckets *layer = NULL;
    /* What there is for the memory of the host only. */
    const uint32_t flags[] = {UNISUM_UNUSED_PARAMETERS, UNISUM_STATIC_GRAPH, UNISUM_UNEVEN_INPUTS,
                              UNISUM_KEEP_LAYOUT, UNISUM_SHARDED, 1u << 31};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        unisum_bucket_options other = {.flags = flags[i]};
        REFUSED(UNISUM_INVALID_ARGUMENT, "and no other options",
                unisum_device_buckets_create(comm, rank, model, 2, &other, &layer));
    }
    unisum_bucket_options wired = {.encoding = UNISUM_BF16}, low = {.low_rank = 1};
    unisum_bucket_options laid = {.layout = "x", .layout_bytes = 1};
    unisum_bucket_options *hosts[] = {&wired, &low, &laid};
    for (size_t i = 0; i < 3; i++) {
        REFUSED(UNISUM_INVALID_ARGUMENT, "and no other options",
                unisum_device_buckets_create(comm, rank, model, 2, hosts[i], &layer));
    }
    unisum_buckets *of_host = NULL;
    unisum_bucket_options ignoring = {.flags = UNISUM_IGNORE_NONFINITE};
    REFUSED(UNISUM_INVALID_ARGUMENT, "flags that do not exist",
            unisum_buckets_create(comm, model, 2, &ignoring, &of_host));
    REFUSED(UNISUM_CONFIGURATION, "there is no device 77",
            unisum_device_buckets_create(comm, 77, model, 2, &options, &layer));
    unisum_bucket_options differing = {.bucket_bytes = rank == 0 ? 1000 : 2000};
    EXPECT(UNISUM_MISMATCH,
           unisum_device_buckets_create(comm, rank, model, 2, &differing, &layer));
    CHECK(layer == NULL && of_host == NULL);

    OK(unisum_device_buckets_create(comm, rank, model, 2, &options, &layer));
    void *places[2];
    for (size_t p = 0; p < 2; p++) {
        size_t count = 0;
        OK(unisum_device_buckets_view(layer, p, &places[p], &count));
        CHECK(count == counts[p]);
    }
    OK(unisum_device_buckets_view(layer, 1, &places[1], NULL));
    REFUSED(UNISUM_INVALID_ARGUMENT, "there is no parameter 2",
            unisum_device_buckets_view(layer, 2, &places[0], NULL));
    REFUSED(UNISUM_INVALID_ARGUMENT, "no step is under way",
            unisum_device_buckets_ready(layer, 0, stream));
    REFUSED(UNISUM_INVALID_ARGUMENT, "no step is under way",
            unisum_device_buckets_wait(layer, stream));
    REFUSED(UNISUM_INVALID_HANDLE, "another kind",
            unisum_device_buckets_begin((unisum_device_buckets *)device));
    float values[WEIGHT];
    for (int step = 0; step < 3; step++) {
        OK(unisum_device_buckets_begin(layer));
        REFUSED(UNISUM_INVALID_ARGUMENT, "a step is under way", unisum_device_buckets_begin(layer));
        REFUSED(UNISUM_INVALID_ARGUMENT, "a step is under way",
                unisum_device_buckets_read(layer, 0, values, WEIGHT, stream));
        for (size_t i = 0; i < BIAS; i++) values[i] = gradient_value(rank, step, 1, i);
        CHECK(cuMemcpyHtoDAsync((address)places[1], values, BIAS * sizeof(float), stream) == 0);
        OK(unisum_device_buckets_ready(layer, 1, stream));
        for (size_t i = 0; i < WEIGHT; i++) values[i] = gradient_value(rank, step, 0, i);
        OK(unisum_device_buckets_put(layer, 0, values, WEIGHT, stream));
        OK(unisum_device_buckets_wait(layer, stream));
        /* As the program itself finds them, and as they are copied for it. */
        for (size_t p = 0; p < 2; p++) {
            memset(values, 0xff, sizeof values);
            get((address)places[p], values, counts[p]);
            for (size_t i = 0; i < counts[p]; i++) CHECK(values[i] == mean(step, p, i));
            memset(values, 0xff, sizeof values);
            OK(unisum_device_buckets_read(layer, p, values, counts[p], stream));
            for (size_t i = 0; i < counts[p]; i++) CHECK(values[i] == mean(step, p, i));
        }
        REFUSED(UNISUM_CONFIGURATION, "was given 5 elements",
                unisum_device_buckets_read(layer, 0, values, 5, stream));
    }
    bool found = true;
    OK(unisum_device_buckets_take_nonfinite(layer, stream, 30, &found));
    CHECK(!found);

    /* Rank 1 leaves one out: the step fails on all ranks, and the next one is as ever. */
    OK(unisum_device_buckets_begin(layer));
    OK(unisum_device_buckets_ready(layer, 1, stream));
    if (rank != 1) OK(unisum_device_buckets_ready(layer, 0, stream));
    REFUSED(UNISUM_STEP_FAILED, "weight", unisum_device_buckets_wait(layer, stream));
    OK(unisum_device_buckets_begin(layer));
    for (size_t p = 0; p < 2; p++) {
        for (size_t i = 0; i < counts[p]; i++) values[i] = rank == 1 && i == 3 ? 1.0f / 0.0f : 1;
        OK(unisum_device_buckets_put(layer, p, values, counts[p], stream));
    }
    OK(unisum_device_buckets_wait(layer, stream));
    OK(unisum_device_buckets_synchronize(layer, stream, -1));
    OK(unisum_device_buckets_take_nonfinite(layer, stream, 30, &found));
    CHECK(found);
    OK(unisum_device_buckets_take_nonfinite(layer, stream, 30, &found));
    CHECK(!found);
    /* One that is freed in a step fails it, and is gone. */
    OK(unisum_device_buckets_begin(layer));
    OK(unisum_device_buckets_free(layer));
    REFUSED(UNISUM_INVALID_HANDLE, "was freed", unisum_device_buckets_free(layer));
    REFUSED(UNISUM_INVALID_HANDLE, "was freed", unisum_device_buckets_begin(layer));

    OK(unisum_device_buckets_create(comm, rank, model, 2, &ignoring, &layer));
    REFUSED(UNISUM_CONFIGURATION, "detect_nonfinite(false)",
            unisum_device_buckets_take_nonfinite(layer, stream, 30, &found));
    OK(unisum_device_buckets_free(layer));
}

/* The driver of rank 1 fails: all ranks hear of it, by the status of its own. */
static void failing(void) {
    address memory = allocate();
    unisum_collective all_reduce = {.kind = UNISUM_ALL_REDUCE, .op = UNISUM_SUM};
    unisum_buffers buffers = {UNISUM_IN_PLACE, 0, (void *)memory, COUNT};
    unisum_status status = UNISUM_OK;
    for (int i = 0; i < 1000 && status == UNISUM_OK; i++) {
        status = unisum_device_run(device, &all_reduce, UNISUM_F32, &buffers, stream);
    }
    CHECK(status == UNISUM_DEVICE && unisum_last_error()->status == UNISUM_DEVICE);
    CHECK(strcmp(unisum_status_name(status), "UNISUM_DEVICE") == 0);
    CHECK(strstr(unisum_last_error()->text, "cuLaunchKernel") != NULL);
    CHECK(unisum_last_error()->rank_count == 1 && unisum_last_error()->ranks[0] == 1);
    CHECK(unisum_device_run(device, &all_reduce, UNISUM_F32, &buffers, stream) != UNISUM_OK);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    OK(unisum_connect_from_environment(&comm));
    OK(unisum_comm_rank(comm, &rank));
    OK(unisum_comm_world(comm, &world));
    if (strcmp(argv[1], "absent") == 0) {
        uint32_t count;
        REFUSED(UNISUM_CONFIGURATION, "there is no CUDA driver", unisum_device_count(&count));
        REFUSED(UNISUM_CONFIGURATION, "no CUDA driver", unisum_device_create(comm, 0, &device));
        OK(unisum_comm_free(comm));
        return 0;
    }
    OK(unisum_device_create(comm, rank, &device));
    load();
    void *context;
    CHECK(cuDevicePrimaryCtxRetain(&context, (int)rank) == 0 && cuCtxSetCurrent(context) == 0);
    CHECK(cuStreamCreate(&stream, 1) == 0);
    if (strcmp(argv[1], "collectives") == 0) collectives();
    else if (strcmp(argv[1], "refusals") == 0) refusals();
    else if (strcmp(argv[1], "buckets") == 0) buckets();
    else if (strcmp(argv[1], "failing") == 0) failing();
    else CHECK(!"a scenario");
    OK(unisum_device_free(device));
    REFUSED(UNISUM_INVALID_HANDLE, "was freed", unisum_device_free(device));
    OK(unisum_comm_free(comm));
    CHECK(cuStreamDestroy(stream) == 0 || strcmp(argv[1], "failing") == 0);
    CHECK(cuDevicePrimaryCtxRelease((int)rank) == 0);
    return 0;
}
