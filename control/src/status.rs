//! What this rank is doing right now, written by the thread that drives a collective and read by
//! the control thread at any moment.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use unisum_kernels::Dtype;
use unisum_link::{Call, CollectiveKind, Rank};

use super::doing::{Needs, Part, Traffic};

/// The words of an encoded call.
const CALL_WORDS: usize = Call::ENCODED / 8;

/// This rank's progress, as others are told it when a deadline expires.
///
/// One thread at a time writes: the one that drives the collective. Nobody ever waits: a call is
/// written into the slot of the oldest and then made current, so that a writer which is preempted
/// half-way leaves the current slot whole.
pub struct Status {
    /// The job's numbers of the communicator's ranks, of which this one is number `rank`.
    ranks: Arc<[Rank]>,
    rank: Rank,
    /// How many calls have begun; it chooses the slot.
    begun: AtomicU64,
    /// How many calls have ended.
    ended: AtomicU64,
    /// How many collectives so far are none of the program's calls, but parts of those.
    uncounted: AtomicU64,
    /// Whom the call under way needs, if that does not follow from what it says of itself.
    needs: AtomicU8,
    /// In a messenger, by rank, the messages from and to this one.
    traffic: Box<[Counts]>,
    slots: [Slot; KEPT],
    /// What newest calls agreed on beside what they say themselves, by their histories.
    terms: Mutex<VecDeque<(u64, Terms)>>,
}

/// Which ranks a call needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Needed {
    /// Those whose blocks its result is made of, where all blocks have elements.
    ByCall = 0,
    /// Some of them perhaps not, which these alone know.
    Unknown = 1,
    /// All.
    All = 2,
}

/// Calls that are remembered.
const KEPT: usize = 16;
/// Longest text of a call, in characters.
const TOLD_MAX: usize = 400;

/// What a call agreed on beside what it says itself, in words.
pub(crate) type Terms = Arc<dyn fmt::Display + Send + Sync>;

/// A call, and what it is in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub call: Call,
    pub text: String,
}

#[derive(Debug, Default)]
struct Slot {
    call: [AtomicU64; CALL_WORDS],
    /// Steps done in the upper half, all steps in the lower.
    steps: AtomicU64,
    bytes: AtomicU64,
    /// How many collectives before it were none of the program's calls.
    uncounted: AtomicU64,
}

/// A [`Status`] at one moment.
///
/// Of a message, the call's root is the rank at the other end, by its number in the job, and its
/// count the message's bytes; [`Snapshot::step`] is 1 if it is received, and [`Snapshot::bytes`] is
/// its tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The newest call, if there was any.
    pub call: Option<Call>,
    /// Whether the rank is still in it.
    pub inside: bool,
    /// Steps done.
    pub step: u32,
    /// All steps.
    pub steps: u32,
    /// Bytes moved in this call.
    pub bytes: u64,
    /// How many collectives before the call were none of the program's calls.
    pub uncounted: u64,
}

/// What a rank did last in each communicator that it is no longer in, by number.
pub(super) type Lasts = std::collections::BTreeMap<u32, Snapshot>;

/// What passed between this rank and another.
#[derive(Debug, Default)]
struct Counts {
    said: AtomicU64,
    heard: AtomicU64,
}

impl Status {
    /// Of rank `rank` in a communicator of ranks that have these numbers in the job.
    pub(super) fn new(ranks: Arc<[Rank]>, rank: Rank) -> Self {
        Self {
            traffic: ranks.iter().map(|_| Counts::default()).collect(),
            ranks,
            rank,
            begun: AtomicU64::default(),
            ended: AtomicU64::default(),
            uncounted: AtomicU64::default(),
            needs: AtomicU8::default(),
            slots: Default::default(),
            terms: Mutex::default(),
        }
    }

    /// The job's numbers of the communicator's ranks.
    pub(super) const fn ranks(&self) -> &Arc<[Rank]> {
        &self.ranks
    }

    /// The calls that begin from now on need these ranks.
    pub fn set_needs(&self, needs: Needed) {
        // Relaxed: the Release store in `begin` comes after it.
        self.needs.store(needs as u8, Ordering::Relaxed);
    }

