/* Wrong use in a world of one: each is a status, and nothing else happens. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static unisum_comm *alone(void) {
    unisum_comm *comm = NULL;
    OK(unisum_connect_to(0, 1, NULL, NULL, &comm));
    CHECK(comm != NULL);
    return comm;
}

static unisum_collective sum_of_all(void) {
    unisum_collective collective = {.kind = UNISUM_ALL_REDUCE, .op = UNISUM_SUM};
    return collective;
}

static void nulls(void) {
    unisum_comm *comm = alone();
    unisum_collective collective = sum_of_all();
    unisum_buffers buffers = {UNISUM_IN_PLACE, 0, NULL, 0};
    uint32_t number;
    void *memory;
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_connect_from_environment(NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_connect_to(0, 1, NULL, NULL, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_config_create(NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_config_set(NULL, "UNISUM_RANK", "0"));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_config_set_store(NULL, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_connect(NULL, &comm));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_config_free(NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_comm_rank(NULL, &number));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_rank(comm, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_world(comm, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_local_rank(comm, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_local_size(comm, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_comm_describe(NULL, NULL, 0, NULL));
    OK(unisum_comm_describe(comm, NULL, 0, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_comm_description(NULL, (unisum_description **)&memory));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_description(comm, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_comm_stats(NULL, (unisum_stats **)&memory));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_stats(comm, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_split(comm, 0, 0, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_subset(comm, NULL, 1, (unisum_comm **)&memory));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_duplicate(comm, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_abort(comm, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_comm_free(NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_run(comm, NULL, UNISUM_F32, &buffers, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_run(comm, &collective, UNISUM_F32, NULL, NULL));
    OK(unisum_run(comm, &collective, UNISUM_F32, &buffers, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_run_batch(comm, &collective, UNISUM_F32, NULL, 1, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_start(comm, &collective, UNISUM_F32, &buffers, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_all_reduce(comm, NULL, 1, UNISUM_F32, UNISUM_SUM));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_all_gather(comm, NULL, NULL, 1, UNISUM_F32));
    OK(unisum_all_reduce(comm, NULL, 0, UNISUM_F32, UNISUM_SUM));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_work_test(NULL, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_work_wait(NULL, 0, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_work_on_end(NULL, NULL, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_work_free(NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_messenger_create(NULL, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_messenger_create(comm, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_send(NULL, NULL, 0, UNISUM_F32, 0, 0));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_exchange(NULL, NULL, 0, UNISUM_F32));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_messenger_free(NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_buckets_create(comm, NULL, 1, NULL, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_buckets_begin(NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_buckets_view(NULL, 0, NULL, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_buckets_wait(NULL, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_buckets_join(NULL, NULL, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_buckets_free(NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_allocate(NULL, 1, &memory));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_allocate(comm, 1, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_free(NULL));
    OK(unisum_comm_free(comm));
}

static void handles(void) {
    unisum_comm *comm = alone();
    unisum_config *config;
    uint32_t rank = 7;
    int somewhere[4] = {0};
    OK(unisum_config_create(&config));
    REFUSED(UNISUM_INVALID_HANDLE, "another kind", unisum_comm_rank((unisum_comm *)config, &rank));
    REFUSED(UNISUM_INVALID_HANDLE, "another kind", unisum_config_free((unisum_config *)comm));
    REFUSED(UNISUM_INVALID_HANDLE, "no handle",
            unisum_comm_rank((const unisum_comm *)(const void *)somewhere, &rank));
    /* Handles are odd; this is none all the same. */
    REFUSED(UNISUM_INVALID_HANDLE, "no handle",
            unisum_comm_rank((const void *)((const char *)somewhere + 1), &rank));
    CHECK(rank == 7);
    OK(unisum_config_free(config));
    REFUSED(UNISUM_INVALID_HANDLE, "was freed", unisum_config_free(config));
    OK(unisum_comm_free(comm));
    REFUSED(UNISUM_INVALID_HANDLE, "was freed", unisum_comm_free(comm));
    REFUSED(UNISUM_INVALID_HANDLE, "was freed", unisum_barrier(comm));
    /* A new one does not take the place of the old one. */
    unisum_comm *other = alone();
    CHECK(other != comm);
    REFUSED(UNISUM_INVALID_HANDLE, "was freed", unisum_barrier(comm));
    OK(unisum_comm_free(other));
}

