/* The C interface of unisum: collective communication between processes.
 *
 * Every function returns a status; unisum_last_error tells more of a failure. Pointers to
 * structures without a definition are handles: a handle that is NULL, was freed, or is of another
 * kind is refused. All functions may be called from several threads at once, and on the same
 * handles.
 *
 * This file is made of the library's source:
 * UNISUM_BLESS=1 cargo test -p unisum-c --test header */

#ifndef UNISUM_H
#define UNISUM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Given as an input: the output is the input, too. */
#define UNISUM_IN_PLACE ((const void *)1)


/**
 * What a function returns. All but UNISUM_OK and UNISUM_IN_PROGRESS are failures, of which
 * unisum_last_error tells more.
 */
enum unisum_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * It went well.
     */
    UNISUM_OK = 0,
    /**
     * A wait timed out: what is waited for is still under way. No failure.
     */
    UNISUM_IN_PROGRESS = 1,
    /**
     * A pointer is NULL, a number or a size makes no sense, buffers overlap. Nothing was done.
     */
    UNISUM_INVALID_ARGUMENT = 2,
    /**
     * A handle is NULL, was freed, is of another kind, or none at all. Nothing was done.
     */
    UNISUM_INVALID_HANDLE = 3,
    /**
     * An argument that the library found wrong, an environment variable, a launcher's setting.
     */
    UNISUM_CONFIGURATION = 10,
    /**
     * The job could not be joined: an address, the token, a rank that never came.
     */
    UNISUM_RENDEZVOUS = 11,
    /**
     * A rank's process ended, or its host or network went away.
     */
    UNISUM_RANK_LOST = 12,
    /**
     * The deadline passed: a rank is stopped, too late, too slow, or never called.
     */
    UNISUM_TIMEOUT = 13,
    /**
     * Ranks called different things, or the same with different arguments.
     */
    UNISUM_MISMATCH = 14,
    /**
     * A training step can't be used, on no rank. The next one can be begun.
     */
    UNISUM_STEP_FAILED = 15,
    /**
     * Code of the program failed where the library called it.
     */
    UNISUM_CALLBACK_FAILED = 16,
    /**
     * Memory, or another resource of the system, could not be had.
     */
    UNISUM_MEMORY = 17,
    /**
     * An earlier error aborted the communicator, or the program did.
     */
    UNISUM_ABORTED = 18,
    /**
     * The process was forked after the handle was made: only the parent may use it.
     */
    UNISUM_FORKED = 19,
    /**
     * What came from a rank makes no sense: a bug of the library, or bytes that were altered.
     */
    UNISUM_PROTOCOL = 20,
    /**
     * A device or its driver failed.
     */
    UNISUM_DEVICE = 21,
    /**
     * An elastic job has lost ranks, or has taken some in: unisum_comm_rebuild gives the
     * communicator of those that are there now.
     */
    UNISUM_VIEW_CHANGED = 22,
    /**
     * A bug of the library.
     */
    UNISUM_INTERNAL = 99,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum unisum_status unisum_status;
#else
typedef int32_t unisum_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The type of the elements of a buffer.
 */
enum unisum_dtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * IEEE 754 binary16.
     */
    UNISUM_F16 = 1,
    /**
     * The upper half of an IEEE 754 binary32.
     */
    UNISUM_BF16 = 2,
    /**
     * float
     */
    UNISUM_F32 = 3,
    /**
     * double
     */
    UNISUM_F64 = 4,
    /**
     * int8_t
     */
    UNISUM_I8 = 5,
    /**
     * uint8_t
     */
    UNISUM_U8 = 6,
    /**
     * int16_t
     */
    UNISUM_I16 = 7,
    /**
     * uint16_t
     */
    UNISUM_U16 = 8,
    /**
     * int32_t
     */
    UNISUM_I32 = 9,
    /**
     * uint32_t
     */
    UNISUM_U32 = 10,
    /**
     * int64_t
     */
    UNISUM_I64 = 11,
    /**
     * uint64_t
     */
    UNISUM_U64 = 12,
    /**
     * 8 bits, 4 of exponent and 3 of mantissa, without infinities.
     */
    UNISUM_F8E4M3 = 13,
    /**
     * 8 bits, 5 of exponent and 2 of mantissa.
     */
    UNISUM_F8E5M2 = 14,
    /**
     * A byte that is true unless it is 0. Results are 0 or 1.
     */
    UNISUM_BOOL = 15,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum unisum_dtype unisum_dtype;
#else
typedef uint32_t unisum_dtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * How the elements of the ranks become one.
 */
enum unisum_op
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * Adds them. Integers wrap around.
     */
    UNISUM_SUM = 1,
    /**
     * Multiplies them. Integers wrap around.
     */
    UNISUM_PRODUCT = 2,
    /**
     * The least; NaN wins.
     */
    UNISUM_MIN = 3,
    /**
     * The greatest; NaN wins.
     */
    UNISUM_MAX = 4,
    /**
     * Adds them and divides by their number, once, at the end.
     */
    UNISUM_AVERAGE = 5,
    /**
     * The bits that are set in all.
     */
    UNISUM_BIT_AND = 6,
    /**
     * The bits that are set in any.
     */
    UNISUM_BIT_OR = 7,
    /**
     * The bits that are set in an odd number of them.
     */
    UNISUM_BIT_XOR = 8,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum unisum_op unisum_op;
#else
typedef uint32_t unisum_op;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The collectives, for unisum_collective. A block is what one rank puts in, or gets.
 */
enum unisum_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * Reduces all ranks' elements; every rank gets the result.
     */
    UNISUM_ALL_REDUCE = 1,
    /**
     * Reduces all ranks' elements; the root gets the result.
     */
    UNISUM_REDUCE = 2,
    /**
     * Every rank gets the elements of the root.
     */
    UNISUM_BROADCAST = 3,
    /**
     * Every rank gets the blocks of all ranks, in rank order.
     */
    UNISUM_ALL_GATHER = 4,
    /**
     * Reduces all ranks' blocks; each rank gets its own.
     */
    UNISUM_REDUCE_SCATTER = 5,
    /**
     * Each rank has a block for each rank.
     */
    UNISUM_ALL_TO_ALL = 6,
    /**
     * The root gets the blocks of all ranks.
     */
    UNISUM_GATHER = 7,
    /**
     * Each rank gets its block of what the root has.
     */
    UNISUM_SCATTER = 8,
    /**
     * Nobody goes on before everybody has come.
     */
    UNISUM_BARRIER = 9,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum unisum_kind unisum_kind;
#else
typedef uint32_t unisum_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * What a collective is asked for beside its result.
 */
enum unisum_flags
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * The inputs of a sum are multiplied by `scale`, in the same pass.
     */
    UNISUM_SCALED = 1,
    /**
     * It is told whether a result is infinite or NaN, at no further pass and no further message:
     * of sums, products and averages of floats, in an all-reduce or a reduce-scatter.
     */
    UNISUM_DETECT_NONFINITE = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum unisum_flags unisum_flags;
#else
typedef uint32_t unisum_flags;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Which way a message goes.
 */
enum unisum_direction
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * From this rank.
     */
    UNISUM_SEND = 1,
    /**
     * To this rank.
     */
    UNISUM_RECEIVE = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum unisum_direction unisum_direction;
#else
typedef uint32_t unisum_direction;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Whether a model does not use all parameters, and the like.
 */
enum unisum_bucket_flags
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * A rank may end a step without a gradient for some parameters: it then puts in zeros.
     */
    UNISUM_UNUSED_PARAMETERS = 1,
    /**
     * What a rank does not use in its first step it never uses.
     */
    UNISUM_STATIC_GRAPH = 2,
    /**
     * Ranks may run out of data at different times: unisum_buckets_join.
     */
    UNISUM_UNEVEN_INPUTS = 4,
    /**
     * Buckets are not laid out anew after the first step.
     */
    UNISUM_KEEP_LAYOUT = 8,
    /**
     * A rank gets the averages of its shard of each bucket only, as in ZeRO-2 and FSDP:
     * unisum_buckets_shard. Keeps the layout; not with an encoding or a low rank.
     */
    UNISUM_SHARDED = 16,
    /**
     * Averages are not looked at for what is infinite or NaN. Of unisum_device_buckets only.
     */
    UNISUM_IGNORE_NONFINITE = 32,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum unisum_bucket_flags unisum_bucket_flags;
