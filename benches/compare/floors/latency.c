/* Floors of latency: one way from one process to another, on two cores where there are two. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <linux/futex.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "floor.h"
#include "world.h"

enum { BATCHES = 21, SPINS = 20000, WAKES = 200, STOPS_MAX = 10000 };
static const double STOPS_S = 0.5, STOP_MIN_S = 10e-6;

static _Atomic uint32_t *turn;
static int sockets[2];

static void stay_on(int core)
{
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(core, &cores);
    (void)sched_setaffinity(0, sizeof cores, &cores);
}

static void spin(int me, uint32_t round)
{
    (void)me;
    while (atomic_load_explicit(turn, memory_order_acquire) != round)
        pause_briefly();
    atomic_store_explicit(turn, round + 1, memory_order_release);
}

static void wake(int me, uint32_t round)
{
    (void)me;
    uint32_t now;
    while ((now = atomic_load(turn)) != round)
        syscall(SYS_futex, turn, FUTEX_WAIT, now, NULL, NULL, 0);
    atomic_store(turn, round + 1);
    syscall(SYS_futex, turn, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static void message(int me, int flags)
{
    double word = 1;
    ssize_t got;
    do
        got = recv(sockets[me], &word, sizeof word, flags);
    while (got < 0 && flags);
    need(got == sizeof word, "recv");
    need(send(sockets[me], &word, sizeof word, 0) == sizeof word, "send");
}

static void message_asleep(int me, uint32_t round)
{
    (void)round;
    message(me, 0);
}

static void message_spinning(int me, uint32_t round)
{
    (void)round;
    message(me, MSG_DONTWAIT);
}

static void connect_sockets(void)
{
    struct sockaddr_in address = { .sin_family = AF_INET,
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    need(listener >= 0, "socket");
    need(bind(listener, (struct sockaddr *)&address, length) == 0, "bind");
    need(listen(listener, 1) == 0, "listen");
    need(getsockname(listener, (struct sockaddr *)&address, &length) == 0, "getsockname");
    sockets[0] = socket(AF_INET, SOCK_STREAM, 0);
    need(connect(sockets[0], (struct sockaddr *)&address, length) == 0, "connect");
    sockets[1] = accept(listener, NULL, NULL);
    need(sockets[1] >= 0, "accept");
    close(listener);
    for (int at = 0; at < 2; at++)
        setsockopt(sockets[at], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* Each process waits for its turn and passes it on: half a round trip, median over batches. */
static void one_way(const char *name, void (*pass)(int me, uint32_t round), int trips,
                    int begins_with_message)
{
    atomic_store(turn, 0);
    int me = fork_ranks(2);
    stay_on(me % (int)sysconf(_SC_NPROCESSORS_ONLN));
    double word = 1, times[BATCHES];
    if (begins_with_message && me == 1)
        need(send(sockets[1], &word, sizeof word, 0) == sizeof word, "send");
    uint32_t round = (uint32_t)me;
    for (int batch = 0; batch < BATCHES; batch++) {
        double start = seconds_now();
        for (int at = 0; at < trips; at++, round += 2)
            pass(me, round);
        times[batch] = (seconds_now() - start) / trips / 2;
    }
    if (me == 1)
        _exit(0);
    need(end_ranks(me) == 0, "the child failed");
    if (begins_with_message)
        need(recv(sockets[0], &word, sizeof word, 0) == sizeof word, "recv");
    print_floor(name, median(times, BATCHES) * 1e6, "us");
}

/* How often and for how long a spinning core is taken away, by the system's ticks and by those of
   the host whose guest it is: an operation that meets such a stop takes that much longer. */
static void stops(void)
{
    static double lengths[STOPS_MAX];
    int count = 0;
    double start = seconds_now(), last = start;
    while (last - start < STOPS_S && count < STOPS_MAX) {
        double now = seconds_now();
        if (now - last > STOP_MIN_S)
            lengths[count++] = now - last;
        last = now;
    }
    print_floor("core_stops_per_ms", count / (last - start) * 1e-3, "/ms");
    if (count > 0)
        print_floor("core_stop", median(lengths, count) * 1e6, "us");
}

int main(void)
{
    turn = shared_memory(sizeof *turn);
    connect_sockets();
    one_way("spin_one_way", spin, SPINS, 0);
    one_way("futex_wake", wake, WAKES, 0);
    one_way("tcp_8B_asleep", message_asleep, WAKES, 1);
    one_way("tcp_8B_spinning", message_spinning, WAKES * 4, 1);
    stops();
    return 0;
}
