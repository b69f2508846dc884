/* Floors of TCP.
 *
 * Without arguments, over loopback: one stream, and a duplex exchange (both ways at once between
 * two processes) with the kernel's congestion control and with cubic.
 * `--listen ADDRESS:PORT` and `--connect ADDRESS:PORT` with `--bytes N`: one stream between hosts;
 * the listener prints its goodput.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "floor.h"
#include "world.h"

enum { REPEATS = 7, PIECE = 256 * 1024 };

static char *buffer;

static void tune(int socket, const char *congestion)
{
    int on = 1;
    need(setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0, "TCP_NODELAY");
    if (congestion)
        need(setsockopt(socket, IPPROTO_TCP, TCP_CONGESTION, congestion,
                        (socklen_t)strlen(congestion)) == 0, congestion);
}

static struct sockaddr_in address_of(const char *text)
{
    struct sockaddr_in address = { .sin_family = AF_INET };
    char host[64];
    int port;
    need(sscanf(text, "%63[^:]:%d", host, &port) == 2, "ADDRESS:PORT");
    need(inet_pton(AF_INET, host, &address.sin_addr) == 1, host);
    address.sin_port = htons((uint16_t)port);
    return address;
}

static int listen_at(struct sockaddr_in *address)
{
    socklen_t length = sizeof *address;
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    need(listener >= 0, "socket");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    need(bind(listener, (struct sockaddr *)address, length) == 0, "bind");
    need(listen(listener, 1) == 0, "listen");
    need(getsockname(listener, (struct sockaddr *)address, &length) == 0, "getsockname");
    return listener;
}

/* Tries for ten seconds: the listener may not be up yet. */
static int connect_to(const struct sockaddr_in *address)
{
    for (double start = seconds_now();;) {
        int connected = socket(AF_INET, SOCK_STREAM, 0);
        need(connected >= 0, "socket");
        if (connect(connected, (const struct sockaddr *)address, sizeof *address) == 0)
            return connected;
        need(errno == ECONNREFUSED && seconds_now() - start < 10, "connect");
        close(connected);
        usleep(10000);
    }
}

static void send_bytes(int socket, size_t bytes)
{
    while (bytes > 0) {
        ssize_t sent = send(socket, buffer, bytes < PIECE ? bytes : PIECE, MSG_NOSIGNAL);
        need(sent > 0, "send");
        bytes -= (size_t)sent;
    }
}

static void receive_bytes(int socket, size_t bytes)
{
    while (bytes > 0) {
        ssize_t got = recv(socket, buffer, bytes < PIECE ? bytes : PIECE, 0);
        need(got > 0, "recv");
        bytes -= (size_t)got;
    }
}

static void stream(int me, int socket, size_t bytes)
{
    if (me == 0)
        send_bytes(socket, bytes);
    else
        receive_bytes(socket, bytes);
}

static size_t unless_blocked(ssize_t moved)
{
    need(moved > 0 || (moved < 0 && errno == EAGAIN), "the other end has gone");
    return moved > 0 ? (size_t)moved : 0;
}

/* Both ways at once, through buffers of the whole size, as an all-reduce has them. */
static void exchange(int me, int socket, size_t bytes)
{
    static char *whole[2];
    static size_t room;
    if (room < bytes) {
        whole[0] = shared_memory(bytes);
        whole[1] = shared_memory(bytes);
        memset(whole[0], 1, bytes);
        memset(whole[1], 2, bytes);
        room = bytes;
    }
    (void)me;
    size_t sent = 0, got = 0;
    while (sent < bytes || got < bytes) {
        size_t before = sent + got;
        /* In pieces, so that what waits in the kernel stays in the cache. */
        size_t out = bytes - sent < PIECE ? bytes - sent : PIECE;
        size_t in = bytes - got < PIECE ? bytes - got : PIECE;
        if (out)
            sent += unless_blocked(send(socket, whole[0] + sent, out,
                                        MSG_DONTWAIT | MSG_NOSIGNAL));
        if (in)
            got += unless_blocked(recv(socket, whole[1] + got, in, MSG_DONTWAIT));
        if (sent + got == before) {
            short events = (short)((sent < bytes ? POLLOUT : 0) | (got < bytes ? POLLIN : 0));
            struct pollfd polled = { socket, events, 0 };
            need(poll(&polled, 1, -1) >= 0 || errno == EINTR, "poll");
        }
    }
}