#else
typedef uint32_t unisum_bucket_flags;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Gradient buckets: the layer that training calls during the backward pass.
 */
typedef struct unisum_buckets unisum_buckets;

/**
 * A communicator: this process's membership in a world of ranks that reduce together. All ranks
 * call the same collectives in the same order; calls may come from several threads.
 */
typedef struct unisum_comm unisum_comm;

/**
 * Settings for a communicator, on top of the environment.
 */
typedef struct unisum_config unisum_config;

/**
 * A communicator whose ranks have a CUDA device each: collectives on its memory.
 */
typedef struct unisum_device unisum_device;

/**
 * Gradient buckets in the memory of this rank's CUDA device.
 */
typedef struct unisum_device_buckets unisum_device_buckets;

/**
 * Sends and receives messages between the ranks of a communicator, from any threads at once.
 */
typedef struct unisum_messenger unisum_messenger;

/**
 * A reduction of the program's own.
 */
typedef struct unisum_reduction unisum_reduction;

/**
 * Finds the factor by which the loss is multiplied, so that gradients in 16 bits neither vanish
 * nor overflow.
 */
typedef struct unisum_scaler unisum_scaler;

/**
 * What a rank keeps for its shards from step to step: several vectors, for example the weights and
 * the optimiser's two moments, each with one element for each element of the shards.
 */
typedef struct unisum_shard_state unisum_shard_state;

/**
 * A model's parameters themselves, in the memory and the layout of sharded buckets.
 */
typedef struct unisum_weights unisum_weights;

/**
 * A collective under way.
 */
typedef struct unisum_work unisum_work;

/**
 * What went wrong last on a thread. Fields may be added at the end.
 */
typedef struct unisum_error {
    /**
     * What the function returned; UNISUM_OK if none has failed on this thread.
     */
    unisum_status status;
    /**
     * What went wrong, for people. Never NULL.
     */
    const char *text;
    /**
     * The rank of the job that found it, or -1 where that is not known.
     */
    int64_t rank;
    /**
     * The ranks of the job that caused it, the same on every rank that reports it, where that is
     * known.
     */
    const uint32_t *ranks;
    /**
     * How many of them are known.
     */
    size_t rank_count;
    /**
     * The call that failed, in words, if it was one that had begun; else NULL.
     */
    const char *operation;
    /**
     * The step that the call was at on this rank.
     */
    uint64_t step;
    /**
     * How many steps it has; 0 if there is no operation.
     */
    uint64_t steps;
    /**
     * The epoch that an elastic job is in now, of UNISUM_VIEW_CHANGED; else 0.
     */
    uint64_t epoch;
    /**
     * The ranks that are not in that epoch any more, as they were numbered before.
     */
    const uint32_t *lost;
    /**
     * How many.
     */
    size_t lost_count;
    /**
     * The ranks that are new in that epoch, as they are numbered there.
     */
    const uint32_t *joined;
    /**
     * How many.
     */
    size_t joined_count;
} unisum_error;

/**
 * A key-value store that all ranks of a job reach. Its functions are called in unisum_connect and
 * unisum_join, on the thread that calls them; in an elastic job also later, from any thread, when
 * the view changes and when the job ends. One of the values holds the job's secret.
 */
typedef struct unisum_store {
    /**
     * Stores a value under a key, in place of an earlier one. Gives 0 if that went well.
     */
    int (*set)(void *user, const char *key, const void *value, size_t length);
    /**
     * Waits until there is a value under a key, so many seconds at most, copies it to the
     * `capacity` bytes at `value`, and writes its length. Gives 0 if that went well; anything else
     * if the time is up, the value does not fit, or the store fails.
     */
    int (*get)(void *user,
               const char *key,
               double timeout_s,
               void *value,
               size_t capacity,
               size_t *length);
    /**
     * Given to both functions.
     */
    void *user;
} unisum_store;

/**
 * What moved between this rank and a peer.
 */
typedef struct unisum_peer_stats {
    /**
     * Payload bytes sent to it.
     */
    uint64_t sent;
    /**
     * Payload bytes received from it.
     */
    uint64_t received;
} unisum_peer_stats;

/**
 * What a link has counted.
 */
typedef struct unisum_link_stats {
    /**
     * The transport's name, as in "verbs".
     */
    const char *transport;
    /**
     * What is counted, which is the transport's choice.
     */
    const char *const *names;
    /**
     * How much of each.
     */
    const uint64_t *values;
    /**
     * How many counters there are.
     */
    size_t count;
} unisum_link_stats;

/**
 * What a communicator has done so far on this rank, and what it is doing. Fields may be added at
 * the end.
 */
typedef struct unisum_stats {
    /**
     * How many bytes this structure has in the library that wrote it: a field beyond them is not
     * there.
     */
    size_t size;
    /**
     * Collectives that have ended well, those included that try algorithms.
     */
    uint64_t calls;
    /**
     * How often a thread went to sleep in a collective because a peer was not there yet.
     */
    uint64_t sleeps;
    /**
     * For how long in all, in seconds.
     */
    double slept_s;
    /**
     * By rank, what moved between the two in transfers; what ranks read in each other's shared
     * memory is not counted. Transfers count when all of their run have ended.
     */
    const struct unisum_peer_stats *const *peers;
    /**
     * How many there are: the world, or 0 if that is 1.
     */
    size_t peer_count;
    /**
     * What those of the links that count have counted. They also count what no collective does:
     * connecting, measuring, trying algorithms.
     */
    const struct unisum_link_stats *const *links;
    /**
     * How many of them there are.
     */
    size_t link_count;
    /**
     * The collective that is under way, in words, as in errors; NULL if none is.
     */
    const char *running;
    /**
     * Steps of it that were done when it last waited.
     */
    uint64_t running_step;
    /**
     * All its steps; 0 until it waits.
     */
    uint64_t running_steps;
    /**
     * Payload bytes that had been transferred then.
     */
    uint64_t running_bytes;
} unisum_stats;

/**
 * A rank of a job.
 */
typedef struct unisum_rank_description {
    /**
     * Ranks of the same node share memory.
     */
    uint64_t node;
    /**
     * Its process, in its own PID namespace.
     */
    uint64_t pid;
    /**
     * Where others reach it, the preferred address first.
     */
    const char *const *addresses;
    /**
     * How many addresses it has.
     */
    size_t address_count;
} unisum_rank_description;

/**
 * What was measured when a job started: a time however few bytes there are, and a rate.
 */
typedef struct unisum_measured_cost {
    /**
     * What it is of, as in "inside a node".
     */
    const char *what;
    /**
     * By whom it was measured.
     */
    const char *source;
    /**
     * Seconds before the first byte.
     */
    double latency_s;
    /**
     * 0 if that is too fast to be told.
     */
    double bytes_per_second;
    /**
     * The same for bytes that are in a cache; 0 where that makes no difference.
     */
    double bytes_per_second_in_cache;
} unisum_measured_cost;

/**
 * Which algorithm all-reduces of f32 use, above a size and up to another one.
 */
typedef struct unisum_algorithm_range {
    /**
     * Buffers of more bytes than these.
     */
    size_t above;
    /**
     * Buffers of so many bytes at most.
     */
    size_t up_to;
    /**
     * The algorithm's name.
     */
    const char *algorithm;
    /**
     * The modelled time at `up_to`, in seconds; negative if it is not modelled.
     */
    double seconds;
} unisum_algorithm_range;

/**
 * What a communicator consists of. Fields may be added at the end.
 */
