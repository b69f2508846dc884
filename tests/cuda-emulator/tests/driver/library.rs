//! cudarc's own types on the emulator, as a program would use them.

use cudarc::driver::{CudaContext, sys};

use crate::support::{leave, role, run};

#[test]
fn contexts_streams_slices_and_events_of_cudarc_leave_nothing_behind() {
    let name = "library::contexts_streams_slices_and_events_of_cudarc_leave_nothing_behind";
    if role().is_none() {
        for pools in ["0", "1"] {
            let settings = [("POOLS", pools), ("LEAKS", "fail"), ("DELAY_US", "300")];
            run(name, &settings).assert_success();
        }
        return;
    }
    assert_eq!(CudaContext::device_count().unwrap(), 2);
    {
        let context = CudaContext::new(1).unwrap();
        assert_eq!(context.name().unwrap(), "Emulated device 1");
        assert_eq!(context.compute_capability().unwrap(), (8, 0));
        let (one, other) = (context.new_stream().unwrap(), context.default_stream());
        let words: Vec<u32> = (0..1000).collect();
        let mut slice = one.clone_htod(&words).unwrap();
        let copy = other.clone_dtod(&slice).unwrap();
        assert_eq!(other.clone_dtoh(&copy).unwrap(), words);
        one.memset_zeros(&mut slice).unwrap();
        let event = one.record_event(None).unwrap();
        other.wait(&event).unwrap();
        assert_eq!(other.clone_dtoh(&slice).unwrap(), [0; 1000]);
        context.synchronize().unwrap();
    }
    leave();
}

#[test]
fn errors_have_names_and_meanings() {
    if role().is_none() {
        run("library::errors_have_names_and_meanings", &[]).assert_success();
        return;
    }
    let error = cudarc::driver::DriverError(sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_eq!(error.error_name().unwrap().to_str(), Ok("CUDA_ERROR_ILLEGAL_ADDRESS"));
    let meaning = error.error_string().unwrap().to_str();
    assert_eq!(meaning, Ok("an illegal memory access was encountered"));
    leave();
}

/// The library is where the directory says, under the names that loaders look for.
#[test]
fn the_directory_holds_the_driver() {
    let folder = cuda_emulator::library_dir();
    for name in ["libcuda.so", "libcuda.so.1"] {
        let library = std::fs::read(folder.join(name)).unwrap();
        assert_eq!(library[..4], *b"\x7FELF");
    }
    assert_eq!(folder, cuda_emulator::library_dir(), "also the second time");
}
