//! The writes of one connection: what waits to be posted, what was posted, what was reported, and
//! how many the peer has announced. Nothing here touches a device.
//!
//! Where queue pairs are made anew, writes are kept until they are reported, and numbered from 0
//! over all queue pairs of the connection. Each takes one receive of the peer, and they come in
//! order, so that the number of those it has heard tells which ones arrived.

use std::collections::VecDeque;

use crate::queue_pair::Write;

/// What a write carries, for its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carries {
    /// A small message from its cell.
    Small,
    /// A part of the large message with this number.
    Large(usize),
    /// Nothing that anything waits for.
    Word,
}

/// What is known to be done once a write is reported: itself and all writes before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Finished {
    pub(crate) requests: usize,
    pub(crate) smalls: u32,
    pub(crate) large: Option<usize>,
}

impl Finished {
    fn add(&mut self, carries: Carries) {
        self.requests += 1;
        match carries {
            Carries::Small => self.smalls += 1,
            Carries::Large(number) => self.large = Some(number),
            Carries::Word => {}
        }
    }
}

/// Writes that a queue pair holds.
pub(crate) const WRITES: usize = 128;

/// The writes of a connection, over all its queue pairs.
#[derive(Debug)]
pub(crate) struct Ledger {
    pending: VecDeque<(Write, Carries)>,
    /// The number of writes that the queue has room for.
    room: usize,
    /// The signaled writes under way, oldest first.
    under_way: VecDeque<Finished>,
    /// The posted writes that are not reported, oldest first, if they are kept. It has room for
    /// all from the start.
    kept: Option<VecDeque<(Write, Carries)>>,
    /// The number of writes that are known to be done: the number of the oldest one kept.
    done: u64,
    /// The number of the peer's writes that were heard.
    heard: u64,
}

impl Ledger {
    /// An empty one; `keeps` where queue pairs may be made anew.
    pub(crate) fn new(keeps: bool) -> Self {
        Self {
            pending: VecDeque::new(),
            room: WRITES,
            under_way: VecDeque::new(),
            kept: keeps.then(|| VecDeque::with_capacity(WRITES)),
            done: 0,
            heard: 0,
        }
    }

    /// Appends a write to those to post.
    pub(crate) fn push(&mut self, write: Write, carries: Carries) {
        self.pending.push_back((write, carries));
    }

    /// Whether writes are kept, so that another queue pair can go on.
    pub(crate) const fn keeps(&self) -> bool {
        self.kept.is_some()
    }

    /// Whether something is not posted yet.
    pub(crate) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether a write is not known to be done.
    pub(crate) fn is_busy(&self) -> bool {
        self.has_pending() || self.room < WRITES
    }

    /// The number of writes that can be posted now.
    pub(crate) fn ready(&self) -> usize {
        self.pending.len().min(self.room)
    }

    /// Takes these writes, to be posted with one call. The last one is signaled, and each that ends
    /// a part of a large message.
    pub(crate) fn batch(&mut self) -> impl Iterator<Item = Write> {
        let count = self.ready();
        self.room -= count;
        let mut finished = Finished::default();
        let Self { pending, under_way, kept, .. } = self;
        pending.drain(..count).enumerate().map(move |(index, (write, carries))| {
            if let Some(kept) = kept {
                kept.push_back((write, carries));
            }
            finished.add(carries);
            let signalled = finished.large.is_some() || index + 1 == count;
            if signalled {
                under_way.push_back(std::mem::take(&mut finished));
            }
            Write { signalled, ..write }
        })
    }

    /// Records a completed write; `None` if there was none to complete.
    pub(crate) fn reported(&mut self) -> Option<Finished> {
        let finished = self.under_way.pop_front()?;
        self.room += finished.requests;
        self.done += finished.requests as u64;
        if let Some(kept) = &mut self.kept {
            kept.drain(..finished.requests);
        }
        Some(finished)
    }

    /// Records a write of the peer.
    pub(crate) const fn hear(&mut self) {
        self.heard += 1;
    }

    /// The number of the peer's writes that were heard.
    pub(crate) const fn heard(&self) -> u64 {
        self.heard
    }

    /// Goes on with another queue pair, once the peer has told that it has heard `heard` writes and
    /// will hear no more on the last one. What was heard is done and given to `done`, in its order;
    /// the rest waits to be posted again before everything else. `false`, and nothing has changed,
    /// if so many can't be.
    pub(crate) fn go_on(&mut self, heard: u64, mut done: impl FnMut(Finished)) -> bool {
        let Some(kept) = &mut self.kept else { return false };
        let arrived = heard.checked_sub(self.done).and_then(|it| usize::try_from(it).ok());
        let Some(arrived) = arrived.filter(|&arrived| arrived <= kept.len()) else { return false };
        for (_, carries) in kept.drain(..arrived) {
            let mut finished = Finished::default();
            finished.add(carries);
            done(finished);
        }
        self.done = heard;
        while let Some(write) = kept.pop_back() {
            self.pending.push_front(write);
        }
        self.under_way.clear();
        self.room = WRITES;
        true
    }