typedef struct unisum_description {
    /**
     * How many bytes this structure has in the library that wrote it: a field beyond them is not
     * there.
     */
    size_t size;
    /**
     * All of this for people, in several lines.
     */
    const char *text;
    /**
     * Which launcher started the ranks and how they found each other, or what the communicator was
     * made from.
     */
    const char *origin;
    /**
     * The transports in use, as "tcp", "shm" or "shm+tcp"; "none" in a world of one.
     */
    const char *transport;
    /**
     * How the transport is protected from others, in words; NULL if there is nothing to protect.
     */
    const char *protection;
    /**
     * How long joining took on this rank, in seconds; negative unless it is a job's own
     * communicator.
     */
    double joined_in_s;
    /**
     * By rank; only of a job's own communicator with several ranks.
     */
    const struct unisum_rank_description *const *ranks;
    /**
     * How many there are.
     */
    size_t rank_count;
    /**
     * What the links say of themselves, as the RDMA devices in use.
     */
    const char *const *links;
    /**
     * How many lines that are.
     */
    size_t link_count;
    /**
     * What was measured when the job started: what algorithms are chosen by.
     */
    const struct unisum_measured_cost *const *costs;
    /**
     * How many there are.
     */
    size_t cost_count;
    /**
     * Where the costs come from if they were not measured, and which file keeps what is settled.
     */
    const char *const *notes;
    /**
     * How many lines that are.
     */
    size_t note_count;
    /**
     * The algorithms of an all-reduce of f32, by size in ascending order.
     */
    const struct unisum_algorithm_range *const *algorithms;
    /**
     * How many ranges there are.
     */
    size_t algorithm_count;
} unisum_description;

/**
 * Reduces `count` elements at `other` into those at `accumulator`, one by one. It is associative
 * up to rounding. The library calls it from any thread, from several at once, with pieces of any
 * length: it depends on nothing but the elements and `user`, and calls nothing of the library.
 * Gives 0 if all is well; anything else fails the collective, on all ranks, with
 * UNISUM_CALLBACK_FAILED; a rank that has its whole result without the one that failed hears of it
 * in its next call. It must not throw C++ exceptions.
 */
typedef int (*unisum_fold)(void *user, void *accumulator, const void *other, size_t count);

/**
 * A collective with its arguments, the same on all ranks but where it says otherwise. A structure
 * of zeros, with `kind` and, if it reduces, `op`.
 */
typedef struct unisum_collective {
    /**
     * Which it is: a unisum_kind.
     */
    uint32_t kind;
    /**
     * How it reduces, if it does: a unisum_op.
     */
    uint32_t op;
    /**
     * The root, if it has one.
     */
    uint32_t root;
    /**
     * unisum_flags, added.
     */
    uint32_t flags;
    /**
     * With UNISUM_SCALED: the factor of the inputs of a sum of floats.
     */
    double scale;
    /**
     * How long the blocks are, in elements: one number for each rank, in rank order. NULL if all
     * are alike. Of an all-to-all: what goes to each rank.
     */
    const size_t *counts;
    /**
     * Of an all-to-all with counts: what comes from each rank. Else NULL.
     */
    const size_t *receive_counts;
    /**
     * A reduction of the program's own, instead of `op`, which is then 0; else NULL.
     */
    const struct unisum_reduction *reduction;
} unisum_collective;

/**
 * The buffers of a collective. With UNISUM_IN_PLACE as the input, the output is both: as long as
 * all blocks, with the rank's own at its place, on ranks that have or get all blocks, else as long
 * as one. Else the two are apart. A rank that puts nothing in or gets nothing gives NULL and 0.
 */
typedef struct unisum_buffers {
    /**
     * What this rank puts in; it stays as it is.
     */
    const void *input;
    /**
     * How many elements that are; not looked at in place.
     */
    size_t input_count;
    /**
     * Where the result goes.
     */
    void *output;
    /**
     * How many elements that are.
     */
    size_t output_count;
} unisum_buffers;

/**
 * Called when a work has ended, well or not, with what was given with it.
 */
typedef void (*unisum_callback)(void *user);

/**
 * One of the messages of unisum_exchange.
 */
typedef struct unisum_message {
    /**
     * A unisum_direction.
     */
    uint32_t direction;
    /**
     * The rank at the other end.
     */
    uint32_t peer;
    /**
     * Messages of the same two ranks and the same tag arrive in the order in which they were sent.
     */
    uint64_t tag;
    /**
     * What is sent, which is only read, or where it goes.
     */
    void *data;
    /**
     * How many elements; the same at both ends.
     */
    size_t count;
} unisum_message;

/**
 * A parameter of a model.
 */
typedef struct unisum_parameter {
    /**
     * Its name, which no other has.
     */
    const char *name;
    /**
     * Its shape.
     */
    const size_t *shape;
    /**
     * How many numbers the shape has.
     */
    size_t dimensions;
    /**
     * The type of its gradient: UNISUM_F16, UNISUM_BF16, UNISUM_F32 or UNISUM_F64.
     */
    uint32_t dtype;
    /**
     * How often the model uses it: its gradient is final when it was marked ready so often. 0 is
     * 1.
     */
    uint32_t uses;
} unisum_parameter;

/**
 * Settings of buckets, the same on all ranks; a structure of zeros has the defaults.
 */
typedef struct unisum_bucket_options {
    /**
     * How large buckets get; 0 is 25 MiB.
     */
    size_t bucket_bytes;
    /**
     * How large the first and the last get; 0 is 1 MiB.
     */
    size_t end_bucket_bytes;
    /**
     * unisum_bucket_flags, added.
     */
    uint32_t flags;
    /**
     * As what f32 gradients travel: 0 as they are, or UNISUM_BF16, UNISUM_F16, UNISUM_F8E4M3,
     * UNISUM_F8E5M2 or UNISUM_I8, with error feedback.
     */
    uint32_t encoding;
    /**
     * The rank of PowerSGD's approximation; 0 for none. Not with an encoding.
     */
    uint32_t low_rank;
    /**
     * A layout that unisum_buckets_layout gave, to be used and kept; else NULL.
     */
    const void *layout;
    /**
     * How many bytes it has.
     */
    size_t layout_bytes;
} unisum_bucket_options;

/**
 * How the view of an elastic job changed during a step, which all ranks that are left have ended
 * in the same way.
 */
typedef struct unisum_step_change {
    /**
     * The epoch in which the step ended: unisum_buckets_take_communicator gives its communicator.
     */
    uint64_t epoch;
    /**
     * By rank of that epoch, which process it is, as in unisum_comm_view.
     */
    const uint64_t *processes;
    /**
     * How many ranks it has.
     */
    size_t process_count;
    /**
     * The ranks that were lost, as they were numbered when the step began.
     */
    const uint32_t *lost;
    /**
     * How many.
     */
    size_t lost_count;
    /**
     * Whether the gradients were averaged again, over the ranks that are left; otherwise they are
     * averages over those that there were before.
     */
    bool redone;
    /**
     * From when this rank noticed the first loss until it was in the view, in seconds.
     */
    double took_s;
} unisum_step_change;

/**
 * What a step tells. Fields may be added at the end.
 */
typedef struct unisum_step_report {
    /**
     * Whether some averaged gradient is infinite or NaN: the same on all ranks.
     */
    bool nonfinite;
    /**
     * How many ranks had gradients; the average is over these.
     */
    uint32_t participants;
    /**
     * What the program waited for communication after it had computed, in seconds.
     */
    double exposed_s;
    /**
     * How long buckets were being reduced, in seconds.
     */
    double communicated_s;
    /**
     * How the view of an elastic job changed meanwhile; NULL if it did not. Valid until the next
     * step of these buckets ends, or they are freed; in a join, until the update returns.
     */
    const struct unisum_step_change *change;
    /**
     * Whether processes ask to be let into an elastic job, and all ranks know: the same on all
     * ranks, so that all can call unisum_buckets_admit.
     */
    bool newcomers;
} unisum_step_report;

/**
 * What unisum_buckets_join calls after each step of the others, whose averages all ranks get: the
 * optimiser's step. `gradients` and `counts` have one entry for each parameter. Gives 0 to go on;
 * anything else ends unisum_buckets_join with UNISUM_CALLBACK_FAILED. It calls nothing of these
 * buckets.
 */
typedef int (*unisum_update)(void *user,
                             const struct unisum_step_report *report,
                             void *const *gradients,
                             const size_t *counts,
                             size_t parameters);

/**
 * The elements of a parameter in a rank's shard of a bucket.
 */
