//! What must hold of saved state, whatever a checkpoint holds in its place.

use unisum_kernels::Dtype;
use unisum_link::fuzzing::Target;

use super::LossScaler;
use super::codec::Kept;
use super::layout::Layout;
use super::parameter::Parameter;
use super::power::State;

pub(crate) const TARGETS: &[Target] = &[
    Target { name: "kept_values", check: check_kept, seeds: kept_seeds },
    Target { name: "power_state", check: check_power, seeds: power_seeds },
    Target { name: "loss_scaler", check: check_scaler, seeds: scaler_seeds },
    Target { name: "bucket_layout", check: check_layout, seeds: layout_seeds },
];

/// Values that are accepted are written as bytes that say the same.
fn check_kept(bytes: &[u8]) {
    let Ok(kept) = Kept::from_bytes(bytes) else { return };
    let written = kept.to_bytes();
    assert_eq!(written.len(), bytes.len());
    assert_eq!(Kept::from_bytes(&written).map(|kept| kept.to_bytes()), Ok(written));
    // Whatever ranges it has, others can be looked for.
    kept.copy_to("w", 2, &mut [0.0; 4]);
}

fn kept_seeds() -> Vec<Vec<u8>> {
    let mut kept = Kept::default();
    kept.put("w", 3, &[1.0, f32::NAN]);
    kept.put("layer.0.bias", 0, &[0.5]);
    vec![kept.to_bytes(), Kept::default().to_bytes()]
}

/// A state that is accepted is written as bytes that say the same.
fn check_power(bytes: &[u8]) {
    let Ok(state) = State::from_bytes(bytes) else { return };
    let written = state.to_bytes();
    assert_eq!(State::from_bytes(&written).map(|state| state.to_bytes()), Ok(written));
}

fn power_seeds() -> Vec<Vec<u8>> {
    vec![State::default().to_bytes()]
}

/// A scaler that is restored scales by a number within its limits, and one that refuses stays as
/// it was.
fn check_scaler(bytes: &[u8]) {
    let mut scaler = LossScaler::new();
    if scaler.restore(bytes).is_err() {
        assert_eq!(scaler, LossScaler::new());
    }
    assert!((1.0..=2_f32.powi(32)).contains(&scaler.scale()));
    assert!(scaler.update(false));
}

fn scaler_seeds() -> Vec<Vec<u8>> {
    vec![LossScaler::new().save().to_vec()]
}

/// A layout that is accepted has each parameter once, and is written as the bytes that it was read
/// from. The first byte says into how many pieces a bucket can be cut.
fn check_layout(bytes: &[u8]) {
    let Some((&pieces, bytes)) = bytes.split_first() else { return };
    let pieces = usize::from(pieces).max(1);
    if let Ok(layout) = Layout::from_bytes(bytes, &parameters(), pieces) {
        assert_eq!(layout.to_bytes(), bytes);
    }
}

fn parameters() -> Vec<Parameter> {
    let lengths = [(3, Dtype::F32), (4, Dtype::F32), (5, Dtype::F16), (70, Dtype::Bf16)];
    let parameter = |(at, (len, dtype)): (usize, (usize, Dtype))| {
        Parameter::new(format!("p{at}"), &[len], dtype)
    };
    lengths.into_iter().enumerate().map(parameter).collect()
}

fn layout_seeds() -> Vec<Vec<u8>> {
    let words = |words: &[u32]| words.iter().flat_map(|it| it.to_le_bytes()).collect::<Vec<_>>();
    // Version, buckets, and in each how many parameters and which.
    let layouts = [words(&[1, 3, 2, 1, 0, 1, 2, 1, 3]), words(&[7, 4, 1, 3, 1, 2, 1, 1, 1, 0])];
    layouts.map(|layout| [&[4], &layout[..]].concat()).to_vec()
}
