/* Ranks of an elastic job, some of which the test kills: elastic SCENARIO. TEST_DIRECTORY is for
 * what they tell the test, LAST is how many ranks are left in the end. */
#include <sys/stat.h>

#include "check.h"

enum { PROCESSES = 16, LONG = 20000 };

static unisum_comm *comm;
static uint32_t rank, world;
static uint64_t epoch, processes[PROCESSES], me;

static void look(void) {
    size_t count;
    OK(unisum_comm_rank(comm, &rank));
    OK(unisum_comm_world(comm, &world));
    OK(unisum_comm_view(comm, &epoch, processes, PROCESSES, &count));
    CHECK(count == (epoch ? world : 0));
}

static void join(const char *minimum) {
    unisum_config *config;
    OK(unisum_config_create(&config));
    OK(unisum_config_set(config, "UNISUM_ELASTIC", minimum));
    OK(unisum_connect(config, &comm));
    OK(unisum_config_free(config));
    look();
    me = processes[rank];
}

/* The communicator of another view takes the place of the last one. */
static void enter(unisum_comm *next) {
    uint64_t before = epoch;
    OK(unisum_comm_free(comm));
    comm = next;
    look();
    CHECK(epoch > before && processes[rank] == me);
}

static void leave(void) { OK(unisum_comm_free(comm)); }

/* Says that this process has come to a point. */
static void reach(const char *point) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s-%s", getenv("TEST_DIRECTORY"), point,
             getenv("UNISUM_RANK"));
    CHECK(mkdir(path, 0700) == 0);
}

static uint32_t last(void) { return (uint32_t)atoi(getenv("LAST")); }

/* The change is from the view that is known to that of the communicator that comes with it. */
static void follow(unisum_buckets *buckets, const unisum_step_report *report) {
    const unisum_step_change *change = report->change;
    unisum_comm *next;
    OK(unisum_buckets_take_communicator(buckets, &next));
    CHECK((next != NULL) == (change != NULL));
    if (!change)
        return;
    CHECK(change->lost_count > 0 && change->took_s > 0);
    CHECK(change->process_count + change->lost_count == world);
    for (size_t i = 0, place = 0, gone = 0; i < world; i++) {
        if (gone < change->lost_count && change->lost[gone] == i)
            gone++;
        else
            CHECK(change->processes[place++] == processes[i]);
    }
    CHECK(!change->redone || report->participants == change->process_count);
    enter(next);
    CHECK(epoch == change->epoch && world == change->process_count);
    for (uint32_t i = 0; i < world; i++)
        CHECK(processes[i] == change->processes[i]);
    OK(unisum_buckets_take_communicator(buckets, &next));
    CHECK(next == NULL);
}

/* Averages of what follows from step and process; who takes part is seen in the first gradient. */
static void take_step(unisum_buckets *buckets, uint32_t step, unisum_step_report *report) {
    void *memory;
    OK(unisum_buckets_begin(buckets));
    OK(unisum_buckets_view(buckets, 1, &memory, NULL));
    for (size_t i = 0; i < LONG; i++)
        ((float *)memory)[i] = (float)((i * 7 + step * 3 + me) % 41) - 20;
    OK(unisum_buckets_ready(buckets, 1));
    double who[PROCESSES] = {0};
    who[me] = 1;
    OK(unisum_buckets_put(buckets, 0, who, PROCESSES));
    OK(unisum_buckets_wait(buckets, report));
}

/* Steps until one was made by LAST ranks, and five more: no call fails, whoever is killed. Some ranks
 * may hear of the change in an earlier step than others. */
static void training(void) {
    join("1");
    size_t shapes[2] = {PROCESSES, LONG};
    unisum_parameter parameters[2] = {{"who", shapes, 1, UNISUM_F64, 0},
                                      {"all", shapes + 1, 1, UNISUM_F32, 0}};
    unisum_bucket_options options = {.bucket_bytes = 32 << 10, .end_bucket_bytes = 1024};
    unisum_buckets *buckets;
    OK(unisum_buckets_create(comm, parameters, 2, &options, &buckets));
    static float weights[LONG];
    uint32_t took_part[PROCESSES] = {0}, until = UINT32_MAX, step = 0;
    while (step < until) {
        unisum_step_report report;
        take_step(buckets, step, &report);
        if (++step == 3)
            reach("training");
        void *memory;
        uint32_t there = 0;
        OK(unisum_buckets_gradient(buckets, 0, &memory, NULL));
        for (uint32_t i = 0; i < PROCESSES; i++)
            if (((double *)memory)[i] != 0)
                took_part[i]++, there++;
        CHECK(there == report.participants);
        OK(unisum_buckets_gradient(buckets, 1, &memory, NULL));
        for (size_t i = 0; i < LONG; i++)
            weights[i] += ((float *)memory)[i];
        follow(buckets, &report);
        if (report.participants == last() && until == UINT32_MAX)
            until = step + 5;
    }
    /* What was taken is a communicator as any other. */
    OK(unisum_barrier(comm));
    uint64_t hash = 7;
    for (size_t i = 0; i < LONG; i++) {
        uint32_t bits;
        memcpy(&bits, weights + i, sizeof bits);
        hash = hash * 0x100000001b3 ^ bits;
    }
    printf("epoch %llu of %u after %u steps, %llx:", (unsigned long long)epoch, world, step,
           (unsigned long long)hash);
    for (uint32_t i = 0; i < PROCESSES; i++)
        printf(" %u", took_part[i]);
    puts("");
    for (uint32_t i = 0; i < world; i++)
        CHECK(took_part[processes[i]] == step);
    OK(unisum_buckets_free(buckets));
    leave();
}