    /// This rank has sent so many messages to a rank of the communicator.
    pub fn said(&self, peer: Rank, messages: u64) {
        // Release: pairs with the Acquire load in `part`.
        self.traffic[peer].said.store(messages, Ordering::Release);
    }

    /// When it last said what it waits for, it had had so many messages of a rank.
    pub fn heard(&self, peer: Rank, messages: u64) {
        // Release: as above; who sees it sees what this rank then waited for.
        self.traffic[peer].heard.store(messages, Ordering::Release);
    }

    /// What this rank does, for who looks at several communicators.
    pub(super) fn part(&self, communicator: u32) -> Part {
        let traffic = self.traffic.iter().zip(&*self.ranks).map(|(counts, &peer)| {
            // Acquire, twice: pair with the Release stores in `heard` and `said`. Before the
            // snapshot: what was heard since it said what it waits for does not count.
            let heard = counts.heard.load(Ordering::Acquire);
            Traffic { peer, said: counts.said.load(Ordering::Acquire), heard }
        });
        let traffic: Vec<_> = traffic.filter(|it| it.said > 0 || it.heard > 0).collect();
        let doing = self.snapshot();
        // Relaxed: as in `set_needs`. It matters only while the thread is held in the call.
        let needed = self.needs.load(Ordering::Relaxed);
        let needs = match doing.call.filter(|_| doing.inside) {
            Some(_) if needed == Needed::All as u8 => Needs::All,
            Some(call) if needed == Needed::ByCall as u8 => {
                Needs::of(&call, self.ranks[self.rank], &self.ranks)
            }
            _ => Needs::Unknown,
        };
        let lowest = self.ranks.iter().min().copied().unwrap_or(0);
        Part { communicator, lowest, doing, needs, traffic }
    }

    /// A collective begins. A handful of plain stores.
    pub fn begin(&self, call: &Call) {
        // Relaxed: only this thread writes it, and threads take turns under the engine's lock.
        let begun = self.begun.load(Ordering::Relaxed);
        let slot = self.slot(begun + 1);
        // Pairs with the Acquire fence in `snapshot`: who sees one of the stores below sees that
        // `begun` has moved past this slot's former call.
        fence(Ordering::Release);
        for (place, word) in slot.call.iter().zip(call.words()) {
            place.store(word, Ordering::Relaxed);
        }
        slot.uncounted.store(self.uncounted(), Ordering::Relaxed);
        slot.steps.store(0, Ordering::Relaxed);
        slot.bytes.store(0, Ordering::Relaxed);
        // Release: pairs with the Acquire load in `snapshot`, which then sees the slot.
        self.begun.store(begun + 1, Ordering::Release);
    }

    /// `done` of all `steps` are done, and so many bytes were moved in this call. Two plain
    /// stores.
    pub fn step(&self, done: usize, steps: usize, bytes: u64) {
        let half = |steps: usize| u64::from(u32::try_from(steps).unwrap_or(u32::MAX));
        // Relaxed, all: numbers for people, on which nothing depends; and `begun` is this
        // thread's own.
        let slot = self.slot(self.begun.load(Ordering::Relaxed));
        slot.steps.store(half(done) << 32 | half(steps), Ordering::Relaxed);
        slot.bytes.store(bytes, Ordering::Relaxed);
    }

    /// So many more collectives were none of the program's calls: they tried algorithms out, say.
    pub fn discount(&self, collectives: u64) {
        // Relaxed: a number for people; and only the thread whose turn it is adds to it.
        self.uncounted.fetch_add(collectives, Ordering::Relaxed);
    }

    /// How many collectives so far were none of the program's calls.
    pub fn uncounted(&self) -> u64 {
        self.uncounted.load(Ordering::Relaxed) // a number for people
    }

    /// This rank waits in a message.
    pub fn wait_for_message(&self, waiting: &Waiting) {
        self.begin(&waiting.call());
        self.step(usize::from(waiting.receives), 0, waiting.tag);
    }

