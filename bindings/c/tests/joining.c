/* Ranks of an elastic job that other processes join: joining SCENARIO. TEST_DIRECTORY is for what
 * they tell the test. A process with TEST_JOIN is a newcomer, which dies as soon as it is in a view
 * if that says "die"; LAST is how many ranks there are in the end. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>

#include "check.h"

enum { PROCESSES = 16, LONG = 20000 };

static unisum_comm *comm;
static uint32_t rank, world;
static uint64_t epoch, processes[PROCESSES];

static void path_of(char *path, size_t capacity, const char *name) {
    snprintf(path, capacity, "%s/%s", getenv("TEST_DIRECTORY"), name);
    for (char *at = path + strlen(path) - strlen(name); *at; at++)
        if (*at == '/')
            *at = '_';
}

/* Says that this process has come to a point. */
static void reach(const char *point) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s-%s", getenv("TEST_DIRECTORY"), point,
             getenv("UNISUM_RANK"));
    CHECK(mkdir(path, 0700) == 0);
}

static void look(void) {
    size_t count;
    OK(unisum_comm_rank(comm, &rank));
    OK(unisum_comm_world(comm, &world));
    OK(unisum_comm_view(comm, &epoch, processes, PROCESSES, &count));
    CHECK(count == (epoch ? world : 0));
}

static int is_newcomer(void) { return getenv("TEST_JOIN") != NULL; }

/* In the job, as one of its first ranks or as a newcomer. */
static void enter(unisum_config *config) {
    OK(unisum_config_set(config, "UNISUM_ELASTIC", "1"));
    if (is_newcomer()) {
        OK(unisum_join(config, &comm));
        if (strcmp(getenv("TEST_JOIN"), "die") == 0)
            raise(SIGKILL);
    } else {
        OK(unisum_connect(config, &comm));
    }
    look();
    CHECK(is_newcomer() ? epoch > 1 : epoch == 1);
}

/* The communicator of another view takes the place of the last one. */
static void follow(unisum_comm *next) {
    uint64_t before = epoch, me = processes[rank];
    OK(unisum_comm_free(comm));
    comm = next;
    look();
    CHECK(epoch > before && processes[rank] == me);
}

static unisum_buckets *build(void) {
    size_t shapes[2] = {1, LONG};
    unisum_parameter parameters[2] = {{"ranks", shapes, 1, UNISUM_F64, 0},
                                      {"weights", shapes + 1, 1, UNISUM_F32, 0}};
    unisum_bucket_options options = {.bucket_bytes = 32 << 10, .end_bucket_bytes = 1024};
    for (;;) {
        unisum_buckets *buckets;
        unisum_comm *next;
        unisum_status status = unisum_buckets_create(comm, parameters, 2, &options, &buckets);
        if (status == UNISUM_OK)
            return buckets;
        /* Another newcomer was lost: all begin again. */
        CHECK(is_newcomer() && status == UNISUM_VIEW_CHANGED);
        OK(unisum_comm_rebuild(comm, &next));
        follow(next);
    }
}

static struct {
    uint64_t steps;
    float weights[LONG];
} state;

static void take_step(unisum_buckets *buckets, unisum_step_report *report) {
    void *memory;
    double one = 1;
    OK(unisum_buckets_begin(buckets));
    OK(unisum_buckets_view(buckets, 1, &memory, NULL));
    for (size_t i = 0; i < LONG; i++)
        ((float *)memory)[i] = (float)((i * 7 + state.steps * 3 + rank) % 41) - 20;
    OK(unisum_buckets_ready(buckets, 1));
    OK(unisum_buckets_put(buckets, 0, &one, 1));
    unisum_comm *next;
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_buckets_admit(buckets, &next));
    OK(unisum_buckets_wait(buckets, report));
    OK(unisum_buckets_gradient(buckets, 0, &memory, NULL));
    CHECK(*(double *)memory == 1);
    OK(unisum_buckets_gradient(buckets, 1, &memory, NULL));
    for (size_t i = 0; i < LONG; i++)
        state.weights[i] += ((float *)memory)[i];
    state.steps++;
}

