// The element types, each with how its elements are computed with. All floats are summed,
// multiplied and divided in f32 (f64 in itself) and rounded once, every NaN result is the same one,
// and no operation may be fused: the build passes -fmad=false.

#pragma once

#include "device.h"

/// What holds the bits of one element in a register.
template <u32 BYTES> struct RawOf { typedef u32 Type; };
template <> struct RawOf<8> { typedef u64 Type; };

/// Integers wrap around.
template <class Int, bool SIGNED> struct Integer {
    enum : u32 { BYTES = sizeof(Int) };
    typedef typename RawOf<BYTES>::Type Raw;
    typedef Raw Wide;
    typedef Int Key;
    typedef u32 Factor;
    typedef u32 Divisor;

    static INLINE Wide widen(Raw raw) { return raw; }
    static INLINE Raw narrow(Wide wide) { return wide; }
    static INLINE Wide scaled(Wide wide, Factor) { return wide; }

    /// Truncates toward zero.
    static INLINE Wide over(Wide wide, Divisor divisor) {
        const Wide value = (Wide)(Int)wide;
        const bool negative = SIGNED && value >> (sizeof(Wide) * 8 - 1);
        const Wide magnitude = negative ? (Wide)0 - value : value;
        const Wide quotient = magnitude / divisor;
        return negative ? (Wide)0 - quotient : quotient;
    }

    /// A key that no other one loses against.
    template <bool MAX> static INLINE Key weakest_key() {
        const Raw sign = (Raw)1 << (BYTES * 8 - 1);
        const Raw least = SIGNED ? sign : 0;
        return (Int)(MAX ? least : ~least);
    }
    template <bool MAX> static INLINE Key key(Raw raw) { return (Int)raw; }
    template <bool MAX> static INLINE Raw from_key(Key key) { return (Raw)key; }
    static INLINE bool is_nonfinite(Raw) { return false; }
};

/// The bits of floats: `Signed` is a signed integer at least as wide, `INFINITE` the magnitude of
/// the least that is not finite, `GREATEST` that of the greatest that is not NaN.
template <u32 SIZE, class SignedBits, class Bits, Bits INFINITE, Bits GREATEST, Bits CANONICAL>
struct FloatBits {
    enum : u32 { BYTES = SIZE };
    enum : Bits { SIGN = (Bits)1 << (SIZE * 8 - 1), NAN_BITS = CANONICAL };
    typedef Bits Raw;
    typedef SignedBits Key;

    static INLINE Bits magnitude(Bits raw) { return raw & (SIGN - 1); }
    static INLINE bool is_nan(Bits raw) { return magnitude(raw) > GREATEST; }
    static INLINE bool is_nonfinite(Bits raw) { return magnitude(raw) >= INFINITE; }

    /// Inverts all but the sign of a negative number, so that integers ascend as the values do, −0
    /// below +0; its own inverse.
    static INLINE Key turned(Key bits) {
        return bits ^ (Key)((Bits)(bits >> (sizeof(Bits) * 8 - 1)) >> 1);
    }

    /// The key of NaN beats those of all numbers.
    template <bool MAX> static INLINE Key nan_key() {
        const Key least = (Key)((Bits)1 << (sizeof(Bits) * 8 - 1));
        return MAX ? ~least : least;
    }
    /// A key that no other one loses against.
    template <bool MAX> static INLINE Key weakest_key() { return nan_key<!MAX>(); }
    template <bool MAX> static INLINE Key key(Bits raw) {
        const Key extended = (Key)((raw ^ SIGN) - SIGN);
        return is_nan(raw) ? nan_key<MAX>() : turned(extended);
    }
    template <bool MAX> static INLINE Bits from_key(Key key) {
        return key == nan_key<MAX>() ? NAN_BITS : (Bits)turned(key);
    }
};

struct F64 : FloatBits<8, i64, u64, 0x7ff0000000000000, 0x7ff0000000000000, 0x7ff8000000000000> {
    typedef double Wide;
    typedef double Factor;
    typedef double Divisor;

    static INLINE double widen(u64 raw) { return double_of(raw); }
    static INLINE u64 narrow(double wide) {
        const u64 raw = bits_of(wide);
        return is_nan(raw) ? NAN_BITS : raw;
    }
    static INLINE double scaled(double wide, double factor) { return wide * factor; }
    static INLINE double over(double wide, double divisor) { return wide / divisor; }
};

