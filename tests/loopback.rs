//! A transport that is not built in, given to the builder: the conformance suite, and worlds of
//! processes that use it for everything.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;
#[path = "loopback/transport.rs"]
mod transport;

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use support::stopwatch::Stopwatch;
use support::{Ended, World, reach, setting, tell, tell_error};
use transport::Loopback;
use unisum::buckets::{Buckets, Parameter};
use unisum::link::conformance::{End, Mesh};
use unisum::link::{Limit, Reach, Refusal, Setup, Site, Transport};
use unisum::{
    Collective, Communicator, Dtype, Elastic, Error, ErrorKind, LinkStats, Messenger, ReduceOp,
};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("everything", everything),
        ("reduce_forever", reduce_forever),
        ("lose_one_and_go_on", lose_one_and_go_on),
        ("connect_only", connect_only),
    ]);
}

const LIMIT: Duration = Duration::from_secs(200);

/// The ends of a world of threads: endpoints whose information goes from hand to hand.
fn ends(world: usize) -> Vec<End> {
    let ranks: Vec<usize> = (0..world).collect();
    let endpoint = |rank: usize| {
        let peers: Vec<usize> = ranks.iter().copied().filter(|&it| it != rank).collect();
        let site = Site { rank, ranks: &ranks, peers: &peers, is_asked_for: true };
        Loopback(Reach::Unanimous).endpoint(&site).unwrap()
    };
    let mut endpoints: Vec<_> = (0..world).map(endpoint).collect();
    let infos: Vec<Vec<u8>> = endpoints
        .iter()
        .map(|it| match it.info() {
            unisum::link::EndpointInfo::Same(info) => info,
            unisum::link::EndpointInfo::Each(_) => panic!("all are told the same"),
        })
        .collect();
    let limit = Limit::from(Instant::now() + Duration::from_secs(20));
    let setup = Setup { session: [7; 16], limit, ways: None };
    for endpoint in &mut endpoints {
        assert_eq!(endpoint.agree(&infos, &setup), Ok(0));
    }
    // The ranks below have connections in their queues.
    let connect = endpoints.into_iter().map(|it| it.connect(&ranks, &setup).unwrap());
    connect.map(|connected| End::new(connected.link)).collect()
}

unisum::link::conformance_tests!(Mesh { connect: ends, sees_peer_death: true });

#[test]
fn a_rank_that_never_connects_is_named_when_the_time_is_up() {
    let site = Site { rank: 0, ranks: &[0, 1], peers: &[1], is_asked_for: true };
    let endpoint = Loopback(Reach::Unanimous).endpoint(&site).unwrap();
    let limit = Limit::from(Instant::now() + Duration::from_millis(100));
    let refusal =
        endpoint.connect(&[0, 1], &Setup { session: [7; 16], limit, ways: None }).unwrap_err();
    assert_eq!(refusal, Refusal::Others(vec![1], "did not connect in time".into()));
}

fn connect() -> Result<Communicator, Error> {
    let reach = match &setting("LOOPBACK_REACH")[..] {
        "host" => Reach::Host,
        _ => Reach::Unanimous,
    };
    let builder = Communicator::builder();
    match std::env::var("LOOPBACK_ABSENT") {
        Ok(rank) if rank == setting("UNISUM_RANK") => builder.transport("tcp").connect(),
        _ => builder.with_transport(Loopback(reach)).connect(),
    }
}

fn world(ranks: usize, scenario: &'static str, reach: &str) -> World {
    World::new(ranks, scenario).set("LOOPBACK_REACH", reach).set("UNISUM_TRANSPORT", "loopback")
}

/// Collectives, groups, messages and buckets; what each gives is checked.
fn everything() {
    let communicator = connect().unwrap();
    assert_eq!(communicator.transport(), "loopback");
    let described = communicator.describe();
    let counted = || match &communicator.stats().links[..] {
        [LinkStats { transport: "loopback", counters, .. }] => counters[0],
        others => panic!("{others:?}"),
    };
    let before = counted();
    communicator.set_algorithm(Some("ring")).unwrap();
    communicator.all_reduce(&mut [1.0_f32; 9], ReduceOp::Sum).unwrap();
    communicator.set_algorithm(None).unwrap();
    assert_eq!((before.0, counted().0), ("messages", "messages"));
    assert!(counted().1 > before.1, "{before:?}");
    assert!(described.links.iter().any(|it| it.contains("loopback: 2 sockets")), "{described}");
    for count in [1, 1000, 70_000] {
        collectives(&communicator, count);
    }
    let odd = (communicator.rank() % 2) as u32;
    let group = communicator.split(Some(odd), 0).unwrap().unwrap();
    let whole = communicator.duplicate().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| collectives(&group, 5000));
        collectives(&whole, 5000);
    });
    messages(&communicator);
    gradients(&communicator);
    tell(format!("{} in all", communicator.transport()));
}

fn value(rank: usize, at: usize) -> i64 {
    (rank * 1_000_003 + at * 17 % 4099) as i64
}

