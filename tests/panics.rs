//! Code of the program that panics where the library calls it: all ranks get an error that says so
//! within moments, nobody hangs, and no lock is poisoned.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, RawWaker, RawWakerVTable, Wake, Waker};
use std::time::{Duration, Instant};

use support::{World, await_others, reach, setting, tell, tell_error};
use unisum::buckets::{AllReduce, Bucket, Buckets, Hook, Parameter};
use unisum::{
    Buffers, Collective, Communicator, CustomOp, Dtype, Error, ErrorKind, InPlace, OutOfPlace,
    Owned, ReduceOp,
};

#[test]
fn rank_process() {
    support::run_if_rank(&[("panics", panics), ("twice", twice), ("odd_words", odd_words)]);
}

const LIMIT: Duration = Duration::from_secs(60);
/// In which all ranks have their error, on a busy machine, too; the deadline of calls is far later.
const MOMENTS: Duration = Duration::from_secs(30);
const RANKS: usize = 3;
const SAID: &str = "this panic is part of a test";

/// Where a rank's code panics, and what all ranks' errors say of it.
const PLACES: [(&str, &str); 21] = [
    ("reduction", "the reduction function panicked"),
    ("reduction of a batch", "the reduction function panicked"),
    ("reduction in the background", "the reduction function panicked"),
    ("reduction of a group", "the reduction function panicked"),
    ("as_mut", "a buffer panicked when it was asked for its elements"),
    ("as_ref", "a buffer panicked when it was asked for its elements"),
    ("lend", "a buffer panicked when it was asked for its elements"),
    ("lend in a batch", "a buffer panicked when it was asked for its elements"),
    ("destructor", "the destructor of its buffers panicked"),
    ("waker of a work", "the waker of a work"),
    ("waker of a step", "the waker of a step or a bucket panicked"),
    ("waker of a bucket", "the waker of a step or a bucket panicked"),
    ("name", "the bucket hook panicked in `name`"),
    ("reduce", "the bucket hook panicked in `reduce`"),
    ("settle", "the bucket hook panicked in `settle`"),
    ("settle of a failed step", "the bucket hook panicked in `settle`"),
    ("rescale", "the bucket hook panicked in `rescale`"),
    ("save", "the bucket hook panicked in `save`"),
    ("restore", "the bucket hook panicked in `restore`"),
    ("update", "the update of `join` panicked"),
    ("boxed hook", "the bucket hook panicked in `reduce`"),
];

#[test]
fn a_panic_of_the_programs_code_is_an_error_on_all_ranks_that_says_where() {
    for (place, says) in PLACES {
        let of_all = |transport| (0..RANKS).map(move |odd| (transport, odd));
        let cases = support::transports().into_iter().flat_map(of_all).collect();
        for (transport, odd) in support::sample(cases, 2) {
            let world = World::new(RANKS, "panics").set("UNISUM_TRANSPORT", transport);
            let told = world.set("PLACE", place).set("ODD", odd).succeed(LIMIT);
            for (rank, told) in told.iter().enumerate() {
                let (text, context) = (&told[0], format!("{transport}, {place}, rank {rank}"));
                let kind = text.split(' ').next().unwrap();
                // Where a call had no error to give, the next one has.
                assert_eq!(kind, "Panicked", "{context}: {text}");
                assert!(text.contains(&format!(" [{odd}] ")), "{context}: {text}");
                assert!(text.contains(&format!("on rank {odd} ")), "{context}: {text}");
                assert!(text.contains(says) && text.contains(SAID), "{context}: {text}");
            }
        }
    }
}

