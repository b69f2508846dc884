// All-reduce of oneCCL on the CPU. The ranks are started one by one with `--rank`, `--ranks` and
// `--meet FILE`, through which rank 0 tells the others the address of its key-value store.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>

#include <oneapi/ccl.hpp>

#include "rule.h"

namespace {

std::unique_ptr<ccl::communicator> communicator;

void all_reduce(float *data, size_t count)
{
    ccl::allreduce(data, data, count, ccl::reduction::sum, *communicator).wait();
}

void combine(double *values, size_t count, int sum)
{
    const auto reduction = sum ? ccl::reduction::sum : ccl::reduction::max;
    ccl::allreduce(values, values, count, reduction, *communicator).wait();
}

float *allocate(size_t bytes)
{
    void *data = nullptr;
    if (posix_memalign(&data, 4096, bytes) != 0)
        std::abort();
    return static_cast<float *>(data);
}

void publish(const std::string &path, const ccl::kvs::address_type &address)
{
    const std::string partial = path + ".partial";
    FILE *file = std::fopen(partial.c_str(), "wb");
    if (!file || std::fwrite(address.data(), address.size(), 1, file) != 1)
        std::abort();
    std::fclose(file);
    // Others see it whole or not at all.
    std::rename(partial.c_str(), path.c_str());
}

// Waits for rank 0; whoever started the ranks bounds the wait.
ccl::kvs::address_type discover(const std::string &path)
{
    ccl::kvs::address_type address;
    for (;;) {
        if (FILE *file = std::fopen(path.c_str(), "rb")) {
            const bool whole = std::fread(address.data(), address.size(), 1, file) == 1;
            std::fclose(file);
            if (whole)
                return address;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

void connect(int rank, int ranks, const std::string &meet)
{
    ccl::init();
    ccl::shared_ptr_class<ccl::kvs> store;
    if (rank == 0) {
        store = ccl::create_main_kvs();
        publish(meet, store->get_address());
    } else {
        store = ccl::create_kvs(discover(meet));
    }
    communicator =
        std::make_unique<ccl::communicator>(ccl::create_communicator(ranks, rank, store));
}

} // namespace

int main(int argc, char **argv)
{
    job job = job_from_arguments(argc, argv);
    library library = {};
    library.transport = argument(argc, argv, "transport", "shm");
    library.algorithm = "library's choice";
    library.memory = "private";
    library.rank = std::atoi(argument(argc, argv, "rank", "0"));
    library.ranks = std::atoi(argument(argc, argv, "ranks", "1"));
    library.all_reduce = all_reduce;
    library.combine = combine;
    library.allocate = allocate;
    job_begin(&job);
    connect(library.rank, library.ranks, argument(argc, argv, "meet", "meet"));
    job_run(&job, &library);
    // Tearing down is not measured, and a rank that leaves early must not disturb the others.
    double nothing = 0;
    combine(&nothing, 1, 0);
    communicator.reset();
    return 0;
}
