//! What is left when the process exits.

use super::memory;
use super::settings::LeakReport;
use super::{Driver, host, multicast, report, vmm};

/// The exit status of a process that leaks, with `CUDA_EMULATOR_LEAKS=fail`.
pub(crate) const EXIT_CODE: i32 = 86;

/// What has not been freed, closed, destroyed or released: names and numbers.
pub(crate) fn left(driver: &Driver) -> Vec<(&'static str, usize)> {
    let (mut allocations, mut opened, mut ranges, mut mappings) = (0, 0, 0, 0);
    for address in memory::all() {
        let counted = memory::with_any(address, |region| {
            match &region.origin {
                memory::Origin::Module => {}
                memory::Origin::Opened { .. } => opened += 1,
                memory::Origin::Reserved(reserved) => {
                    ranges += 1;
                    mappings += reserved.count();
                }
                _ => allocations += usize::from(!region.is_dying()),
            }
            Some(())
        });
        // Somebody else may free it at this moment.
        let _ = counted;
    }
    let (handles, descriptors) = vmm::left();
    let contexts = driver.devices.iter().filter(|device| device.is_active()).count();
    vec![
        ("device allocations", allocations),
        ("opened memory handles", opened),
        ("reserved ranges", ranges),
        ("mappings", mappings),
        ("allocation handles", handles),
        ("multicast bindings", multicast::bindings()),
        ("descriptors of allocations", descriptors),
        ("host allocations", host::count()),
        ("events", driver.events.len()),
        ("streams", driver.streams.len()),
        ("modules", driver.modules.len()),
        ("retained contexts", contexts),
    ]
}

/// Everything that is left, together.
pub(crate) fn count(driver: &Driver) -> usize {
    left(driver).iter().map(|(_, number)| number).sum()
}

/// Reports what is left, as the settings say.
pub(crate) fn at_exit(driver: &Driver) {
    let wanted = driver.settings.leaks;
    if wanted == LeakReport::None || count(driver) == 0 {
        return;
    }
    let left = left(driver).into_iter().filter(|(_, number)| *number > 0);
    let words: Vec<String> = left.map(|(name, number)| format!("{number} {name}")).collect();
    report(&format!("left behind: {}", words.join(", ")));
    if wanted == LeakReport::Fail {
        // SAFETY: ends the process at once, as an exit handler may.
        unsafe { libc::_exit(EXIT_CODE) };
    }
}
