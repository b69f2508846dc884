// What the kernels take: one struct each, by value. `kernels/src/cuda.rs` mirrors them, and
// `kernels/tests/cuda` compares the layouts.

#pragma once

#define UNISUM_SOURCES_MAX 32
#define UNISUM_COPIES_MAX 32
#define UNISUM_FLAGS_MAX 64
#define UNISUM_RANKS_MAX 32

enum FoldFlags {
    /// Divides by `divisor` before the result is rounded. Sums only.
    UNISUM_DIVIDES = 1,
    /// Multiplies each element by `factor` before it is added. Sums of floats only.
    UNISUM_SCALES = 2,
    /// Sets `nonfinite` to 1 if a result is infinite or NaN. Floats only.
    UNISUM_WATCHES = 4,
};

/// `to[i] = from[0][i] ∘ from[1][i] ∘ …`, from left to right. Pointers are aligned to the element;
/// `to` is exactly one of the sources or overlaps none.
struct Fold {
    void *to;
    const void *from[UNISUM_SOURCES_MAX];
    /// In elements of the kernel's type.
    unsigned long long count;
    /// A whole number from 1 to 2³² − 1.
    double divisor;
    double factor;
    /// Device memory or pinned host memory; only read if the flag says so.
    unsigned int *nonfinite;
    /// At least 1.
    unsigned int sources;
    unsigned int flags;
};

/// Any alignment; the two do not overlap.
struct Copy {
    void *to;
    const void *from;
    unsigned long long bytes;
};

/// Copies that may run at once: none reads or writes what another one writes.
struct Copies {
    struct Copy copy[UNISUM_COPIES_MAX];
    unsigned int count;
};

/// Stores each value at its flag, after everything that was enqueued before.
struct Signal {
    unsigned int *flag[UNISUM_FLAGS_MAX];
    unsigned int value[UNISUM_FLAGS_MAX];
    unsigned int count;
    /// Own device memory, or null: nothing is signalled once it is not 0.
    const unsigned int *stopped;
};

/// Ends when each flag has reached its value, counting modulo 2³².
struct Wait {
    const unsigned int *flag[UNISUM_FLAGS_MAX];
    unsigned int value[UNISUM_FLAGS_MAX];
    unsigned int count;
    /// Pinned host memory, or null: once it is not 0, the wait ends early and sets `stopped`.
    const unsigned int *abort;
    /// Own device memory, or null.
    unsigned int *stopped;
};

/// An all-reduce of which each rank launches its part, all with the same grid.
struct Staged {
    /// May be `from`. Both are aligned to the element.
    void *to;
    const void *from;
    /// Of each rank, this one's included: aligned to 16 bytes, `count` elements rounded up to 16
    /// bytes. Launches use two such memories in turns.
    void *staging[UNISUM_RANKS_MAX];
    /// At each other rank: this rank's flags, one for each block.
    unsigned long long *theirs[UNISUM_RANKS_MAX];
    /// At this rank: each other rank's flags, one for each block.
    const unsigned long long *mine[UNISUM_RANKS_MAX];
    /// In elements of the kernel's type.
    unsigned long long count;
    /// The same on all ranks, and greater than in all launches before.
    unsigned long long call;
    /// From here on as in `Fold` and `Wait`.
    double divisor;
    double factor;
    unsigned int *nonfinite;
    const unsigned int *abort;
    unsigned int *stopped;
    unsigned int flags;
    unsigned int rank;
    unsigned int ranks;
};

/// An all-reduce that the switch does, of which each rank launches its part, all with the same grid.
struct Multimem {
    /// May be `from`. Both are aligned to the element.
    void *to;
    const void *from;
    /// Memory of this rank's device: aligned to 16 bytes, `count` elements rounded up to 16 bytes.
    void *own;
    /// The multicast address that stands for the `own` of all ranks.
    void *all;
    /// As in `Staged`.
    unsigned long long *theirs[UNISUM_RANKS_MAX];
    const unsigned long long *mine[UNISUM_RANKS_MAX];
    /// In elements of the kernel's type.
    unsigned long long count;
    /// The same on all ranks, and greater than in all launches before.
    unsigned long long call;
    /// From here on as in `Staged`.
    double divisor;
    double factor;
    unsigned int *nonfinite;
    const unsigned int *abort;
    unsigned int *stopped;
    unsigned int flags;
    unsigned int rank;
    unsigned int ranks;
};
