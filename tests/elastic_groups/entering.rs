//! Processes that enter an elastic job while groups of its ranks are in calls, and are in groups
//! themselves.

use super::*;

/// Works on the job's communicator, lets in who asks, and goes on without who is lost, until the
/// view has the right processes.
fn work_until(mut communicator: Communicator, is_right: impl Fn(&[u64]) -> bool) -> Communicator {
    loop {
        if is_right(&view(&communicator).1) {
            return communicator;
        }
        let mut known = [u8::from(communicator.newcomers() > 0)];
        communicator = match communicator.all_reduce(&mut known, ReduceOp::Min) {
            Ok(()) if known == [1] => communicator.admit().unwrap(),
            Ok(()) => continue,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ViewChanged, "{error}");
                communicator.rebuild().unwrap()
            }
        };
    }
}

fn is_replaced(processes: &[u64]) -> bool {
    processes.len() == 5 && !processes.contains(&0)
}

/// The first ranks: two of them have a group that is older than the newcomers.
pub(super) fn grow() {
    let communicator = connect();
    let group = communicator.subset(&[2, 0]).unwrap();
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let old = group.as_ref().map(|group| scope.spawn(|| stream(group, "old", &is_done)));
        mix(communicator);
        if let Some(old) = old {
            let error = old.join().unwrap().unwrap_err();
            tell(format!("old {:?} {:?}", error.kind(), error.lost()));
        }
    });
}

pub(super) fn enter() {
    mix(Communicator::builder().elastic(Elastic { minimum: 1 }).join().unwrap());
}

/// A group of a newcomer, which is its rank 0, and a rank of the first view streams while rank 0
/// dies and another newcomer comes.
fn mix(communicator: Communicator) {
    let communicator = work_until(communicator, |processes| processes.len() == 5);
    let parts = communicator.split(Some(communicator.rank() as u32 % 2), 0).unwrap().unwrap();
    assert!(step(&parts, 7, true).unwrap());
    let mixed = communicator.subset(&[3, 1]).unwrap();
    drop(parts);
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mixed = mixed.as_ref().map(|mixed| scope.spawn(|| stream(mixed, "mixed", &is_done)));
        finish(work_until(communicator, is_replaced));
        // Release: pairs with the Acquire load of the stream.
        is_done.store(true, Ordering::Release);
        if let Some(mixed) = mixed {
            assert!(mixed.join().unwrap().unwrap() > 20);
            tell("mixed goes on");
        }
    });
}

/// A newcomer that knows only the last view.
pub(super) fn enter_late() {
    let joined = Communicator::builder().elastic(Elastic { minimum: 1 }).join().unwrap();
    finish(work_until(joined, is_replaced));
}

/// A group of the newest rank and the oldest one.
fn finish(communicator: Communicator) {
    let group = communicator.subset(&[4, 0]).unwrap();
    assert!(group.is_none_or(|group| step(&group, 6, true).unwrap()));
    communicator.barrier().unwrap();
    tell(format!("{} ranks", communicator.world()));
}

#[test]
fn groups_go_on_while_newcomers_enter_and_take_them_in_when_they_are_made_again() {
    for transport in support::transports() {
        let world = World::new(3, "grow")
            .set("UNISUM_TRANSPORT", transport)
            .set("UNISUM_REPRODUCIBLE", 1)
            .set("UNISUM_TLS", "token");
        let newcomer = |scenario| {
            let world = world.clone().running(scenario);
            world.set("UNISUM_RANK", "").set("UNISUM_WORLD", "")
        };
        let mut running = world.start();
        running.wait_for("old", 2, LIMIT);
        (3..5).for_each(|number| running.add(&newcomer("enter"), number));
        running.wait_for("mixed", 2, LIMIT);
        running.signal(0, libc::SIGKILL);
        running.add(&newcomer("enter_late"), 5);
        for (rank, told) in succeeded(&running.wait(LIMIT), &[0]) {
            let has = |text: &str| told.iter().any(|it| it == text);
            assert!(has("5 ranks"), "{transport}: process {rank}: {told:?}");
            assert_eq!(has("old ViewChanged [1]"), rank == 2, "{transport}: {rank}: {told:?}");
            assert!(rank != 1 || has("mixed goes on"), "{transport}: {told:?}");
        }
    }
}
