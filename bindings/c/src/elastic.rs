//! Jobs that outlive their ranks.

use std::ffi::c_void;
use std::ptr;

use unisum::Dtype;
use unisum::buckets::StepReport;

use crate::buckets::{Layer, unisum_buckets};
use crate::communicator::{Comm, unisum_comm};
use crate::handles;
use crate::memory::{check, check_place, elements, give_bytes, list, put};
use crate::status::{guard, numbers, unisum_status};

/// How the view of an elastic job changed during a step, which all ranks that are left have ended
/// in the same way.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_step_change {
    /// The epoch in which the step ended: unisum_buckets_take_communicator gives its communicator.
    pub epoch: u64,
    /// By rank of that epoch, which process it is, as in unisum_comm_view.
    pub processes: *const u64,
    /// How many ranks it has.
    pub process_count: usize,
    /// The ranks that were lost, as they were numbered when the step began.
    pub lost: *const u32,
    /// How many.
    pub lost_count: usize,
    /// Whether the gradients were averaged again, over the ranks that are left; otherwise they are
    /// averages over those that there were before.
    pub redone: bool,
    /// From when this rank noticed the first loss until it was in the view, in seconds.
    pub took_s: f64,
}

/// What a change points to.
pub(crate) struct Change {
    told: unisum_step_change,
    _processes: Vec<u64>,
    _lost: Vec<u32>,
}

// SAFETY: it points to what it owns, and nobody writes there.
unsafe impl Send for Change {}
// SAFETY: as above.
unsafe impl Sync for Change {}

impl Change {
    /// What a report tells of a change, if there was one.
    pub(crate) fn of(report: &StepReport) -> Option<Self> {
        let change = report.change.as_ref()?;
        // Their places stay the same while the change is moved.
        let (processes, lost) = (change.view.processes.clone(), numbers(&change.lost));
        let told = unisum_step_change {
            epoch: change.view.epoch,
            processes: processes.as_ptr(),
            process_count: processes.len(),
            lost: lost.as_ptr(),
            lost_count: lost.len(),
            redone: change.redone,
            took_s: change.took.as_secs_f64(),
        };
        Some(Self { told, _processes: processes, _lost: lost })
    }

    /// Where C finds it while it lives in this place; NULL if there is none.
    pub(crate) fn place(change: Option<&Self>) -> *const unisum_step_change {
        change.map_or(ptr::null(), |change| &raw const change.told)
    }
}

/// Who is in an elastic job: `epoch` gets 1 at the start of the job and 1 more after each change,
/// or 0 if the job is not elastic (UNISUM_ELASTIC), and for groups. `processes` gets, by rank,
/// which process it is, `capacity` at most: the same process has the same number in all epochs.
/// `count` gets how many ranks there are. All but the communicator may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_view(
    comm: *const unisum_comm,
    epoch: *mut u64,
    processes: *mut u64,
    capacity: usize,
    count: *mut usize,
) -> unisum_status {
    guard(|| {
        let view = handles::get::<Comm, _>(comm)?.communicator.view();
        let (number, members) = view.map_or((0, Vec::new()), |it| (it.epoch, it.processes));
        if !processes.is_null() {
            check_place(processes, "the processes")?;
            for (place, &process) in members.iter().enumerate().take(capacity) {
                // SAFETY: C promises so many.
                let place = unsafe { processes.add(place) };
                // SAFETY: as above.
                unsafe { put(place, process, "a process") }?;
            }
        }
        if !count.is_null() {
            // SAFETY: C promises that it may be written.
            unsafe { put(count, members.len(), "the count") }?;
        }
        if epoch.is_null() {
            return Ok(());
        }
        // SAFETY: as above.
        unsafe { put(epoch, number, "the epoch") }
    })
}

/// Makes the communicator of the ranks that are left, after UNISUM_VIEW_CHANGED: they are numbered
/// anew, in the same order. Messengers, buckets and groups of all ranks are made again from it;
/// memory stays, and groups of some ranks go on if none of these is lost.
/// The old communicator is still to be freed.
///
/// Collective: every rank that is left calls it. Blocks until all have. If ranks are lost
/// meanwhile, it goes on with those that are left then. If the view has not changed, this makes it
/// change, with the same ranks. UNISUM_RANK_LOST if too few are left, or if the others went on
/// without this rank.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_rebuild(
    comm: *const unisum_comm,
    next: *mut *mut unisum_comm,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        check_place(next, "the communicator")?;
        let rebuilt = comm.communicator.rebuild()?;
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(Comm::new(rebuilt), next) };
        Ok(())
    })
}

/// How many processes ask to be let into an elastic job (unisum_join), as far as this rank knows:
/// other ranks may know of more, or of fewer. 0 if the job is not elastic, and for groups. Never
/// blocks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_newcomers(
    comm: *const unisum_comm,
    count: *mut u32,
) -> unisum_status {
    guard(|| {
        let known = handles::get::<Comm, _>(comm)?.communicator.newcomers();
        let known = u32::try_from(known).unwrap_or(u32::MAX);
        // SAFETY: C promises that it may be written.
        unsafe { put(count, known, "the count") }
    })
}

