//! What runs the kernels for devices: the host, for which their source is compiled, or a driver
//! that interprets the shipped PTX.

use std::mem::offset_of;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use super::emulated::Emulated;
use crate::harness::Misaligned;
use libloading::{Library, Symbol};
use unisum_kernels::cuda::{
    CopiesTask, CopyTask, FoldTask, MultimemTask, SignalTask, StagedTask, WaitTask,
};

/// How many blocks of how many threads run a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid(pub(crate) u32, pub(crate) u32);

/// What a kernel takes: which of the library's functions launches it.
///
/// # Safety
/// It has the layout of the parameter of every kernel that this function launches.
pub(crate) unsafe trait Argument {
    const LAUNCHER: &'static str;
}

macro_rules! arguments {
    ($($task:ty, $launcher:expr;)*) => {$(
        // SAFETY: a test compares the layouts.
        unsafe impl Argument for $task {
            const LAUNCHER: &'static str = $launcher;
        }
    )*};
}

arguments! {
    FoldTask, "host_launch_fold";
    CopyTask, "host_launch_copy";
    CopiesTask, "host_launch_copies";
    SignalTask, "host_launch_signal";
    WaitTask, "host_launch_wait";
    StagedTask, "host_launch_staged";
}

/// What stands for a device.
pub(crate) trait Device: Sync {
    /// Makes bytes of the host known to the device, as far behind a multiple of 16 bytes.
    fn lend(&self, memory: &mut Misaligned) -> u64;
    /// Gives what the device has made of them back to the host.
    fn take_back(&self, memory: &mut Misaligned, address: u64);
    /// Runs a fold to its end.
    ///
    /// # Safety
    /// All addresses are of this device, and as large as the task says.
    unsafe fn fold(&self, kernel: &str, grid: Grid, task: &FoldTask);
}

/// All that this machine has.
pub(crate) fn devices() -> impl Iterator<Item = &'static dyn Device> {
    let host = Host::get().map(|it| it as &dyn Device);
    host.into_iter().chain([Emulated::get() as &dyn Device])
}

/// The source, compiled for the host.
pub(crate) struct Host(Library);

impl Device for Host {
    fn lend(&self, memory: &mut Misaligned) -> u64 {
        memory.pointer() as u64
    }

    fn take_back(&self, _: &mut Misaligned, _: u64) {}

    unsafe fn fold(&self, kernel: &str, grid: Grid, task: &FoldTask) {
        // SAFETY: the caller keeps the same contract.
        unsafe { self.launch(kernel, grid, task) };
    }
}

impl Host {
    /// None without a C++ compiler, unless `UNISUM_TEST_C` is `required`.
    pub(crate) fn get() -> Option<&'static Self> {
        static HOST: OnceLock<Option<Host>> = OnceLock::new();
        HOST.get_or_init(Self::build).as_ref()
    }

    fn build() -> Option<Self> {
        // A compiler for another machine is none.
        let mut asked = Command::new("g++");
        let machine = asked.arg("-dumpmachine").stderr(Stdio::null()).output();
        if !machine.is_ok_and(|it| it.stdout.starts_with(std::env::consts::ARCH.as_bytes())) {
            let required = std::env::var("UNISUM_TEST_C").is_ok_and(|word| word == "required");
            assert!(!required, "missing: g++");
            println!("skipped: this machine lacks g++");
            return None;
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let here = root.join("tests/cuda");
        // Not a name that a test process beside this one writes to.
        let library = format!("libkernels-{}.so", std::process::id());
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(library);
        let mut compiler = Command::new("g++");
        compiler.args(["-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing"]);
        compiler.args([
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unknown-pragmas",
            "-fPIC",
            "-shared",
            "-pthread",
        ]);
        compiler.arg("-DUNISUM_ON_HOST").arg("-I").arg(&here).arg("-I").arg(root.join("cuda"));
        compiler.args(["-x", "c++"]).arg(here.join("host.cpp")).arg("-o").arg(&library);
        let output = compiler.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{compiler:?}: {}\n{said}", output.status);
        // SAFETY: nothing runs when the library is loaded.
        let loaded = unsafe { Library::new(&library) }.unwrap();
        std::fs::remove_file(&library).unwrap();
        Some(Self(loaded))
    }

    /// Runs a kernel to its end.
    ///
    /// # Safety
    /// What the kernel does with `task` is sound.
    pub(crate) unsafe fn launch<T: Argument>(&self, kernel: &str, grid: Grid, task: &T) {
        type Launcher<T> = unsafe extern "C" fn(*const (), u32, u32, *const T);
        // SAFETY: the library has launchers of this type.
        let launcher: Symbol<'_, Launcher<T>> = unsafe { self.0.get(T::LAUNCHER) }.unwrap();
        // SAFETY: a kernel is a function, of which only the address is taken here.
        let kernel: Symbol<'_, *const ()> = unsafe { self.0.get(kernel) }.unwrap();
        // SAFETY: the launcher is the one for kernels that take this; the caller vouches for it.
        unsafe { launcher(*kernel, grid.0, grid.1, task) };
    }
}