typedef struct unisum_shard_piece {
    /**
     * The parameter, by its number in the list.
     */
    size_t parameter;
    /**
     * The first of its elements.
     */
    size_t start;
    /**
     * How many.
     */
    size_t count;
    /**
     * Where the first of them is in the shard.
     */
    size_t at;
} unisum_shard_piece;

/**
 * Elements that keep or change their rank when shards are laid out anew.
 */
typedef struct unisum_shard_move {
    /**
     * The parameter, by its number in the list.
     */
    size_t parameter;
    /**
     * The first of its elements.
     */
    size_t start;
    /**
     * How many.
     */
    size_t count;
    /**
     * The rank whose state they come from, often the same one; -1 if nobody has them any more.
     */
    int64_t from;
    /**
     * The rank in whose shard they are now.
     */
    uint32_t to;
} unisum_shard_move;

/**
 * Settings of a scaler, the same on all ranks; a structure of zeros has the defaults.
 */
typedef struct unisum_scaler_options {
    /**
     * The first scale; 0 is 65536.
     */
    float scale;
    /**
     * By how much it grows after `growth_interval` good steps in a row; 0 is 2.
     */
    float growth;
    /**
     * 0 is 2000.
     */
    uint32_t growth_interval;
    /**
     * By how much it is multiplied after a step that was not finite; 0 is 0.5.
     */
    float backoff;
    /**
     * The least scale; 0 is 1.
     */
    float least;
    /**
     * The greatest scale; 0 is 2 to the power of 32.
     */
    float greatest;
} unisum_scaler_options;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * What went wrong last on the calling thread. Valid until another call fails on this thread, or
 * the thread ends. Never NULL; UNISUM_OK if nothing has failed.
 */
const struct unisum_error *unisum_last_error(void);

/**
 * The name of a status, as in "UNISUM_TIMEOUT". Never NULL, never freed.
 */
const char *unisum_status_name(int32_t status);

/**
 * Joins the job that this process was started in, as the environment says: torchrun, mpirun, srun
 * and others, or UNISUM_RANK, UNISUM_WORLD and UNISUM_RENDEZVOUS. Collective: every rank calls it.
 * Blocks until all have come. A process without a job is a world of one.
 */
unisum_status unisum_connect_from_environment(struct unisum_comm **comm);

/**
 * Joins as rank `rank` of `world`. Where the ranks meet: "tcp://HOST:PORT" of rank 0, or
 * "file:///PATH"; NULL leaves it to the environment. The job's secret, 16 bytes or more, the same
 * on all ranks; NULL leaves it to the environment and to the user's token file. Else as
 * unisum_connect_from_environment.
 */
unisum_status unisum_connect_to(uint32_t rank,
                                uint32_t world,
                                const char *rendezvous,
                                const char *token,
                                struct unisum_comm **comm);

/**
 * Makes a configuration that says nothing; freed by unisum_config_free.
 */
unisum_status unisum_config_create(struct unisum_config **config);

/**
 * Sets a variable of docs/configuration.md by its name, as "UNISUM_TIMEOUT" to "30": it wins over
 * the environment.
 */
unisum_status unisum_config_set(const struct unisum_config *config,
                                const char *variable,
                                const char *value);

/**
 * Has the ranks meet by a store of the program's, unless the environment or the configuration says
 * where: rank 0 writes its addresses and a fresh token under the key "unisum", or under KEY if
 * UNISUM_RENDEZVOUS is set to "store://KEY". The structure is copied; what `user` points to lives
 * until the last unisum_connect with this configuration has returned, and in an elastic job, which
 * keeps a record of its members under KEY.members, until all of its communicators and buckets were
 * freed. NULL takes the store away.
 */
unisum_status unisum_config_set_store(const struct unisum_config *config,
                                      const struct unisum_store *store);

/**
 * Joins a job as the configuration says, which may be used again. Else as
 * unisum_connect_from_environment.
 */
unisum_status unisum_connect(const struct unisum_config *config, struct unisum_comm **comm);

/**
 * Joins an elastic job that runs (UNISUM_ELASTIC, as its ranks have it), as a new rank behind the
 * others. The configuration, with the environment, says how the job is found: by the same file or
 * store as its ranks were given. Rank and world count for nothing. Not collective: the job's ranks
 * let this process in by unisum_comm_admit or unisum_buckets_admit.
 *
 * Blocks until they have, for UNISUM_CONNECT_TIMEOUT at most. UNISUM_CONFIGURATION if the job is
 * not said to be elastic, or meets by neither a file nor a store; UNISUM_RENDEZVOUS if there is no
 * such job, it ends, refuses this process, or lets nobody in.
 */
unisum_status unisum_join(const struct unisum_config *config, struct unisum_comm **comm);

/**
 * Frees a configuration. Communicators are not concerned.
 */
unisum_status unisum_config_free(const struct unisum_config *config);

/**
 * This process's number in the communicator, from 0.
 */
unisum_status unisum_comm_rank(const struct unisum_comm *comm, uint32_t *rank);

/**
 * How many ranks there are.
 */
unisum_status unisum_comm_world(const struct unisum_comm *comm, uint32_t *world);

/**
 * This rank's place among the communicator's ranks on its host: which device it may take.
 */
unisum_status unisum_comm_local_rank(const struct unisum_comm *comm, uint32_t *local_rank);

/**
 * How many of the communicator's ranks are on this rank's host.
 */
unisum_status unisum_comm_local_size(const struct unisum_comm *comm, uint32_t *local_size);

/**
 * Where the ranks are, what the links cost, and which algorithm is chosen from which size on: for
 * people, several lines. Copied to `capacity` bytes at `text`, cut if need be, with a NUL byte at
 * the end; `length` gets how long it is without that. Either may be NULL.
 */
unisum_status unisum_comm_describe(const struct unisum_comm *comm,
                                   char *text,
                                   size_t capacity,
                                   size_t *length);

/**
 * The transports in use, as "tcp", "shm" or "shm+tcp". Else as unisum_comm_describe.
 */
unisum_status unisum_comm_transport(const struct unisum_comm *comm,
                                    char *text,
                                    size_t capacity,
                                    size_t *length);

/**
 * Fixes the algorithm of all later calls by its name, or, with NULL, has it chosen for each call.
 * All ranks call it alike, between collectives.
 */
unisum_status unisum_comm_set_algorithm(const struct unisum_comm *comm, const char *name);

/**
 * Divides the communicator: ranks of the same color make a group, numbered by `key` and then by
 * rank. A rank with a negative color is in no group: it gets NULL. The group is a communicator of
 * its own, freed by unisum_comm_free. Collective: every rank calls it. Blocks.
 *
 * In an elastic job, a group of some of the ranks goes on while none of its own is lost; its
 * errors name ranks by their numbers in the group.
 */
unisum_status unisum_comm_split(const struct unisum_comm *comm,
                                int64_t color,
                                int64_t key,
                                struct unisum_comm **group);

/**
 * Makes a group of the ranks that are listed, numbered in the order of the list, which is the same
 * on all ranks of the communicator. Those that are not in it get NULL. Else as unisum_comm_split.
 */
unisum_status unisum_comm_subset(const struct unisum_comm *comm,
                                 const uint32_t *ranks,
                                 size_t count,
                                 struct unisum_comm **group);

/**
 * Makes a communicator of the same ranks with an order of calls of its own. Else as
 * unisum_comm_split.
 */
unisum_status unisum_comm_duplicate(const struct unisum_comm *comm, struct unisum_comm **duplicate);

/**
 * Ends the job on all ranks, from any thread of any rank: all calls under way, here and elsewhere,
 * end within moments with UNISUM_ABORTED and an error that names this rank and says why. Later
 * calls repeat it. In an elastic job, this ends only the communicator and groups of all its ranks.
 * Gives UNISUM_OK, also if the job had ended before.
 */
unisum_status unisum_comm_abort(const struct unisum_comm *comm, const char *why);

/**
 * Leaves, and frees the communicator. Blocks until works under way have ended. Calls of other
 * threads that are under way go on, and the last of them leaves. Works, messengers, buckets,
 * groups and memory made by it are freed on their own. Free communicators before the process ends:
 * the others would take it for lost if they still wait for it.
 */
