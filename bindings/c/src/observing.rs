//! What a communicator has done, is doing and consists of, as data.
//!
//! C gets structures in memory of the library's, which it frees. They may get fields at their ends,
//! so lists of them are lists of pointers: no program depends on their size. They are writable only
//! so that a program need not say `const` to own one.

use std::any::Any;
use std::ffi::{CString, c_char};
use std::ptr;

use unisum::{Description, LinkStats, MeasuredCost, Stats};

use crate::communicator::{Comm, unisum_comm};
use crate::handles;
use crate::memory::{check_place, give_structure, put};
use crate::status::{Outcome, guard, unisum_status};

/// What moved between this rank and a peer.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_peer_stats {
    /// Payload bytes sent to it.
    pub sent: u64,
    /// Payload bytes received from it.
    pub received: u64,
}

/// What a link has counted.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_link_stats {
    /// The transport's name, as in "verbs".
    pub transport: *const c_char,
    /// What is counted, which is the transport's choice.
    pub names: *const *const c_char,
    /// How much of each.
    pub values: *const u64,
    /// How many counters there are.
    pub count: usize,
}

/// What a communicator has done so far on this rank, and what it is doing. Fields may be added at
/// the end.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_stats {
    /// How many bytes this structure has in the library that wrote it: a field beyond them is not
    /// there.
    pub size: usize,
    /// Collectives that have ended well, those included that try algorithms.
    pub calls: u64,
    /// How often a thread went to sleep in a collective because a peer was not there yet.
    pub sleeps: u64,
    /// For how long in all, in seconds.
    pub slept_s: f64,
    /// By rank, what moved between the two in transfers; what ranks read in each other's shared
    /// memory is not counted. Transfers count when all of their run have ended.
    pub peers: *const *const unisum_peer_stats,
    /// How many there are: the world, or 0 if that is 1.
    pub peer_count: usize,
    /// What those of the links that count have counted. They also count what no collective does:
    /// connecting, measuring, trying algorithms.
    pub links: *const *const unisum_link_stats,
    /// How many of them there are.
    pub link_count: usize,
    /// The collective that is under way, in words, as in errors; NULL if none is.
    pub running: *const c_char,
    /// Steps of it that were done when it last waited.
    pub running_step: u64,
    /// All its steps; 0 until it waits.
    pub running_steps: u64,
    /// Payload bytes that had been transferred then.
    pub running_bytes: u64,
}

/// A rank of a job.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_rank_description {
    /// Ranks of the same node share memory.
    pub node: u64,
    /// Its process, in its own PID namespace.
    pub pid: u64,
    /// Where others reach it, the preferred address first.
    pub addresses: *const *const c_char,
    /// How many addresses it has.
    pub address_count: usize,
}

/// What was measured when a job started: a time however few bytes there are, and a rate.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_measured_cost {
    /// What it is of, as in "inside a node".
    pub what: *const c_char,
    /// By whom it was measured.
    pub source: *const c_char,
    /// Seconds before the first byte.
    pub latency_s: f64,
    /// 0 if that is too fast to be told.
    pub bytes_per_second: f64,
    /// The same for bytes that are in a cache; 0 where that makes no difference.
    pub bytes_per_second_in_cache: f64,
}

/// Which algorithm all-reduces of f32 use, above a size and up to another one.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_algorithm_range {
    /// Buffers of more bytes than these.
    pub above: usize,
    /// Buffers of so many bytes at most.
    pub up_to: usize,
    /// The algorithm's name.
    pub algorithm: *const c_char,
    /// The modelled time at `up_to`, in seconds; negative if it is not modelled.
    pub seconds: f64,
}