#[test]
fn the_structs_of_kernels_have_the_layout_that_rust_gives_them() {
    let Some(host) = Host::get() else { return };
    let expected = [
        size_of::<FoldTask>(),
        offset_of!(FoldTask, to),
        offset_of!(FoldTask, from),
        offset_of!(FoldTask, count),
        offset_of!(FoldTask, divisor),
        offset_of!(FoldTask, factor),
        offset_of!(FoldTask, nonfinite),
        offset_of!(FoldTask, sources),
        offset_of!(FoldTask, flags),
        size_of::<CopyTask>(),
        offset_of!(CopyTask, to),
        offset_of!(CopyTask, from),
        offset_of!(CopyTask, bytes),
        size_of::<CopiesTask>(),
        offset_of!(CopiesTask, copy),
        offset_of!(CopiesTask, count),
        size_of::<SignalTask>(),
        offset_of!(SignalTask, flag),
        offset_of!(SignalTask, value),
        offset_of!(SignalTask, count),
        offset_of!(SignalTask, stopped),
        size_of::<WaitTask>(),
        offset_of!(WaitTask, flag),
        offset_of!(WaitTask, value),
        offset_of!(WaitTask, count),
        offset_of!(WaitTask, abort),
        offset_of!(WaitTask, stopped),
        size_of::<StagedTask>(),
        offset_of!(StagedTask, to),
        offset_of!(StagedTask, from),
        offset_of!(StagedTask, staging),
        offset_of!(StagedTask, theirs),
        offset_of!(StagedTask, mine),
        offset_of!(StagedTask, count),
        offset_of!(StagedTask, call),
        offset_of!(StagedTask, divisor),
        offset_of!(StagedTask, factor),
        offset_of!(StagedTask, nonfinite),
        offset_of!(StagedTask, abort),
        offset_of!(StagedTask, stopped),
        offset_of!(StagedTask, flags),
        offset_of!(StagedTask, rank),
        offset_of!(StagedTask, ranks),
        size_of::<MultimemTask>(),
        offset_of!(MultimemTask, to),
        offset_of!(MultimemTask, from),
        offset_of!(MultimemTask, own),
        offset_of!(MultimemTask, all),
        offset_of!(MultimemTask, theirs),
        offset_of!(MultimemTask, mine),
        offset_of!(MultimemTask, count),
        offset_of!(MultimemTask, call),
        offset_of!(MultimemTask, divisor),
        offset_of!(MultimemTask, factor),
        offset_of!(MultimemTask, nonfinite),
        offset_of!(MultimemTask, abort),
        offset_of!(MultimemTask, stopped),
        offset_of!(MultimemTask, flags),
        offset_of!(MultimemTask, rank),
        offset_of!(MultimemTask, ranks),
    ];
    // SAFETY: the library has an array of this type, as long as this one: both list the same.
    let layout: Symbol<'_, *const [u64; 60]> = unsafe { host.0.get("host_layout") }.unwrap();
    // SAFETY: as above, and the library stays.
    let layout = unsafe { **layout };
    assert_eq!(layout.map(|number| number as usize), expected);
}
