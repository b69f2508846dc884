/* Ranks of an elastic job that keep state of shards: sharding SCENARIO. The test kills some, or
 * lets others join, with TEST_JOIN. TEST_DIRECTORY is for what they tell the test, LAST is how many
 * ranks there are in the end. */
#include <sys/stat.h>

#include "check.h"

enum { PARAMETERS = 3, LONG = 20000, VECTORS = 2, MOVES = 200 };

static const size_t counts[PARAMETERS] = {LONG, 1, 3};
static unisum_comm *comm;
static uint32_t rank, world;
static uint64_t epoch;

static void look(void) {
    OK(unisum_comm_rank(comm, &rank));
    OK(unisum_comm_world(comm, &world));
    OK(unisum_comm_view(comm, &epoch, NULL, 0, NULL));
}

static int is_newcomer(void) { return getenv("TEST_JOIN") != NULL; }

static void enter(void) {
    unisum_config *config;
    OK(unisum_config_create(&config));
    OK(unisum_config_set(config, "UNISUM_ELASTIC", "1"));
    OK((is_newcomer() ? unisum_join : unisum_connect)(config, &comm));
    OK(unisum_config_free(config));
    look();
}

/* The communicator of another view takes the place of the last one. */
static void follow(unisum_status (*make)(const unisum_comm *, unisum_comm **)) {
    unisum_comm *next;
    OK(make(comm, &next));
    OK(unisum_comm_free(comm));
    comm = next;
    look();
}

static void reach(const char *point) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s-%s", getenv("TEST_DIRECTORY"), point,
             getenv("UNISUM_RANK"));
    CHECK(mkdir(path, 0700) == 0);
}

static unisum_buckets *build(void) {
    unisum_parameter parameters[PARAMETERS] = {{"long", counts, 1, UNISUM_F32, 0},
                                               {"one", counts + 1, 1, UNISUM_F32, 0},
                                               {"short", counts + 2, 1, UNISUM_F32, 0}};
    unisum_bucket_options options = {
        .flags = UNISUM_SHARDED, .bucket_bytes = 32 << 10, .end_bucket_bytes = 1024};
    for (;;) {
        unisum_buckets *buckets;
        unisum_status status =
            unisum_buckets_create(comm, parameters, PARAMETERS, &options, &buckets);
        if (status == UNISUM_OK)
            return buckets;
        CHECK(status == UNISUM_VIEW_CHANGED);
        follow(unisum_comm_rebuild);
    }
}

/* The same on all ranks; of 11 steps in a row, the sum is 0. */
static float gradient(uint64_t step, size_t parameter, size_t at) {
    return (float)((3 * step + 5 * parameter + 7 * at) % 11) - 5;
}

/* An element of a vector after so many steps. */
static float expected(uint64_t version, size_t vector, size_t parameter, size_t at) {
    float value = vector == 0 ? (float)at : 0;
    for (uint64_t step = 0; step < version % 11; step++)
        value += (float)(vector + 1) * gradient(step, parameter, at);
    return value;
}

/* All that this rank has is as it should be; what nobody has is restored. How much that was. */
static size_t restore(const unisum_shard_state *state) {
    static unisum_shard_move moves[MOVES];
    size_t count, lost = 0, covered[PARAMETERS] = {0};
    uint64_t version;
    OK(unisum_shard_state_version(state, &version));
    OK(unisum_shard_state_moves(state, moves, MOVES, &count));
    CHECK(count <= MOVES);
    for (size_t i = 0; i < count; i++) {
        const unisum_shard_move *move = moves + i;
        CHECK(move->from < (int64_t)world && move->to < world);
        covered[move->parameter] += move->count;
        if (move->from < 0)
            lost += move->count;
        for (size_t vector = 0; vector < VECTORS && move->to == rank; vector++) {
            void *memory;
            OK(unisum_shard_state_elements(state, vector, move->parameter, move->start, move->count,
                                           &memory));
            for (size_t at = 0; at < move->count; at++) {
                float *element = (float *)memory + at;
                float value = expected(version, vector, move->parameter, move->start + at);
                CHECK(*element == (move->from < 0 ? 0 : value));
                *element = value;
            }
        }
    }
    for (size_t i = 0; i < PARAMETERS; i++)
        CHECK(covered[i] == counts[i]);
    OK(unisum_shard_state_set_version(state, version));
    return lost;
}

/* One more step, also of all vectors of this rank's shards. */
static unisum_status take_step(unisum_buckets *buckets, unisum_shard_state *state,
                               unisum_step_report *report) {
    static float values[LONG];
    uint64_t version;
    size_t all;
    OK(unisum_shard_state_version(state, &version));
    unisum_status status = unisum_buckets_begin(buckets);
    for (size_t i = PARAMETERS; status == UNISUM_OK && i-- > 0;) {
        for (size_t at = 0; at < counts[i]; at++)
            values[at] = gradient(version, i, at);
        status = unisum_buckets_put(buckets, i, values, counts[i]);
    }
    if (status == UNISUM_OK)
        status = unisum_buckets_wait(buckets, report);
    if (status != UNISUM_OK)
        return status;
    OK(unisum_buckets_count(buckets, &all));
    for (size_t bucket = 0; bucket < all; bucket++) {
        const void *averages;
        size_t count, same;
        OK(unisum_buckets_shard(buckets, bucket, &averages, &count));
        for (size_t vector = 0; vector < VECTORS; vector++) {
            void *memory;
            OK(unisum_shard_state_vector(state, bucket, vector, &memory, &same));
            CHECK(same == count);
            for (size_t at = 0; at < count; at++)
                ((float *)memory)[at] += (float)(vector + 1) * ((const float *)averages)[at];
        }
    }
    OK(unisum_shard_state_set_version(state, version + 1));
    return UNISUM_OK;
}