fn collectives(communicator: &Communicator, count: usize) {
    let (rank, world) = (communicator.rank(), communicator.world());
    let own: Vec<i64> = (0..count).map(|at| value(rank, at)).collect();
    let sum = |at: usize| (0..world).map(|it| value(it, at)).sum::<i64>();
    for algorithm in Collective::all_reduce(ReduceOp::Sum).algorithms() {
        communicator.set_algorithm(Some(algorithm)).unwrap();
        let mut data = own.clone();
        communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        assert!((0..count).all(|at| data[at] == sum(at)), "{algorithm} of {count}");
    }
    communicator.set_algorithm(None).unwrap();
    for root in 0..world {
        let mut data = own.clone();
        communicator.reduce(&mut data, ReduceOp::Sum, root).unwrap();
        let expected = |at| if rank == root { sum(at) } else { value(rank, at) };
        assert!((0..count).all(|at| data[at] == expected(at)), "reduce to {root}");
        let mut data = own.clone();
        communicator.broadcast(&mut data, root).unwrap();
        assert!((0..count).all(|at| data[at] == value(root, at)), "broadcast of {root}");
        let mut all = vec![0; if rank == root { world * count } else { 0 }];
        communicator.gather(&own, &mut all, root).unwrap();
        let gathered = |(at, &it): (usize, &i64)| it == value(at / count, at % count);
        assert!(all.iter().enumerate().all(gathered), "gather to {root}");
        let mut block = vec![0; count];
        communicator.scatter(&all, &mut block, root).unwrap();
        assert_eq!(block, own, "scatter of {root}");
    }
    let mut all = vec![0; world * count];
    communicator.all_gather(&own, &mut all).unwrap();
    assert!((0..all.len()).all(|at| all[at] == value(at / count, at % count)), "all_gather");
    let mut blocks = vec![0; world * count];
    communicator.all_to_all(&all, &mut blocks).unwrap();
    let from = |at: usize| value(rank, at % count);
    assert!((0..blocks.len()).all(|at| blocks[at] == from(at)), "all_to_all");
    let mut block = vec![0; count];
    communicator.reduce_scatter(&all, &mut block, ReduceOp::Sum).unwrap();
    let times = world as i64;
    assert!((0..count).all(|at| block[at] == times * value(rank, at)), "reduce_scatter");
    communicator.barrier().unwrap();
}

fn messages(communicator: &Communicator) {
    let messenger = Messenger::new(communicator).unwrap();
    let (rank, world) = (messenger.rank(), messenger.world());
    let (next, before) = ((rank + 1) % world, (rank + world - 1) % world);
    for count in [3, 100_000] {
        let out: Vec<i64> = (0..count).map(|at| value(rank, at)).collect();
        let mut got = vec![0; count];
        thread::scope(|scope| {
            scope.spawn(|| messenger.send(&out, next, 9).unwrap());
            messenger.receive(&mut got, before, 9).unwrap();
        });
        assert!((0..count).all(|at| got[at] == value(before, at)), "{count} from {before}");
    }
}

fn gradients(communicator: &Communicator) {
    let parameters: Vec<Parameter> =
        (0..5).map(|it| Parameter::new(format!("p{it}"), &[1000 * (it + 1)], Dtype::F32)).collect();
    let builder = Buckets::builder(communicator).bucket_bytes(8 << 10);
    let mut buckets = builder.build(&parameters).unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    for step in 0..3 {
        let under_way = buckets.begin().unwrap();
        for parameter in (0..5).rev() {
            let gradient = vec![(rank + step + parameter) as f32; 1000 * (parameter + 1)];
            under_way.put(parameter, &gradient).unwrap();
        }
        under_way.wait().unwrap();
        for parameter in 0..5 {
            let mean = (world - 1) as f32 / 2.0 + (step + parameter) as f32;
            let average = buckets.gradient::<f32>(parameter);
            assert!(average.iter().all(|it| (it - mean).abs() < 1e-5), "step {step}: {mean}");
        }
    }
}

#[test]
fn a_world_does_everything_over_a_given_transport() {
    for reach in ["all", "host"] {
        let told = world(3, "everything", reach).succeed(LIMIT);
        assert!(told.iter().all(|it| *it == ["loopback in all"]), "{told:?}");
    }
}

fn reduce_forever() {
    let communicator = connect().unwrap();
    let mut data = vec![1.0_f32; 500_000];
    for round in 0_u64.. {
        if let Err(error) = communicator.all_reduce(&mut data, ReduceOp::Sum) {
            return tell_error(&error);
        }
        if round == 0 {
            reach("reducing");
        }
    }
}

#[test]
fn a_rank_that_dies_is_named_by_the_others_in_time() {
    for (victim, reach) in [(0, "all"), (2, "host")] {
        let running = world(3, "reduce_forever", reach).start();
        running.wait_for("reducing", 3, LIMIT);
        running.signal(victim, libc::SIGKILL);
        let killed = Stopwatch::start();
        let ended = running.wait(LIMIT);
        let took = killed.elapsed();
        for (rank, ended) in ended.iter().enumerate().filter(|(rank, _)| *rank != victim) {
            let told = ended.told.first().unwrap_or_else(|| panic!("rank {rank}: {ended:#?}"));
            assert!(told.starts_with(&format!("RankLost [{victim}] ")), "rank {rank}: {told}");
        }
        // Half of what ranks wait for one that they don't know to be gone.
        killed.assert_took(
            took,
            (Duration::from_secs(5), LIMIT / 2),
            &format!("rank {victim} was killed"),
        );
    }
}

