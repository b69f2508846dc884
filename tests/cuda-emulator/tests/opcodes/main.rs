//! Each family of instructions against the arithmetic of Rust, through the driver.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod bits;
mod conversions;
mod floats;
mod integers;
mod memory;
#[path = "../support/mod.rs"]
mod support;

use std::fmt::Write;

use support::{Gpu, leave, role, run};

/// What a register of a case holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    B16,
    B32,
    B64,
    F32,
    F64,
    /// A predicate: the lowest bit.
    Pred,
}

use Kind::{B16, B32, B64, F32, F64, Pred};

/// An instruction, and what it yields for three operands of 64 bits. It uses as many as it needs.
struct Case {
    opcode: String,
    result: Kind,
    sources: Vec<Kind>,
    expected: Box<dyn Fn(u64, u64, u64) -> u64>,
    /// Operands for which the result is undefined.
    skips: Box<dyn Fn(u64, u64, u64) -> bool>,
    /// Operands after the registers.
    immediate: &'static str,
}

fn case(
    opcode: impl Into<String>,
    result: Kind,
    sources: &[Kind],
    expected: impl Fn(u64, u64, u64) -> u64 + 'static,
) -> Case {
    Case {
        opcode: opcode.into(),
        result,
        sources: sources.to_vec(),
        expected: Box::new(expected),
        skips: Box::new(|_, _, _| false),
        immediate: "",
    }
}

impl Case {
    fn skipping(mut self, skips: impl Fn(u64, u64, u64) -> bool + 'static) -> Self {
        self.skips = Box::new(skips);
        self
    }

    fn with_immediate(mut self, immediate: &'static str) -> Self {
        self.immediate = immediate;
        self
    }
}

/// Bit patterns at the edges of all types, and some of no special kind.
fn values() -> Vec<u64> {
    let mut values = vec![0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256];
    values.extend([0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF]);
    values.extend([i64::MAX as u64, i64::MIN as u64, u64::MAX, u64::MAX - 1]);
    let floats = [0.5, 1.0, -1.0, 1.5, 2.5, -2.5, 3.0, 1e-40, -1e38, f32::MAX, f32::INFINITY];
    values.extend(floats.map(|float: f32| u64::from(float.to_bits())));
    values.extend([f32::NEG_INFINITY, f32::NAN, -0.0].map(|float| u64::from(float.to_bits())));
    let doubles = [0.5, 1.0, -1.5, 1e300, 5e-324, f64::INFINITY, f64::NAN, -0.0, 65504.0, 1e10];
    values.extend(doubles.map(|double: f64| double.to_bits()));
    // 16-bit floats: the same bits as f16 and bf16.
    values.extend([0x3C00, 0xBC00, 0x7BFF, 0x7C00, 0x7E00, 0x0001, 0x3F80, 0x4040, 0x7F7F, 0x3555]);
    let mut random = 0x1234_5678_9ABC_DEF1_u64;
    for _ in 0..16 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        values.push(random);
        // Exponents near 1, in 32 and in 64 bits.
        values.push(random & 0x007F_FFFF | 0x3F80_0000);
        values.push(random & 0x000F_FFFF_FFFF_FFFF | 0x3FF0_0000_0000_0000);
    }
    values
}

/// The text that makes a register of its kind from 64 bits, and 64 bits from a register.
fn convert_in(text: &mut String, kind: Kind, name: &str, from: &str) {
    match kind {
        B16 => writeln!(text, "cvt.u16.u64 %{name}, %{from};"),
        B32 => writeln!(text, "cvt.u32.u64 %{name}, %{from};"),
        B64 => writeln!(text, "mov.u64 %{name}, %{from};"),
        F32 => writeln!(text, "cvt.u32.u64 %w, %{from};\nmov.b32 %{name}, %w;"),
        F64 => writeln!(text, "mov.b64 %{name}, %{from};"),
        Pred => writeln!(text, "and.b64 %q, %{from}, 1;\nsetp.ne.u64 %{name}, %q, 0;"),
    }
    .unwrap();
}

fn convert_out(text: &mut String, kind: Kind) {
    match kind {
        B16 => writeln!(text, "cvt.u64.u16 %q, %d;"),
        B32 => writeln!(text, "cvt.u64.u32 %q, %d;"),
        B64 => writeln!(text, "mov.u64 %q, %d;"),
        F32 => writeln!(text, "mov.b32 %w, %d;\ncvt.u64.u32 %q, %w;"),
        F64 => writeln!(text, "mov.b64 %q, %d;"),
        Pred => writeln!(text, "selp.u64 %q, 1, 0, %d;"),
    }
    .unwrap();
}

fn declaration(kind: Kind) -> &'static str {
    match kind {
        B16 => ".b16",
        B32 => ".b32",
        B64 => ".b64",
        F32 => ".f32",
        F64 => ".f64",
        Pred => ".pred",
    }
}

