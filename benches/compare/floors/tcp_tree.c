/* Reference: all-reduce by a k-ary tree over loopback TCP.
 *
 * Streams cut through: a rank adds up what its children send as it comes, passes on each prefix
 * that is complete, and hands the result's prefix down as it comes from above. It waits by a few
 * pauses, a few yields, then poll(2).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "world.h"

enum { PAUSES = 4, YIELDS = 8, PIECE = 64 * 1024, MOST_CHILDREN = MOST_RANKS };

/* Above, the widest rank's work decides and not the depth, so the tree is binary. */
enum { LARGE_BYTES = 256 * 1024 };

struct child {
    int socket;
    size_t received; /* bytes that have been added */
    size_t sent;     /* bytes of the result handed down */
    size_t carried;  /* bytes of a float that has come in part, at the front of `piece` */
    _Alignas(64) char piece[PIECE];
};

struct tree {
    int parent;
    int child_count;
    struct child *children;
};

static struct library library;
static struct tree wide, binary;

/* Bytes moved without blocking; 0 if none can be now. */
static size_t moved(ssize_t result)
{
    if (result > 0)
        return (size_t)result;
    need(result < 0 && (errno == EAGAIN || errno == EINTR), "the other end has gone");
    return 0;
}

static size_t send_some(int socket, const char *data, size_t from, size_t until)
{
    if (from >= until)
        return 0;
    return moved(send(socket, data + from, until - from, MSG_DONTWAIT | MSG_NOSIGNAL));
}

static size_t receive_some(int socket, char *into, size_t room)
{
    return room ? moved(recv(socket, into, room, MSG_DONTWAIT)) : 0;
}

/* Adds what this child has sent. */
static size_t add_from(struct child *child, float *data, size_t bytes)
{
    size_t rest = bytes - child->received - child->carried;
    size_t room = PIECE - child->carried < rest ? PIECE - child->carried : rest;
    size_t got = receive_some(child->socket, child->piece + child->carried, room);
    size_t whole = (child->carried + got) / sizeof(float);
    float *restrict into = data + child->received / sizeof(float);
    const float *restrict from = (const float *)(const void *)child->piece;
    for (size_t at = 0; at < whole; at++)
        into[at] += from[at];
    child->carried = child->carried + got - whole * sizeof(float);
    memmove(child->piece, child->piece + whole * sizeof(float), child->carried);
    child->received += whole * sizeof(float);
    return got;
}

struct progress {
    size_t summed;   /* prefix to which all children have added */
    size_t sent_up;  /* of it, sent to the parent */
    size_t finished; /* prefix of the result */
};

static int is_done(const struct tree *tree, const struct progress *progress, size_t bytes)
{
    if (progress->finished < bytes)
        return 0;
    for (int at = 0; at < tree->child_count; at++)
        if (tree->children[at].sent < bytes)
            return 0;
    return 1;
}

/* Tries every socket once; gives the bytes that moved. */
static size_t advance(struct tree *tree, struct progress *progress, float *data, size_t bytes)
{
    size_t total = 0;
    progress->summed = bytes;
    for (int at = 0; at < tree->child_count; at++) {
        if (tree->children[at].received < bytes)
            total += add_from(&tree->children[at], data, bytes);
        if (tree->children[at].received < progress->summed)
            progress->summed = tree->children[at].received;
    }
    if (tree->parent < 0) {
        progress->finished = progress->summed;
    } else {
        char *raw = (char *)data;
        size_t up = send_some(tree->parent, raw, progress->sent_up, progress->summed);
        progress->sent_up += up;
        /* What comes down replaces only what has gone up. */
        size_t room = progress->sent_up - progress->finished;
        size_t down = receive_some(tree->parent, raw + progress->finished, room);
        progress->finished += down;
        total += up + down;
    }
    for (int at = 0; at < tree->child_count; at++) {
        struct child *child = &tree->children[at];
        size_t down = send_some(child->socket, (char *)data, child->sent, progress->finished);
        child->sent += down;
        total += down;
    }
    return total;
}