fn panics() {
    let communicator = Communicator::from_environment().unwrap();
    let is_odd = communicator.rank().to_string() == setting("ODD");
    let place = setting("PLACE");
    communicator.barrier().unwrap();
    let start = Instant::now();
    let met = match &place[..] {
        place if place.starts_with("reduction") => reduction(&communicator, place, is_odd),
        "as_mut" | "as_ref" | "lend" | "lend in a batch" | "destructor" | "waker of a work" => {
            background(&communicator, &place, is_odd)
        }
        _ => in_buckets(&communicator, &place, is_odd),
    };
    // What had no error to give is told by the next call.
    let error = met.and_then(|()| loop_until_told(&communicator)).unwrap_err();
    assert!(start.elapsed() < MOMENTS, "{place}: took {:?}", start.elapsed());
    tell_error(&error);
    if !place.starts_with("settle") {
        // The job has ended for this communicator, too, and says so.
        let again = loop_until_told(&communicator).unwrap_err();
        assert!(again.to_string().contains(SAID), "{again}");
    }
}

fn loop_until_told(communicator: &Communicator) -> Result<(), Error> {
    loop {
        communicator.barrier()?;
    }
}

fn fails(_: &mut [f32], _: &[f32]) {
    panic!("{SAID}");
}

fn keeps(_: &mut [f32], _: &[f32]) {}

fn reduction(communicator: &Communicator, place: &str, is_odd: bool) -> Result<(), Error> {
    let how = CustomOp::commutative(if is_odd { fails } else { keeps });
    // By which every rank folds a part.
    communicator.set_algorithm(Some("ring"))?;
    let (mut first, mut second) = (vec![1_f32; 1000], vec![1_f32; 100]);
    match place {
        "reduction of a batch" => {
            let mut batch = [Buffers::InPlace(&mut first[..]), Buffers::InPlace(&mut second)];
            communicator.run_batch(&Collective::all_reduce(how), &mut batch).map(drop)
        }
        "reduction in the background" => communicator.all_reduce_async(first, how).wait().map(drop),
        "reduction of a group" => {
            let group = communicator.duplicate()?;
            group.set_algorithm(Some("ring"))?;
            group.all_reduce(&mut first, how)
        }
        _ => communicator.all_reduce(&mut first, how),
    }
}

/// Elements that panic where they are told to.
struct Touchy(Vec<f32>, &'static str);

impl Touchy {
    fn touch(&self, place: &str) {
        assert!(self.1 != place, "{SAID}");
    }
}

impl AsMut<[f32]> for Touchy {
    fn as_mut(&mut self) -> &mut [f32] {
        self.touch("as_mut");
        &mut self.0
    }
}

impl AsRef<[f32]> for Touchy {
    fn as_ref(&self) -> &[f32] {
        self.touch("as_ref");
        &self.0
    }
}

impl Owned<f32> for Touchy {
    fn lend(&mut self) -> Buffers<'_, f32> {
        self.touch("lend");
        Buffers::InPlace(&mut self.0)
    }
}

impl Drop for Touchy {
    fn drop(&mut self) {
        self.touch("destructor");
    }
}

struct Bomb;

impl Wake for Bomb {
    fn wake(self: Arc<Self>) {
        panic!("{SAID}");
    }
}

/// Polls a future once, with a waker that panics; it is not ready.
fn poll(future: &mut (impl Future + Unpin)) {
    let waker = Waker::from(Arc::new(Bomb));
    assert!(Pin::new(future).poll(&mut Context::from_waker(&waker)).is_pending());
    reach("polled");
}