static void arguments(void) {
    unisum_comm *comm = alone();
    unisum_config *config;
    float data[64] = {0}, other[64] = {0};
    unisum_collective collective = sum_of_all();
    unisum_buffers buffers = {data, 64, other, 64};
    REFUSED(UNISUM_INVALID_ARGUMENT, "no dtype", unisum_all_reduce(comm, data, 1, 0, UNISUM_SUM));
    REFUSED(UNISUM_INVALID_ARGUMENT, "no dtype", unisum_all_reduce(comm, data, 1, 16, UNISUM_SUM));
    REFUSED(UNISUM_INVALID_ARGUMENT, "no reduction",
            unisum_all_reduce(comm, data, 1, UNISUM_F32, 0));
    REFUSED(UNISUM_INVALID_ARGUMENT, "no reduction",
            unisum_all_reduce(comm, data, 1, UNISUM_F32, 4000000000u));
    EXPECT(UNISUM_CONFIGURATION, unisum_all_reduce(comm, data, 1, UNISUM_F32, UNISUM_BIT_AND));
    EXPECT(UNISUM_CONFIGURATION, unisum_broadcast(comm, data, 1, UNISUM_F32, 1));
    CHECK(unisum_last_error()->rank == 0);

    /* More than memory has, or than numbers can say. */
    REFUSED(UNISUM_INVALID_ARGUMENT, "more than memory",
            unisum_all_reduce(comm, data, (size_t)-1, UNISUM_F32, UNISUM_SUM));
    REFUSED(UNISUM_INVALID_ARGUMENT, "more than memory",
            unisum_all_reduce(comm, data, (size_t)-1 / 2, UNISUM_F32, UNISUM_SUM));
    REFUSED(UNISUM_INVALID_ARGUMENT, "more than memory",
            unisum_all_reduce(comm, data, (size_t)-1 / 4 + 2, UNISUM_F32, UNISUM_SUM));

    /* Misaligned, and overlapping. */
    REFUSED(UNISUM_INVALID_ARGUMENT, "not aligned",
            unisum_all_reduce(comm, (char *)data + 1, 1, UNISUM_F32, UNISUM_SUM));
    buffers.output = data + 1;
    buffers.output_count = buffers.input_count = 32;
    REFUSED(UNISUM_INVALID_ARGUMENT, "overlap",
            unisum_run(comm, &collective, UNISUM_F32, &buffers, NULL));
    unisum_buffers tensors[2] = {{UNISUM_IN_PLACE, 0, data, 10}, {UNISUM_IN_PLACE, 0, data + 9, 10}};
    REFUSED(UNISUM_INVALID_ARGUMENT, "overlap",
            unisum_run_batch(comm, &collective, UNISUM_F32, tensors, 2, NULL));
    tensors[1].output = data + 10;
    OK(unisum_run_batch(comm, &collective, UNISUM_F32, tensors, 2, NULL));
    /* The same buffer twice is in place. */
    buffers.output = data;
    OK(unisum_run(comm, &collective, UNISUM_F32, &buffers, NULL));

    /* Structures that make no sense. */
    buffers.output = other;
    collective.kind = 0;
    REFUSED(UNISUM_INVALID_ARGUMENT, "no kind",
            unisum_run(comm, &collective, UNISUM_F32, &buffers, NULL));
    collective = sum_of_all();
    collective.flags = 64;
    REFUSED(UNISUM_INVALID_ARGUMENT, "flags",
            unisum_run(comm, &collective, UNISUM_F32, &buffers, NULL));
    collective.flags = UNISUM_SCALED;
    collective.op = UNISUM_MAX;
    REFUSED(UNISUM_INVALID_ARGUMENT, "only a sum",
            unisum_run(comm, &collective, UNISUM_F32, &buffers, NULL));
    collective = sum_of_all();
    size_t counts[1] = {32};
    collective.counts = counts;
    EXPECT(UNISUM_CONFIGURATION, unisum_run(comm, &collective, UNISUM_F32, &buffers, NULL));
    collective.receive_counts = counts;
    REFUSED(UNISUM_INVALID_ARGUMENT, "receive_counts",
            unisum_run(comm, &collective, UNISUM_F32, &buffers, NULL));

    OK(unisum_config_create(&config));
    REFUSED(UNISUM_CONFIGURATION, "UNISUM_RNAK", unisum_config_set(config, "UNISUM_RNAK", "0"));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_config_set(config, "UNISUM_RANK", "\xff"));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_config_set(config, NULL, "0"));
    unisum_store store = {NULL, NULL, NULL};
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_config_set_store(config, &store));
    OK(unisum_config_set(config, "UNISUM_RANK", "1"));
    OK(unisum_config_set(config, "UNISUM_WORLD", "1"));
    unisum_comm *none = NULL;
    EXPECT(UNISUM_CONFIGURATION, unisum_connect(config, &none));
    CHECK(none == NULL);
    OK(unisum_config_free(config));

    unisum_work *work;
    buffers.output = NULL;
    EXPECT(UNISUM_INVALID_ARGUMENT,
           unisum_start(comm, &collective, UNISUM_F32, &buffers, &work));
    OK(unisum_comm_free(comm));
}