unisum_status unisum_comm_free(const struct unisum_comm *comm);

/**
 * What a communicator has done so far on this rank, and what it is doing, as it is now; to be
 * freed by unisum_free. Not collective. Any thread may call it at any time, also while a call is
 * stuck: it waits for none. In a world of one everything is zero.
 */
unisum_status unisum_comm_stats(const struct unisum_comm *comm, struct unisum_stats **stats);

/**
 * What a communicator consists of: where the ranks are, what the links cost, which algorithm is
 * chosen from which size on; to be freed by unisum_free. unisum_comm_describe gives its text
 * alone. Not collective; never waits.
 */
unisum_status unisum_comm_description(const struct unisum_comm *comm,
                                      struct unisum_description **description);

/**
 * Makes a reduction of elements of type `dtype`, for unisum_collective. `commutes` says that a ∘ b
 * is b ∘ a, to the bit: else elements are reduced in rank order. All ranks make the same. Freed by
 * unisum_reduction_free. Not collective.
 */
unisum_status unisum_reduction_create(uint32_t dtype,
                                      unisum_fold fold,
                                      void *user,
                                      bool commutes,
                                      struct unisum_reduction **reduction);

/**
 * Frees a reduction. Works under way that were given it still call its function.
 */
unisum_status unisum_reduction_free(const struct unisum_reduction *reduction);

/**
 * Runs a collective. Collective: every rank calls it, in the same order, with the same arguments
 * and buffers that fit. Blocks. `nonfinite`, which may be NULL, gets whether a result is infinite
 * or NaN, with UNISUM_DETECT_NONFINITE. After an error that other ranks hear of the communicator
 * is aborted and the output unspecified.
 */
unisum_status unisum_run(const struct unisum_comm *comm,
                         const struct unisum_collective *collective,
                         uint32_t dtype,
                         const struct unisum_buffers *buffers,
                         bool *nonfinite);

/**
 * Runs one collective on each of several tensors, as so many calls of unisum_run would, but in few
 * launches. Every rank gives as many, in the same order.
 */
unisum_status unisum_run_batch(const struct unisum_comm *comm,
                               const struct unisum_collective *collective,
                               uint32_t dtype,
                               const struct unisum_buffers *tensors,
                               size_t count,
                               bool *nonfinite);

/**
 * Reduces `count` elements over all ranks, in place, and leaves the result on every rank: the same
 * bits. Collective: every rank calls it, in the same order, with the same arguments. Blocks.
 */
unisum_status unisum_all_reduce(const struct unisum_comm *comm,
                                void *data,
                                size_t count,
                                uint32_t dtype,
                                uint32_t op);

/**
 * Reduces `count` elements over all ranks, in place, and leaves the result at the root; elsewhere
 * `data` stays as it is. Else as unisum_all_reduce.
 */
unisum_status unisum_reduce(const struct unisum_comm *comm,
                            void *data,
                            size_t count,
                            uint32_t dtype,
                            uint32_t op,
                            uint32_t root);

/**
 * Copies `count` elements of the root to all ranks. Else as unisum_all_reduce.
 */
unisum_status unisum_broadcast(const struct unisum_comm *comm,
                               void *data,
                               size_t count,
                               uint32_t dtype,
                               uint32_t root);

/**
 * Gathers `count` elements of each rank, in rank order, in the output of all ranks, which has
 * world times `count`. With UNISUM_IN_PLACE as the input, the rank's own are in the output
 * already, at their place. Else as unisum_all_reduce.
 */
unisum_status unisum_all_gather(const struct unisum_comm *comm,
                                const void *input,
                                void *output,
                                size_t count,
                                uint32_t dtype);

/**
 * Reduces world times `count` elements of all ranks and leaves in the output this rank's block of
 * `count`. With UNISUM_IN_PLACE as the input, the output has world times `count` elements, and the
 * result is at the rank's place in it. Else as unisum_all_reduce.
 */
unisum_status unisum_reduce_scatter(const struct unisum_comm *comm,
                                    const void *input,
                                    void *output,
                                    size_t count,
                                    uint32_t dtype,
                                    uint32_t op);

/**
 * Sends block r of the input, of `count` elements, to rank r, and receives its block for this rank
 * in block r of the output. Input or UNISUM_IN_PLACE, and output, have world blocks. Else as
 * unisum_all_reduce.
 */
unisum_status unisum_all_to_all(const struct unisum_comm *comm,
                                const void *input,
                                void *output,
                                size_t count,
                                uint32_t dtype);

/**
 * Gathers `count` elements of each rank, in rank order, in the root's output, which has world
 * times `count`; elsewhere the output is not looked at. Else as unisum_all_gather.
 */
unisum_status unisum_gather(const struct unisum_comm *comm,
                            const void *input,
                            void *output,
                            size_t count,
                            uint32_t dtype,
                            uint32_t root);

/**
 * Sends block r of the root's input, of `count` elements, to the output of rank r; elsewhere the
 * input is not looked at. With UNISUM_IN_PLACE as the input, the root's output has all blocks.
 * Else as unisum_all_reduce.
 */
unisum_status unisum_scatter(const struct unisum_comm *comm,
                             const void *input,
                             void *output,
                             size_t count,
                             uint32_t dtype,
                             uint32_t root);

/**
 * Returns when all ranks have called it.
 */
unisum_status unisum_barrier(const struct unisum_comm *comm);

/**
 * Starts a collective, and returns at once. As unisum_run, but the buffers must stay and nobody
 * may use them until the work has ended. Calls start in the order in which they are made, blocking
 * or not; a thread of the communicator does the work. The work is freed by unisum_work_free.
 */
unisum_status unisum_start(const struct unisum_comm *comm,
                           const struct unisum_collective *collective,
                           uint32_t dtype,
                           const struct unisum_buffers *buffers,
                           struct unisum_work **work);

/**
 * Starts a batch, as unisum_run_batch, and returns at once, as unisum_start.
 */
unisum_status unisum_start_batch(const struct unisum_comm *comm,
                                 const struct unisum_collective *collective,
                                 uint32_t dtype,
                                 const struct unisum_buffers *tensors,
                                 size_t count,
                                 struct unisum_work **work);

/**
 * Whether a work has ended. Never blocks.
 */
unisum_status unisum_work_test(const struct unisum_work *work, bool *ended);

/**
 * Waits until a work has ended, `timeout_s` seconds at most, or for ever if that is negative.
 * Gives UNISUM_IN_PROGRESS when the time is up: the work goes on. Else what unisum_run would give,
 * to everybody who waits, however often; `nonfinite`, which may be NULL, as there.
 */
unisum_status unisum_work_wait(const struct unisum_work *work, double timeout_s, bool *nonfinite);

/**
 * Has `callback` called with `user` when the work has ended, well or not; at once if it has. A
 * thread of its own calls all callbacks of the process, one after another, never the one that
 * calls this or one that makes progress: a callback may call anything, and free the work. It must
 * not throw C++ exceptions.
 */
unisum_status unisum_work_on_end(const struct unisum_work *work,
                                 unisum_callback callback,
                                 void *user);

/**
 * Frees a work. Blocks until it has ended: then the buffers are the program's again.
 */
unisum_status unisum_work_free(const struct unisum_work *work);

/**
 * Makes a messenger between the ranks of a communicator, which it may outlive; freed by
 * unisum_messenger_free. Collective: every rank calls it, and nothing else on this communicator
 * meanwhile. Blocks.
 */
unisum_status unisum_messenger_create(const struct unisum_comm *comm,
                                      struct unisum_messenger **messenger);

/**
 * Sends a message to rank `to`. Blocks until the data may be overwritten: messages up to 8 KiB are
 * buffered at the receiver, longer ones wait for the receive.
 */
unisum_status unisum_send(const struct unisum_messenger *messenger,
                          const void *data,
                          size_t count,
                          uint32_t dtype,
                          uint32_t to,
                          uint64_t tag);

/**
 * Receives the next message with this tag of rank `from`, which has the same length and type.
 * Blocks until it is there.
 */
unisum_status unisum_receive(const struct unisum_messenger *messenger,
                             void *data,
                             size_t count,
                             uint32_t dtype,
                             uint32_t from,
                             uint64_t tag);

