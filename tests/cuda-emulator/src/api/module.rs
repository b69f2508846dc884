//! Modules and their kernels.

use std::sync::atomic::Ordering;

use super::{In, Out, Text, entry_points};
use crate::driver::codes::{Code, Done};
use crate::driver::device::current;
use crate::driver::driver;
use crate::driver::kernels::{self, NotLoaded, SHARED_OPTIN_MAX, THREADS_MAX};

/// How a binary image begins: an ELF file, or several images in one.
const ELF: [u8; 4] = *b"\x7FELF";
const FAT: [u8; 4] = 0xBA55_ED50_u32.to_le_bytes();
const FAT_WRAPPER: [u8; 4] = 0x4662_43B1_u32.to_le_bytes();

/// Loads an image: PTX only. Binary images are for devices that the emulated ones are not.
fn load(image: In<u8>) -> Result<u64, NotLoaded> {
    let device = current()?;
    let mut start = [0; 4];
    for (index, byte) in start.iter_mut().enumerate() {
        *byte = image.at(index)?;
        if *byte == 0 {
            return Err(Code::INVALID_IMAGE.into());
        }
    }
    if [ELF, FAT, FAT_WRAPPER].contains(&start) {
        return Err(Code::NO_BINARY_FOR_GPU.into());
    }
    let text = Text(image.0.cast()).get()?;
    if !text.contains(".version") {
        return Err(Code::INVALID_IMAGE.into());
    }
    kernels::load(&text, device, driver()?.settings.compute)
}

/// `CU_JIT_ERROR_LOG_BUFFER` and its size: the options of the compiler that are answered.
const ERROR_LOG: i32 = 5;
const ERROR_LOG_BYTES: i32 = 6;

/// Writes a reason into the buffer for errors, if the options name one.
fn log(reason: &str, count: u32, options: In<i32>, values: In<usize>) -> Done {
    let (mut buffer, mut length) = (0, 0);
    for index in 0..count as usize {
        match options.at(index)? {
            ERROR_LOG => buffer = values.at(index)?,
            ERROR_LOG_BYTES => length = values.at(index)?,
            _ => {}
        }
    }
    if buffer != 0 && length > 0 {
        let mut bytes = reason.as_bytes()[..reason.len().min(length - 1)].to_vec();
        bytes.push(0);
        Out::<u8>(std::ptr::with_exposed_provenance_mut(buffer)).put_all(&bytes);
    }
    Ok(())
}

entry_points! {
    fn cuModuleLoadData(module: Out<u64>, image: In<u8>) {
        let loaded = load(image).map_err(|refused| refused.code)?;
        module.put(loaded)
    }

    fn cuModuleLoadDataEx(
        module: Out<u64>,
        image: In<u8>,
        count: u32,
        options: In<i32>,
        values: In<usize>,
    ) {
        match load(image) {
            Ok(loaded) => module.put(loaded),
            Err(NotLoaded { code, reason }) => {
                log(&reason, count, options, values)?;
                Err(code)
            }
        }
    }

    fn cuModuleLoadFatBinary(_module: Out<u64>, _image: In<u8>) {
        current()?;
        Err(Code::NO_BINARY_FOR_GPU)
    }

    fn cuModuleLoad(module: Out<u64>, path: Text) {
        let mut image = std::fs::read(path.get()?).map_err(|_| Code::FILE_NOT_FOUND)?;
        image.push(0);
        let loaded = load(In(image.as_ptr())).map_err(|refused| refused.code)?;
        module.put(loaded)
    }

    fn cuModuleUnload(module: u64) {
        kernels::unload(module)?;
        current().map(|_| ())
    }

    fn cuModuleGetFunction(kernel: Out<u64>, module: u64, name: Text) {
        current()?;
        let loaded = driver()?.modules.find(module)?;
        kernel.put(kernels::kernel(&loaded, &name.get()?)?)
    }

    fn cuModuleGetGlobal_v2(address: Out<u64>, bytes: Out<usize>, module: u64, name: Text) {
        current()?;
        let loaded = driver()?.modules.find(module)?;
        let found = loaded.module.variables.get(&name.get()?).copied();
        let (start, length) = found.ok_or(Code::NOT_FOUND)?;
        address.put_if_wanted(start);
        bytes.put_if_wanted(length);
        Ok(())
    }

    fn cuFuncGetAttribute(value: Out<i32>, attribute: i32, kernel: u64) {
        let kernel = driver()?.kernels.find(kernel)?;
        let function = kernel.function();
        let bytes = |bytes: usize| i32::try_from(bytes).unwrap_or(i32::MAX);
        value.put(match attribute {
            0 => THREADS_MAX.cast_signed(),
            1 => bytes(function.shared_bytes),
            3 => bytes(function.local_bytes),
            // Registers of a thread: what a real compiler would make of it is unknown.
            4 => 32,
            5 | 6 => driver()?.settings.compute.cast_signed(),
            // Relaxed: only ever set before a launch.
            8 => kernel.dynamic_shared_max.load(Ordering::Relaxed).cast_signed(),
            _ => 0,
        })
    }

    fn cuFuncSetAttribute(kernel: u64, attribute: i32, value: i32) {
        let kernel = driver()?.kernels.find(kernel)?;
        if attribute != 8 {
            return Ok(());
        }
        match u32::try_from(value) {
            Ok(bytes) if bytes <= SHARED_OPTIN_MAX => {
                // Relaxed: only ever read by launches that follow.
                kernel.dynamic_shared_max.store(bytes, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(Code::INVALID_VALUE),
        }
    }

    fn cuFuncSetCacheConfig(kernel: u64, _config: i32) {
        driver()?.kernels.find(kernel).map(|_| ())
    }
}
