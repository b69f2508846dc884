//! Whether a replay fits this machine.

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::options::Wire;
use crate::Result;
use crate::world::World;

/// Why a replay of so many elements does not fit, if some host has no memory for it: the same on
/// all ranks.
///
/// Collective.
///
/// # Errors
/// If /proc cannot be read or a collective fails.
pub(crate) fn lack(world: &World, elements: usize, wires: &[Wire]) -> Result<Option<String>> {
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let mut hasher = DefaultHasher::new();
    host.hash(&mut hasher);
    let mut hosts = vec![0; world.comm.world()];
    world.comm.all_gather(&[hasher.finish()], &mut hosts)?;
    let ranks = hosts.iter().filter(|host| **host == hosts[world.comm.rank()]).count();
    let needed = needed_bytes(elements, wires) * ranks as f64;
    // The host that lacks most speaks for all.
    let mut lacking = [needed - available_bytes()?];
    world.max(&mut lacking)?;
    if lacking[0] <= 0.0 {
        return Ok(None);
    }
    let gib = |bytes: f64| bytes / f64::from(1 << 30);
    Ok(Some(format!(
        "gradients of {elements} elements take {:.1} GiB on each rank, which is {:.1} GiB more \
         than a host has available; --scale shrinks the model",
        gib(needed_bytes(elements, wires)),
        gib(lacking[0])
    )))
}

/// What the largest of the ways takes on a rank: ways are measured one after the other.
fn needed_bytes(elements: usize, wires: &[Wire]) -> f64 {
    let of_wire = |wire: &Wire| match wire.0 {
        None => 4 * elements,
        // As `unisum::buckets::Compressed` says.
        Some(encoding) => 20 * elements + 2 * encoding.bytes(elements),
    };
    wires.iter().map(of_wire).max().unwrap_or_default() as f64
}

/// Source: proc_meminfo(5), `MemAvailable`.
fn available_bytes() -> Result<f64> {
    let known = fs::read_to_string("/proc/meminfo")?;
    let line = known.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(1024.0 * kib.ok_or("no MemAvailable in /proc/meminfo")?.parse::<f64>()?)
}