fn background(communicator: &Communicator, place: &str, is_odd: bool) -> Result<(), Error> {
    let sum = Collective::all_reduce(ReduceOp::Sum);
    let touchy = |at: &'static str| Touchy(vec![1.0; 100], if is_odd { at } else { "" });
    // Something is under way before and after, whose turns come as well.
    let before = communicator.all_reduce_async(vec![1_f32; 10], ReduceOp::Sum);
    let met = match place {
        "as_mut" => communicator.start(sum, InPlace(touchy("as_mut"))).wait().map(drop),
        "as_ref" => {
            let apart = OutOfPlace(touchy("as_ref"), vec![0_f32; 100]);
            communicator.start(sum, apart).wait().map(drop)
        }
        "lend" => communicator.start(sum, touchy("lend")).wait().map(drop),
        "lend in a batch" => {
            let batch = vec![touchy(""), touchy("lend"), touchy("")];
            communicator.start_batch(sum, batch).wait().map(drop)
        }
        "destructor" => {
            // Nobody waits: the buffer is dropped where the collective ends.
            drop(communicator.start(sum, touchy("destructor")));
            Ok(())
        }
        _ => {
            if !is_odd {
                await_others("polled", 1, LIMIT);
            }
            let mut work = communicator.all_reduce_async(vec![1_f32; 10], ReduceOp::Sum);
            if is_odd {
                poll(&mut work);
            }
            work.wait().map(drop)
        }
    };
    let after = communicator.all_reduce_async(vec![1_f32; 10], ReduceOp::Sum);
    before.wait().unwrap();
    let after = after.wait().map(drop);
    met.and(after)
}

/// Panics in a method.
#[derive(Debug)]
struct BadHook(&'static str);

impl BadHook {
    fn touch(&self, method: &str) {
        assert!(self.0 != method, "{SAID}");
    }
}

impl Hook for BadHook {
    fn name(&self) -> String {
        self.touch("name");
        "bad".into()
    }

    fn reduce(&mut self, bucket: &mut Bucket<'_>) -> Result<(), Error> {
        AllReduce.reduce(bucket)?;
        self.touch("reduce");
        Ok(())
    }

    fn settle(&mut self, _: bool) {
        self.touch("settle");
    }

    fn rescale(&mut self, _: f32) {
        self.touch("rescale");
    }

    fn save(&self) -> Vec<u8> {
        self.touch("save");
        vec![7]
    }

    fn restore(&mut self, _: &[u8]) -> Result<(), String> {
        self.touch("restore");
        Ok(())
    }
}

const METHODS: [&str; 6] = ["name", "reduce", "settle", "rescale", "save", "restore"];

fn in_buckets(communicator: &Communicator, place: &str, is_odd: bool) -> Result<(), Error> {
    let method = match place {
        "settle of a failed step" => "settle",
        "boxed hook" => "reduce",
        _ => METHODS.into_iter().find(|method| *method == place).unwrap_or(""),
    };
    let hook = BadHook(if is_odd { method } else { "" });
    let builder = Buckets::builder(communicator).uneven_inputs(place == "update");
    let builder = match place {
        "boxed hook" => builder.hook(Box::new(hook) as Box<dyn Hook>),
        _ => builder.hook(hook),
    };
    let parameters: Vec<_> =
        (0..3).map(|at| Parameter::new(format!("layer{at}"), &[100], Dtype::F32)).collect();
    let mut buckets = builder.bucket_bytes(400).end_bucket_bytes(400).build(&parameters)?;
    if place == "update" && is_odd {
        let joined = catch_unwind(AssertUnwindSafe(|| buckets.join(|_, _| panic!("{SAID}"))));
        assert_eq!(joined.unwrap_err().downcast_ref::<String>().unwrap(), SAID);
        return Ok(());
    }
    let step = step(&mut buckets, place, is_odd);
    if method == "settle" {
        let error = step.as_ref().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Panicked, "{error}");
        let again = buckets.begin().map(drop).unwrap_err();
        assert_eq!(
            (again.kind(), again.failed_ranks()),
            (ErrorKind::Aborted, error.failed_ranks())
        );
        // The job lives, and the hook's state can still be asked for.
        communicator.barrier().unwrap();
        assert_eq!(buckets.save_hook(), [7]);
        return step;
    }
    step?;
    let resumed = |panics: &mut dyn FnMut()| {
        let payload = catch_unwind(AssertUnwindSafe(panics));
        assert_eq!(payload.is_err(), is_odd, "the caller's panic goes on");
    };
    match place {
        "rescale" => resumed(&mut || buckets.rescale_hook(0.5)),
        "save" => resumed(&mut || drop(buckets.save_hook())),
        "restore" => buckets.restore_hook(&[7])?,
        _ => {}
    }
    loop {
        self::step(&mut buckets, "", false)?;
    }
}