/* Steps in one view, with copies after every other one: until `until`, which is known once there
 * are LAST ranks. What ends it: a status, or newcomers. */
static unisum_status steps_in_view(unisum_buckets *buckets, unisum_shard_state *state,
                                   uint64_t *until, unisum_step_report *report) {
    uint64_t version;
    static int has_copied = 0;
    OK(unisum_shard_state_version(state, &version));
    if (world == (uint32_t)atoi(getenv("LAST")) && *until == UINT64_MAX)
        *until = version + 5;
    while (version < *until) {
        unisum_status status = take_step(buckets, state, report);
        if (status != UNISUM_OK)
            return status;
        OK(unisum_shard_state_version(state, &version));
        if (version % 2 == 0) {
            status = unisum_buckets_copy_shards(buckets, state);
            if (status != UNISUM_OK)
                return status;
            if (!has_copied++)
                reach("training");
        }
        if (report->newcomers)
            break;
    }
    return UNISUM_OK;
}

static void training(void) {
    enter();
    unisum_shard_state *state;
    unisum_step_report report = {0};
    uint64_t until = UINT64_MAX, version = 0;
    OK(unisum_shard_state_create(UNISUM_F32, VECTORS, &state));
    for (int layouts = 0; version < until;) {
        unisum_buckets *buckets = build();
        unisum_status status = unisum_buckets_reshard(buckets, state);
        if (status == UNISUM_OK) {
            size_t lost = restore(state);
            CHECK(lost == (epoch == 1 ? LONG + 4 : 0));
            CHECK(layouts++ > 0 || is_newcomer() == (lost == 0));
            status = steps_in_view(buckets, state, &until, &report);
            OK(unisum_shard_state_version(state, &version));
        }
        OK(unisum_buckets_free(buckets));
        if (status == UNISUM_OK && version < until)
            follow(unisum_comm_admit);
        else if (status != UNISUM_OK) {
            CHECK(status == UNISUM_VIEW_CHANGED);
            follow(unisum_comm_rebuild);
        }
    }
    unisum_buckets *buckets = build();
    OK(unisum_buckets_reshard(buckets, state));
    CHECK(restore(state) == 0);
    OK(unisum_buckets_free(buckets));
    OK(unisum_shard_state_free(state));
    printf("epoch %llu of %u after %llu\n", (unsigned long long)epoch, world,
           (unsigned long long)version);
    OK(unisum_comm_free(comm));
}

static void refused(void) {
    enter();
    unisum_shard_state *state, *other;
    void *memory;
    size_t count;
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_shard_state_create(UNISUM_I32, 1, &state));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_shard_state_create(UNISUM_F32, 1, NULL));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_shard_state_create(UNISUM_F32, (size_t)-1, &state));
    OK(unisum_shard_state_create(UNISUM_F32, VECTORS, &state));
    OK(unisum_shard_state_create(UNISUM_F32, 1 + rank, &other));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_shard_state_vector(state, 0, 0, &memory, &count));
    unisum_buckets *buckets = build();
    EXPECT(UNISUM_MISMATCH, unisum_buckets_reshard(buckets, other));
    EXPECT(UNISUM_CONFIGURATION, unisum_buckets_copy_shards(buckets, state));
    OK(unisum_buckets_reshard(buckets, state));
    EXPECT(UNISUM_CONFIGURATION, unisum_buckets_copy_shards(buckets, state));
    CHECK(restore(state) == LONG + 4);
    OK(unisum_buckets_copy_shards(buckets, state));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_shard_state_vector(state, 99, 0, &memory, &count));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_shard_state_vector(state, 0, VECTORS, &memory, &count));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_shard_state_vector(state, 0, 0, NULL, &count));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_shard_state_elements(state, 0, 0, 0, LONG, &memory));
    EXPECT(UNISUM_INVALID_ARGUMENT,
           unisum_shard_state_elements(state, 0, 0, SIZE_MAX, 2, &memory));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_shard_state_elements(state, 0, 9, 0, 1, &memory));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_shard_state_moves(state, NULL, 0, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_buckets_reshard(buckets, NULL));
    OK(unisum_shard_state_set_version(state, rank));
    EXPECT(UNISUM_MISMATCH, unisum_buckets_copy_shards(buckets, state));
    OK(unisum_buckets_free(buckets));
    unisum_parameter parameter = {"long", counts, 1, UNISUM_F32, 0};
    OK(unisum_buckets_create(comm, &parameter, 1, NULL, &buckets));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_buckets_reshard(buckets, state));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_buckets_copy_shards(buckets, state));
    OK(unisum_buckets_free(buckets));
    OK(unisum_shard_state_free(other));
    OK(unisum_shard_state_free(state));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_shard_state_free(state));
    OK(unisum_comm_free(comm));
}

int main(int count, char **arguments) {
    CHECK(count == 2);
    if (strcmp(arguments[1], "refused") == 0)
        refused();
    else
        training();
    return 0;
}