    /// The collective has ended, well or not. One plain store.
    pub fn end(&self) {
        // Relaxed, twice: `begun` is this thread's own, and `ended` stands for itself.
        self.ended.store(self.begun.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// What the rank is doing. From any thread; never waits for the writer.
    pub fn snapshot(&self) -> Snapshot {
        loop {
            // Acquire: pairs with the Release store in `begin`.
            let begun = self.begun.load(Ordering::Acquire);
            let snapshot = self.read(begun);
            // Pairs with the Release fence in `begin`: if the slot was overwritten while it was
            // read, the load below sees a newer `begun`.
            fence(Ordering::Acquire);
            // Another round means that the rank has begun a call meanwhile: it makes progress.
            if self.begun.load(Ordering::Relaxed) == begun {
                return snapshot;
            }
        }
    }

    fn read(&self, begun: u64) -> Snapshot {
        let uncounted = self.uncounted();
        if begun == 0 {
            return Snapshot { uncounted, ..Snapshot::default() };
        }
        let slot = self.slot(begun);
        // Relaxed, all: the fences in `begin` and `snapshot` order them.
        let call = slot.call.each_ref().map(|word| word.load(Ordering::Relaxed));
        let steps = slot.steps.load(Ordering::Relaxed);
        Snapshot {
            call: Call::from_words(&call),
            inside: self.ended.load(Ordering::Relaxed) < begun,
            step: (steps >> 32) as u32,
            steps: steps as u32,
            bytes: slot.bytes.load(Ordering::Relaxed),
            uncounted,
        }
    }

    /// Says what the call of a history agrees on beside what it says itself. For calls that are no
    /// hot path.
    pub fn note(&self, history: u64, terms: Terms) {
        let mut all = self.terms.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() == KEPT {
            all.pop_front();
        }
        all.push_back((history, terms));
    }

    /// The newest calls in words, the oldest first. From any thread.
    pub(super) fn told(&self) -> Vec<Told> {
        // Acquire: as in `snapshot`.
        let begun = self.begun.load(Ordering::Acquire);
        let oldest = begun.saturating_sub(KEPT as u64 - 1).max(1);
        // Relaxed: as in `read`.
        let before = |begun: u64| self.slot(begun).uncounted.load(Ordering::Relaxed);
        let read = |begun: u64| (begun, self.read(begun).call, before(begun));
        let calls: Vec<_> = (oldest..=begun).map(read).collect();
        // As in `snapshot`.
        fence(Ordering::Acquire);
        let now = self.begun.load(Ordering::Relaxed);
        let terms = self.terms.lock().unwrap_or_else(PoisonError::into_inner);
        let told = |(begun, call, uncounted): (u64, Option<Call>, u64)| {
            // The one after `now` may be written already.
            let call = call.filter(|_| begun + KEPT as u64 > now + 1)?;
            if call.collective == CollectiveKind::Message {
                return None; // it stands for one of those that a rank waits in
            }
            let terms = terms.iter().find(|(history, _)| *history == call.history);
            let terms = terms.map_or_else(String::new, |(_, terms)| terms.to_string());
            let text =
                format!("{}{terms}", describe(&call, uncounted)).chars().take(TOLD_MAX).collect();
            Some(Told { call, text })
        };
        calls.into_iter().filter_map(told).collect()
    }

    fn slot(&self, begun: u64) -> &Slot {
        &self.slots[(begun % KEPT as u64) as usize]
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.snapshot().fmt(f)
    }
}

/// A message that a rank waits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The messenger's communicator.
    pub communicator: u32,
    /// The rank at the other end, by its number in the job.
    pub peer: Rank,
    /// Whether this rank receives it.
    pub receives: bool,
    /// Its elements.
    pub dtype: Dtype,
    /// Its length.
    pub bytes: u64,
    /// The program's tag.
    pub tag: u64,
}

impl Waiting {
    /// The call that stands for it.
    pub fn call(&self) -> Call {
        let Self { communicator, peer, dtype, bytes, .. } = *self;
        let root = peer as u16; // worlds have 2^16 ranks at most
        Call {
            communicator,
            collective: CollectiveKind::Message,
            root,
            ..Call::all_reduce(0, dtype, bytes)
        }
    }
}

impl Snapshot {
    /// The rank that this one waits for in a message.
    pub(super) fn peer(&self) -> Option<Rank> {
        let waits = |call: &Call| self.inside && call.collective == CollectiveKind::Message;
        self.call.filter(waits).map(|call| call.root as Rank)
    }

