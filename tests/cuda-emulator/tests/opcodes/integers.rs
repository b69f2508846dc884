//! Integer arithmetic.

use crate::{B16, B32, B64, Case, Kind, case};

/// An integer type: its name, registers, and how 64 bits are read as a number of it.
#[derive(Clone, Copy)]
struct Type {
    name: &'static str,
    kind: Kind,
    bits: u32,
    signed: bool,
}

const TYPES: [Type; 6] = [
    Type { name: "u16", kind: B16, bits: 16, signed: false },
    Type { name: "s16", kind: B16, bits: 16, signed: true },
    Type { name: "u32", kind: B32, bits: 32, signed: false },
    Type { name: "s32", kind: B32, bits: 32, signed: true },
    Type { name: "u64", kind: B64, bits: 64, signed: false },
    Type { name: "s64", kind: B64, bits: 64, signed: true },
];

impl Type {
    fn number(self, bits: u64) -> i128 {
        let shift = 128 - self.bits;
        if self.signed {
            (i128::from(bits) << shift) >> shift
        } else {
            (u128::from(bits) << shift >> shift).cast_signed()
        }
    }

    fn binary(self, operation: &str, expected: impl Fn(i128, i128) -> i128 + 'static) -> Case {
        let opcode = format!("{operation}.{}", self.name);
        case(opcode, self.kind, &[self.kind; 2], move |a, b, _| {
            expected(self.number(a), self.number(b)) as u64
        })
    }

    fn ternary(
        self,
        operation: &str,
        expected: impl Fn(i128, i128, i128) -> i128 + 'static,
    ) -> Case {
        let opcode = format!("{operation}.{}", self.name);
        case(opcode, self.kind, &[self.kind; 3], move |a, b, c| {
            expected(self.number(a), self.number(b), self.number(c)) as u64
        })
    }

    /// The product of two unsigned 64-bit numbers may not fit into `i128`, but its bits do.
    fn high(self, a: i128, b: i128) -> i128 {
        a.wrapping_mul(b) >> self.bits
    }

    fn by_zero(self) -> impl Fn(u64, u64, u64) -> bool {
        move |_, b, _| self.number(b) == 0
    }
}

fn wide() -> Vec<Case> {
    let mut cases = Vec::new();
    for (kind, double, signed) in
        [(B16, B32, false), (B16, B32, true), (B32, B64, false), (B32, B64, true)]
    {
        let bits = if kind == B16 { 16 } else { 32 };
        let letter = if signed { 's' } else { 'u' };
        let of = Type { name: "", kind, bits, signed };
        let product = move |a, b| of.number(a).wrapping_mul(of.number(b)) as u64;
        cases.push(case(format!("mul.wide.{letter}{bits}"), double, &[kind; 2], move |a, b, _| {
            product(a, b)
        }));
        let sources = [kind, kind, double];
        cases.push(case(format!("mad.wide.{letter}{bits}"), double, &sources, move |a, b, c| {
            product(a, b).wrapping_add(c)
        }));
    }
    cases
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = wide();
    for of in TYPES {
        cases.extend([
            of.binary("add", |a, b| a.wrapping_add(b)),
            of.binary("sub", |a, b| a.wrapping_sub(b)),
            of.binary("mul.lo", |a, b| a.wrapping_mul(b)),
            of.binary("mul.hi", move |a, b| of.high(a, b)),
            of.ternary("mad.lo", |a, b, c| a.wrapping_mul(b).wrapping_add(c)),
            of.ternary("mad.hi", move |a, b, c| of.high(a, b).wrapping_add(c)),
            of.binary("div", |a, b| a.checked_div(b).unwrap_or(0)).skipping(of.by_zero()),
            of.binary("rem", |a, b| a.checked_rem(b).unwrap_or(0)).skipping(of.by_zero()),
            of.binary("min", i128::min),
            of.binary("max", i128::max),
            of.ternary("sad", |a, b, c| (a - b).abs().wrapping_add(c)),
        ]);
        let shift = move |a: u64, b: u64, _| {
            let by = (b as u32).min(127);
            (of.number(a) >> by) as u64
        };
        cases.push(case(format!("shr.{}", of.name), of.kind, &[of.kind, B32], shift));
        if of.signed {
            let (abs, neg) = (format!("abs.{}", of.name), format!("neg.{}", of.name));
            cases.push(case(abs, of.kind, &[of.kind], move |a, _, _| {
                of.number(a).unsigned_abs() as u64
            }));
            cases.push(case(neg, of.kind, &[of.kind], move |a, _, _| (-of.number(a)) as u64));
        }
    }
    let saturated = |sum: i64| sum.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as u64;
    cases.push(case("add.sat.s32", B32, &[B32, B32], move |a, b, _| {
        saturated(i64::from(a as i32) + i64::from(b as i32))
    }));
    cases
}