/* What a call that has ended with a change tells. */
static void check_error(uint32_t world_before) {
    const unisum_error *error = unisum_last_error();
    CHECK(error->status == UNISUM_VIEW_CHANGED && error->epoch > epoch);
    CHECK(error->lost_count < world_before && error->joined_count == 0);
    for (size_t i = 0; i < error->lost_count; i++)
        CHECK(error->lost[i] < world_before);
    CHECK(strcmp(unisum_status_name(UNISUM_VIEW_CHANGED), "UNISUM_VIEW_CHANGED") == 0);
}

/* All ranks after as many calls as the one that is furthest, in the view of those that are left. */
static uint32_t align(uint32_t done) {
    for (;;) {
        unisum_comm *next;
        OK(unisum_comm_rebuild(comm, &next));
        enter(next);
        unisum_status status = unisum_all_reduce(comm, &done, 1, UNISUM_U32, UNISUM_MAX);
        if (status == UNISUM_OK)
            return done;
        CHECK(status == UNISUM_VIEW_CHANGED);
    }
}

/* Calls that a loss ends are made again: what they read is as it was. */
static void calls(void) {
    join("1");
    uint32_t done = 0, until = UINT32_MAX;
    while (done < until) {
        double data[1000], sum = 0;
        for (int i = 0; i < 1000; i++)
            data[i] = (double)me + 1;
        unisum_status status = unisum_all_reduce(comm, data, 1000, UNISUM_F64, UNISUM_SUM);
        if (status == UNISUM_OK) {
            for (uint32_t i = 0; i < world; i++)
                sum += (double)processes[i] + 1;
            CHECK(data[0] == sum && data[999] == sum);
            done++;
        } else {
            check_error(world);
            CHECK(data[0] == (double)me + 1 && data[999] == (double)me + 1);
            done = align(done);
        }
        if (done == 3)
            reach("training");
        if (world == last() && until == UINT32_MAX)
            until = done + 5;
    }
    printf("epoch %llu of %u after %u\n", (unsigned long long)epoch, world, done);
    leave();
}

/* Changes that nobody's death causes: a revoke, and ranks that are left behind. */
static void changes(void) {
    join("1");
    unisum_comm *next, *group;
    uint32_t stuck[1] = {world - 1};
    CHECK(epoch == 1);
    if (rank == 1)
        OK(unisum_comm_revoke(comm));
    unisum_status status;
    while ((status = unisum_barrier(comm)) == UNISUM_OK)
        continue;
    CHECK(status == UNISUM_VIEW_CHANGED);
    check_error(world);
    CHECK(unisum_last_error()->epoch == 2 && unisum_last_error()->lost_count == 0);
    OK(unisum_comm_rebuild(comm, &next));
    enter(next);
    OK(unisum_comm_split(comm, 0, 0, &group));
    EXPECT(UNISUM_CONFIGURATION, unisum_comm_rebuild(group, &next));
    EXPECT(UNISUM_CONFIGURATION, unisum_comm_revoke(group));
    OK(unisum_comm_free(group));
    EXPECT(UNISUM_CONFIGURATION, unisum_comm_shrink(comm, &rank, 1, &next));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_shrink(comm, NULL, 1, &next));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_comm_shrink(comm, stuck, 1, NULL));
    OK(unisum_barrier(comm));
    if (rank == stuck[0]) {
        while ((status = unisum_barrier(comm)) == UNISUM_OK)
            continue;
        CHECK(status == UNISUM_RANK_LOST);
        CHECK(unisum_last_error()->epoch == 0);
    } else {
        OK(unisum_comm_shrink(comm, stuck, 1, &next));
        uint32_t before = world;
        enter(next);
        CHECK(world == before - 1 && epoch == 3);
        OK(unisum_barrier(comm));
    }
    leave();
}

/* Nothing of it in other jobs. */
static void otherwise(void) {
    join("0");
    unisum_comm *next = comm;
    CHECK(epoch == 0);
    OK(unisum_comm_view(comm, NULL, NULL, 0, NULL));
    EXPECT(UNISUM_CONFIGURATION, unisum_comm_rebuild(comm, &next));
    EXPECT(UNISUM_CONFIGURATION, unisum_comm_revoke(comm));
    size_t shape = PROCESSES;
    unisum_parameter parameter = {"who", &shape, 1, UNISUM_F64, 0};
    unisum_buckets *buckets;
    unisum_step_report report;
    double who[PROCESSES] = {0};
    OK(unisum_buckets_create(comm, &parameter, 1, NULL, &buckets));
    OK(unisum_buckets_begin(buckets));
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_buckets_take_communicator(buckets, &next));
    OK(unisum_buckets_put(buckets, 0, who, PROCESSES));
    OK(unisum_buckets_wait(buckets, &report));
    CHECK(report.change == NULL);
    OK(unisum_buckets_take_communicator(buckets, &next));
    CHECK(next == NULL);
    EXPECT(UNISUM_INVALID_ARGUMENT, unisum_buckets_take_communicator(buckets, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_buckets_take_communicator(NULL, &next));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_comm_view(NULL, NULL, NULL, 0, NULL));
    EXPECT(UNISUM_INVALID_HANDLE, unisum_comm_revoke(NULL));
    OK(unisum_buckets_free(buckets));
    leave();
}

int main(int count, char **arguments) {
    const struct {
        const char *name;
        void (*run)(void);
    } all[] = {
        {"training", training}, {"calls", calls}, {"changes", changes}, {"otherwise", otherwise},
    };
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