    /// The message that this rank waits in, in words.
    pub(super) fn message(&self) -> Option<String> {
        let (peer, Call { dtype, count, .. }) = (self.peer()?, self.call?);
        let (what, way) = if self.step == 1 { ("receive", "from") } else { ("send", "to") };
        let tag = self.bytes;
        Some(format!("the {what} of {count} bytes of {dtype} {way} rank {peer} with tag {tag}"))
    }

    /// Orders ranks by how far they are in the sequence of calls: even numbers wait outside call
    /// `position / 2`, odd ones are inside it.
    pub(super) fn position(&self) -> u64 {
        let Some(call) = &self.call else { return 0 };
        let inside = call.number.saturating_mul(2).saturating_add(1);
        if self.inside { inside } else { inside.saturating_add(1) }
    }

    /// Whether the rank is less far in the same call than `other`.
    pub(super) fn is_behind(&self, other: &Self) -> bool {
        let scaled = |a: &Self, b: &Self| u64::from(a.step) * u64::from(b.steps.max(1));
        let (ours, theirs) = (scaled(self, other), scaled(other, self));
        (ours, self.bytes) < (theirs, other.bytes)
    }
}

/// A call as the program knows it: by its number among the program's own calls, where so many
/// collectives before it were none of them, and by the name of its algorithm.
pub fn describe(call: &Call, uncounted: u64) -> String {
    // A call without elements takes an all-reduce's algorithms.
    let kind = if call.count == 0 { CollectiveKind::AllReduce } else { call.collective };
    describe_by(kind, call, uncounted)
}

/// The same of an all-to-all with the elements that it has for one rank, perhaps none.
pub fn describe_for_one(call: &Call, uncounted: u64) -> String {
    describe_by(call.collective, call, uncounted)
}

fn describe_by(kind: CollectiveKind, call: &Call, uncounted: u64) -> String {
    let number = call.number.saturating_sub(uncounted);
    let text = Call { number, ..*call }.to_string();
    let list = unisum_algorithms::algorithms(plan_of(kind, call.root as Rank));
    let name = match call.algorithm {
        Call::BETWEEN_TRIALS => Some("trying algorithms"),
        Call::IN_SWITCH => Some("multimem"),
        number => list.get(usize::from(number)).map(|algorithm| algorithm.name()),
    };
    let told = text.strip_suffix(&format!("algorithm {})", call.algorithm)).zip(name);
    told.map(|(rest, name)| format!("{rest}{name})")).unwrap_or(text)
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { call, inside, step, steps, bytes, uncounted } = self;
        match call {
            None => f.write_str("has called nothing in this communicator yet"),
            Some(Call { collective: CollectiveKind::Message, .. }) if *inside => {
                write!(f, "in {}", self.message().unwrap_or_default())
            }
            Some(Call { collective: CollectiveKind::Message, .. }) => f.write_str("in no message"),
            Some(call) if *inside => {
                let call = describe(call, *uncounted);
                write!(f, "in {call}, step {step} of {steps}, {bytes} bytes moved")
            }
            Some(call) => {
                write!(f, "outside; its last call was {}", describe(call, *uncounted))
            }
        }
    }
}

