//! Ranks that meet by a key-value store of the program's: here a directory, which each process
//! opens for itself.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use support::{Ended, World, setting, tell, tell_error};
use unisum::{Communicator, ReduceOp, Store};

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("meet", meet),
        ("meet_again", meet_again),
        ("explicit", explicit),
        ("fail", fail),
    ]);
}

/// Files in a directory; `get` looks for them again and again.
struct Directory(PathBuf);

impl Directory {
    fn of_world() -> Self {
        Self(setting("TEST_MARKS").into())
    }

    fn path(&self, key: &str) -> PathBuf {
        self.0.join(format!("store-{}", key.replace('/', "_")))
    }
}

impl Store for Directory {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), String> {
        // Threads of one process write, too, each another key.
        let key_name = key.replace('/', "_");
        let draft = self.0.join(format!("draft-{}-{key_name}", std::process::id()));
        fs::write(&draft, value).map_err(|error| error.to_string())?;
        fs::rename(&draft, self.path(key)).map_err(|error| error.to_string())
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, String> {
        let until = Instant::now() + timeout;
        loop {
            match fs::read(self.path(key)) {
                Ok(value) => return Ok(value),
                Err(error) if Instant::now() >= until => return Err(error.to_string()),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// A world that is told neither where to meet nor a token.
fn world(ranks: usize, scenario: &'static str) -> World {
    let world = World::new(ranks, scenario).set("UNISUM_RENDEZVOUS", "").set("UNISUM_TOKEN", "");
    world.set("HOME", "/nonexistent").set("XDG_CONFIG_HOME", "")
}

fn sum(communicator: &Communicator) {
    let mut data = [communicator.rank() as f32 + 1.0; 100];
    communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    let world = communicator.world();
    assert!(data.iter().all(|it| *it == (world * (world + 1) / 2) as f32), "{data:?}");
}

#[test]
fn ranks_meet_by_a_store_without_an_address_a_token_or_a_home() {
    for transport in support::transports() {
        let world = world(3, "meet").set("UNISUM_TRANSPORT", transport);
        assert_eq!(world.succeed(LIMIT), [["met"]; 3]);
    }
}

fn meet() {
    let communicator = Communicator::builder().store(Directory::of_world()).connect().unwrap();
    sum(&communicator);
    // The token is a secret that nobody needs any more.
    if communicator.rank() == 0 {
        let left = Directory::of_world().get("unisum", LIMIT).unwrap();
        assert_eq!(String::from_utf8(left).unwrap(), "unisum-store1 over\n");
    }
    tell("met");
}

/// Each start finds what the one before left; ranks come to it in any order.
#[test]
fn starts_one_after_another_may_use_the_same_key_and_at_once_different_ones() {
    assert_eq!(world(3, "meet_again").succeed(LIMIT), [["met"]; 3]);
}

fn meet_again() {
    for round in 0..6 {
        let communicator = Communicator::builder().store(Directory::of_world()).connect().unwrap();
        // In the other rounds a rank may come back while others are not through with the start.
        if round % 3 == 2 {
            sum(&communicator);
        }
    }
    let start = |key: &'static str| {
        let builder = Communicator::builder().rendezvous(key).store(Directory::of_world());
        thread::spawn(move || sum(&builder.connect().unwrap()))
    };
    for started in ["store://one", "store://another one/of two"].map(start) {
        started.join().unwrap();
    }
    tell("met");
}

#[test]
fn what_the_environment_says_wins_over_the_store() {
    // Its own rendezvous and token: the store is not asked, and refuses everything.
    assert_eq!(World::new(2, "explicit").succeed(LIMIT), [["met"]; 2]);
    // A token that all ranks have is not told.
    let token = "a token of the tests, long enough";
    let told = world(2, "meet").set("UNISUM_TOKEN", token).succeed(LIMIT);
    assert_eq!(told, [["met"]; 2]);
}

fn explicit() {
    struct Refuses;
    impl Store for Refuses {
        fn set(&self, _: &str, _: &[u8]) -> Result<(), String> {
            panic!("the store is not to be asked")
        }
        fn get(&self, _: &str, _: Duration) -> Result<Vec<u8>, String> {
            panic!("the store is not to be asked")
        }
    }
    sum(&Communicator::builder().store(Refuses).connect().unwrap());
    tell("met");
}

fn errors(world: &World) -> Vec<String> {
    world.succeed(LIMIT).into_iter().map(|told| told[0].clone()).collect()
}

#[test]
fn starts_by_a_store_that_fail_say_why_on_all_ranks() {
    // A rank 0 that can't listen.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let world_of_two = || world(2, "fail").set("UNISUM_CONNECT_TIMEOUT", 20);
    let told = errors(&world_of_two().set("PORT", port).set("PLACE", "port"));
    assert!(told[1].contains("rank 0 could not start: "), "{told:?}");
    // A rank 0 that does not come.
    let late = world(2, "fail").set("UNISUM_CONNECT_TIMEOUT", "0.3").start_ranks(&[1]);
    let Ended { told, .. } = &late.wait(LIMIT)[0];
    assert!(told[0].starts_with("Rendezvous [0] reading `unisum` in the store"), "{told:?}");
    assert!(told[0].ends_with("has rank 0 started?"), "{told:?}");
    // A store that returns something else, or fails.
    let told = errors(&world_of_two().set("PLACE", "garbage"));
    assert!(told[1].contains("its 7 bytes are not what rank 0 writes"), "{told:?}");
    let told = errors(&world_of_two().set("PLACE", "broken"));
    assert!(told[0].contains("writing `unisum` in the store: no store today"), "{told:?}");
    assert!(told[1].contains("reading `unisum` in the store"), "{told:?}");
    assert!(told[1].contains("no store today"), "{told:?}");
    // A token that only rank 0 has.
    let told = errors(&world_of_two().set("PLACE", "token"));
    assert!(told[1].contains("rank 0 has a token of its own"), "{told:?}");
    // No store at all.
    let told = errors(&world_of_two().set("PLACE", "none"));
    assert!(told.iter().all(|told| told.contains("hands in no store")), "{told:?}");
}

/// Says what it is told to, or breaks.
struct Broken(&'static str);

impl Store for Broken {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), String> {
        match self.0 {
            "broken" => Err("no store today".to_owned()),
            _ => Directory::of_world().set(key, value),
        }
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, String> {
        match self.0 {
            "garbage" => Ok(b"garbage".to_vec()),
            "broken" => Err("no store today".to_owned()),
            _ => Directory::of_world().get(key, timeout),
        }
    }
}

fn fail() {
    let place = std::env::var("PLACE").unwrap_or_default().leak();
    let is_first = setting("UNISUM_RANK") == "0";
    let builder = Communicator::builder();
    let builder = match &*place {
        "none" => builder.rendezvous("store://unisum"),
        "token" if is_first => builder.token("of rank 0 alone, long enough").store(Broken(place)),
        _ => builder.store(Broken(place)),
    };
    let builder = match &*place {
        "port" if is_first => builder.port_range(&setting("PORT")),
        // Nobody waits for those who gave up.
        "garbage" | "token" if is_first => builder.connect_timeout(Duration::from_secs(4)),
        _ => builder,
    };
    tell_error(&builder.connect().unwrap_err());
}
