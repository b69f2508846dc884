//! Signals and waits.

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use unisum_kernels::cuda::{FLAGS_MAX, SignalTask, WaitTask};

use super::device::{Grid, Host};

type Flags = [AtomicU32; FLAGS_MAX];

fn flags(value: u32) -> Flags {
    [const { AtomicU32::new(0) }; FLAGS_MAX].map(|_| AtomicU32::new(value))
}

fn address(word: &AtomicU32) -> u64 {
    word.as_ptr() as u64
}

fn values(flags: &Flags) -> [u32; FLAGS_MAX] {
    std::array::from_fn(|i| flags[i].load(Ordering::Relaxed)) // No other thread is left.
}

fn signal(device: &Host, flags: &Flags, value: u32, count: u32, stopped: Option<&AtomicU32>) {
    let task = SignalTask {
        flag: std::array::from_fn(|i| address(&flags[i])),
        value: std::array::from_fn(|i| value.wrapping_add(i as u32)),
        count,
        stopped: stopped.map_or(0, address),
    };
    // SAFETY: the words outlive the kernel and are accessed atomically.
    unsafe { device.launch("unisum_signal", Grid(1, 7), &task) };
}

/// Waits for what [`signal`] sets.
fn wait(device: &Host, flags: &Flags, value: u32, count: u32, words: Option<[&AtomicU32; 2]>) {
    let task = WaitTask {
        flag: std::array::from_fn(|i| address(&flags[i])),
        value: std::array::from_fn(|i| value.wrapping_add(i as u32)),
        count,
        abort: words.map_or(0, |[abort, _]| address(abort)),
        stopped: words.map_or(0, |[_, stopped]| address(stopped)),
    };
    // SAFETY: the words outlive the kernel and are accessed atomically.
    unsafe { device.launch("unisum_wait", Grid(1, 7), &task) };
}

#[test]
fn a_signal_sets_the_flags_that_it_counts() {
    let Some(device) = Host::get() else { return };
    for count in [0, 1, 6, 7, 8, FLAGS_MAX] {
        let set = flags(5);
        signal(device, &set, 100, count as u32, None);
        let expected = std::array::from_fn(|i| if i < count { 100 + i as u32 } else { 5 });
        assert_eq!(values(&set), expected);
    }
}

#[test]
fn flags_that_are_there_are_not_waited_for() {
    let Some(device) = Host::get() else { return };
    // As many as wanted, more, and more with wrap-around.
    for (value, is) in [(10, 100), (10, 1 << 30), (u32::MAX - 70, 3), (0x7fff_ff00, 1 << 31)] {
        wait(device, &flags(is), value, FLAGS_MAX as u32, None);
    }
    wait(device, &flags(0), 1, 0, None);
}

#[test]
fn a_wait_ends_when_the_last_flag_is_there_and_not_before() {
    let Some(device) = Host::get() else { return };
    // The second crosses zero.
    for value in [1, u32::MAX - 20] {
        let set = flags(value.wrapping_sub(1));
        let before_last = AtomicU32::new(0);
        thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                wait(device, &set, value, FLAGS_MAX as u32, None);
                // It is set before the last flag, with release, which the wait has acquired.
                before_last.load(Ordering::Relaxed)
            });
            signal(device, &set, value, FLAGS_MAX as u32 - 1, None);
            thread::sleep(Duration::from_millis(20));
            assert!(!waiter.is_finished(), "a flag is missing");
            before_last.store(1, Ordering::Relaxed); // The signal releases it.
            signal(device, &set, value, FLAGS_MAX as u32, None);
            assert_eq!(waiter.join().unwrap(), 1);
        });
    }
}

#[test]
fn an_abort_ends_a_wait_and_silences_the_signals_after_it() {
    let Some(device) = Host::get() else { return };
    let (set, abort, stopped) = (flags(0), AtomicU32::new(0), AtomicU32::new(0));
    signal(device, &set, 1, 3, Some(&stopped));
    assert_eq!(values(&set)[..4], [1, 2, 3, 0]);
    thread::scope(|scope| {
        let waiter = scope.spawn(|| wait(device, &set, 1, 4, Some([&abort, &stopped])));
        thread::sleep(Duration::from_millis(20));
        assert!(!waiter.is_finished(), "a flag is missing");
        abort.store(1, Ordering::Relaxed); // It orders nothing.
        waiter.join().unwrap();
    });
    assert_eq!(stopped.load(Ordering::Relaxed), 1); // No other thread is left.
    signal(device, &set, 50, 3, Some(&stopped));
    assert_eq!(values(&set)[..4], [1, 2, 3, 0]);
}

#[test]
fn a_wait_for_what_is_there_stops_nothing() {
    let Some(device) = Host::get() else { return };
    let (set, abort, stopped) = (flags(100), AtomicU32::new(1), AtomicU32::new(0));
    wait(device, &set, 1, FLAGS_MAX as u32, Some([&abort, &stopped]));
    assert_eq!(stopped.load(Ordering::Relaxed), 0); // No other thread is left.
}