/// The plans' name of a kind of collective.
pub const fn plan_of(kind: CollectiveKind, root: Rank) -> unisum_algorithms::PlanKind {
    match kind {
        CollectiveKind::Reduce => unisum_algorithms::PlanKind::Reduce { root },
        CollectiveKind::Broadcast => unisum_algorithms::PlanKind::Broadcast { root },
        CollectiveKind::AllGather => unisum_algorithms::PlanKind::AllGather,
        CollectiveKind::ReduceScatter => unisum_algorithms::PlanKind::ReduceScatter,
        CollectiveKind::AllToAll => unisum_algorithms::PlanKind::AllToAll,
        CollectiveKind::Gather => unisum_algorithms::PlanKind::Gather { root },
        CollectiveKind::Scatter => unisum_algorithms::PlanKind::Scatter { root },
        // A barrier is an all-reduce of nothing, and a message has no plan.
        _ => unisum_algorithms::PlanKind::AllReduce,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::tests::call;

    #[test]
    fn a_snapshot_tells_call_and_progress() {
        let status = Status::new([0, 1].into(), 0);
        assert_eq!(status.snapshot(), Snapshot::default());
        status.begin(&call(0));
        status.step(3, 9, 100);
        let (call, uncounted) = (Some(call(0)), 0);
        let inside = Snapshot { call, inside: true, step: 3, steps: 9, bytes: 100, uncounted };
        assert_eq!(status.snapshot(), inside);
        assert_eq!(inside.position(), 1);
        status.end();
        assert_eq!(status.snapshot(), Snapshot { inside: false, ..inside });
        assert_eq!(status.snapshot().position(), 2);
    }

    #[test]
    fn calls_are_told_by_the_programs_numbers_and_the_names_of_algorithms() {
        let status = Status::new([0, 1].into(), 0);
        status.discount(50);
        status.begin(&Call { algorithm: 1, ..call(57) });
        let name = unisum_algorithms::algorithms(plan_of(CollectiveKind::AllReduce, 0))[1].name();
        let text = status.snapshot().to_string();
        assert!(text.contains("all_reduce #7 (") && text.contains(&format!(", {name})")), "{text}");
        // What this version does not know is told as it is.
        let text = describe(&Call { algorithm: 200, ..call(57) }, 0);
        assert!(text.contains("#57 (") && text.contains("algorithm 200)"), "{text}");
        let text = describe(&Call { algorithm: Call::BETWEEN_TRIALS, ..call(57) }, 0);
        assert!(text.ends_with(", trying algorithms)"), "{text}");
        let text = describe(&Call { algorithm: Call::IN_SWITCH, ..call(57) }, 0);
        assert!(text.ends_with(", multimem)"), "{text}");
    }

    #[test]
    fn the_newest_calls_are_told_with_what_they_agreed_on() {
        let status = Status::new([0, 1].into(), 0);
        assert_eq!(status.told(), []);
        for number in 0..40 {
            status.begin(&Call { history: number + 100, ..call(number) });
            status.note(number + 100, Arc::new(format!(", of {number}")));
            status.end();
            let told = status.told();
            let last = told.last().unwrap();
            assert_eq!((last.call.number, last.call.history), (number, number + 100));
            assert!(last.text.ends_with(&format!(", of {number}")), "{}", last.text);
            let numbers: Vec<u64> = told.iter().map(|told| told.call.number).collect();
            let kept = number.min(KEPT as u64 - 2);
            assert_eq!(numbers, (number - kept..=number).collect::<Vec<_>>());
        }
    }

    /// What was no call of the program's is none for the calls after it only.
    #[test]
    fn older_calls_are_told_by_the_numbers_that_they_had() {
        let status = Status::new([0, 1].into(), 0);
        status.begin(&call(3));
        status.discount(50);
        status.begin(&call(54));
        let texts: Vec<String> = status.told().into_iter().map(|told| told.text).collect();
        assert!(texts[0].contains("#3 (") && texts[1].contains("#4 ("), "{texts:?}");
    }

    #[test]
    fn snapshots_are_whole_while_a_rank_calls_in_a_hurry() {
        let status = Status::new([0, 1].into(), 0);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..200_000 {
                    status.begin(&Call { count: number * 3, ..call(number) });
                    status.end();
                }
                over.store(true, Ordering::Release);
            });
            while !over.load(Ordering::Acquire) {
                if let Some(call) = status.snapshot().call {
                    assert_eq!(call.count, call.number * 3);
                }
            }
        });
    }
}