static void texts(void) {
    unisum_comm *comm = alone();
    char text[16];
    size_t length = 0, again = 0;
    CHECK(strcmp(unisum_version(), "0.1.0") == 0);
    OK(unisum_comm_transport(comm, text, sizeof text, &length));
    CHECK(strcmp(text, "none") == 0 && length == 4);
    memset(text, 'x', sizeof text);
    OK(unisum_comm_describe(comm, text, 8, &length));
    CHECK(length > 8 && strlen(text) == 7 && text[8] == 'x');
    OK(unisum_comm_describe(comm, NULL, 0, &again));
    CHECK(again == length);
    CHECK(strcmp(unisum_status_name(UNISUM_TIMEOUT), "UNISUM_TIMEOUT") == 0);
    CHECK(unisum_status_name(12345) != NULL && unisum_status_name(-1) != NULL);
    OK(unisum_comm_free(comm));
}

static void memory(void) {
    unisum_comm *comm = alone();
    void *first, *second;
    OK(unisum_allocate(comm, 0, &first));
    OK(unisum_allocate(comm, 1000, &second));
    CHECK(first != second);
    for (int i = 0; i < 1000; i++)
        CHECK(((char *)second)[i] == 0);
    REFUSED(UNISUM_MEMORY, "address space", unisum_allocate(comm, (size_t)-1, &first));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_free((char *)second + 1));
    OK(unisum_free(first));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_free(first));
    /* It may outlive the communicator. */
    OK(unisum_comm_free(comm));
    memset(second, 1, 1000);
    OK(unisum_free(second));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_free(&comm));
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int called;

static void free_it(void *work) {
    bool ended = false;
    OK(unisum_work_test(work, &ended));
    CHECK(ended);
    OK(unisum_work_wait(work, -1, NULL));
    OK(unisum_work_free(work));
    pthread_mutex_lock(&lock);
    called++;
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
}

static void works(void) {
    unisum_comm *comm = alone();
    double data[10] = {1, 2};
    unisum_collective collective = sum_of_all();
    unisum_buffers buffers = {UNISUM_IN_PLACE, 0, data, 10};
    unisum_work *work;
    bool ended = false, nonfinite = true;
    OK(unisum_start(comm, &collective, UNISUM_F64, &buffers, &work));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_work_test(work, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_work_wait(work, 0.0 / 0.0, NULL));
    /* Waited for again and again, with any time-out. */
    OK(unisum_work_wait(work, -1, &nonfinite));
    CHECK(!nonfinite && data[1] == 2);
    OK(unisum_work_wait(work, 0, NULL));
    OK(unisum_work_wait(work, 1e300, NULL));
    OK(unisum_work_test(work, &ended));
    CHECK(ended);
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_work_on_end(work, NULL, NULL));
    /* Freed in its own callback. */
    OK(unisum_work_on_end(work, free_it, work));
    pthread_mutex_lock(&lock);
    while (called == 0)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    REFUSED(UNISUM_INVALID_HANDLE, "was freed", unisum_work_wait(work, -1, NULL));
    OK(unisum_comm_free(comm));
}

static void aborted(void) {
    unisum_comm *comm = alone();
    float data[4] = {0};
    unisum_buffers buffers = {UNISUM_IN_PLACE, 0, data, 4};
    unisum_collective collective = sum_of_all();
    unisum_work *work;
    OK(unisum_comm_abort(comm, "enough"));
    REFUSED(UNISUM_ABORTED, "enough", unisum_all_reduce(comm, data, 4, UNISUM_F32, UNISUM_SUM));
    OK(unisum_start(comm, &collective, UNISUM_F32, &buffers, &work));
    REFUSED(UNISUM_ABORTED, "enough", unisum_work_wait(work, -1, NULL));
    REFUSED(UNISUM_ABORTED, "enough", unisum_work_wait(work, -1, NULL));
    OK(unisum_work_free(work));
    OK(unisum_comm_abort(comm, "again"));
    OK(unisum_comm_free(comm));
}

