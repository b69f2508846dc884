//! The state of the emulated driver in this process.

pub(crate) mod codes;
pub(crate) mod device;
pub(crate) mod event;
pub(crate) mod host;
pub(crate) mod ipc;
pub(crate) mod kernels;
pub(crate) mod leaks;
pub(crate) mod mapping;
pub(crate) mod memory;
pub(crate) mod multicast;
pub(crate) mod registry;
mod settings;
pub(crate) mod stream;
pub(crate) mod vmm;

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use codes::{Code, Done};
use device::Device;
use event::Event;
use kernels::{Kernel, Loaded};
use registry::{Registry, lock};
use settings::Settings;
use stream::Stream;

/// As many devices as a mask has bits.
pub(crate) const DEVICES_MAX: u32 = 64;

/// The version of the driver: CUDA 12.2.
pub(crate) const VERSION: i32 = 12020;

/// The newest PTX that a driver of this version knows, times ten.
pub(crate) const PTX_VERSION: u32 = 82;

/// Everything that the entry points share.
#[derive(Debug)]
pub(crate) struct Driver {
    pub settings: Settings,
    pub devices: Vec<Device>,
    pub streams: Registry<Stream>,
    pub events: Registry<Event>,
    pub modules: Registry<Loaded>,
    pub kernels: Registry<Kernel>,
    /// How often each entry point was called, where somebody wants to know.
    calls: Mutex<BTreeMap<String, u64>>,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();
static IS_INITIALIZED: AtomicBool = AtomicBool::new(false);
static IS_EXITING: AtomicBool = AtomicBool::new(false);

/// The driver, whether or not the process has initialized it.
pub(crate) fn uninitialized() -> &'static Driver {
    DRIVER.get_or_init(|| {
        let settings = Settings::read();
        let devices = settings.devices.iter().enumerate();
        Driver {
            devices: devices.map(|(ordinal, number)| Device::new(ordinal, *number)).collect(),
            settings,
            streams: Registry::new(0x5E),
            events: Registry::new(0xE0),
            modules: Registry::new(0x30),
            kernels: Registry::new(0xF0),
            calls: Mutex::default(),
        }
    })
}

/// The driver.
///
/// # Errors
///
/// Not initialized, before `cuInit`.
pub(crate) fn driver() -> Done<&'static Driver> {
    // Acquire: pairs with the release of `initialize`.
    if IS_INITIALIZED.load(Ordering::Acquire) {
        Ok(uninitialized())
    } else {
        Err(Code::NOT_INITIALIZED)
    }
}

/// What `cuInit` does.
pub(crate) fn initialize() -> Done {
    if uninitialized().devices.is_empty() {
        return Err(Code::NO_DEVICE);
    }
    // AcqRel: pairs with the acquire of `driver`.
    if !IS_INITIALIZED.swap(true, Ordering::AcqRel) {
        // SAFETY: the function has the signature that an exit handler needs.
        unsafe { libc::atexit(at_exit) };
    }
    Ok(())
}

extern "C" fn at_exit() {
    // Release: pairs with the acquire of `is_exiting`.
    IS_EXITING.store(true, Ordering::Release);
    let driver = uninitialized();
    if driver.settings.reports_counts {
        let counts = lock(&driver.calls);
        let words: Vec<String> = counts.iter().map(|(name, n)| format!("{name}={n}")).collect();
        report(&format!("calls: {}", words.join(" ")));
    }
    leaks::at_exit(driver);
}

/// Whether the process exits. Operations that wait should end.
pub(crate) fn is_exiting() -> bool {
    // Acquire: pairs with the release of `at_exit`.
    IS_EXITING.load(Ordering::Acquire)
}

/// Writes a line to standard error.
pub(crate) fn report(text: &str) {
    // A process whose standard error is closed loses the line, and nothing else.
    let _ = writeln!(std::io::stderr(), "cuda-emulator[{}]: {text}", std::process::id());
}

impl Driver {
    /// Counts a call, or the execution of an operation.
    ///
    /// # Errors
    ///
    /// The error that the settings inject there.
    pub(crate) fn count(&self, name: &str) -> Done {
        if self.settings.injections.is_empty() && !self.settings.reports_counts {
            return Ok(());
        }
        let mut calls = lock(&self.calls);
        let count = calls.entry(name.to_owned()).or_insert(0);
        *count += 1;
        let is_meant =
            |injection: &&settings::Injection| injection.call == name && injection.nth == *count;
        match self.settings.injections.iter().find(is_meant) {
            Some(injection) => {
                report(&format!("{name} number {count} fails with {}", injection.code));
                Err(Code(injection.code))
            }
            None => Ok(()),
        }
    }

    /// The device of an ordinal.
    pub(crate) fn device(&self, ordinal: i32) -> Done<&Device> {
        let device = usize::try_from(ordinal).ok().and_then(|ordinal| self.devices.get(ordinal));
        device.ok_or(Code::INVALID_DEVICE)
    }
}