/**
 * Starts all messages, in their order, and waits for all. Ranks that exchange at once what others
 * wait for can't deadlock, in whichever order they list their messages.
 */
unisum_status unisum_exchange(const struct unisum_messenger *messenger,
                              const struct unisum_message *messages,
                              size_t count,
                              uint32_t dtype);

/**
 * Frees a messenger. Messages that nobody has received are lost, so a rank frees it after it has
 * received what was sent to it. Calls of other threads that are under way go on.
 */
unisum_status unisum_messenger_free(const struct unisum_messenger *messenger);

/**
 * Makes buckets for a model's parameters, in the order in which they were registered. NULL options
 * are the defaults. Freed by unisum_buckets_free. Collective: every rank of the communicator,
 * which they may outlive, calls it with the same parameters and settings. Blocks.
 */
unisum_status unisum_buckets_create(const struct unisum_comm *comm,
                                    const struct unisum_parameter *parameters,
                                    size_t count,
                                    const struct unisum_bucket_options *options,
                                    struct unisum_buckets **buckets);

/**
 * Begins a step whose gradients, with those that were accumulated before, are averaged over all
 * ranks. Collective: every rank begins its steps in the same order.
 */
unisum_status unisum_buckets_begin(const struct unisum_buckets *buckets);

/**
 * Begins a step whose gradients stay on this rank and add to those of the next steps.
 */
unisum_status unisum_buckets_begin_accumulating(const struct unisum_buckets *buckets);

/**
 * The gradient of a parameter, in the memory that is reduced: zero if it is the first view since
 * the last reduction. It is the program's until it is marked ready. Threads may view different
 * parameters at once. `count`, which may be NULL, gets how many elements it has.
 */
unisum_status unisum_buckets_view(const struct unisum_buckets *buckets,
                                  size_t parameter,
                                  void **gradient,
                                  size_t *count);

/**
 * Marks a gradient ready, as what was written to its view. It is reduced once the bucket's others
 * are, and not the program's any more.
 */
unisum_status unisum_buckets_ready(const struct unisum_buckets *buckets, size_t parameter);

/**
 * Copies a gradient that lies elsewhere, adds it if the parameter has one already, and marks it
 * ready.
 */
unisum_status unisum_buckets_put(const struct unisum_buckets *buckets,
                                 size_t parameter,
                                 const void *gradient,
                                 size_t count);

/**
 * Ends the step: what was not marked ready is from here on. Blocks until all buckets are reduced
 * and all ranks commit to the step, or none: then UNISUM_STEP_FAILED, on all alike, and the next
 * one can be begun. `report` may be NULL.
 */
unisum_status unisum_buckets_wait(const struct unisum_buckets *buckets,
                                  struct unisum_step_report *report);

/**
 * A parameter's gradient after a step: the average over the ranks that took part, or, after an
 * accumulating step, what this rank has. The program may change it, until the next step begins.
 * `count` may be NULL.
 */
unisum_status unisum_buckets_gradient(const struct unisum_buckets *buckets,
                                      size_t parameter,
                                      void **gradient,
                                      size_t *count);

/**
 * Takes part in the steps of the ranks that have data still, with nothing of its own, until all
 * have called this. Needs UNISUM_UNEVEN_INPUTS. Collective: every rank calls it when it has no
 * more data. Blocks until all have.
 */
unisum_status unisum_buckets_join(const struct unisum_buckets *buckets,
                                  unisum_update update,
                                  void *user);

/**
 * Frees buckets. A step under way is dropped, and fails on all ranks.
 */
unisum_status unisum_buckets_free(const struct unisum_buckets *buckets);

/**
 * The layout of buckets, for unisum_bucket_options: `length` gets how many bytes it has, of which
 * `capacity` at most are written to `bytes`, which may be NULL. It is rank 0's order of the first
 * step, after that: the same on all ranks.
 */
unisum_status unisum_buckets_layout(const struct unisum_buckets *buckets,
                                    void *bytes,
                                    size_t capacity,
                                    size_t *length);

/**
 * What an encoding or a low rank keeps from step to step, for a checkpoint: this rank's own.
 * Written as by unisum_buckets_layout.
 */
unisum_status unisum_buckets_save(const struct unisum_buckets *buckets,
                                  void *bytes,
                                  size_t capacity,
                                  size_t *length);

/**
 * Goes on from what unisum_buckets_save gave on this rank.
 */
unisum_status unisum_buckets_restore(const struct unisum_buckets *buckets,
                                     const void *bytes,
                                     size_t length);

/**
 * Says that from the next step on gradients have a loss scale that is `factor` times the last one:
 * what an encoding or a low rank keeps of them is multiplied. Every rank says the same.
 */
unisum_status unisum_buckets_rescale(const struct unisum_buckets *buckets, float factor);

/**
 * How many buckets there are; a step may lay them out anew, unless they are sharded.
 */
unisum_status unisum_buckets_count(const struct unisum_buckets *buckets, size_t *count);

/**
 * This rank's shard of a bucket's gradients: after a step, the averages. The program may read it
 * until the next step begins. `count`, which may be NULL, gets how many elements that are, with
 * padding. Needs UNISUM_SHARDED.
 */
unisum_status unisum_buckets_shard(const struct unisum_buckets *buckets,
                                   size_t bucket,
                                   const void **gradients,
                                   size_t *count);

/**
 * What this rank's shard of a bucket consists of, besides padding: `count` gets how many pieces
 * there are, of which `capacity` at most are written to `pieces`, which may be NULL.
 */
unisum_status unisum_buckets_shard_pieces(const struct unisum_buckets *buckets,
                                          size_t bucket,
                                          struct unisum_shard_piece *pieces,
                                          size_t capacity,
                                          size_t *count);

/**
 * Allocates memory for the parameters of sharded buckets, zeroed: each rank updates its shards,
 * and unisum_buckets_gather completes them. Freed by unisum_weights_free. Not collective.
 */
unisum_status unisum_weights_create(const struct unisum_buckets *buckets,
                                    struct unisum_weights **weights);

/**
 * A parameter, to be initialised in the same way on all ranks, or read. It stays in place as long
 * as the weights. `count` may be NULL.
 */
unisum_status unisum_weights_get(const struct unisum_weights *weights,
                                 size_t parameter,
                                 void **elements,
                                 size_t *count);

/**
 * This rank's shard of a bucket of the weights, for the optimiser to update: as many elements as
 * unisum_buckets_shard gives.
 */
unisum_status unisum_weights_shard(const struct unisum_weights *weights,
                                   size_t bucket,
                                   void **elements,
                                   size_t *count);

/**
 * Gathers all shards of the weights on all ranks. Collective: every rank calls it, between the
 * same steps. Blocks.
 */
unisum_status unisum_buckets_gather(const struct unisum_buckets *buckets,
                                    const struct unisum_weights *weights);

/**
 * Frees weights.
 */
unisum_status unisum_weights_free(const struct unisum_weights *weights);

/**
 * Makes state of so many vectors, at most 1024, of which this rank has nothing yet:
 * unisum_buckets_reshard lays it out. `dtype` is a type of gradients. Freed by
 * unisum_shard_state_free. Not collective.
 */
unisum_status unisum_shard_state_create(uint32_t dtype,
                                        size_t vectors,
                                        struct unisum_shard_state **state);

/**
 * Gives each rank what belongs to its shards now, from whoever has it: at the start, and after
 * each change of an elastic job's view, when the buckets have been made again. A newcomer, and
 * every rank at the start, gives a new state. unisum_shard_state_moves tells what moved and what
 * nobody has, which is zero: the program initialises it or takes it from its checkpoint, and then
 * calls unisum_shard_state_set_version. If copies of an earlier version are more complete
 * (unisum_buckets_copy_shards), all ranks go back to that.
 *
 * Collective: every rank calls it, between two steps. Blocks. If it fails, the state is what it
 * was. Needs UNISUM_SHARDED. On all ranks: UNISUM_MISMATCH if numbers of vectors or types differ,
 * or state of other parameters was given; UNISUM_MEMORY if one has no memory.
 */
unisum_status unisum_buckets_reshard(const struct unisum_buckets *buckets,
                                     const struct unisum_shard_state *state);