/// What is computed with in f32.
template <u32 SIZE, u32 INFINITE, u32 GREATEST, u32 CANONICAL>
struct InF32 : FloatBits<SIZE, i32, u32, INFINITE, GREATEST, CANONICAL> {
    typedef float Wide;
    typedef float Factor;
    typedef float Divisor;

    static INLINE float scaled(float wide, float factor) { return wide * factor; }
    static INLINE float over(float wide, float divisor) { return wide / divisor; }
};

/// Bits of f32, without the sign.
enum : u32 { F32_MAGNITUDE = 0x7fffffff, F32_INFINITY = 0x7f800000, F32_NAN = 0x7fc00000 };

INLINE bool is_nan(float value) { return (bits_of(value) & F32_MAGNITUDE) > F32_INFINITY; }

struct F32 : InF32<4, F32_INFINITY, F32_INFINITY, F32_NAN> {
    static INLINE float widen(u32 raw) { return float_of(raw); }
    static INLINE u32 narrow(float wide) { return ::is_nan(wide) ? F32_NAN : bits_of(wide); }
};

struct F16 : InF32<2, 0x7c00, 0x7c00, 0x7e00> {
    static INLINE float widen(u32 raw) { return f16_to_f32(raw); }
    static INLINE u32 narrow(float wide) { return ::is_nan(wide) ? NAN_BITS : f32_to_f16(wide); }
};

struct Bf16 : InF32<2, 0x7f80, 0x7f80, 0x7fc0> {
    static INLINE float widen(u32 raw) { return float_of(raw << 16); }
    /// The canonical NaN rounds like a number, to the upper half of its bits.
    static INLINE u32 narrow(float wide) {
        const u32 bits = F32::narrow(wide);
        return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    }
};

/// The bits of the nearest float with this bias and mantissa, ties to even, to the f32 with the
/// bits `magnitude`, which is not negative; as if exponents had no end.
template <u32 BIAS, u32 MANTISSA_BITS> INLINE u32 nearest(u32 magnitude) {
    const u32 dropped = 23 - MANTISSA_BITS;
    const u32 odd = (magnitude >> dropped) & 1;
    // Half of the last place that stays, less one if that place is even. A carry into the exponent
    // is right.
    const u32 half = (1 << (dropped - 1)) - 1 + odd;
    const u32 normal = (magnitude - ((127 - BIAS) << 23) + half) >> dropped;
    // Its last place is that of a subnormal result: the addition rounds to it.
    const u32 unit = (127 + 24 - BIAS - MANTISSA_BITS) << 23;
    const u32 tiny = bits_of(float_of(magnitude) + float_of(unit)) - unit;
    return magnitude < ((128 - BIAS) << 23) ? tiny : normal;
}

INLINE u32 lesser(u32 left, u32 right) { return left < right ? left : right; }

/// No infinities: what is too large becomes NaN.
struct F8E4M3 : InF32<1, 0x7f, 0x7e, 0x7f> {
    static INLINE float widen(u32 raw) {
        const u32 bits = magnitude(raw);
        // Subnormal: an integer of units of 2⁻⁹.
        const u32 tiny = bits_of((float)(i32)bits * float_of((127 - 9) << 23));
        const u32 finite = bits < 0x08 ? tiny : (bits << 20) + ((127 - 7) << 23);
        return float_of((bits == 0x7f ? F32_NAN : finite) | (raw & SIGN) << 24);
    }
    static INLINE u32 narrow(float wide) {
        const u32 bits = bits_of(wide);
        // Infinity and NaN have the greatest magnitudes.
        const u32 result = lesser(nearest<7, 3>(bits & F32_MAGNITUDE), NAN_BITS);
        return result == NAN_BITS ? NAN_BITS : result | (bits >> 24 & SIGN);
    }
};

/// The upper half of an f16.
struct F8E5M2 : InF32<1, 0x7c, 0x7c, 0x7e> {
    static INLINE float widen(u32 raw) { return f16_to_f32(raw << 8); }
    /// Not by way of f16: that would round twice.
    static INLINE u32 narrow(float wide) {
        const u32 bits = bits_of(wide);
        const u32 result = lesser(nearest<15, 2>(bits & F32_MAGNITUDE), 0x7c);
        return ::is_nan(wide) ? NAN_BITS : result | (bits >> 24 & SIGN);
    }
};
