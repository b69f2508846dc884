//! Encodings: the same bytes on every instruction set, errors within their bounds, and nothing
//! infinite or NaN that becomes a number.

use half::{bf16, f16};
use proptest::prelude::*;
use unisum_kernels::{Encoding, Isa};

/// Numbers of all magnitudes, many of one, and what is no number.
fn value() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -1.0_f32..1.0,
        4 => any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |x| x.is_finite()),
        1 => Just(0.0), 1 => Just(-0.0), 1 => Just(65520.0), 1 => Just(f32::MAX),
    ]
}

fn anything() -> impl Strategy<Value = f32> {
    prop_oneof![40 => value(), 1 => any::<u32>().prop_map(f32::from_bits)]
}

fn values(of: impl Strategy<Value = f32>) -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(of, 0..700)
}

fn encoding() -> impl Strategy<Value = Encoding> {
    prop::sample::select(&Encoding::ALL[..])
}

fn encode(encoding: Encoding, values: &[f32]) -> (Vec<u8>, bool) {
    let mut bytes = vec![0xa5; encoding.bytes(values.len())];
    let found = encoding.encode(values, &mut bytes);
    (bytes, found)
}

fn decode(encoding: Encoding, bytes: &[u8], count: usize) -> (Vec<f32>, bool) {
    let mut values = vec![0.0; count];
    let found = encoding.decode(bytes, &mut values);
    (values, found)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// How far a value of a block with this greatest magnitude may be from what is decoded.
fn bound(encoding: Encoding, value: f32, greatest: f32) -> f64 {
    let (value, greatest) = (f64::from(value.abs()), f64::from(greatest));
    match encoding {
        Encoding::F16 => (value * 2_f64.powi(-11)).max(2_f64.powi(-25)),
        Encoding::Bf16 => (value * 2_f64.powi(-8)).max(2_f64.powi(-134)),
        Encoding::F8E4M3 => {
            (value * 2_f64.powi(-4)).max(greatest * 2_f64.powi(-17)).max(2_f64.powi(-136))
        }
        Encoding::F8E5M2 => {
            (value * 2_f64.powi(-3)).max(greatest * 2_f64.powi(-31)).max(2_f64.powi(-143))
        }
        Encoding::Int8 => (greatest / 254.0 * 1.000_1).max(2_f64.powi(-127)),
    }
}

/// What `check` says of every block of values and what becomes of them.
fn of_blocks(encoding: Encoding, values: &[f32], check: impl Fn(&[f32], &[f32])) {
    let (bytes, _) = encode(encoding, values);
    let (decoded, _) = decode(encoding, &bytes, values.len());
    let blocks = values.chunks(encoding.block()).zip(decoded.chunks(encoding.block()));
    blocks.for_each(|(values, decoded)| check(values, decoded));
}

proptest! {
    #[test]
    fn all_instruction_sets_give_the_same_bits(
        encoding in encoding(),
        values in values(anything()),
        onto in -1.0_f32..1.0,
    ) {
        let (bytes, found) = encode(encoding, &values);
        let (decoded, _) = decode(encoding, &bytes, values.len());
        let added: Vec<f32> = decoded.iter().map(|value| onto + value).collect();
        for isa in Isa::available() {
            let mut again = vec![0; bytes.len()];
            prop_assert_eq!(encoding.encode_with(isa, &values, &mut again), found, "{}", isa);
            prop_assert_eq!(&again, &bytes, "{}", isa);
            let mut back = vec![0.0; values.len()];
            prop_assert_eq!(encoding.decode_with(isa, &bytes, &mut back), found, "{}", isa);
            prop_assert_eq!(bits(&back), bits(&decoded), "{}", isa);
            back.fill(onto);
            prop_assert_eq!(encoding.add_with(isa, &bytes, &mut back), found, "{}", isa);
            for (sum, expected) in back.iter().zip(&added) {
                let same = sum.to_bits() == expected.to_bits();
                prop_assert!(same || sum.is_nan() && expected.is_nan(), "{}", isa);
            }
        }
    }

    #[test]
    fn what_is_infinite_or_nan_is_told_and_stays_so(
        encoding in encoding(),
        values in values(anything()),
    ) {
        let (bytes, found) = encode(encoding, &values);
        let (decoded, told) = decode(encoding, &bytes, values.len());
        prop_assert_eq!(told, found);
        prop_assert_eq!(told, decoded.iter().any(|value| !value.is_finite()));
        for (value, decoded) in values.iter().zip(&decoded) {
            prop_assert!(value.is_finite() || !decoded.is_finite());
        }
    }

    #[test]
    fn errors_are_within_their_bounds(encoding in encoding(), values in values(value())) {
        of_blocks(encoding, &values, |values, decoded| {
            let greatest = values.iter().fold(0.0_f32, |greatest, value| greatest.max(value.abs()));
            for (value, decoded) in values.iter().zip(decoded) {
                let error = (f64::from(*value) - f64::from(*decoded)).abs();
                let bound = bound(encoding, *value, greatest);
                assert!(
                    error <= bound || !decoded.is_finite() && is_too_large(encoding, greatest),
                    "{encoding:?}: {value:e} became {decoded:e}, the greatest is {greatest:e}"
                );
            }
        });
    }

    #[test]
    fn an_encoding_is_that_of_its_blocks(
        encoding in encoding(),
        values in values(anything()),
        at in 0..4_usize,
    ) {
        let at = (at * encoding.block()).min(values.len() / encoding.block() * encoding.block());
        let (bytes, _) = encode(encoding, &values);
        let (first, second) = values.split_at(at);
        let parts = [encode(encoding, first).0, encode(encoding, second).0];
        prop_assert_eq!(parts.concat(), bytes);
    }

    #[test]
    fn any_bytes_stand_for_values(
        encoding in encoding(),
        count in 0..600_usize,
        seed in prop::collection::vec(any::<u8>(), 1..97),
    ) {
        let bytes: Vec<u8> = seed.iter().copied().cycle().take(encoding.bytes(count)).collect();
        let (decoded, told) = decode(encoding, &bytes, count);
        prop_assert_eq!(told, decoded.iter().any(|value| !value.is_finite()));
    }

    #[test]
    fn sixteen_bits_are_those_of_the_crate_half(values in values(value())) {
        let (f16s, _) = encode(Encoding::F16, &values);
        let (bf16s, _) = encode(Encoding::Bf16, &values);
        for (i, value) in values.iter().enumerate() {
            let at = 2 * i..2 * i + 2;
            prop_assert_eq!(&f16s[at.clone()], &f16::from_f32(*value).to_le_bytes());
            prop_assert_eq!(&bf16s[at], &bf16::from_f32(*value).to_le_bytes());
        }
    }
}

/// Whether finite values of this magnitude become infinite.
fn is_too_large(encoding: Encoding, greatest: f32) -> bool {
    match encoding {
        Encoding::F16 => greatest >= 65520.0,
        Encoding::Bf16 => greatest.to_bits() >= 0x7f7f_8000,
        Encoding::F8E4M3 | Encoding::F8E5M2 => greatest > 1.75 * 2_f32.powi(127),
        Encoding::Int8 => false,
    }
}

#[test]
fn integers_take_at_most_1_02_bytes_a_value() {
    for count in [256, 1000, 4096, 262_144] {
        let bytes = Encoding::Int8.bytes(count);
        assert!(bytes as f64 <= 1.02 * count as f64, "{count} values take {bytes} bytes");
    }
    assert_eq!(Encoding::ALL.map(|encoding| encoding.bytes(0)), [0; 5]);
}

/// The greatest is among them: no scale that is rounded may bring it to infinity.
#[test]
fn the_greatest_magnitudes_of_a_block_stay_finite_up_to_the_limit() {
    for encoding in Encoding::ALL {
        for below in 0..5000_u32 {
            let greatest = f32::from_bits(f32::MAX.to_bits() - below * 431);
            let (bytes, found) = encode(encoding, &[greatest, -greatest, 1.0]);
            let (decoded, told) = decode(encoding, &bytes, 3);
            assert_eq!(found, is_too_large(encoding, greatest), "{encoding:?}: {greatest:e}");
            assert_eq!(found, told);
            assert_eq!(found, !decoded[0].is_finite(), "{encoding:?}: {greatest:e}");
        }
    }
}

/// With one scale for all, the lesser block would vanish.
#[test]
fn a_block_of_small_values_keeps_them_beside_one_of_great_values() {
    for encoding in [Encoding::F8E4M3, Encoding::F8E5M2, Encoding::Int8] {
        let block = encoding.block();
        let values: Vec<f32> = (0..2 * block).map(|i| if i < block { 1e9 } else { 1e-9 }).collect();
        of_blocks(encoding, &values, |values, decoded| {
            assert!(decoded.iter().all(|x| (x / values[0] - 1.0).abs() < 0.07), "{encoding:?}");
        });
    }
}

#[test]
#[should_panic(expected = "bytes of 3 values as Bf16")]
fn bytes_that_do_not_fit_are_refused() {
    Encoding::Bf16.encode(&[0.0; 3], &mut [0; 5]);
}
