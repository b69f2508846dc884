// The operations, each with the lanes that a thread computes with: how their bits become
// accumulators, meet the next ones, and leave again, and what accumulators begin with: what changes
// no bit of what they meet. A lane is an
// element, except where elements are combined bit by bit: there it is a word of several.

#pragma once

#include "abi.h"
#include "elements.h"

/// What a task says of the operation.
struct Terms {
    double divisor;
    double factor;
    u32 flags;

    template <class Task> static INLINE Terms of(const Task &task) {
        return Terms{task.divisor, task.factor, task.flags};
    }
};

/// Sums and averages.
template <class E> struct Sum {
    enum : u32 { BYTES = E::BYTES, LANE_BYTES = E::BYTES };
    typedef typename E::Raw Raw;
    typedef typename E::Wide Wide;

    const typename E::Factor factor;
    const typename E::Divisor divisor;
    const bool divides;

    /// A factor of 1 changes no bit: there is no other loop for sums without one.
    INLINE explicit Sum(const Terms &terms)
        : factor(terms.flags & UNISUM_SCALES ? (typename E::Factor)terms.factor : 1),
          divisor((typename E::Divisor)terms.divisor), divides(terms.flags & UNISUM_DIVIDES) {}

    /// −0 for floats: +0 would make +0 of −0.
    INLINE Wide start() const { return -(Wide)0; }
    INLINE Wide lift(Raw raw) const { return E::scaled(E::widen(raw), factor); }
    INLINE Wide combine(Wide left, Wide right) const { return left + right; }
    template <u32 LANES> INLINE void finish(Wide (&wide)[LANES]) const {
        if (divides) {
#pragma unroll
            for (u32 i = 0; i < LANES; i++) wide[i] = E::over(wide[i], divisor);
        }
    }
    INLINE Raw lower(Wide wide) const { return E::narrow(wide); }
    INLINE bool is_nonfinite(Raw raw) const { return E::is_nonfinite(raw); }
};

template <class E> struct Product {
    enum : u32 { BYTES = E::BYTES, LANE_BYTES = E::BYTES };
    typedef typename E::Raw Raw;
    typedef typename E::Wide Wide;

    INLINE explicit Product(const Terms &) {}
    INLINE Wide start() const { return 1; }
    INLINE Wide lift(Raw raw) const { return E::widen(raw); }
    INLINE Wide combine(Wide left, Wide right) const { return left * right; }
    template <u32 LANES> INLINE void finish(Wide (&)[LANES]) const {}
    INLINE Raw lower(Wide wide) const { return E::narrow(wide); }
    INLINE bool is_nonfinite(Raw raw) const { return E::is_nonfinite(raw); }
};

/// The greatest element if MAX, else the least.
template <class E, bool MAX> struct Extreme {
    enum : u32 { BYTES = E::BYTES, LANE_BYTES = E::BYTES };
    typedef typename E::Raw Raw;
    typedef typename E::Key Wide;

    INLINE explicit Extreme(const Terms &) {}
    INLINE Wide start() const { return E::template weakest_key<MAX>(); }
    INLINE Wide lift(Raw raw) const { return E::template key<MAX>(raw); }
    INLINE Wide combine(Wide left, Wide right) const {
        return (left < right) == MAX ? right : left;
    }
    template <u32 LANES> INLINE void finish(Wide (&)[LANES]) const {}
    INLINE Raw lower(Wide wide) const { return E::template from_key<MAX>(wide); }
    INLINE bool is_nonfinite(Raw raw) const { return E::is_nonfinite(raw); }
};

/// Any bytes: elements are as many of them as they have.
struct Bytes {
    static INLINE u32 bits(u32 word) { return word; }
};

/// Bytes that are true unless they are 0; results are 0 or 1.
struct Truths {
    static INLINE u32 bits(u32 word) {
        const u32 low = 0x7f7f7f7f;
        return (((word & low) + low) | word) >> 7 & 0x01010101;
    }
};

enum class Bit { And, Or, Xor };

template <class E, Bit BIT> struct Bitwise {
    enum : u32 { BYTES = 1, LANE_BYTES = 4 };
    typedef u32 Raw;
    typedef u32 Wide;

    INLINE explicit Bitwise(const Terms &) {}
    INLINE u32 start() const { return BIT == Bit::And ? ~0u : 0; }
    INLINE u32 lift(u32 word) const { return E::bits(word); }
    INLINE u32 combine(u32 left, u32 right) const {
        return BIT == Bit::And ? left & right : BIT == Bit::Or ? left | right : left ^ right;
    }
    template <u32 LANES> INLINE void finish(u32 (&)[LANES]) const {}
    INLINE u32 lower(u32 wide) const { return wide; }
    INLINE bool is_nonfinite(u32) const { return false; }
};