fn step(buckets: &mut Buckets, place: &str, is_odd: bool) -> Result<(), Error> {
    let step = buckets.begin()?;
    if place.starts_with("waker") {
        match is_odd {
            true if place == "waker of a bucket" => poll(&mut step.bucket(0)),
            true => {}
            false => await_others("polled", 1, LIMIT),
        }
    }
    (0..3).rev().try_for_each(|at| step.put(at, &[1_f32; 100]))?;
    if place == "settle of a failed step" {
        let _refused = step.ready(0);
    }
    let mut work = step.finish();
    if place == "waker of a step" && is_odd {
        poll(&mut work);
    }
    work.wait().map(drop)
}

/// What a program may say in a panic, or when it aborts.
const ODD_WORDS: [&str; 5] = ["NUL", "long", "lines", "nothing", "no text"];
/// Longer than any error.
const ERROR_BYTES_MAX: usize = 20 << 10;

fn words(which: &str) -> String {
    match which {
        "NUL" => "before\0after".into(),
        // Not cut between characters.
        "long" => "\u{e9}".repeat(1 << 20),
        "lines" => "one\r\ntwo \u{1b}[31m three\n".into(),
        _ => String::new(),
    }
}

#[test]
fn whatever_a_panic_or_an_abort_says_is_told_on_all_ranks_and_cut_where_it_is_long() {
    for which in ODD_WORDS {
        let aborts = [false, true].into_iter().filter(|aborts| which != "no text" || !aborts);
        let cases = aborts.flat_map(|aborts| [0, 2].map(|odd| (aborts, odd))).collect();
        for (aborts, odd) in support::sample(cases, 2) {
            let world = World::new(RANKS, "odd_words").set("WORDS", which).set("ODD", odd);
            let kind = if aborts { "Aborted" } else { "Panicked" };
            for (rank, told) in world.set("ABORTS", aborts).succeed(LIMIT).iter().enumerate() {
                let context = format!("{which}, {kind} on rank {odd}, rank {rank}: {told:?}");
                assert_eq!(told, &[format!("{kind} [{odd}] true")], "{context}");
            }
        }
    }
}

fn odd_words() {
    fn fails_in_words(_: &mut [f32], _: &[f32]) {
        match &setting("WORDS")[..] {
            "no text" => std::panic::panic_any(7),
            which => panic!("{}", words(which)),
        }
    }
    let communicator = Communicator::from_environment().unwrap();
    communicator.set_algorithm(Some("ring")).unwrap();
    let is_odd = communicator.rank().to_string() == setting("ODD");
    let mut data = vec![1_f32; 1000];
    let words = words(&setting("WORDS"));
    let error = match setting("ABORTS") == "true" {
        true if is_odd => communicator.abort(&words),
        true => loop_until_told(&communicator).unwrap_err(),
        false => {
            let how = CustomOp::commutative(if is_odd { fails_in_words } else { keeps });
            // Who has all it needs hears of it in the next call.
            let called = communicator.all_reduce(&mut data, how);
            called.and_then(|()| loop_until_told(&communicator)).unwrap_err()
        }
    };
    let text = error.to_string();
    let said: String = words.chars().take(1000).collect();
    let is_right = text.contains(&said) && text.len() < ERROR_BYTES_MAX;
    tell(format!("{:?} {:?} {is_right}", error.kind(), error.failed_ranks()));
}

#[test]
fn a_result_that_was_given_is_not_given_again_and_nobody_waits_for_it() {
    for transport in support::transports() {
        World::new(2, "twice").set("UNISUM_TRANSPORT", transport).succeed(LIMIT);
    }
}

fn twice() {
    given_once(&Communicator::from_environment().unwrap());
}

