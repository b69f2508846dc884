//! Dynamic loss scaling.

use std::sync::{Mutex, MutexGuard, PoisonError};

use unisum::LossScaler;

use crate::handles::{self, Object};
use crate::memory::{check_place, list, put};
use crate::status::{Outcome, guard, unisum_status};

/// Finds the factor by which the loss is multiplied, so that gradients in 16 bits neither vanish
/// nor overflow.
#[derive(Debug)]
pub struct unisum_scaler {
    _private: [u8; 0],
}

/// Settings of a scaler, the same on all ranks; a structure of zeros has the defaults.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_scaler_options {
    /// The first scale; 0 is 65536.
    pub scale: f32,
    /// By how much it grows after `growth_interval` good steps in a row; 0 is 2.
    pub growth: f32,
    /// 0 is 2000.
    pub growth_interval: u32,
    /// By how much it is multiplied after a step that was not finite; 0 is 0.5.
    pub backoff: f32,
    /// The least scale; 0 is 1.
    pub least: f32,
    /// The greatest scale; 0 is 2 to the power of 32.
    pub greatest: f32,
}

struct Scaler(Mutex<LossScaler>);

impl Object for Scaler {
    const KIND: usize = 7;
    const NAME: &'static str = "scaler";
}

impl Scaler {
    fn lock(&self) -> MutexGuard<'_, LossScaler> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a scaler. NULL options are the defaults. Freed by unisum_scaler_free. Not collective.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_scaler_create(
    options: *const unisum_scaler_options,
    scaler: *mut *mut unisum_scaler,
) -> unisum_status {
    guard(|| {
        check_place(scaler, "the scaler")?;
        let mut made = LossScaler::new();
        if !options.is_null() {
            // SAFETY: C promises one.
            let options = unsafe { list(options, 1, "the options") }?;
            made = configured(made, &options[0])?;
        }
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(Scaler(Mutex::new(made)), scaler) };
        Ok(())
    })
}

fn configured(scaler: LossScaler, options: &unisum_scaler_options) -> Outcome<LossScaler> {
    let or = |asked: f32, default: f32| if asked == 0.0 { default } else { asked };
    let interval = if options.growth_interval == 0 { 2000 } else { options.growth_interval };
    let limits = or(options.least, 1.0)..=or(options.greatest, 4_294_967_296.0);
    let scaler = scaler.growing(or(options.growth, 2.0), interval)?;
    let scaler = scaler.backing_off_by(or(options.backoff, 0.5))?.within(limits)?;
    Ok(scaler.starting_at(or(options.scale, 65536.0))?)
}

/// The factor for the loss in this step.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_scaler_scale(
    scaler: *const unisum_scaler,
    scale: *mut f32,
) -> unisum_status {
    guard(|| {
        let scaler = handles::get::<Scaler, _>(scaler)?;
        let now = scaler.lock().scale();
        // SAFETY: C promises that it may be written.
        unsafe { put(scale, now, "the scale") }
    })
}

/// Ends a step, and finds the scale of the next. `nonfinite` is what all ranks were told alike, as
/// by unisum_buckets_wait; `apply` gets whether the optimiser applies the step.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_scaler_update(
    scaler: *const unisum_scaler,
    nonfinite: bool,
    apply: *mut bool,
) -> unisum_status {
    guard(|| {
        let scaler = handles::get::<Scaler, _>(scaler)?;
        check_place(apply, "`apply`")?;
        let applies = scaler.lock().update(nonfinite);
        // SAFETY: C promises that it may be written.
        unsafe { put(apply, applies, "`apply`") }
    })
}

/// The scale and the good steps so far, for a checkpoint.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_scaler_save(
    scaler: *const unisum_scaler,
    saved: *mut u64,
) -> unisum_status {
    guard(|| {
        let scaler = handles::get::<Scaler, _>(scaler)?;
        let bytes = scaler.lock().save();
        // SAFETY: C promises that it may be written.
        unsafe { put(saved, u64::from_le_bytes(bytes), "what is saved") }
    })
}

/// Goes on from what unisum_scaler_save gave, with the settings of this scaler.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_scaler_restore(
    scaler: *const unisum_scaler,
    saved: u64,
) -> unisum_status {
    guard(|| {
        let scaler = handles::get::<Scaler, _>(scaler)?;
        let mut scaler = scaler.lock();
        Ok(scaler.restore(&saved.to_le_bytes())?)
    })
}

/// Frees a scaler.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_scaler_free(scaler: *const unisum_scaler) -> unisum_status {
    guard(|| handles::remove::<Scaler, _>(scaler).map(drop))
}