/**
 * Copies each rank's state to the next rank, and keeps it as it is now: if the job then loses a
 * rank, or several of which no two are neighbours, unisum_buckets_reshard loses nothing, and goes
 * back to this version.
 *
 * Collective: every rank calls it, between two steps, as often as is worth it: a loss costs the
 * steps since. Blocks. Memory for two more states, and for four during the call. On all ranks:
 * UNISUM_MISMATCH if versions differ; UNISUM_CONFIGURATION if state of other buckets, or with
 * missing elements, was given on any rank.
 */
unisum_status unisum_buckets_copy_shards(const struct unisum_buckets *buckets,
                                         const struct unisum_shard_state *state);

/**
 * Where each element of each parameter was before the last unisum_buckets_reshard, and is: the
 * same on all ranks. `count` gets how many moves there are, of which `capacity` at most are
 * written to `moves`, which may be NULL.
 */
unisum_status unisum_shard_state_moves(const struct unisum_shard_state *state,
                                       struct unisum_shard_move *moves,
                                       size_t capacity,
                                       size_t *count);

/**
 * A vector of this rank's shard of a bucket, to be read and updated: as many elements as
 * unisum_buckets_shard gives, with padding. It stays in place until unisum_buckets_reshard is
 * called or the state is freed. `count` may be NULL.
 */
unisum_status unisum_shard_state_vector(const struct unisum_shard_state *state,
                                        size_t bucket,
                                        size_t vector,
                                        void **elements,
                                        size_t *count);

/**
 * Some elements of a parameter in one of this rank's shards, to be restored or initialised: those
 * of a unisum_shard_move whose `to` is this rank. They stay in place as those of
 * unisum_shard_state_vector.
 */
unisum_status unisum_shard_state_elements(const struct unisum_shard_state *state,
                                          size_t vector,
                                          size_t parameter,
                                          size_t start,
                                          size_t count,
                                          void **elements);

/**
 * After how many steps the state is: what unisum_shard_state_set_version was given, or the version
 * that all ranks have since unisum_buckets_reshard.
 */
unisum_status unisum_shard_state_version(const struct unisum_shard_state *state, uint64_t *version);

/**
 * Says that the state is complete, after so many steps: what was missing is restored. Ranks that
 * have different versions have different models, so this is called after each step.
 */
unisum_status unisum_shard_state_set_version(const struct unisum_shard_state *state,
                                             uint64_t version);

/**
 * Frees state of shards.
 */
unisum_status unisum_shard_state_free(const struct unisum_shard_state *state);

/**
 * Who is in an elastic job: `epoch` gets 1 at the start of the job and 1 more after each change,
 * or 0 if the job is not elastic (UNISUM_ELASTIC), and for groups. `processes` gets, by rank,
 * which process it is, `capacity` at most: the same process has the same number in all epochs.
 * `count` gets how many ranks there are. All but the communicator may be NULL.
 */
unisum_status unisum_comm_view(const struct unisum_comm *comm,
                               uint64_t *epoch,
                               uint64_t *processes,
                               size_t capacity,
                               size_t *count);

/**
 * Makes the communicator of the ranks that are left, after UNISUM_VIEW_CHANGED: they are numbered
 * anew, in the same order. Messengers, buckets and groups of all ranks are made again from it;
 * memory stays, and groups of some ranks go on if none of these is lost.
 * The old communicator is still to be freed.
 *
 * Collective: every rank that is left calls it. Blocks until all have. If ranks are lost
 * meanwhile, it goes on with those that are left then. If the view has not changed, this makes it
 * change, with the same ranks. UNISUM_RANK_LOST if too few are left, or if the others went on
 * without this rank.
 */
unisum_status unisum_comm_rebuild(const struct unisum_comm *comm, struct unisum_comm **next);

/**
 * How many processes ask to be let into an elastic job (unisum_join), as far as this rank knows:
 * other ranks may know of more, or of fewer. 0 if the job is not elastic, and for groups. Never
 * blocks.
 */
unisum_status unisum_comm_newcomers(const struct unisum_comm *comm, uint32_t *count);

/**
 * Makes the communicator of a view that the processes enter which ask for it: their ranks follow
 * those that there are. If nobody asks, or those that ask are lost, there is another view all the
 * same. Calls of others on the old communicator end with UNISUM_VIEW_CHANGED. Newcomers have a
 * communicator in the same state, and nothing else: unisum_comm_share_state gives them the
 * program's.
 *
 * Collective: every rank calls it, for example once a minimum of unisum_comm_newcomers over all
 * ranks has shown that all know of one. Else as unisum_comm_rebuild. With buckets, call
 * unisum_buckets_admit.
 */
unisum_status unisum_comm_admit(const struct unisum_comm *comm, struct unisum_comm **next);

/**
 * Gives the program's state (parameters, the optimiser's, the position in the data) to ranks that
 * have none, such as newcomers. A rank that has it gives `bytes` bytes at `state`: the lowest of
 * them sends, and on the others the state has to be the same, byte for byte, which is compared by
 * fingerprints. A rank that has none gives NULL, and gets memory at `received`, `received_bytes`
 * long, to be freed by unisum_free. On ranks that gave a state, `received` gets NULL and
 * `received_bytes` 0; both may be NULL there.
 *
 * Collective: every rank calls it. Blocks. UNISUM_MISMATCH, on all ranks, if states differ:
 * unisum_last_error names those that differ from the lowest. UNISUM_CONFIGURATION if no rank has
 * one.
 */
unisum_status unisum_comm_share_state(const struct unisum_comm *comm,
                                      const void *state,
                                      size_t bytes,
                                      void **received,
                                      size_t *received_bytes);

/**
 * Makes the communicator of all ranks but those that are listed, which need not take part: their
 * calls end with UNISUM_RANK_LOST. Collective: every other rank calls it, with the same list. Else
 * as unisum_comm_rebuild.
 */
unisum_status unisum_comm_shrink(const struct unisum_comm *comm,
                                 const uint32_t *exclude,
                                 size_t count,
                                 struct unisum_comm **next);

/**
 * Ends all calls on an elastic job's communicator, on all ranks, with UNISUM_VIEW_CHANGED: all
 * then call unisum_comm_rebuild. Not collective: any thread of any rank may call it. Returns at
 * once.
 */
unisum_status unisum_comm_revoke(const struct unisum_comm *comm);

/**
 * Gives the communicator of the ranks that are left, if steps have changed the view of an elastic
 * job (unisum_step_report.change) since the last call of this; else NULL. It takes the place of
 * the earlier one, which has ended, and is freed by unisum_comm_free, as that is. The buckets go
 * on with it. Not collective, not blocking. Not while a step is under way.
 */
unisum_status unisum_buckets_take_communicator(const struct unisum_buckets *buckets,
                                               struct unisum_comm **comm);

/**
 * Lets the processes into the job that ask for it (unisum_step_report.newcomers), and gives the
 * communicator of the view, in place of the earlier one, which is still to be freed. As
 * unisum_comm_admit, but these buckets, their gradients and what an encoding keeps stay.
 *
 * Collective: every rank calls it, between two steps, and none while gradients accumulate.
 * Newcomers make their buckets meanwhile, with the same parameters and options, before they call
 * anything else on their communicator. Blocks until they have. UNISUM_CONFIGURATION if the job is
 * not elastic, if the buckets are sharded, or while gradients accumulate; UNISUM_MISMATCH, on all
 * ranks, if a newcomer has other parameters or options.
 */
unisum_status unisum_buckets_admit(const struct unisum_buckets *buckets, struct unisum_comm **next);

/**
 * Makes a scaler. NULL options are the defaults. Freed by unisum_scaler_free. Not collective.
 */
unisum_status unisum_scaler_create(const struct unisum_scaler_options *options,
                                   struct unisum_scaler **scaler);

/**
 * The factor for the loss in this step.
 */
unisum_status unisum_scaler_scale(const struct unisum_scaler *scaler, float *scale);

/**
 * Ends a step, and finds the scale of the next. `nonfinite` is what all ranks were told alike, as
 * by unisum_buckets_wait; `apply` gets whether the optimiser applies the step.
 */