fn alone() -> Communicator {
    Communicator::builder().rank(0).world(1).connect().unwrap()
}

#[test]
fn a_result_that_was_given_is_not_given_again_in_a_world_of_one() {
    given_once(&alone());
}

fn given_once(communicator: &Communicator) {
    let mut context = Context::from_waker(Waker::noop());
    for waits in [true, false] {
        let mut work = communicator.all_reduce_async(vec![1_f32; 10], ReduceOp::Sum);
        while Pin::new(&mut work).poll(&mut context).is_pending() {
            std::thread::yield_now();
        }
        assert!(work.is_ended());
        let error = match waits {
            true => work.wait().unwrap_err(),
            false => match Pin::new(&mut work).poll(&mut context) {
                std::task::Poll::Ready(result) => result.unwrap_err(),
                std::task::Poll::Pending => panic!("it has ended"),
            },
        };
        assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
        assert!(error.to_string().contains("gave its result before"), "{error}");
    }
    // Steps give theirs as often as they are asked.
    let weight = Parameter::new("weight", &[10], Dtype::F32);
    let mut buckets = Buckets::builder(communicator).build(&[weight]).unwrap();
    let step = buckets.begin().unwrap();
    step.put(0, &[1_f32; 10]).unwrap();
    let mut work = step.finish();
    while Pin::new(&mut work).poll(&mut context).is_pending() {
        std::thread::yield_now();
    }
    work.wait().unwrap();
}

#[test]
fn a_panic_in_a_world_of_one_is_the_same_error() {
    let communicator = alone();
    let sum = Collective::all_reduce(ReduceOp::Sum);
    for (place, is_batch) in [("as_mut", false), ("lend", true)] {
        let touchy = || Touchy(vec![1.0; 3], place);
        let result = match is_batch {
            true => communicator.start_batch(sum.clone(), vec![touchy()]).wait().map(drop),
            false => communicator.start(sum.clone(), InPlace(touchy())).wait().map(drop),
        };
        let error = result.unwrap_err();
        assert_eq!(
            (error.kind(), error.failed_ranks()),
            (ErrorKind::Panicked, &[0][..]),
            "{error}"
        );
    }
    for place in METHODS {
        let met = catch_unwind(|| in_buckets(&alone(), place, true));
        match place {
            "rescale" | "save" => assert!(met.is_err() || met.is_ok_and(|it| it.is_err())),
            _ => assert_eq!(met.unwrap().unwrap_err().kind(), ErrorKind::Panicked, "{place}"),
        }
    }
}

/// A waker whose clone panics.
const TOUCHY: RawWakerVTable = RawWakerVTable::new(|_| panic!("{SAID}"), |_| (), |_| (), |_| ());

#[test]
fn a_waker_that_panics_when_it_is_cloned_leaves_the_work_as_it_was() {
    let communicator = alone();
    // SAFETY: none of the functions uses the data.
    let waker = unsafe { Waker::from_raw(RawWaker::new(std::ptr::null(), &TOUCHY)) };
    let mut context = Context::from_waker(&waker);
    let mut work = communicator.all_reduce_async(vec![1_f32; 10], ReduceOp::Sum);
    let polled = catch_unwind(AssertUnwindSafe(|| Pin::new(&mut work).poll(&mut context)));
    assert!(polled.is_err(), "the panic is the caller's own");
    assert_eq!(work.wait().unwrap(), [1_f32; 10]);
    let weight = Parameter::new("weight", &[10], Dtype::F32);
    let mut buckets = Buckets::builder(&communicator).build(&[weight]).unwrap();
    let step = buckets.begin().unwrap();
    let mut bucket = step.bucket(0);
    let polled = catch_unwind(AssertUnwindSafe(|| Pin::new(&mut bucket).poll(&mut context)));
    assert!(polled.is_err(), "the panic is the caller's own");
    step.put(0, &[1_f32; 10]).unwrap();
    step.wait().unwrap();
    bucket.wait().unwrap();
}
