//! Memory and events of several processes.

use cudarc::driver::sys::CUresult;

use crate::KERNELS;
use crate::support::{Gpu, accept, connect, leave, listen, role, start};

/// Starts two processes in the roles `first` and `second`, with the same settings but seeds.
fn two(name: &str, settings: &[(&str, &str)]) {
    let of_first = [settings, &[("SEED", "1")]].concat();
    let of_second = [settings, &[("SEED", "2")]].concat();
    let meeting = format!("{name}-{}", std::process::id());
    let with = |settings: &[(&str, &str)], role| {
        let settings = [settings, &[("CUDA_EMULATOR_TEST_MEETING", meeting.as_str())]].concat();
        start(name, role, &settings)
    };
    let (first, second) = (with(&of_first, "first"), with(&of_second, "second"));
    let (first, second) = (first.wait(), second.wait());
    first.assert_success();
    second.assert_success();
}

const EVENT: u32 = 6;

#[test]
fn memory_is_shared_and_handles_are_of_whole_allocations() {
    let name = "processes::memory_is_shared_and_handles_are_of_whole_allocations";
    match role().as_deref() {
        None => two(name, &[("LEAKS", "fail")]),
        Some("first") => {
            let (gpu, listener) = (Gpu::open(0), listen());
            let mut line = accept(&listener);
            let words: Vec<u32> = (0..1000).collect();
            let memory = gpu.upload(&words);
            let handle = gpu.export(memory + 400).unwrap();
            assert_eq!(handle, gpu.export(memory).unwrap(), "of the whole allocation");
            let own = gpu.import(handle);
            assert_eq!(own, Err(CUresult::CUDA_ERROR_INVALID_CONTEXT), "its own");
            line.send(&handle);
            line.meet();
            assert_eq!(gpu.download::<u32>(memory, 2), [77, 1], "what the other has written");
            assert_eq!(gpu.free(memory), CUresult::CUDA_SUCCESS);
            line.meet();
            gpu.close();
            leave();
        }
        Some(_) => {
            let gpu = Gpu::open(1);
            let mut line = connect();
            let handle = line.receive::<64>();
            let memory = gpu.import(handle).unwrap();
            assert_eq!(gpu.import(handle), Ok(memory), "the same mapping");
            let mut broken = handle;
            broken[16] ^= 1;
            assert_eq!(gpu.import(broken), Err(CUresult::CUDA_ERROR_INVALID_HANDLE));
            assert_eq!(gpu.close_import(memory), CUresult::CUDA_SUCCESS);
            assert_eq!(gpu.download::<u32>(memory, 1000)[999], 999, "still open once");
            assert_eq!(gpu.export(memory), Err(CUresult::CUDA_ERROR_INVALID_VALUE), "not its own");
            assert_eq!(gpu.free(memory), CUresult::CUDA_ERROR_INVALID_VALUE, "not its own");
            let (copy, from) = (gpu.kernel(KERNELS, "copy"), gpu.upload(&[77_u32]));
            gpu.launch(copy, 1, 1, &mut [memory.into(), from.into(), 1_u32.into()]);
            gpu.synchronize();
            line.meet();
            line.meet();
            // The owner has freed it: the handle opens nothing any more.
            assert_eq!(gpu.close_import(memory), CUresult::CUDA_SUCCESS);
            assert_eq!(gpu.close_import(memory), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(gpu.import(handle), Err(CUresult::CUDA_ERROR_INVALID_HANDLE));
            gpu.free(from);
            gpu.unload(copy);
            gpu.close();
            leave();
        }
    }
}

#[test]
fn memory_that_its_owner_has_freed_is_gone() {
    let name = "processes::memory_that_its_owner_has_freed_is_gone";
    match role().as_deref() {
        None => two(name, &[]),
        Some("first") => {
            let (gpu, listener) = (Gpu::open(0), listen());
            let mut line = accept(&listener);
            let memory = gpu.upload(&[1_u32]);
            line.send(&gpu.export(memory).unwrap());
            line.meet();
            gpu.free(memory);
            line.meet();
            line.meet();
            leave();
        }
        Some(_) => {
            let gpu = Gpu::open(0);
            let mut line = connect();
            let memory = gpu.import(line.receive()).unwrap();
            let (copy, to) = (gpu.kernel(KERNELS, "copy"), gpu.allocate(4));
            gpu.launch(copy, 1, 1, &mut [to.into(), memory.into(), 1_u32.into()]);
            gpu.synchronize();
            line.meet();
            line.meet();
            gpu.launch(copy, 1, 1, &mut [to.into(), memory.into(), 1_u32.into()]);
            assert_eq!(gpu.try_synchronize(), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
            line.meet();
            leave();
        }
    }
}

#[test]
fn devices_without_peer_access_open_nothing() {
    let name = "processes::devices_without_peer_access_open_nothing";
    match role().as_deref() {
        None => two(name, &[("NO_PEER", "0:1")]),
        Some("first") => {
            let (gpu, listener) = (Gpu::open(0), listen());
            let mut line = accept(&listener);
            line.send(&gpu.export(gpu.allocate(4)).unwrap());
            line.meet();
            leave();
        }
        Some(_) => {
            let gpu = Gpu::open(1);
            let mut line = connect();
            let handle = line.receive();
            let unsupported = CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
            assert_eq!(gpu.import(handle), Err(unsupported));
            // The same device of another process needs no peer access.
            let same = Gpu::open(0);
            assert!(same.import(handle).is_ok());
            line.meet();
            leave();
        }
    }
}

#[test]
fn a_wait_for_an_event_of_another_process_orders() {
    let name = "processes::a_wait_for_an_event_of_another_process_orders";
    exchange_with_events(name, true);
}

/// The same program without the wait: with delays, it reads what is not there yet.
#[test]
fn a_missing_wait_shows() {
    exchange_with_events("processes::a_missing_wait_shows", false);
}

const ROUNDS: u32 = 30;

/// The first process writes the number of the round and records an event; the second reads it.
fn exchange_with_events(name: &str, waits: bool) {
    match role().as_deref() {
        None => two(name, &[("DELAY_US", "3000")]),
        Some("first") => {
            let (gpu, listener) = (Gpu::open(0), listen());
            let mut line = accept(&listener);
            let (memory, from) = (gpu.upload(&[0_u32]), gpu.allocate(4 * ROUNDS as usize));
            let rounds: Vec<u32> = (1..=ROUNDS).collect();
            gpu.free(from);
            let (from, event) = (gpu.upload(&rounds), gpu.event(EVENT));
            let copy = gpu.kernel(KERNELS, "copy");
            line.send(&gpu.export(memory).unwrap());
            line.send(&gpu.export_event(event));
            for round in 0..u64::from(ROUNDS) {
                let source = from + 4 * round;
                gpu.launch(copy, 1, 1, &mut [memory.into(), source.into(), 1_u32.into()]);
                gpu.record(event);
                // The record is made: from here on, the other may wait for it.
                line.meet();
                // The other has read, or has enqueued it at least.
                line.meet();
                gpu.synchronize();
            }
            leave();
        }
        Some(_) => {
            let gpu = Gpu::open(1);
            let mut line = connect();
            let memory = gpu.import(line.receive()).unwrap();
            let event = gpu.import_event(line.receive());
            let mut stale = 0;
            for round in 1..=ROUNDS {
                line.meet();
                if waits {
                    gpu.wait(event);
                }
                stale += u32::from(gpu.download::<u32>(memory, 1) != [round]);
                line.meet();
            }
            assert_eq!(stale == 0, waits, "{stale} of {ROUNDS} values were stale");
            leave();
        }
    }
}

#[test]
fn kernels_of_two_processes_meet_in_memory() {
    let name = "processes::kernels_of_two_processes_meet_in_memory";
    match role().as_deref() {
        None => two(name, &[("DELAY_US", "200")]),
        Some(which) => {
            let is_first = which == "first";
            let gpu = Gpu::open(i32::from(!is_first));
            let mut line = if is_first { accept(&listen()) } else { connect() };
            let own = gpu.upload(&[0_u32]);
            line.send(&gpu.export(own).unwrap());
            let other = gpu.import(line.receive()).unwrap();
            let module = gpu.kernel(KERNELS, "spin").module;
            let (spin, store) = (gpu.kernel_of(module, "spin"), gpu.kernel_of(module, "store"));
            for round in 1..=20_u32 {
                if is_first {
                    gpu.launch(store, 1, 1, &mut [other.into(), round.into()]);
                    gpu.launch(spin, 1, 1, &mut [own.into(), round.into()]);
                } else {
                    gpu.launch(spin, 1, 1, &mut [own.into(), round.into()]);
                    gpu.launch(store, 1, 1, &mut [other.into(), round.into()]);
                }
            }
            gpu.synchronize();
            assert_eq!(gpu.download::<u32>(own, 1), [20]);
            line.meet();
            leave();
        }
    }
}

#[test]
fn memory_outlives_a_process_that_was_killed_but_opens_no_more() {
    let name = "processes::memory_outlives_a_process_that_was_killed_but_opens_no_more";
    let meeting = format!("{name}-{}", std::process::id());
    let settings = [("CUDA_EMULATOR_TEST_MEETING", meeting.as_str())];
    match role().as_deref() {
        None => {
            let first = start(name, "first", &settings);
            first.wait().assert_success();
        }
        Some("first") => {
            let listener = listen();
            let second = start(name, "second", &[]);
            let mut line = accept(&listener);
            let (gpu, handle) = (Gpu::open(0), line.receive::<64>());
            let memory = gpu.import(handle).unwrap();
            second.kill();
            assert_eq!(gpu.download::<u32>(memory, 1), [9]);
            gpu.close_import(memory);
            assert_eq!(gpu.import(handle), Err(CUresult::CUDA_ERROR_INVALID_HANDLE));
            leave();
        }
        Some(_) => {
            let (mut line, gpu) = (connect(), Gpu::open(0));
            line.send(&gpu.export(gpu.upload(&[9_u32])).unwrap());
            line.receive::<1>();
            unreachable!("the other process kills this one");
        }
    }
}