const HEADER: &str = ".version 8.1\n.target sm_70\n.address_size 64\n";

/// A kernel for each case: each thread takes three operands and stores a result.
fn module(cases: &[Case]) -> String {
    let mut text = HEADER.to_owned();
    for (index, case) in cases.iter().enumerate() {
        let Case { opcode, result, sources, immediate, .. } = case;
        let names = &["s0", "s1", "s2"][..sources.len()];
        write!(
            text,
            ".visible .entry k{index}(.param .u64 from, .param .u64 to)\n{{\n\
             .reg .b64 %x<8>, %v<3>, %q;\n.reg .b32 %w, %t<4>;\n.reg {} %d;\n",
            declaration(*result)
        )
        .unwrap();
        for (kind, name) in sources.iter().zip(names) {
            writeln!(text, ".reg {} %{name};", declaration(*kind)).unwrap();
        }
        text.push_str(
            "ld.param.u64 %x0, [from];\nld.param.u64 %x1, [to];\n\
             mov.u32 %t0, %ctaid.x;\nmov.u32 %t1, %ntid.x;\nmov.u32 %t2, %tid.x;\n\
             mad.lo.s32 %t3, %t0, %t1, %t2;\nmul.wide.u32 %x2, %t3, 24;\nadd.s64 %x3, %x0, %x2;\n\
             ld.global.u64 %v0, [%x3];\nld.global.u64 %v1, [%x3+8];\n\
             ld.global.u64 %v2, [%x3+16];\n",
        );
        for (at, (kind, name)) in sources.iter().zip(names).enumerate() {
            convert_in(&mut text, *kind, name, &format!("v{at}"));
        }
        let operands: Vec<String> = names.iter().map(|name| format!("%{name}")).collect();
        writeln!(text, "{opcode} %d, {}{immediate};", operands.join(", ")).unwrap();
        convert_out(&mut text, *result);
        text.push_str(
            "mul.wide.u32 %x4, %t3, 8;\nadd.s64 %x5, %x1, %x4;\n\
             st.global.u64 [%x5], %q;\nret;\n}\n",
        );
    }
    text
}

fn width(kind: Kind) -> u64 {
    match kind {
        Pred => 1,
        B16 => u64::from(u16::MAX),
        B32 | F32 => u64::from(u32::MAX),
        B64 | F64 => u64::MAX,
    }
}

/// Runs all cases on all pairs of values.
fn check(name: &str, cases: fn() -> Vec<Case>) {
    if role().is_none() {
        run(name, &[]).assert_success();
        return;
    }
    let (gpu, cases, values) = (Gpu::open(0), cases(), values());
    let mut operands = Vec::new();
    for (index, a) in values.iter().enumerate() {
        for (other, b) in values.iter().enumerate() {
            let c = values[(index * 7 + other * 13 + 5) % values.len()];
            operands.extend([*a, *b, c]);
        }
    }
    let count = operands.len() / 3;
    let from = gpu.upload(&operands);
    let blocks = u32::try_from(count.div_ceil(128)).unwrap();
    let to = gpu.allocate(blocks as usize * 128 * 8);
    operands.resize(blocks as usize * 128 * 3, 0);
    gpu.free(from);
    let from = gpu.upload(&operands);
    let loaded = gpu.try_load(&module(&cases)).unwrap();
    for (index, case) in cases.iter().enumerate() {
        let kernel = gpu.kernel_of(loaded, &format!("k{index}"));
        gpu.launch(kernel, blocks, 128, &mut [from.into(), to.into()]);
        let results: Vec<u64> = gpu.download(to, count);
        for (operands, found) in operands.chunks_exact(3).zip(results) {
            let [a, b, c] = *operands else { unreachable!() };
            let expected = (case.expected)(a, b, c) & width(case.result);
            if !(case.skips)(a, b, c) {
                let opcode = &case.opcode;
                assert_eq!(found, expected, "{opcode}({a:#x}, {b:#x}, {c:#x}): {found:#x}");
            }
        }
    }
    leave()
}

#[test]
fn integer_arithmetic_wraps_around() {
    check("integer_arithmetic_wraps_around", integers::cases);
}

#[test]
fn bits_are_moved_as_documented() {
    check("bits_are_moved_as_documented", bits::cases);
}

#[test]
fn floats_are_rounded_to_nearest_even_with_subnormals() {
    check("floats_are_rounded_to_nearest_even_with_subnormals", floats::cases);
}

#[test]
fn sixteen_bit_floats_are_rounded_once() {
    check("sixteen_bit_floats_are_rounded_once", floats::halves);
}

#[test]
fn comparisons_know_unordered_values() {
    check("comparisons_know_unordered_values", floats::comparisons);
}

#[test]
fn conversions_truncate_extend_round_and_saturate() {
    check("conversions_truncate_extend_round_and_saturate", conversions::cases);
}
