// Starts an all-gather, computes while it goes on, and has a callback fulfil a std::promise.
//
// c++ overlap.cpp -o overlap $(pkg-config --cflags --libs unisum)
// mpirun -n 4 ./overlap
#include <cstdio>
#include <cstring>
#include <future>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unisum.h>
#include <vector>

static void check(unisum_status status) {
    if (status != UNISUM_OK)
        throw std::runtime_error(std::string(unisum_status_name(status)) + ": " +
                                 unisum_last_error()->text);
}

struct CommDeleter {
    void operator()(unisum_comm *comm) const { unisum_comm_free(comm); }
};
using Comm = std::unique_ptr<unisum_comm, CommDeleter>;

static Comm connect() {
    unisum_comm *comm = nullptr;
    check(unisum_connect_from_environment(&comm));
    return Comm(comm);
}

int main() try {
    Comm comm = connect();
    uint32_t rank = 0, world = 0;
    check(unisum_comm_rank(comm.get(), &rank));
    check(unisum_comm_world(comm.get(), &world));
    if (rank == 0) { // how the ranks found each other, in the first line
        char told[512];
        check(unisum_comm_describe(comm.get(), told, sizeof told, nullptr));
        std::fprintf(stderr, "%.*s\n", static_cast<int>(std::strcspn(told, "\n")), told);
    }

    std::vector<int32_t> own(1000, static_cast<int32_t>(rank)), all(own.size() * world);
    unisum_collective all_gather{};
    all_gather.kind = UNISUM_ALL_GATHER;
    unisum_buffers buffers{own.data(), own.size(), all.data(), all.size()};
    unisum_work *work = nullptr;
    check(unisum_start(comm.get(), &all_gather, UNISUM_I32, &buffers, &work));

    std::promise<void> ended;
    check(unisum_work_on_end(
        work, [](void *user) { static_cast<std::promise<void> *>(user)->set_value(); }, &ended));
    double meanwhile = 0;
    for (int i = 1; i < 100000; i++)
        meanwhile += 1.0 / i;

    ended.get_future().get();
    check(unisum_work_wait(work, 0, nullptr)); // whether it went well
    check(unisum_work_free(work));
    long sum = std::accumulate(all.begin(), all.end(), 0L);
    std::printf("rank %u of %u: the sum is %ld, and %.3f came of computing\n", rank, world, sum,
                meanwhile);
    return sum == 500L * world * (world - 1) ? 0 : 1;
} catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
