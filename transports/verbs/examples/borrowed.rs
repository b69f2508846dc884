//! What borrowed memory costs on this machine's first RDMA devices: passed through slots,
//! registered for each collective, or allocated (registered once).
//!
//! `cargo run --release -p unisum-verbs --example borrowed`, where there is a device; elsewhere
//! `tests/softroce/vm target/release/examples/borrowed`. Two links of this process send each other
//! messages of 256 KiB out of one buffer into another, four at a time as the engine does; the
//! median over turns of the time until both have all.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::error::Error;
use std::ptr::NonNull;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use unisum_kernels::Dtype;
use unisum_link::{Call, Landing, Link as _, Region, Regions, Ticket};
use unisum_verbs::{Offer, VerbsConfig, VerbsLink};

const SLICE: usize = 256 << 10;
const WINDOW: usize = 4;
const MODES: [&str; 3] = ["slots", "registered", "allocated"];
/// For each size, all modes together.
const TIME: Duration = Duration::from_secs(4);

fn main() -> Result<(), Box<dyn Error>> {
    let mut links = connect()?;
    println!("{}", links[0].description());
    println!(
        "{:>10} {:>12} {:>12} {:>12}  (us, median; calls)",
        "bytes", MODES[0], MODES[1], MODES[2]
    );
    let mut number = 0;
    for bytes in (16..=24).map(|power| 1_usize << power) {
        let mut times = [const { Vec::new() }; MODES.len()];
        let until = Instant::now() + TIME;
        while times[0].len() < 3 || Instant::now() < until {
            for (mode, times) in times.iter_mut().enumerate() {
                times.push(turn(&mut links, mode, bytes, number));
                number += 1;
            }
        }
        let calls = times[0].len();
        let [slots, registered, allocated] = times.map(median_us);
        println!("{bytes:>10} {slots:>12.0} {registered:>12.0} {allocated:>12.0}  {calls}");
    }
    Ok(())
}

fn median_us(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

fn connect() -> Result<Vec<VerbsLink>, Box<dyn Error>> {
    let config = VerbsConfig { software: true, ..VerbsConfig::default() };
    let offers = [0, 1].map(|rank| Offer::new(rank, 2, &[1 - rank], config.clone()));
    let offers = offers.into_iter().collect::<Result<Vec<_>, _>>()?;
    let cards: Vec<_> = offers.iter().map(Offer::cards).collect();
    let links = offers.into_iter().enumerate().map(|(rank, offer)| {
        let for_rank: Vec<Vec<u8>> = cards.iter().map(|cards| cards[rank].clone()).collect();
        offer.connect(&for_rank)
    });
    let mut links = links.collect::<Result<Vec<_>, _>>()?;
    let until = Instant::now() + Duration::from_secs(20);
    thread::scope(|scope| {
        let proofs: Vec<_> =
            links.iter_mut().map(|link| scope.spawn(move || link.prove(until))).collect();
        proofs.into_iter().try_for_each(|proof| proof.join().expect("proving does not panic"))
    })?;
    Ok(links)
}

/// Pages of a rank: what it sends, then what it receives.
struct Pages {
    start: NonNull<u8>,
    layout: Layout,
}

impl Pages {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(2 * bytes, 4096).expect("a size in bounds");
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).expect("there is memory");
        // SAFETY: just allocated. The pages are there before the time is taken.
        unsafe { start.as_ptr().write_bytes(1, layout.size()) };
        Self { start, layout }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// One exchange, with memory of its own as a program that allocates and frees has it.
fn turn(links: &mut [VerbsLink], mode: usize, bytes: usize, number: u64) -> Duration {
    let barrier = Barrier::new(links.len());
    let run = |rank: usize, link: &mut VerbsLink| {
        let pages = Pages::new(bytes);
        let registry = link.registry();
        registry.set_register_from([usize::MAX, 1, usize::MAX][mode]);
        let adopt = || {
            // SAFETY: the registration ends before the pages, which are declared before it.
            unsafe { registry.adopt(pages.start, pages.layout.size()) }
        };
        let adopted = (mode == 2).then(adopt).map(|adopted| adopted.expect("it is allowed"));
        // SAFETY: the pages outlive the exchange, and nobody else uses them.
        let region = unsafe { Region::new(pages.start, pages.layout.size(), None) };
        barrier.wait();
        let start = Instant::now();
        exchange(link, rank, &region, bytes, number);
        // Ends what was registered for it, as the next collective would.
        link.begin(&call(number, 0), &Regions::in_place(region));
        let taken = start.elapsed();
        barrier.wait();
        drop(adopted);
        taken
    };
    thread::scope(|scope| {
        let run = &run;
        let start = |(rank, link)| scope.spawn(move || run(rank, link));
        let ranks: Vec<_> = links.iter_mut().enumerate().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank fails")).max()
    })
    .expect("there are two")
}

fn call(number: u64, bytes: usize) -> Call {
    Call::all_reduce(number, Dtype::U8, bytes as u64)
}

fn exchange(link: &mut VerbsLink, rank: usize, region: &Region, bytes: usize, number: u64) {
    link.begin(&call(number, bytes), &Regions::in_place(*region));
    let slices = bytes.div_ceil(SLICE);
    let (mut posted, mut done) = (0, Vec::new());
    let patience = Duration::from_secs(30);
    while done.len() < 2 * slices {
        while posted < slices && 2 * posted < done.len() + 2 * WINDOW {
            let range = posted * SLICE..((posted + 1) * SLICE).min(bytes);
            let into = region.part(&(bytes + range.start..bytes + range.end));
            let ticket = 2 * posted as u64;
            link.receive(1 - rank, into, Landing::Place, Ticket(ticket)).expect("posted");
            link.send(1 - rank, region.part(&range), Ticket(ticket + 1)).expect("posted");
            posted += 1;
        }
        let before = done.len();
        link.progress(&mut done).expect("the link works");
        if done.len() == before {
            link.park(Instant::now() + patience, 1).expect("the link works");
        }
    }
}