/* Steps until one was made by LAST ranks, and five more. All have the same weights then. */
static void training(void) {
    unisum_config *config;
    OK(unisum_config_create(&config));
    enter(config);
    OK(unisum_config_free(config));
    unisum_buckets *buckets = build();
    uint32_t last = (uint32_t)atoi(getenv("LAST"));
    uint64_t until = UINT64_MAX;
    void *received;
    size_t bytes;
    if (is_newcomer()) {
        OK(unisum_comm_share_state(comm, NULL, 0, &received, &bytes));
        CHECK(bytes == sizeof state);
        memcpy(&state, received, bytes);
        OK(unisum_free(received));
        CHECK(state.steps > 0);
        EXPECT(UNISUM_INVALID_ARGUMENT, unisum_free(received));
    }
    while (state.steps < until) {
        unisum_step_report report;
        unisum_comm *next;
        take_step(buckets, &report);
        CHECK(report.change == NULL && report.participants == world);
        if (report.newcomers && until == UINT64_MAX) {
            uint32_t known;
            OK(unisum_comm_newcomers(comm, &known));
            OK(unisum_buckets_admit(buckets, &next));
            follow(next);
            received = &state;
            OK(unisum_comm_share_state(comm, &state, sizeof state, &received, &bytes));
            CHECK(received == NULL && bytes == 0);
        }
        if (!is_newcomer() && state.steps == 3)
            reach("training");
        if (report.participants == last && until == UINT64_MAX)
            until = state.steps + 5;
    }
    OK(unisum_barrier(comm));
    uint64_t hash = 7;
    for (size_t i = 0; i < LONG; i++) {
        uint32_t bits;
        memcpy(&bits, state.weights + i, sizeof bits);
        hash = hash * 0x100000001b3 ^ bits;
    }
    printf("epoch %llu of %u after %llu steps, %llx\n", (unsigned long long)epoch, world,
           (unsigned long long)state.steps, (unsigned long long)hash);
    OK(unisum_buckets_free(buckets));
    OK(unisum_comm_free(comm));
}

static int set(void *user, const char *key, const void *value, size_t length) {
    char draft[4096], path[4096], name[64];
    CHECK(user == &state);
    snprintf(name, sizeof name, "draft-%s", getenv("UNISUM_RANK"));
    path_of(draft, sizeof draft, name);
    path_of(path, sizeof path, key);
    FILE *file = fopen(draft, "wb");
    CHECK(file && fwrite(value, 1, length, file) == length && fclose(file) == 0);
    return rename(draft, path);
}

static int get(void *user, const char *key, double timeout_s, void *value, size_t capacity,
               size_t *length) {
    char path[4096];
    CHECK(user == &state && timeout_s > 0);
    path_of(path, sizeof path, key);
    FILE *file;
    for (double left = timeout_s; !(file = fopen(path, "rb")); left -= 0.002) {
        if (left <= 0)
            return ETIMEDOUT;
        struct timespec pause = {0, 2000000};
        nanosleep(&pause, NULL);
    }
    *length = fread(value, 1, capacity, file);
    return fclose(file);
}

/* What was made of a communicator ends when newcomers enter, on the ranks that were there. */
static void check_old(unisum_comm *old, unisum_comm *group, unisum_messenger *post, float *memory) {
    float data[10] = {0};
    size_t length;
    EXPECT(UNISUM_VIEW_CHANGED, unisum_barrier(old));
    const unisum_error *error = unisum_last_error();
    CHECK(error->epoch == 2 && error->lost_count == 0 && error->joined_count == 1);
    CHECK(error->joined[0] == 2);
    EXPECT(UNISUM_VIEW_CHANGED, unisum_all_reduce(group, data, 10, UNISUM_F32, UNISUM_SUM));
    EXPECT(UNISUM_VIEW_CHANGED, unisum_receive(post, data, 10, UNISUM_F32, 1 - rank, 1));
    EXPECT(UNISUM_VIEW_CHANGED, unisum_comm_share_state(old, "old", 3, NULL, &length));
    OK(unisum_messenger_free(post));
    OK(unisum_comm_free(group));
    /* It goes on as memory. */
    memory[0] = 1;
    OK(unisum_all_reduce(comm, memory, 1, UNISUM_F32, UNISUM_SUM));
    CHECK(memory[0] == 3);
    OK(unisum_free(memory));
}

/* The two ranks that were there first. */
static void let_in(void) {
    unisum_comm *old = comm, *group, *next;
    unisum_messenger *post;
    void *memory;
    uint32_t known = 0;
    OK(unisum_comm_newcomers(comm, &known));
    OK(unisum_comm_duplicate(comm, &group));
    OK(unisum_messenger_create(comm, &post));
    OK(unisum_allocate(comm, 1000, &memory));
    OK(unisum_comm_newcomers(group, &known));
    CHECK(known == 0);
    EXPECT(UNISUM_CONFIGURATION, unisum_comm_admit(group, &next));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_admit(comm, NULL));
    reach("running");
    /* Which all ranks know. */
    while (known == 0) {
        OK(unisum_comm_newcomers(comm, &known));
        OK(unisum_all_reduce(comm, &known, 1, UNISUM_U32, UNISUM_MIN));
    }
    CHECK(known == 1);
    OK(unisum_comm_admit(old, &comm));
    look();
    CHECK(epoch == 2 && world == 3 && rank < 2);
    check_old(old, group, post, memory);
    /* Once more by the old one, with all ranks: another view, though nobody asks. */
    OK(unisum_comm_admit(old, &next));
    OK(unisum_comm_free(old));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_comm_admit(old, &next));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_comm_newcomers(old, &known));
    follow(next);
}

