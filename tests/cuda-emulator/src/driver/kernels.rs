//! Modules, kernels and launches.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::codes::{Code, Done};
use super::device::Device;
use super::memory::{self, Origin};
use super::registry::lock;
use super::settings::Skip;
use super::stream::{Failure, Stream};
use super::{PTX_VERSION, driver, report};
use crate::machine::{self, FaultKind, Function, Launch, Order, Shape};
use crate::ptx::{Module, Refusal};

/// Parameters of a kernel, together, in bytes.
const PARAMS_MAX: usize = 4096;

/// Shared memory of a block without and with opting in to more, in bytes.
pub(crate) const SHARED_MAX: u32 = 48 << 10;
pub(crate) const SHARED_OPTIN_MAX: u32 = 160 << 10;

pub(crate) const THREADS_MAX: u32 = 1024;

/// A module loaded into a context.
pub(crate) struct Loaded {
    pub device: &'static Device,
    pub module: Module,
    variables: Option<u64>,
    /// Handles of kernels that were asked for.
    handles: Mutex<HashMap<usize, u64>>,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a module of {} functions", self.module.functions.len())
    }
}

/// A kernel of a loaded module.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub loaded: Arc<Loaded>,
    index: usize,
    /// Dynamic shared memory that a launch may ask for.
    pub dynamic_shared_max: AtomicU32,
    launches: AtomicU64,
}

/// Why a module was refused.
pub(crate) struct NotLoaded {
    pub code: Code,
    pub reason: String,
}

impl From<Refusal> for NotLoaded {
    fn from(refusal: Refusal) -> Self {
        Self { code: Code::INVALID_PTX, reason: refusal.to_string() }
    }
}

impl From<Code> for NotLoaded {
    fn from(code: Code) -> Self {
        Self { code, reason: String::new() }
    }
}

/// Loads PTX into the context of a device.
pub(crate) fn load(text: &str, device: &'static Device, compute: u32) -> Result<u64, NotLoaded> {
    let mut variables = None;
    let module = Module::load(
        text,
        |required| {
            if required.version > PTX_VERSION {
                let reason = format!("PTX version {} is too new", required.version);
                return Err(NotLoaded { code: Code::UNSUPPORTED_PTX_VERSION, reason });
            }
            if required.target > compute {
                let reason = format!("PTX for sm_{} on sm_{compute}", required.target);
                return Err(NotLoaded { code: Code::NO_BINARY_FOR_GPU, reason });
            }
            Ok(())
        },
        |image| {
            let address = memory::allocate_variables(image, device.ordinal, device.physical)?;
            variables = Some(address);
            Ok(address)
        },
    );
    let module = module.and_then(check_limits).inspect_err(|refused| {
        if let Some(address) = variables {
            free_variables(address);
        }
        report(&format!("PTX refused: {}", refused.reason));
    })?;
    let handles = Mutex::default();
    Ok(driver()?.modules.add(Loaded { device, module, variables, handles }))
}

fn check_limits(module: Module) -> Result<Module, NotLoaded> {
    for function in module.functions.iter().filter(|function| function.is_entry) {
        if function.param_bytes > PARAMS_MAX || function.shared_bytes > SHARED_MAX as usize {
            let reason = format!("{} has too many parameters or shared memory", function.name);
            return Err(NotLoaded { code: Code::INVALID_PTX, reason });
        }
    }
    Ok(module)
}

fn free_variables(address: u64) {
    let is_module = |region: &memory::Region| matches!(region.origin, Origin::Module);
    let removed = memory::remove(address, is_module);
    assert!(removed.is_ok(), "the variables of a module are removed once");
}

/// Unloads a module. Its kernels' handles become invalid.
pub(crate) fn unload(handle: u64) -> Done {
    let driver = driver()?;
    let loaded = driver.modules.remove(handle)?;
    driver.kernels.remove_if(|kernel| Arc::ptr_eq(&kernel.loaded, &loaded));
    if let Some(address) = loaded.variables {
        free_variables(address);
    }
    Ok(())
}