    /// Drops what was pushed, because the peer has it all. Returns the large messages of which a
    /// part was under way, once for each part. Nothing more may be posted or reported.
    pub(crate) fn drain(&mut self) -> Vec<usize> {
        let posted = self.under_way.drain(..).filter_map(|finished| finished.large);
        let mut large: Vec<usize> = posted.collect();
        let pending = self.pending.drain(..).filter_map(|(_, carries)| match carries {
            Carries::Large(number) => Some(number),
            Carries::Small | Carries::Word => None,
        });
        large.extend(pending);
        self.room = WRITES;
        if let Some(kept) = &mut self.kept {
            kept.clear();
        }
        large
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn write(number: u64) -> Write {
        Write {
            from: number,
            bytes: 8,
            local: 1,
            to: 0,
            remote: 2,
            immediate: Some(0),
            signalled: false,
        }
    }

    fn carries(number: u64) -> Carries {
        match number % 3 {
            0 => Carries::Small,
            1 => Carries::Large(number as usize),
            _ => Carries::Word,
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Push(u8),
        Post,
        /// So many of the writes under way arrive.
        Arrive(u8),
        /// So many reports of writes that have arrived come.
        Report(u8),
        Cut,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (0_u8..60).prop_map(Event::Push),
            Just(Event::Post),
            (0_u8..90).prop_map(Event::Arrive),
            (0_u8..30).prop_map(Event::Report),
            Just(Event::Cut),
        ]
    }

    /// A sender, and what is between it and the receiver.
    struct Model {
        ledger: Ledger,
        there: Ledger,
        pushed: u64,
        /// On the present queue pair: posted and not arrived; whether each arrived one is signaled.
        wire: VecDeque<Write>,
        arrived: VecDeque<bool>,
        /// What the receiver has heard.
        heard: Vec<u64>,
        finished: (u64, Vec<usize>),
    }

    impl Model {
        fn new() -> Self {
            Self {
                ledger: Ledger::new(true),
                there: Ledger::new(true),
                pushed: 0,
                wire: VecDeque::new(),
                arrived: VecDeque::new(),
                heard: Vec::new(),
                finished: (0, Vec::new()),
            }
        }

        fn happen(&mut self, event: Event) {
            match event {
                Event::Push(count) => {
                    for _ in 0..count {
                        self.ledger.push(write(self.pushed), carries(self.pushed));
                        self.pushed += 1;
                    }
                }
                Event::Post => self.wire.extend(self.ledger.batch()),
                Event::Arrive(count) => {
                    for write in self.wire.drain(..usize::from(count).min(self.wire.len())) {
                        self.heard.push(write.from);
                        self.there.hear();
                        self.arrived.push_back(write.signalled);
                    }
                }
                Event::Report(count) => {
                    for _ in 0..count {
                        let Some(signalled) = self.arrived.pop_front() else { return };
                        if signalled {
                            let finished = self.ledger.reported().expect("it was posted");
                            self.finished.0 += u64::from(finished.smalls);
                            self.finished.1.extend(finished.large);
                        }
                    }
                }
                Event::Cut => self.cut(),
            }
        }

        fn cut(&mut self) {
            self.wire.clear();
            self.arrived.clear();
            let heard = self.there.heard();
            let finished = &mut self.finished;
            // Nobody has heard what was not posted, or forgets.
            let posted = self.ledger.done + self.ledger.kept.as_ref().unwrap().len() as u64;
            assert!(!self.ledger.go_on(posted + 1, |_| panic!("nothing is done")));
            if let Some(fewer) = self.ledger.done.checked_sub(1) {
                assert!(!self.ledger.go_on(fewer, |_| panic!("nothing is done")));
            }
            assert!(self.ledger.go_on(heard, |it| {
                finished.0 += u64::from(it.smalls);
                finished.1.extend(it.large);
            }));
        }
    }

    proptest! {
        #[test]
        fn everything_arrives_once_and_in_order(events in prop::collection::vec(event(), 0..80)) {
            let mut model = Model::new();
            events.into_iter().for_each(|event| model.happen(event));
            while model.ledger.is_busy() {
                for event in [Event::Post, Event::Arrive(255), Event::Report(255)] {
                    model.happen(event);
                }
            }
            let all = 0..model.pushed;
            prop_assert_eq!(&model.heard, &all.clone().collect::<Vec<_>>());
            let smalls = all.clone().filter(|it| carries(*it) == Carries::Small).count() as u64;
            let large: Vec<usize> = all.filter(|it| it % 3 == 1).map(|it| it as usize).collect();
            prop_assert_eq!(model.finished, (smalls, large));
            prop_assert_eq!(model.ledger.kept.as_ref().map(VecDeque::len), Some(0));
            // The ring never grew.
            prop_assert!(model.ledger.kept.unwrap().capacity() < 2 * WRITES);
        }
    }

    #[test]
    fn without_what_is_kept_nothing_goes_on() {
        let mut ledger = Ledger::new(false);
        ledger.push(write(0), Carries::Small);
        assert_eq!(ledger.batch().count(), 1);
        assert!(!ledger.go_on(0, |_| panic!("nothing is done")));
        assert_eq!(ledger.reported(), Some(Finished { requests: 1, smalls: 1, large: None }));
    }
}
