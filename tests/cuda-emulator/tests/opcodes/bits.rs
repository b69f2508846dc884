//! Bits.

use crate::{B16, B32, B64, Case, Kind, Pred, case};

fn logical(name: &str, kind: Kind) -> Vec<Case> {
    let shift_limit = match kind {
        B16 => 16,
        B32 => 32,
        _ => 64,
    };
    let mask = u64::MAX >> (64 - shift_limit);
    vec![
        case(format!("and.{name}"), kind, &[kind; 2], |a, b, _| a & b),
        case(format!("or.{name}"), kind, &[kind; 2], |a, b, _| a | b),
        case(format!("xor.{name}"), kind, &[kind; 2], |a, b, _| a ^ b),
        case(format!("not.{name}"), kind, &[kind], |a, _, _| !a),
        case(format!("cnot.{name}"), kind, &[kind], move |a, _, _| u64::from(a & mask == 0)),
        case(format!("shl.{name}"), kind, &[kind, B32], move |a, b, _| {
            (a & mask).checked_shl(b as u32).unwrap_or(0)
        }),
        case(format!("shr.{name}"), kind, &[kind, B32], move |a, b, _| {
            (a & mask).checked_shr(b as u32).unwrap_or(0)
        }),
        case(
            format!("selp.{name}"),
            kind,
            &[kind, kind, Pred],
            |a, b, c| {
                if c & 1 == 1 { a } else { b }
            },
        ),
    ]
}

fn counting() -> Vec<Case> {
    vec![
        case("popc.b32", B32, &[B32], |a, _, _| u64::from((a as u32).count_ones())),
        case("popc.b64", B32, &[B64], |a, _, _| u64::from(a.count_ones())),
        case("clz.b32", B32, &[B32], |a, _, _| u64::from((a as u32).leading_zeros())),
        case("clz.b64", B32, &[B64], |a, _, _| u64::from(a.leading_zeros())),
        case("brev.b32", B32, &[B32], |a, _, _| u64::from((a as u32).reverse_bits())),
        case("brev.b64", B64, &[B64], |a, _, _| a.reverse_bits()),
        case("bfind.u32", B32, &[B32], |a, _, _| match a as u32 {
            0 => u64::MAX,
            a => u64::from(31 - a.leading_zeros()),
        }),
        case("bfind.s32", B32, &[B32], |a, _, _| {
            let a = a as i32;
            match if a < 0 { !a } else { a }.leading_zeros() {
                32 => u64::MAX,
                zeros => u64::from(31 - zeros),
            }
        }),
        case("bfind.shiftamt.u64", B32, &[B64], |a, _, _| match a {
            0 => u64::MAX,
            a => u64::from(a.leading_zeros()),
        }),
    ]
}

/// Bit by bit, as the manual describes it.
fn extracted(a: u64, position: u64, length: u64, bits: u64, signed: bool) -> u64 {
    let (position, length) = (position & 0xFF, length & 0xFF);
    let bit = |at: u64| a >> at & 1;
    let sign_at = (position + length).saturating_sub(1).min(bits - 1);
    let sign = if signed && length > 0 { bit(sign_at) } else { 0 };
    (0..bits).fold(0, |result, index| {
        let inside = index < length && position + index < bits;
        result | (if inside { bit(position + index) } else { sign }) << index
    })
}

fn inserted(a: u64, b: u64, position: u64, bits: u64, length: u64) -> u64 {
    let position = position & 0xFF;
    (0..bits).fold(0, |result, index| {
        let from_a = index >= position && index < position + length;
        let bit = if from_a { a >> (index - position) } else { b >> index } & 1;
        result | bit << index
    })
}

fn fields() -> Vec<Case> {
    vec![
        case("bfe.u32", B32, &[B32; 3], |a, b, c| extracted(a & 0xFFFF_FFFF, b, c, 32, false)),
        case("bfe.s32", B32, &[B32; 3], |a, b, c| extracted(a & 0xFFFF_FFFF, b, c, 32, true)),
        case("bfe.u64", B64, &[B64, B32, B32], |a, b, c| extracted(a, b, c, 64, false)),
        case("bfe.s64", B64, &[B64, B32, B32], |a, b, c| extracted(a, b, c, 64, true)),
        case("bfi.b32", B32, &[B32; 3], |a, b, c| inserted(a, b, c, 32, 5)).with_immediate(", 5"),
        case("bfi.b64", B64, &[B64, B64, B32], |a, b, c| inserted(a, b, c, 64, 40))
            .with_immediate(", 40"),
        case("prmt.b32", B32, &[B32; 3], |a, b, c| {
            let bytes = (b << 32 | a & 0xFFFF_FFFF).to_le_bytes();
            (0..4).fold(0, |result, index| {
                let choice = c >> (4 * index) & 15;
                let byte = bytes[choice as usize & 7];
                let sign = if byte > 127 { 255 } else { 0 };
                result | u64::from(if choice & 8 == 0 { byte } else { sign }) << (8 * index)
            })
        }),
    ]
}

fn funnels() -> Vec<Case> {
    let both =
        |low: u64, high: u64| u128::from(high & 0xFFFF_FFFF) << 32 | u128::from(low & 0xFFFF_FFFF);
    vec![
        case("shf.l.wrap.b32", B32, &[B32; 3], move |a, b, c| {
            (both(a, b) << (c & 31) >> 32) as u64
        }),
        case("shf.r.wrap.b32", B32, &[B32; 3], move |a, b, c| (both(a, b) >> (c & 31)) as u64),
        case("shf.l.clamp.b32", B32, &[B32; 3], move |a, b, c| {
            (both(a, b) << (c & 0xFFFF_FFFF).min(32) >> 32) as u64
        }),
        case("shf.r.clamp.b32", B32, &[B32; 3], move |a, b, c| {
            (both(a, b) >> (c & 0xFFFF_FFFF).min(32)) as u64
        }),
        case("lop3.b32", B32, &[B32; 3], |a, b, c| a & b | !a & c).with_immediate(", 0xCA"),
        case("lop3.b32", B32, &[B32; 3], |a, b, c| a ^ b ^ c).with_immediate(", 0x96"),
    ]
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = counting();
    for (name, kind) in [("b16", B16), ("b32", B32), ("b64", B64)] {
        cases.extend(logical(name, kind));
    }
    cases.extend([
        case("and.pred", Pred, &[Pred; 2], |a, b, _| a & b),
        case("or.pred", Pred, &[Pred; 2], |a, b, _| a | b),
        case("xor.pred", Pred, &[Pred; 2], |a, b, _| a ^ b),
        case("not.pred", Pred, &[Pred], |a, _, _| !a),
    ]);
    cases.extend(fields());
    cases.extend(funnels());
    cases
}
