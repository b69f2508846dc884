//! Communicators: who takes part, and groups of those.

use std::ffi::c_char;

use unisum::Communicator;

use crate::handles::{self, Object};
use crate::memory::{check_place, list, put, put_text, text};
use crate::status::{Outcome, guard, unisum_status};

/// A communicator: this process's membership in a world of ranks that reduce together. All ranks
/// call the same collectives in the same order; calls may come from several threads.
#[derive(Debug)]
pub struct unisum_comm {
    _private: [u8; 0],
}

/// What a communicator's handle stands for.
pub(crate) struct Comm {
    pub(crate) communicator: Communicator,
}

impl Comm {
    pub(crate) const fn new(communicator: Communicator) -> Self {
        Self { communicator }
    }
}

impl Object for Comm {
    const KIND: usize = 2;
    const NAME: &'static str = "communicator";
}

fn comm(handle: *const unisum_comm) -> Outcome<std::sync::Arc<Comm>> {
    handles::get(handle)
}

/// Writes a number of the communicator's.
unsafe fn number(
    handle: *const unisum_comm,
    place: *mut u32,
    of: fn(&Communicator) -> usize,
) -> unisum_status {
    guard(|| {
        let number = of(&comm(handle)?.communicator);
        let number = u32::try_from(number).expect("worlds have 2^16 ranks at most");
        // SAFETY: C promises that it may be written.
        unsafe { put(place, number, "the number") }
    })
}

/// This process's number in the communicator, from 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_rank(
    comm: *const unisum_comm,
    rank: *mut u32,
) -> unisum_status {
    // SAFETY: C promises that it may be written.
    unsafe { number(comm, rank, Communicator::rank) }
}

/// How many ranks there are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_world(
    comm: *const unisum_comm,
    world: *mut u32,
) -> unisum_status {
    // SAFETY: C promises that it may be written.
    unsafe { number(comm, world, Communicator::world) }
}

/// This rank's place among the communicator's ranks on its host: which device it may take.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_local_rank(
    comm: *const unisum_comm,
    local_rank: *mut u32,
) -> unisum_status {
    // SAFETY: C promises that it may be written.
    unsafe { number(comm, local_rank, Communicator::local_rank) }
}

/// How many of the communicator's ranks are on this rank's host.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_local_size(
    comm: *const unisum_comm,
    local_size: *mut u32,
) -> unisum_status {
    // SAFETY: C promises that it may be written.
    unsafe { number(comm, local_size, Communicator::local_size) }
}

/// Where the ranks are, what the links cost, and which algorithm is chosen from which size on: for
/// people, several lines. Copied to `capacity` bytes at `text`, cut if need be, with a NUL byte at
/// the end; `length` gets how long it is without that. Either may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_describe(
    comm: *const unisum_comm,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> unisum_status {
    guard(|| {
        let description = self::comm(comm)?.communicator.describe().to_string();
        // SAFETY: C promises that both may be written.
        unsafe { put_text(&description, text, capacity, length) }
    })
}

/// The transports in use, as "tcp", "shm" or "shm+tcp". Else as unisum_comm_describe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_transport(
    comm: *const unisum_comm,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> unisum_status {
    guard(|| {
        let comm = self::comm(comm)?;
        // SAFETY: C promises that both may be written.
        unsafe { put_text(comm.communicator.transport(), text, capacity, length) }
    })
}

/// Fixes the algorithm of all later calls by its name, or, with NULL, has it chosen for each call.
/// All ranks call it alike, between collectives.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_set_algorithm(
    comm: *const unisum_comm,
    name: *const c_char,
) -> unisum_status {
    guard(|| {
        let comm = self::comm(comm)?;
        // SAFETY: C promises a text.
        let name = (!name.is_null()).then(|| unsafe { text(name, "the name") }).transpose()?;
        Ok(comm.communicator.set_algorithm(name)?)
    })
}

/// Divides the communicator: ranks of the same color make a group, numbered by `key` and then by
/// rank. A rank with a negative color is in no group: it gets NULL. The group is a communicator of
/// its own, freed by unisum_comm_free. Collective: every rank calls it. Blocks.
///
/// In an elastic job, a group of some of the ranks goes on while none of its own is lost; its
/// errors name ranks by their numbers in the group.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_split(
    comm: *const unisum_comm,
    color: i64,
    key: i64,
    group: *mut *mut unisum_comm,
) -> unisum_status {
    guard(|| {
        let comm = self::comm(comm)?;
        check_place(group, "the group")?;
        let color = match color {
            ..0 => None,
            _ => Some(u32::try_from(color).or_else(|_| {
                crate::status::invalid(format!("the color {color} is above {}", u32::MAX))
            })?),
        };
        give_group(comm.communicator.split(color, key)?, group)
    })
}

/// Makes a group of the ranks that are listed, numbered in the order of the list, which is the same
/// on all ranks of the communicator. Those that are not in it get NULL. Else as unisum_comm_split.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_subset(
    comm: *const unisum_comm,
    ranks: *const u32,
    count: usize,
    group: *mut *mut unisum_comm,
) -> unisum_status {
    guard(|| {
        let comm = self::comm(comm)?;
        check_place(group, "the group")?;
        // SAFETY: C promises so many.
        let ranks = unsafe { list(ranks, count, "the list of ranks") }?;
        let ranks: Vec<usize> = ranks.iter().map(|&rank| rank as usize).collect();
        give_group(comm.communicator.subset(&ranks)?, group)
    })
}

/// Makes a communicator of the same ranks with an order of calls of its own. Else as
/// unisum_comm_split.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_duplicate(
    comm: *const unisum_comm,
    duplicate: *mut *mut unisum_comm,
) -> unisum_status {
    guard(|| {
        let comm = self::comm(comm)?;
        check_place(duplicate, "the duplicate")?;
        give_group(Some(comm.communicator.duplicate()?), duplicate)
    })
}

pub(crate) fn give_group(group: Option<Communicator>, place: *mut *mut unisum_comm) -> Outcome {
    match group {
        // SAFETY: C promises that it may be written.
        Some(group) => unsafe { handles::give(Comm::new(group), place) },
        // SAFETY: as above.
        None => unsafe { place.write(std::ptr::null_mut()) },
    }
    Ok(())
}

/// Ends the job on all ranks, from any thread of any rank: all calls under way, here and elsewhere,
/// end within moments with UNISUM_ABORTED and an error that names this rank and says why. Later
/// calls repeat it. In an elastic job, this ends only the communicator and groups of all its ranks.
/// Gives UNISUM_OK, also if the job had ended before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_abort(
    comm: *const unisum_comm,
    why: *const c_char,
) -> unisum_status {
    guard(|| {
        let comm = self::comm(comm)?;
        // SAFETY: C promises a text.
        let why = unsafe { text(why, "the reason") }?;
        let error = comm.communicator.abort(why);
        match error.kind() {
            unisum::ErrorKind::Forked => Err(error.into()),
            _ => Ok(()),
        }
    })
}

/// Leaves, and frees the communicator. Blocks until works under way have ended. Calls of other
/// threads that are under way go on, and the last of them leaves. Works, messengers, buckets,
/// groups and memory made by it are freed on their own. Free communicators before the process ends:
/// the others would take it for lost if they still wait for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_free(comm: *const unisum_comm) -> unisum_status {
    guard(|| handles::remove::<Comm, _>(comm).map(drop))
}