static void newcomer(void) {
    float one = 1;
    unisum_comm *next;
    CHECK(epoch == 2 && world == 3 && rank == 2);
    OK(unisum_all_reduce(comm, &one, 1, UNISUM_F32, UNISUM_SUM));
    OK(unisum_comm_admit(comm, &next));
    follow(next);
}

/* By a store of the program's, between two calls. */
static void between(void) {
    unisum_config *config;
    unisum_store store = {set, get, &state};
    unsetenv("UNISUM_RENDEZVOUS");
    unsetenv("UNISUM_TOKEN");
    setenv("HOME", "/nonexistent", 1);
    unsetenv("XDG_CONFIG_HOME");
    OK(unisum_config_create(&config));
    OK(unisum_config_set_store(config, &store));
    enter(config);
    OK(unisum_config_free(config));
    if (is_newcomer())
        newcomer();
    else
        let_in();
    CHECK(epoch == 3 && world == 3);
    void *received = NULL;
    size_t bytes = 7;
    /* A state of no bytes is one, and NULL is none. */
    const char *words[] = {"state", ""};
    for (int i = 0; i < 2; i++) {
        if (is_newcomer()) {
            OK(unisum_comm_share_state(comm, NULL, 0, &received, &bytes));
            CHECK(received && bytes == strlen(words[i]));
            CHECK(memcmp(received, words[i], bytes) == 0);
            OK(unisum_free(received));
        } else {
            OK(unisum_comm_share_state(comm, words[i], strlen(words[i]), NULL, NULL));
        }
    }
    /* Refused here, and nothing was sent. */
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_share_state(comm, NULL, 1, &received, &bytes));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_share_state(comm, NULL, 0, NULL, &bytes));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_share_state(comm, NULL, 0, &received, NULL));
    const char *own = rank == 1 ? "other" : "state";
    EXPECT(UNISUM_MISMATCH, unisum_comm_share_state(comm, rank == 2 ? NULL : own,
                                                    rank == 2 ? 0 : 5, &received, &bytes));
    CHECK(unisum_last_error()->rank_count == 1 && unisum_last_error()->ranks[0] == 1);
    REFUSED(UNISUM_CONFIGURATION, "no rank has a state",
            unisum_comm_share_state(comm, NULL, 0, &received, &bytes));
    OK(unisum_barrier(comm));
    printf("epoch %llu of %u\n", (unsigned long long)epoch, world);
    OK(unisum_comm_free(comm));
}

/* Nobody to join, or nothing to join. */
static void refused(void) {
    unisum_config *config;
    unisum_comm *next = NULL;
    OK(unisum_config_create(&config));
    REFUSED(UNISUM_CONFIGURATION, "for elastic jobs", unisum_join(config, &next));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_join(config, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_join(NULL, &next));
    OK(unisum_config_set(config, "UNISUM_ELASTIC", "1"));
    OK(unisum_config_set(config, "UNISUM_CONNECT_TIMEOUT", "1"));
    REFUSED(UNISUM_RENDEZVOUS, "world.members", unisum_join(config, &next));
    OK(unisum_config_set(config, "UNISUM_RENDEZVOUS", "tcp://127.0.0.1:1"));
    REFUSED(UNISUM_CONFIGURATION, "by a file or by a store", unisum_join(config, &next));
    CHECK(next == NULL);
    OK(unisum_config_free(config));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_join(config, &next));

    OK(unisum_connect_from_environment(&comm));
    uint32_t known = 7;
    OK(unisum_comm_newcomers(comm, &known));
    CHECK(known == 0);
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_newcomers(comm, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_comm_newcomers(NULL, &known));
    EXPECT(UNISUM_CONFIGURATION, unisum_comm_admit(comm, &next));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_comm_admit(NULL, &next));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_comm_share_state(NULL, "state", 5, NULL, NULL));
    unisum_buckets *buckets = build();
    EXPECT(UNISUM_CONFIGURATION, unisum_buckets_admit(buckets, &next));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_buckets_admit(buckets, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_buckets_admit(NULL, &next));
    unisum_step_report report;
    memset(&report, 1, sizeof report);
    take_step(buckets, &report);
    CHECK(!report.newcomers);
    OK(unisum_buckets_free(buckets));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_buckets_admit(buckets, &next));
    CHECK(next == NULL);
    OK(unisum_comm_free(comm));
}

int main(int count, char **arguments) {
    const struct {
        const char *name;
        void (*run)(void);
    } all[] = {{"training", training}, {"between", between}, {"refused", refused}};
    CHECK(count == 2);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (strcmp(all[i].name, arguments[1]) == 0) {
            all[i].run();
            return 0;
        }
    }
    fprintf(stderr, "no scenario %s\n", arguments[1]);
    return 2;
}