/// What a communicator consists of. Fields may be added at the end.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_description {
    /// How many bytes this structure has in the library that wrote it: a field beyond them is not
    /// there.
    pub size: usize,
    /// All of this for people, in several lines.
    pub text: *const c_char,
    /// Which launcher started the ranks and how they found each other, or what the communicator was
    /// made from.
    pub origin: *const c_char,
    /// The transports in use, as "tcp", "shm" or "shm+tcp"; "none" in a world of one.
    pub transport: *const c_char,
    /// How the transport is protected from others, in words; NULL if there is nothing to protect.
    pub protection: *const c_char,
    /// How long joining took on this rank, in seconds; negative unless it is a job's own
    /// communicator.
    pub joined_in_s: f64,
    /// By rank; only of a job's own communicator with several ranks.
    pub ranks: *const *const unisum_rank_description,
    /// How many there are.
    pub rank_count: usize,
    /// What the links say of themselves, as the RDMA devices in use.
    pub links: *const *const c_char,
    /// How many lines that are.
    pub link_count: usize,
    /// What was measured when the job started: what algorithms are chosen by.
    pub costs: *const *const unisum_measured_cost,
    /// How many there are.
    pub cost_count: usize,
    /// Where the costs come from if they were not measured, and which file keeps what is settled.
    pub notes: *const *const c_char,
    /// How many lines that are.
    pub note_count: usize,
    /// The algorithms of an all-reduce of f32, by size in ascending order.
    pub algorithms: *const *const unisum_algorithm_range,
    /// How many ranges there are.
    pub algorithm_count: usize,
}

/// What a structure of C's points to, and the structure itself.
#[derive(Default)]
struct Kept(Vec<Box<dyn Any + Send>>);