/// The handle of a kernel.
pub(crate) fn kernel(loaded: &Arc<Loaded>, name: &str) -> Done<u64> {
    let driver = driver()?;
    let index = loaded.module.entry(name).ok_or(Code::NOT_FOUND)?;
    let mut handles = lock(&loaded.handles);
    let new = || {
        let loaded = Arc::clone(loaded);
        let dynamic_shared_max = AtomicU32::new(SHARED_MAX);
        driver.kernels.add(Kernel {
            loaded,
            index,
            dynamic_shared_max,
            launches: AtomicU64::new(0),
        })
    };
    Ok(*handles.entry(index).or_insert_with(new))
}

impl Kernel {
    pub(crate) fn function(&self) -> &Function {
        &self.loaded.module.functions[self.index]
    }

    /// Whether a device can execute a launch of this shape.
    pub(crate) fn check(&self, shape: Shape) -> Done {
        let [_, grid_y, grid_z] = shape.grid;
        let extents = shape.grid.iter().chain(&shape.block);
        let threads = shape.block.iter().try_fold(1_u32, |all, extent| all.checked_mul(*extent));
        let is_sound = extents.clone().all(|extent| *extent > 0)
            && threads.is_some_and(|threads| threads <= THREADS_MAX)
            && shape.grid[0] <= i32::MAX.cast_unsigned()
            && grid_y <= 65535
            && grid_z <= 65535
            && shape.block[2] <= 64;
        // Relaxed: whoever sets the limit launches afterwards.
        let limit = self.dynamic_shared_max.load(Ordering::Relaxed);
        if is_sound && shape.dynamic_shared <= limit { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    /// What the settings leave out of the launch that begins: all of it, or the waits of a thread.
    fn left_out(&self) -> Done<(bool, Option<u32>)> {
        // Relaxed: a program that cares which launch is which makes them in order.
        let number = self.launches.fetch_add(1, Ordering::Relaxed);
        let name = &self.function().name;
        let is_meant = |skip: &&Skip| skip.kernel == *name && number % skip.of == skip.nth - 1;
        let mut meant = driver()?.settings.skips.iter().filter(is_meant).peekable();
        let is_skipped = meant.clone().any(|skip| skip.thread.is_none());
        Ok((is_skipped, meant.find_map(|skip| skip.thread)))
    }

    /// Enqueues a launch. `params` are the parameters as the kernel sees them.
    pub(crate) fn launch(
        self: &Arc<Self>,
        shape: Shape,
        params: Vec<u64>,
        stream: &Arc<Stream>,
    ) -> Done {
        self.check(shape)?;
        if !std::ptr::eq(stream.device, self.loaded.device) {
            return Err(Code::INVALID_HANDLE);
        }
        let (is_skipped, hasty) = self.left_out()?;
        if is_skipped {
            return stream.push(|_| Ok(()));
        }
        let kernel = Arc::clone(self);
        stream.push_by_chance(move |device, chance| {
            let name = &kernel.function().name;
            let injected = driver()
                .and_then(|driver| driver.count("kernel").and_then(|()| driver.count(name)));
            injected.map_err(|code| Failure { code, reason: format!("injected into {name}") })?;
            let launch = Launch {
                module: &kernel.loaded.module,
                kernel: kernel.index,
                shape,
                order: Order { first: chance >> 16, is_reversed: chance >> 12 & 1 == 1 },
                params: &params,
                hasty,
                memory: device,
            };
            machine::run(&launch).map_err(|(place, fault)| Failure {
                code: code_of(fault.kind),
                reason: format!("{place}: {}", fault.reason),
            })
        })
    }
}

fn code_of(kind: FaultKind) -> Code {
    match kind {
        FaultKind::IllegalAddress => Code::ILLEGAL_ADDRESS,
        FaultKind::MisalignedAddress => Code::MISALIGNED_ADDRESS,
        FaultKind::IllegalInstruction => Code::ILLEGAL_INSTRUCTION,
        FaultKind::Trap => Code::LAUNCH_FAILED,
    }
}