static void buckets(void) {
    unisum_comm *comm = alone();
    unisum_buckets *buckets, *none = NULL;
    size_t shape[2] = {3, 4};
    unisum_parameter parameter = {.name = "w", .shape = shape, .dimensions = 2, .dtype = UNISUM_F32};
    unisum_step_report report;
    float values[12] = {1, 2, 3};
    void *gradient;
    size_t count;
    unisum_parameter wrong = parameter;
    wrong.name = NULL;
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_buckets_create(comm, &wrong, 1, NULL, &none));
    wrong.name = "w";
    wrong.dtype = UNISUM_I32;
    EXPECT(UNISUM_MISMATCH, unisum_buckets_create(comm, &wrong, 1, NULL, &none));
    unisum_bucket_options options = {.flags = 128};
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_buckets_create(comm, &parameter, 1, &options, &none));
    CHECK(none == NULL);
    OK(unisum_comm_free(comm));
    comm = alone();
    OK(unisum_buckets_create(comm, &parameter, 1, NULL, &buckets));
    OK(unisum_comm_free(comm));
    REFUSED(UNISUM_INVALID_ARGUMENT, "no step", unisum_buckets_ready(buckets, 0));
    REFUSED(UNISUM_INVALID_ARGUMENT, "no step", unisum_buckets_wait(buckets, NULL));
    OK(unisum_buckets_begin(buckets));
    REFUSED(UNISUM_INVALID_ARGUMENT, "a step is under way", unisum_buckets_begin(buckets));
    REFUSED(UNISUM_INVALID_ARGUMENT, "a step is under way",
            unisum_buckets_gradient(buckets, 0, &gradient, &count));
    REFUSED(UNISUM_INVALID_ARGUMENT, "no parameter 1",
            unisum_buckets_view(buckets, 1, &gradient, &count));
    OK(unisum_buckets_view(buckets, 0, &gradient, &count));
    CHECK(count == 12);
    OK(unisum_buckets_put(buckets, 0, values, 12));
    OK(unisum_buckets_wait(buckets, &report));
    CHECK(report.participants == 1 && !report.nonfinite && report.exposed_s >= 0);
    OK(unisum_buckets_gradient(buckets, 0, &gradient, NULL));
    CHECK(((float *)gradient)[2] == 3);
    /* Marked ready twice: the step fails, and the next one may be begun. */
    OK(unisum_buckets_begin(buckets));
    OK(unisum_buckets_ready(buckets, 0));
    EXPECT(UNISUM_CONFIGURATION, unisum_buckets_ready(buckets, 0));
    EXPECT(UNISUM_STEP_FAILED, unisum_buckets_wait(buckets, &report));
    OK(unisum_buckets_begin(buckets));
    EXPECT(UNISUM_CONFIGURATION, unisum_buckets_put(buckets, 0, values, 11));
    /* Freed in the middle of a step. */
    OK(unisum_buckets_free(buckets));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_buckets_wait(buckets, &report));
}

static void *in_thread(void *comm) {
    uint32_t rank;
    float data[100] = {0};
    /* Each thread has an error of its own. */
    CHECK(unisum_last_error()->status == UNISUM_OK);
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_rank(comm, NULL));
    for (int i = 0; i < 200; i++) {
        unisum_config *config;
        OK(unisum_config_create(&config));
        OK(unisum_config_free(config));
        OK(unisum_comm_rank(comm, &rank));
        OK(unisum_all_reduce(comm, data, 100, UNISUM_F32, UNISUM_SUM));
    }
    return NULL;
}

static void *free_handle(void *comm) {
    unisum_status status = unisum_comm_free(comm);
    CHECK(status == UNISUM_OK || status == UNISUM_INVALID_HANDLE);
    return (void *)(size_t)(status == UNISUM_OK);
}