/// An elastic job makes its next communicator with the same transport.
fn lose_one_and_go_on() {
    let builder = Communicator::builder().with_transport(Loopback(Reach::Unanimous));
    let communicator = builder.elastic(Elastic { minimum: 2 }).connect().unwrap();
    if communicator.rank() == 1 {
        std::process::exit(0);
    }
    let mut data = vec![1.0_f32; 1000];
    let error = (0..).find_map(|_| communicator.all_reduce(&mut data, ReduceOp::Sum).err());
    let error = error.unwrap();
    assert_eq!(error.kind(), ErrorKind::ViewChanged, "{error}");
    let communicator = communicator.rebuild().unwrap();
    let mut data = vec![communicator.rank() as f32; 1000];
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    tell(format!("{} of {}: {}", communicator.transport(), communicator.world(), data[999]));
}

#[test]
fn an_elastic_job_goes_on_over_it() {
    let ended = world(3, "lose_one_and_go_on", "all").run(LIMIT);
    for rank in [0, 2] {
        assert_eq!(ended[rank].told, ["loopback of 2: 1"], "rank {rank}: {ended:#?}");
    }
}

fn connect_only() {
    match connect() {
        Ok(communicator) => {
            communicator.barrier().unwrap();
            tell(communicator.transport());
        }
        Err(error) => tell_error(&error),
    }
}

fn all_told(ended: &[Ended]) -> BTreeSet<&str> {
    ended.iter().flat_map(|it| &it.told).map(String::as_str).collect()
}

#[test]
fn a_rank_that_refuses_is_named_on_all() {
    for reach in ["all", "host"] {
        let job = world(3, "connect_only", reach);
        let mut running = job.start_ranks(&[0, 2]);
        running.add(&job.clone().set("LOOPBACK_REFUSED", 1), 1);
        let ended = running.wait(LIMIT);
        let told = all_told(&ended);
        assert!(!told.is_empty(), "{ended:#?}");
        for told in told {
            let is_named = told.starts_with("Configuration [1] ")
                && told.contains("transport loopback was asked for")
                && told.contains("rank 1: it was told to refuse");
            assert!(is_named, "{reach}: {told}");
        }
        assert!(ended.iter().all(|it| it.told.len() == 1), "{ended:#?}");
    }
}

#[test]
fn a_transport_that_is_not_asked_for_is_done_without() {
    let job = world(2, "connect_only", "host").set("UNISUM_TRANSPORT", "auto");
    let of = |world: &World| {
        let told = world.succeed(LIMIT);
        assert_eq!(told[0], told[1]);
        told[0].join(" ")
    };
    assert_eq!(of(&job), "loopback", "it comes before shared memory");
    let told = of(&job.clone().set("LOOPBACK_REFUSED", 1));
    assert_eq!(told, "tcp", "all ranks refuse it");
    assert_eq!(of(&job.set("UNISUM_TRANSPORT", "tcp")), "tcp");
}

#[test]
fn a_rank_that_was_not_given_it_is_refused_at_the_start() {
    let job = world(2, "connect_only", "all").set("LOOPBACK_ABSENT", 1);
    let ended = job.set("UNISUM_TRANSPORT", "tcp").run(LIMIT);
    for told in all_told(&ended) {
        assert!(told.starts_with("Configuration [1] "), "{told}");
        assert!(told.contains("transports=loopback"), "{told}");
    }
    assert!(ended.iter().all(|it| it.told.len() == 1), "{ended:#?}");
}

#[test]
fn names_that_are_taken_or_malformed_are_refused() {
    #[derive(Debug)]
    struct Named(&'static str);
    impl Transport for Named {
        fn name(&self) -> &'static str {
            self.0
        }
        fn reach(&self) -> Reach {
            Reach::Any
        }
        fn endpoint(&self, _: &Site<'_>) -> Result<Box<dyn unisum::link::Endpoint>, Refusal> {
            Err(Refusal::Own("only its name is of interest".into()))
        }
    }
    for names in [&["tcp"][..], &["auto"], &[""], &["Fast"], &["a b"], &["a", "a"]] {
        let builder = Communicator::builder().rank(0).world(1);
        let builder = names.iter().fold(builder, |it, name| it.with_transport(Named(name)));
        let error = builder.connect().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{names:?}");
        assert!(error.to_string().contains("a transport can't be called"), "{error}");
    }
    let builder = Communicator::builder().rank(0).world(1).with_transport(Named("a-1"));
    let error = builder.clone().transport("a").connect().unwrap_err();
    assert!(error.to_string().contains("auto, tcp, shm, verbs or a-1"), "{error}");
    assert_eq!(builder.transport("a-1").connect().unwrap().world(), 1);
}