unisum_status unisum_scaler_update(const struct unisum_scaler *scaler, bool nonfinite, bool *apply);

/**
 * The scale and the good steps so far, for a checkpoint.
 */
unisum_status unisum_scaler_save(const struct unisum_scaler *scaler, uint64_t *saved);

/**
 * Goes on from what unisum_scaler_save gave, with the settings of this scaler.
 */
unisum_status unisum_scaler_restore(const struct unisum_scaler *scaler, uint64_t saved);

/**
 * Frees a scaler.
 */
unisum_status unisum_scaler_free(const struct unisum_scaler *scaler);

/**
 * How many CUDA devices this process sees. UNISUM_CONFIGURATION if there is no driver or no
 * device: the text says which.
 */
unisum_status unisum_device_count(uint32_t *count);

/**
 * Gives each rank of a communicator a CUDA device, this one the device with number `ordinal` of
 * this process; unisum_comm_local_rank often is a good one, and two ranks may have the same. It
 * may outlive the communicator, and is freed by unisum_device_free. Collective: every rank calls
 * it. Blocks. UNISUM_CONFIGURATION on all ranks if one has no such device.
 */
unisum_status unisum_device_create(const struct unisum_comm *comm,
                                   uint32_t ordinal,
                                   struct unisum_device **device);

/**
 * The device, and how data moves: whether the devices read each other's memory, or why not. Else
 * as unisum_comm_describe.
 */
unisum_status unisum_device_describe(const struct unisum_device *device,
                                     char *text,
                                     size_t capacity,
                                     size_t *length);

/**
 * Fixes the algorithm of all later calls on devices, as unisum_comm_set_algorithm.
 */
unisum_status unisum_device_set_algorithm(const struct unisum_device *device, const char *name);

/**
 * Puts a collective into a stream, on memory of the device, in place or apart as unisum_run.
 * `stream` is a CUstream or cudaStream_t of the device's primary context; NULL is the legacy
 * default stream. The collective begins after what is in the stream, and what is put there later
 * comes after it: until it has ended, the buffers are its own. Blocks until all ranks have called,
 * not until it has ended.
 *
 * UNISUM_CONFIGURATION, UNISUM_MISMATCH, and UNISUM_DEVICE for want of memory are on all ranks:
 * nothing was put into a stream. After other errors the communicators of the job are aborted.
 */
unisum_status unisum_device_run(const struct unisum_device *device,
                                const struct unisum_collective *collective,
                                uint32_t dtype,
                                const struct unisum_buffers *buffers,
                                void *stream);

/**
 * Waits until everything in a stream has ended, for `timeout_s` seconds at most, or, if that is
 * negative, for as long as a call may take; tells whether collectives ended in order. Not
 * collective. UNISUM_TIMEOUT if they have not ended, with the ranks whose devices are behind.
 */
unisum_status unisum_device_synchronize(const struct unisum_device *device,
                                        void *stream,
                                        double timeout_s);

/**
 * Waits as unisum_device_synchronize, and tells whether a result of the calls with
 * UNISUM_DETECT_NONFINITE since this was last asked is infinite or NaN: the same on all ranks
 * after all-reduces; of the rank's own block after a reduce-scatter.
 */
unisum_status unisum_device_take_nonfinite(const struct unisum_device *device,
                                           void *stream,
                                           double timeout_s,
                                           bool *nonfinite);

/**
 * Frees a device communicator, after the collectives on its device have ended. Waits for the other
 * ranks to free theirs, 2 s at most.
 */
unisum_status unisum_device_free(const struct unisum_device *device);

/**
 * Makes buckets for a model's parameters in the memory of the device with number `ordinal` of this
 * process, in the order in which they were registered. Of the options there are bucket_bytes,
 * end_bucket_bytes and UNISUM_IGNORE_NONFINITE; NULL is the defaults. Gradients are zero at first,
 * and stay where they are. Freed by unisum_device_buckets_free. Collective: every rank of the
 * communicator, which they may outlive, calls it with the same parameters and settings, and any
 * device. Blocks.
 */
unisum_status unisum_device_buckets_create(const struct unisum_comm *comm,
                                           uint32_t ordinal,
                                           const struct unisum_parameter *parameters,
                                           size_t count,
                                           const struct unisum_bucket_options *options,
                                           struct unisum_device_buckets **buckets);

/**
 * Where a parameter's gradient lies on the device, as long as the buckets live: a CUdeviceptr. It
 * is the program's from unisum_device_buckets_begin until it is marked ready, and again in a
 * stream that has waited for the step. `count`, which may be NULL, gets how many elements it has.
 */
unisum_status unisum_device_buckets_view(const struct unisum_device_buckets *buckets,
                                         size_t parameter,
                                         void **gradient,
                                         size_t *count);

/**
 * Begins a step whose gradients are averaged over all ranks. Collective: every rank begins the
 * same number of steps. Blocks until all ranks have handed in the step before.
 */
unisum_status unisum_device_buckets_begin(const struct unisum_device_buckets *buckets);

/**
 * Marks a gradient ready once what is in `stream` now has ended: a CUstream or cudaStream_t of the
 * device's primary context; NULL is the legacy default stream. Nothing may write the gradient from
 * then on. Threads may mark different gradients at once. Does not block.
 */
unisum_status unisum_device_buckets_ready(const struct unisum_device_buckets *buckets,
                                          size_t parameter,
                                          void *stream);

/**
 * Copies a gradient from the host's memory into its place, after what is in `stream`, and marks it
 * ready. Blocks until it is copied.
 */
unisum_status unisum_device_buckets_put(const struct unisum_device_buckets *buckets,
                                        size_t parameter,
                                        const void *gradient,
                                        size_t count,
                                        void *stream);

/**
 * Ends the step: what is put into `stream` from here on comes after all averages. Blocks until all
 * ranks have handed it in, not until it has ended on the devices. UNISUM_STEP_FAILED, on all ranks
 * alike, if one has not marked all gradients ready, or one too often: the next step can be begun.
 */
unisum_status unisum_device_buckets_wait(const struct unisum_device_buckets *buckets, void *stream);

/**
 * Copies a parameter's gradient, of `count` elements, to the host's memory, after what is in
 * `stream`: the average, in a stream that has waited for the step. Blocks until it is copied.
 */
unisum_status unisum_device_buckets_read(const struct unisum_device_buckets *buckets,
                                         size_t parameter,
                                         void *gradient,
                                         size_t count,
                                         void *stream);

/**
 * Waits until everything in a stream has ended, as unisum_device_synchronize.
 */
unisum_status unisum_device_buckets_synchronize(const struct unisum_device_buckets *buckets,
                                                void *stream,
                                                double timeout_s);

/**
 * Waits for the averages and for the stream, as unisum_device_synchronize, and tells whether an
 * average since this was last asked is infinite or NaN: the same on all ranks that ask after the
 * same steps. Not with UNISUM_IGNORE_NONFINITE.
 */
unisum_status unisum_device_buckets_take_nonfinite(const struct unisum_device_buckets *buckets,
                                                   void *stream,
                                                   double timeout_s,
                                                   bool *nonfinite);

/**
 * Frees buckets, once their averages have ended on the device. A step under way is dropped, and
 * fails on all ranks. Waits for the other ranks to free theirs, 2 s at most.
 */
unisum_status unisum_device_buckets_free(const struct unisum_device_buckets *buckets);

/**
 * Allocates zeroed memory that the links of a communicator reach without copies: peers on this
 * host map it, and RDMA devices know it. Not collective. It may outlive the communicator; it is
 * freed by unisum_free, and must not be touched in a forked child.
 */
unisum_status unisum_allocate(const struct unisum_comm *comm, size_t bytes, void **memory);

/**
 * Frees memory that unisum_allocate or unisum_comm_share_state gave, or a structure of
 * unisum_comm_stats or unisum_comm_description with all that it points to. Nobody may use it any
 * more: no call that is under way, no work. NULL is refused, and so is what was freed before.
 */
unisum_status unisum_free(const void *memory);

/**
 * The version of the library, as in "0.1.0". Never NULL, never freed.
 */
const char *unisum_version(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* UNISUM_H */