static void threads(void) {
    pthread_t all[8];
    unisum_comm *comm = alone();
    EXPECT(UNISUM_INVALID_HANDLE, unisum_barrier(NULL));
    for (int i = 0; i < 8; i++)
        CHECK(pthread_create(&all[i], NULL, in_thread, comm) == 0);
    for (int i = 0; i < 8; i++)
        CHECK(pthread_join(all[i], NULL) == 0);
    CHECK(unisum_last_error()->status == UNISUM_INVALID_HANDLE);
    /* One of those who free at once does. */
    size_t freed = 0;
    for (int i = 0; i < 8; i++)
        CHECK(pthread_create(&all[i], NULL, free_handle, comm) == 0);
    for (int i = 0; i < 8; i++) {
        void *one;
        CHECK(pthread_join(all[i], &one) == 0);
        freed += (size_t)one;
    }
    CHECK(freed == 1);
}

static void forked(void) {
    unisum_comm *comm = alone(), *own;
    void *memory;
    uint32_t rank;
    OK(unisum_allocate(comm, 64, &memory));
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        REFUSED(UNISUM_FORKED, "forked", unisum_comm_rank(comm, &rank));
        REFUSED(UNISUM_FORKED, "forked", unisum_comm_free(comm));
        EXPECT(UNISUM_INVALID_ARGUMENT, unisum_free(memory));
        /* It may have its own. */
        own = alone();
        CHECK(own != comm);
        OK(unisum_barrier(own));
        OK(unisum_comm_free(own));
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    OK(unisum_free(memory));
    OK(unisum_comm_free(comm));
}

static void scalers(void) {
    unisum_scaler *scaler, *other;
    float scale;
    uint64_t saved;
    bool apply;
    unisum_scaler_options options = {.scale = 1024, .growth_interval = 2};
    OK(unisum_scaler_create(NULL, &scaler));
    OK(unisum_scaler_scale(scaler, &scale));
    CHECK(scale == 65536);
    OK(unisum_scaler_free(scaler));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_scaler_scale(scaler, &scale));
    OK(unisum_scaler_create(&options, &scaler));
    OK(unisum_scaler_update(scaler, true, &apply));
    OK(unisum_scaler_scale(scaler, &scale));
    CHECK(!apply && scale == 512);
    OK(unisum_scaler_update(scaler, false, &apply));
    CHECK(apply);
    OK(unisum_scaler_save(scaler, &saved));
    /* The other has the good step that was saved. */
    OK(unisum_scaler_create(&options, &other));
    OK(unisum_scaler_restore(other, saved));
    OK(unisum_scaler_update(other, false, &apply));
    OK(unisum_scaler_scale(other, &scale));
    CHECK(apply && scale == 1024);
    EXPECT(UNISUM_CONFIGURATION, unisum_scaler_restore(other, UINT64_MAX));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_scaler_update(other, false, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_scaler_scale(other, NULL));
    OK(unisum_scaler_free(other));
    OK(unisum_scaler_free(scaler));
    options.growth = -1;
    EXPECT(UNISUM_CONFIGURATION, unisum_scaler_create(&options, &scaler));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_scaler_create(NULL, NULL));
    unisum_reduction *reduction;
    EXPECT(UNISUM_INVALID_ARGUMENT,
           unisum_reduction_create(UNISUM_F32, NULL, NULL, true, &reduction));
}

/* In a world of one there is nothing to tell, and no list to read. */
static void observing(void) {
    unisum_comm *comm = alone();
    unisum_stats *stats;
    unisum_description *description;
    float data[4] = {0};
    OK(unisum_all_reduce(comm, data, 4, UNISUM_F32, UNISUM_SUM));
    OK(unisum_comm_stats(comm, &stats));
    CHECK(stats->calls == 0 && stats->peer_count == 0 && stats->peers == NULL);
    CHECK(stats->link_count == 0 && stats->links == NULL && stats->running == NULL);
    OK(unisum_comm_description(comm, &description));
    CHECK(strcmp(description->transport, "none") == 0 && description->protection == NULL);
    CHECK(strstr(description->text, description->origin) == description->text);
    CHECK(description->rank_count + description->cost_count + description->algorithm_count == 0);
    OK(unisum_comm_free(comm));
    OK(unisum_free(stats));
    /* It stays as long as it is not freed, and only from where it begins. */
    REFUSED(UNISUM_INVALID_ARGUMENT, "begins there", unisum_free(&description->text));
    CHECK(strcmp(description->transport, "none") == 0);
    OK(unisum_free(description));
}

int main(void) {
    CHECK(unisum_last_error()->status == UNISUM_OK && unisum_last_error()->text != NULL);
    nulls();
    handles();
    arguments();
    texts();
    memory();
    works();
    aborted();
    buckets();
    scalers();
    observing();
    threads();
    forked();
    puts("edges: all as they should be");
    return 0;
}