/// Makes the communicator of a view that the processes enter which ask for it: their ranks follow
/// those that there are. If nobody asks, or those that ask are lost, there is another view all the
/// same. Calls of others on the old communicator end with UNISUM_VIEW_CHANGED. Newcomers have a
/// communicator in the same state, and nothing else: unisum_comm_share_state gives them the
/// program's.
///
/// Collective: every rank calls it, for example once a minimum of unisum_comm_newcomers over all
/// ranks has shown that all know of one. Else as unisum_comm_rebuild. With buckets, call
/// unisum_buckets_admit.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_admit(
    comm: *const unisum_comm,
    next: *mut *mut unisum_comm,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        check_place(next, "the communicator")?;
        let admitted = comm.communicator.admit()?;
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(Comm::new(admitted), next) };
        Ok(())
    })
}

/// Gives the program's state (parameters, the optimiser's, the position in the data) to ranks that
/// have none, such as newcomers. A rank that has it gives `bytes` bytes at `state`: the lowest of
/// them sends, and on the others the state has to be the same, byte for byte, which is compared by
/// fingerprints. A rank that has none gives NULL, and gets memory at `received`, `received_bytes`
/// long, to be freed by unisum_free. On ranks that gave a state, `received` gets NULL and
/// `received_bytes` 0; both may be NULL there.
///
/// Collective: every rank calls it. Blocks. UNISUM_MISMATCH, on all ranks, if states differ:
/// unisum_last_error names those that differ from the lowest. UNISUM_CONFIGURATION if no rank has
/// one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_share_state(
    comm: *const unisum_comm,
    state: *const c_void,
    bytes: usize,
    received: *mut *mut c_void,
    received_bytes: *mut usize,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        let has_state = !state.is_null();
        check(Dtype::U8, state, bytes, false, "the state")?;
        if !has_state || !received.is_null() {
            check_place(received, "the state")?;
        }
        if !has_state || !received_bytes.is_null() {
            check_place(received_bytes, "the length")?;
        }
        // SAFETY: C promises so many.
        let own = unsafe { elements::<u8>(state, bytes) };
        let got = comm.communicator.share_state(has_state.then_some(own))?;
        let length = got.as_ref().map_or(0, Vec::len);
        let start = got.map_or(Ok(ptr::null_mut()), give_bytes)?;
        if !received.is_null() {
            // SAFETY: C promises that it may be written.
            unsafe { put(received, start, "the state") }?;
        }
        if !received_bytes.is_null() {
            // SAFETY: as above.
            unsafe { put(received_bytes, length, "the length") }?;
        }
        Ok(())
    })
}

/// Makes the communicator of all ranks but those that are listed, which need not take part: their
/// calls end with UNISUM_RANK_LOST. Collective: every other rank calls it, with the same list. Else
/// as unisum_comm_rebuild.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_shrink(
    comm: *const unisum_comm,
    exclude: *const u32,
    count: usize,
    next: *mut *mut unisum_comm,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        check_place(next, "the communicator")?;
        // SAFETY: C promises so many.
        let exclude = unsafe { list(exclude, count, "the list of ranks") }?;
        let exclude: Vec<usize> = exclude.iter().map(|&rank| rank as usize).collect();
        let smaller = comm.communicator.shrink(&exclude)?;
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(Comm::new(smaller), next) };
        Ok(())
    })
}

/// Ends all calls on an elastic job's communicator, on all ranks, with UNISUM_VIEW_CHANGED: all
/// then call unisum_comm_rebuild. Not collective: any thread of any rank may call it. Returns at
/// once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_revoke(comm: *const unisum_comm) -> unisum_status {
    guard(|| Ok(handles::get::<Comm, _>(comm)?.communicator.revoke()?))
}

/// Gives the communicator of the ranks that are left, if steps have changed the view of an elastic
/// job (unisum_step_report.change) since the last call of this; else NULL. It takes the place of
/// the earlier one, which has ended, and is freed by unisum_comm_free, as that is. The buckets go
/// on with it. Not collective, not blocking. Not while a step is under way.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_take_communicator(
    buckets: *const unisum_buckets,
    comm: *mut *mut unisum_comm,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        check_place(comm, "the communicator")?;
        let taken = layer.alone()?.idle()?.take_communicator();
        crate::communicator::give_group(taken, comm)
    })
}

/// Lets the processes into the job that ask for it (unisum_step_report.newcomers), and gives the
/// communicator of the view, in place of the earlier one, which is still to be freed. As
/// unisum_comm_admit, but these buckets, their gradients and what an encoding keeps stay.
///
/// Collective: every rank calls it, between two steps, and none while gradients accumulate.
/// Newcomers make their buckets meanwhile, with the same parameters and options, before they call
/// anything else on their communicator. Blocks until they have. UNISUM_CONFIGURATION if the job is
/// not elastic, if the buckets are sharded, or while gradients accumulate; UNISUM_MISMATCH, on all
/// ranks, if a newcomer has other parameters or options.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_buckets_admit(
    buckets: *const unisum_buckets,
    next: *mut *mut unisum_comm,
) -> unisum_status {
    guard(|| {
        let layer = handles::get::<Layer, _>(buckets)?;
        check_place(next, "the communicator")?;
        let admitted = layer.alone()?.idle()?.admit()?;
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(Comm::new(admitted), next) };
        Ok(())
    })
}