/// A list or a structure that the library does not touch any more.
struct Fixed<T>(#[expect(dead_code, reason = "C reads it")] Vec<T>);

// SAFETY: pointers in it lead to what the same `Kept` has; the library only drops all of it, once.
unsafe impl<T> Send for Fixed<T> {}

impl Kept {
    fn text(&mut self, text: &str) -> *const c_char {
        // Texts are made by the library; one with a NUL byte would end there.
        let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
        let start = text.as_ptr();
        // Its place stays the same while it is moved.
        self.0.push(Box::new(text));
        start
    }

    fn text_or_null(&mut self, text: Option<&str>) -> *const c_char {
        text.map_or(ptr::null(), |text| self.text(text))
    }

    fn texts<'a>(&mut self, texts: impl IntoIterator<Item = &'a str>) -> *const *const c_char {
        let texts = texts.into_iter().map(|text| self.text(text)).collect();
        self.list(texts)
    }

    /// NULL if it is empty.
    fn list<T: 'static>(&mut self, list: Vec<T>) -> *const T {
        if list.is_empty() {
            return ptr::null();
        }
        let start = list.as_ptr();
        self.0.push(Box::new(Fixed(list)));
        start
    }

    /// A list of pointers to these.
    fn pointers<T: 'static>(&mut self, list: Vec<T>) -> *const *const T {
        let count = list.len();
        let start = self.list(list);
        self.list((0..count).map(|index| start.wrapping_add(index)).collect())
    }

    /// Gives C a structure that points to what is kept, and all of that with it.
    fn give<T: 'static>(mut self, structure: T) -> Outcome<*mut T> {
        let mut structure = vec![structure];
        let start = structure.as_mut_ptr();
        self.0.push(Box::new(Fixed(structure)));
        give_structure(start.addr(), Box::new(self.0))?;
        Ok(start)
    }

    fn link(&mut self, link: &LinkStats) -> unisum_link_stats {
        unisum_link_stats {
            transport: self.text(link.transport),
            names: self.texts(link.counters.iter().map(|(name, _)| *name)),
            values: self.list(link.counters.iter().map(|(_, value)| *value).collect()),
            count: link.counters.len(),
        }
    }

    fn stats(&mut self, stats: &Stats) -> unisum_stats {
        let peer =
            |it: &unisum::PeerStats| unisum_peer_stats { sent: it.sent, received: it.received };
        let links = stats.links.iter().map(|link| self.link(link)).collect();
        let running = stats.running.as_ref();
        unisum_stats {
            size: size_of::<unisum_stats>(),
            calls: stats.calls,
            sleeps: stats.sleeps,
            slept_s: stats.slept.as_secs_f64(),
            peers: self.pointers(stats.peers.iter().map(peer).collect()),
            peer_count: stats.peers.len(),
            links: self.pointers(links),
            link_count: stats.links.len(),
            running: self.text_or_null(running.map(|it| &it.call[..])),
            running_step: running.map_or(0, |it| it.step.into()),
            running_steps: running.map_or(0, |it| it.steps.into()),
            running_bytes: running.map_or(0, |it| it.bytes),
        }
    }

    fn rank(&mut self, rank: &unisum::RankDescription) -> unisum_rank_description {
        unisum_rank_description {
            node: rank.node as u64,
            pid: rank.pid.into(),
            addresses: self.texts(rank.addresses.iter().map(String::as_str)),
            address_count: rank.addresses.len(),
        }
    }

    fn cost(&mut self, cost: &MeasuredCost) -> unisum_measured_cost {
        unisum_measured_cost {
            what: self.text(&cost.what),
            source: self.text(&cost.source),
            latency_s: cost.rates.latency_s,
            bytes_per_second: cost.rates.bytes_per_second.unwrap_or(0.0),
            bytes_per_second_in_cache: cost.rates.bytes_per_second_in_cache.unwrap_or(0.0),
        }
    }

    fn description(&mut self, it: &Description) -> unisum_description {
        let ranks = it.ranks.iter().map(|rank| self.rank(rank)).collect();
        let costs = it.costs.iter().map(|cost| self.cost(cost)).collect();
        let range = |range: &unisum::AlgorithmRange| unisum_algorithm_range {
            above: range.above,
            up_to: range.up_to,
            algorithm: self.text(range.algorithm),
            seconds: range.seconds.unwrap_or(-1.0),
        };
        let algorithms = it.algorithms.iter().map(range).collect();
        unisum_description {
            size: size_of::<unisum_description>(),
            text: self.text(&it.to_string()),
            origin: self.text(&it.origin),
            transport: self.text(&it.transport),
            protection: self.text_or_null(it.protection.as_deref()),
            joined_in_s: it.joined_in.map_or(-1.0, |time| time.as_secs_f64()),
            ranks: self.pointers(ranks),
            rank_count: it.ranks.len(),
            links: self.texts(it.links.iter().map(String::as_str)),
            link_count: it.links.len(),
            costs: self.pointers(costs),
            cost_count: it.costs.len(),
            notes: self.texts(it.notes.iter().map(String::as_str)),
            note_count: it.notes.len(),
            algorithms: self.pointers(algorithms),
            algorithm_count: it.algorithms.len(),
        }
    }
}

/// What a communicator has done so far on this rank, and what it is doing, as it is now; to be
/// freed by unisum_free. Not collective. Any thread may call it at any time, also while a call is
/// stuck: it waits for none. In a world of one everything is zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_stats(
    comm: *const unisum_comm,
    stats: *mut *mut unisum_stats,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        check_place(stats, "the statistics")?;
        let mut kept = Kept::default();
        let now = kept.stats(&comm.communicator.stats());
        // SAFETY: C promises that it may be written.
        unsafe { put(stats, kept.give(now)?, "the statistics") }
    })
}

/// What a communicator consists of: where the ranks are, what the links cost, which algorithm is
/// chosen from which size on; to be freed by unisum_free. unisum_comm_describe gives its text
/// alone. Not collective; never waits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_comm_description(
    comm: *const unisum_comm,
    description: *mut *mut unisum_description,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        check_place(description, "the description")?;
        let mut kept = Kept::default();
        let now = kept.description(&comm.communicator.describe());
        // SAFETY: C promises that it may be written.
        unsafe { put(description, kept.give(now)?, "the description") }
    })
}
