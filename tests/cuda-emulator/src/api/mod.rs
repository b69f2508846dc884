//! The entry points of the driver, under the names and with the signatures that CUDA documents.
//!
//! Each is a safe function that takes its pointers as [`Out`], [`In`] or [`Text`]: what a caller
//! promises by CUDA's contract is relied on in those types alone.

mod context;
mod copy;
mod device;
mod event;
mod ipc;
mod launch;
mod memory;
mod module;
mod multicast;
mod pool;
mod stream;
mod unsupported;
mod vmm;

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_void};

use crate::driver::codes::{Code, Done};
use crate::driver::{leaks, uninitialized};

thread_local! {
    /// Whether a host function of a stream runs on this thread. It must not call the driver.
    pub(super) static IN_HOST_FUNCTION: Cell<bool> = const { Cell::new(false) };
}

/// A pointer at which a result is stored, or null.
#[repr(transparent)]
#[derive(Debug)]
struct Out<T>(*mut T);

impl<T> Clone for Out<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Out<T> {}

impl<T> Out<T> {
    /// # Errors
    ///
    /// An invalid value, if the pointer is null.
    fn put(self, value: T) -> Done {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: the caller of the entry point passes a pointer to a `T` that it may write.
        unsafe { self.0.write(value) };
        Ok(())
    }

    /// Does nothing if the pointer is null.
    fn put_if_wanted(self, value: T) {
        if !self.0.is_null() {
            // SAFETY: as in `put`.
            unsafe { self.0.write(value) };
        }
    }

    /// Stores values one after another, as many as there are.
    fn put_all(self, values: &[T])
    where
        T: Copy,
    {
        if !self.0.is_null() {
            // SAFETY: the caller of the entry point passes a pointer to that many.
            unsafe { self.0.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        }
    }

    fn cast<U>(self) -> Out<U> {
        Out(self.0.cast())
    }
}

/// A pointer to an argument, or to several, or null.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
struct In<T>(*const T);

impl<T: Copy> In<T> {
    fn is_null(self) -> bool {
        self.0.is_null()
    }

    fn get(self) -> Done<T> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: the caller of the entry point passes a pointer to a `T`.
        Ok(unsafe { self.0.read_unaligned() })
    }

    /// The element at `index`, of an array that has one there.
    fn at(self, index: usize) -> Done<T> {
        Self(self.0.wrapping_add(index)).get()
    }
}

impl In<u8> {
    /// A copy of so many bytes.
    fn bytes(self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        if !self.0.is_null() {
            // SAFETY: the caller of the entry point passes a pointer to that many.
            unsafe { self.0.copy_to_nonoverlapping(bytes.as_mut_ptr(), count) };
        }
        bytes
    }
}

/// A C string.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
struct Text(*const c_char);

impl Text {
    fn get(self) -> Done<String> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: the caller of the entry point passes a C string.
        let text = unsafe { CStr::from_ptr(self.0) };
        Ok(text.to_string_lossy().into_owned())
    }
}

/// Runs the body of an entry point: counts the call, injects errors, and turns its result into what
/// C sees.
fn call(name: &str, body: impl FnOnce() -> Done) -> i32 {
    if IN_HOST_FUNCTION.get() {
        return Code::NOT_PERMITTED.0;
    }
    match uninitialized().count(name).and_then(|()| body()) {
        Ok(()) => 0,
        Err(Code(code)) => code,
    }
}

/// Defines entry points.
macro_rules! entry_points {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        // SAFETY: the process loads one driver, which defines this name once.
        #[unsafe(no_mangle)]
        #[allow(non_snake_case, reason = "the driver's name")]
        extern "C" fn $name($($argument: $type),*) -> i32 {
            $crate::api::call(stringify!($name), move || $body)
        }
    )*};
}

use entry_points;

/// A pointer that means nothing to the emulator.
type Ignored = *mut c_void;

// SAFETY: no library has another function of this name.
#[unsafe(no_mangle)]
#[allow(non_snake_case, reason = "named like its neighbours")]
extern "C" fn cudaEmulatorLeaks() -> i32 {
    i32::try_from(leaks::count(uninitialized())).unwrap_or(i32::MAX)
}