/* Median of the slower end's times, in seconds. */
static double between_two(void (*work)(int, int, size_t), size_t bytes, const char *congestion)
{
    struct sockaddr_in address = address_of("127.0.0.1:0");
    int listener = listen_at(&address);
    struct meeting *meeting = shared_memory(sizeof *meeting);
    double (*times)[REPEATS] = shared_memory(2 * sizeof *times);
    int me = fork_ranks(2);
    int connected = me == 1 ? connect_to(&address) : accept(listener, NULL, NULL);
    need(connected >= 0, "accept");
    tune(connected, congestion);
    uint32_t round = 0;
    work(me, connected, bytes);
    for (int at = 0; at < REPEATS; at++) {
        meet(meeting, &round, 2);
        double start = seconds_now();
        work(me, connected, bytes);
        times[me][at] = seconds_now() - start;
    }
    if (me == 1)
        _exit(0);
    need(end_ranks(me) == 0, "the child failed");
    close(connected);
    close(listener);
    double slower[REPEATS];
    for (int at = 0; at < REPEATS; at++)
        slower[at] = times[0][at] > times[1][at] ? times[0][at] : times[1][at];
    return median(slower, REPEATS);
}

static void over_loopback(void)
{
    const struct {
        size_t bytes;
        const char *name;
    } sizes[] = { { 1 << 20, "1M" }, { 32 << 20, "32M" }, { 64 << 20, "64M" } };
    const char *congestions[] = { NULL, "cubic" };
    for (int control = 0; control < 2; control++)
        for (int at = 0; at < 3; at++) {
            const char *congestion = congestions[control];
            const char *label = congestion ? congestion : "default";
            char name[64];
            size_t bytes = sizes[at].bytes;
            snprintf(name, sizeof name, "tcp_stream_%s_%s", sizes[at].name, label);
            print_floor(name, (double)bytes / between_two(stream, bytes, congestion) * 1e-9,
                        "GB/s");
            snprintf(name, sizeof name, "tcp_exchange_%s_%s", sizes[at].name, label);
            print_floor(name, (double)bytes / between_two(exchange, bytes, congestion) * 1e-9,
                        "GB/s each way");
        }
}

/* The sender ends when the receiver has confirmed everything. */
static void between_hosts(const char *listens, const char *connects, size_t bytes)
{
    struct sockaddr_in address = address_of(listens ? listens : connects);
    if (connects) {
        int connected = connect_to(&address);
        send_bytes(connected, bytes);
        receive_bytes(connected, 1);
        return;
    }
    int connected = accept(listen_at(&address), NULL, NULL);
    need(connected >= 0, "accept");
    receive_bytes(connected, 1);
    double start = seconds_now();
    receive_bytes(connected, bytes - 1);
    print_floor("stream_between_hosts", (double)bytes / (seconds_now() - start) * 1e-9, "GB/s");
    send_bytes(connected, 1);
}

int main(int argc, char **argv)
{
    const char *listens = argument(argc, argv, "listen", NULL);
    const char *connects = argument(argc, argv, "connect", NULL);
    buffer = malloc(PIECE);
    need(buffer != NULL, "malloc");
    memset(buffer, 1, PIECE);
    if (listens || connects)
        between_hosts(listens, connects,
                      strtoull(argument(argc, argv, "bytes", "67108864"), NULL, 10));
    else
        over_loopback();
    return 0;
}