/* Until a socket can move what this rank has or needs. */
static void wait_for_sockets(const struct tree *tree, const struct progress *progress, size_t bytes)
{
    struct pollfd polled[MOST_CHILDREN + 1];
    nfds_t count = 0;
    for (int at = 0; at < tree->child_count; at++) {
        short events = tree->children[at].received < bytes ? POLLIN : 0;
        if (tree->children[at].sent < progress->finished)
            events |= POLLOUT;
        if (events)
            polled[count++] = (struct pollfd){ tree->children[at].socket, events, 0 };
    }
    if (tree->parent >= 0) {
        short events = progress->finished < progress->sent_up ? POLLIN : 0;
        if (progress->sent_up < progress->summed)
            events |= POLLOUT;
        if (events)
            polled[count++] = (struct pollfd){ tree->parent, events, 0 };
    }
    need(poll(polled, count, -1) >= 0 || errno == EINTR, "poll");
}

static void all_reduce(float *data, size_t count)
{
    size_t bytes = count * sizeof *data;
    struct tree *tree = bytes > LARGE_BYTES ? &binary : &wide;
    struct progress progress = { tree->child_count ? 0 : bytes, 0, 0 };
    for (int at = 0; at < tree->child_count; at++)
        tree->children[at].received = tree->children[at].sent = 0;
    for (int idle = 0; !is_done(tree, &progress, bytes);) {
        if (advance(tree, &progress, data, bytes) > 0)
            idle = 0;
        else if (++idle <= PAUSES)
            pause_briefly();
        else if (idle <= PAUSES + YIELDS)
            sched_yield();
        else
            wait_for_sockets(tree, &progress, bytes);
    }
}

static float *allocate(size_t bytes)
{
    return shared_memory(bytes ? bytes : 1);
}

static void tune(int socket)
{
    int on = 1;
    need(setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0, "TCP_NODELAY");
    /* The kernel's default stays where cubic is not to be had. */
    (void)setsockopt(socket, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5);
}

/* Two connected sockets over loopback. */
static void connect_pair(int *lower, int *upper)
{
    struct sockaddr_in address = { .sin_family = AF_INET,
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    need(listener >= 0, "socket");
    need(bind(listener, (struct sockaddr *)&address, length) == 0, "bind");
    need(listen(listener, 1) == 0, "listen");
    need(getsockname(listener, (struct sockaddr *)&address, &length) == 0, "getsockname");
    *lower = socket(AF_INET, SOCK_STREAM, 0);
    need(*lower >= 0 && connect(*lower, (struct sockaddr *)&address, length) == 0, "connect");
    *upper = accept(listener, NULL, NULL);
    need(*upper >= 0, "accept");
    close(listener);
    tune(*lower);
    tune(*upper);
}

/* Connections of a k-ary tree, made before the ranks fork. */
struct wires {
    int lower[MOST_RANKS]; /* of each rank to its parent: its own end */
    int upper[MOST_RANKS]; /* the parent's end */
};

static void connect_tree(struct wires *wires, int ranks)
{
    for (int rank = 1; rank < ranks; rank++)
        connect_pair(&wires->lower[rank], &wires->upper[rank]);
}

/* Keeps this rank's ends and closes the others'. */
static void take_place(struct tree *tree, const struct wires *wires, int rank, int ranks, int k)
{
    tree->parent = rank > 0 ? wires->lower[rank] : -1;
    tree->children = calloc((size_t)k, sizeof *tree->children);
    need(tree->children != NULL, "calloc");
    for (int other = 1; other < ranks; other++) {
        if ((other - 1) / k == rank)
            tree->children[tree->child_count++].socket = wires->upper[other];
        else
            close(wires->upper[other]);
        if (other != rank)
            close(wires->lower[other]);
    }
}

int main(int argc, char **argv)
{
    struct job job = job_from_arguments(argc, argv);
    library = (struct library){ .transport = "tcp",
                                .algorithm = "k-tree",
                                .memory = "private",
                                .ranks = atoi(argument(argc, argv, "ranks", "2")),
                                .all_reduce = all_reduce,
                                .allocate = allocate };
    need(library.ranks >= 1 && library.ranks <= MOST_RANKS, "--ranks 1 to 64");
    struct wires wide_wires, binary_wires;
    job_begin(&job);
    world_prepare(&library);
    connect_tree(&wide_wires, library.ranks);
    connect_tree(&binary_wires, library.ranks);
    library.rank = fork_ranks(library.ranks);
    /* Few ranks: a star. */
    take_place(&wide, &wide_wires, library.rank, library.ranks, library.ranks <= 4 ? 3 : 4);
    take_place(&binary, &binary_wires, library.rank, library.ranks, 2);
    job_run(&job, &library);
    return end_ranks(library.rank);
}
