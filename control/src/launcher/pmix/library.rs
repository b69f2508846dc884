//! The part of PMIx's C interface that is used here, and its library, opened at run time.
//!
//! It is not linked: a program starts on hosts that lack it. Its binary interface has been the same
//! since version 3. Layouts are written after `pmix.h` and `pmix_common.h`, and checked against a C
//! compiler's view of them by the tests.

use std::error::Error;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::ptr;
use std::time::Duration;

use super::{Identity, Refusal, Server};

/// `pmix_proc_t`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Process {
    namespace: [c_char; NAMESPACE_BYTES],
    rank: u32,
}

/// `pmix_byte_object_t`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Bytes {
    bytes: *mut c_char,
    size: usize,
}

/// The union in `pmix_value_t`: what is used here, and its whole size.
#[repr(C)]
#[derive(Clone, Copy)]
union Data {
    flag: bool,
    integer: c_int,
    uint16: u16,
    uint32: u32,
    bytes: Bytes,
    all: [u64; 3],
}

/// `pmix_value_t`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Value {
    kind: u16,
    data: Data,
}

/// `pmix_info_t`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    key: [c_char; KEY_BYTES],
    flags: u32,
    value: Value,
}

const NAMESPACE_BYTES: usize = 256;
const KEY_BYTES: usize = 512;
/// All of a job, where what is asked for is the job's.
const RANK_WILDCARD: u32 = u32::MAX - 1;

const BOOL: u16 = 1;
const INT: u16 = 6;
const UINT16: u16 = 13;
const UINT32: u16 = 14;
const BYTE_OBJECT: u16 = 27;

const SCOPE_GLOBAL: u8 = 3;

const SUCCESS: c_int = 0;
const TIMED_OUT: c_int = -24;
const UNREACHABLE: c_int = -25;
const COMMUNICATION_FAILED: c_int = -49;
const LOST_CONNECTION: c_int = -61;

const JOB_SIZE: &CStr = c"pmix.job.size";
const LOCAL_SIZE: &CStr = c"pmix.local.size";
const LOCAL_RANK: &CStr = c"pmix.lrank";
const TIMEOUT: &CStr = c"pmix.timeout";
const COLLECT_DATA: &CStr = c"pmix.collect";

const SONAME: &str = "libpmix.so.2";
/// The first version with the layouts above.
const OLDEST: u32 = 3;

/// Declares the functions of the library, and how to find them all.
macro_rules! functions {
    ($($name:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
            /// Keeps the code behind the pointers in memory, for good: the library may have a
            /// thread that runs, also where it could not be opened.
            _library: ManuallyDrop<libloading::Library>,
        }

        impl Functions {
            fn open() -> Result<Self, libloading::Error> {
                // SAFETY: the library's constructors do nothing that this program could break.
                let library = ManuallyDrop::new(unsafe { libloading::Library::new(SONAME) }?);
                Ok(Self {
                    $($name: {
                        // SAFETY: pmix.h declares the symbol with this type.
                        let symbol = unsafe { library.get($symbol.to_bytes_with_nul()) }?;
                        *symbol
                    },)*
                    _library: library,
                })
            }
        }
    };
}

functions! {
    version = c"PMIx_Get_version": fn() -> *const c_char;
    error_string = c"PMIx_Error_string": fn(c_int) -> *const c_char;
    init = c"PMIx_Init": fn(*mut Process, *mut Info, usize) -> c_int;
    initialized = c"PMIx_Initialized": fn() -> c_int;
    finalize = c"PMIx_Finalize": fn(*const Info, usize) -> c_int;
    put = c"PMIx_Put": fn(u8, *const c_char, *mut Value) -> c_int;
    commit = c"PMIx_Commit": fn() -> c_int;
    fence = c"PMIx_Fence": fn(*const Process, usize, *const Info, usize) -> c_int;
    get = c"PMIx_Get":
        fn(*const Process, *const c_char, *const Info, usize, *mut *mut Value) -> c_int;
}

unsafe extern "C" {
    /// The C library's own, for what PMIx allocates with its `malloc`.
    fn free(memory: *mut c_void);
}

/// PMIx, as its library knows it.
pub(super) struct Library {
    functions: Functions,
    /// As `PMIx_Init` said.
    own: Option<Process>,
}

impl Library {
    /// Opens the library.
    ///
    /// # Errors
    /// The loader's words, or that it is too old.
    pub(super) fn open() -> Result<Self, String> {
        let functions = Functions::open().map_err(|error| {
            let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            format!("its library can't be used ({cause})")
        })?;
        // SAFETY: it may be called at any time, and returns a constant.
        let version = text(unsafe { (functions.version)() });
        if major(&version).is_none_or(|major| major < OLDEST) {
            return Err(format!("{SONAME} is `{version}`, and version {OLDEST} is needed"));
        }
        Ok(Self { functions, own: None })
    }

    fn check(&self, doing: &'static str, status: c_int) -> Result<(), Refusal> {
        // SAFETY: any number is allowed, and what is returned is a constant.
        let words = || text(unsafe { (self.functions.error_string)(status) });
        match status {
            SUCCESS => Ok(()),
            TIMED_OUT => Err(Refusal::TimedOut),
            UNREACHABLE | COMMUNICATION_FAILED | LOST_CONNECTION => {
                Err(Refusal::Gone(format!("{doing}: {}", words())))
            }
            _ => Err(Refusal::Other(format!("{doing}: {} ({status})", words()))),
        }
    }

    /// This process; an error unless PMIx is open.
    fn own(&self) -> Result<Process, Refusal> {
        self.own.ok_or_else(|| Refusal::Other("PMIx is not open".to_owned()))
    }

    /// A value of a rank, or of the job. Frees what the library allocated.
    fn value<T>(
        &self,
        rank: u32,
        key: &CStr,
        options: &[Info],
        read: impl FnOnce(&Value) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let process = Process { rank, ..self.own()? };
        let mut value: *mut Value = ptr::null_mut();
        // SAFETY: PMIx is open, as `own` has checked. It reads the process, the key, which ends
        // in a zero, and as many options as are said, and writes a pointer where there is room.
        let status = unsafe {
            (self.functions.get)(
                &raw const process,
                key.as_ptr(),
                options.as_ptr(),
                options.len(),
                &raw mut value,
            )
        };
        self.check("PMIx_Get", status)?;
        // SAFETY: upon success it is null or a value that is whole, and this function's own.
        let got = unsafe { value.as_ref() };
        let nothing = || Refusal::Other("PMIx_Get: it gave no value".to_owned());
        let got = read(got.ok_or_else(nothing)?);
        // SAFETY: the library has allocated it by malloc, and hands it to the caller to free.
        unsafe { free(value.cast()) };
        got
    }

    fn number(&self, rank: u32, key: &CStr) -> Result<usize, Refusal> {
        self.value(rank, key, &[], |value| {
            let number = match value.kind {
                // SAFETY: the kind says which field of the union was written.
                UINT32 => unsafe { value.data.uint32 },
                // SAFETY: as above.
                UINT16 => u32::from(unsafe { value.data.uint16 }),
                other => return Err(unexpected(key, other)),
            };
            usize::try_from(number).map_err(|_| unexpected(key, value.kind))
        })
    }
}

impl Server for Library {
    fn is_initialized(&self) -> bool {
        // SAFETY: it may be called at any time.
        unsafe { (self.functions.initialized)() != 0 }
    }

    fn init(&mut self) -> Result<Identity, Refusal> {
        let mut own = Process { namespace: [0; NAMESPACE_BYTES], rank: 0 };
        // SAFETY: it fills the process, and reads no options, as there are none.
        let status = unsafe { (self.functions.init)(&raw mut own, ptr::null_mut(), 0) };
        self.check("PMIx_Init", status)?;
        self.own = Some(own);
        let bytes = own.namespace.iter().map(|byte| byte.to_ne_bytes()[0]);
        let bytes: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
        let namespace = String::from_utf8_lossy(&bytes).into_owned();
        Ok(Identity { namespace, rank: own.rank })
    }

    fn job_size(&self) -> Result<usize, Refusal> {
        self.number(RANK_WILDCARD, JOB_SIZE)
    }

    fn local_size(&self) -> Result<usize, Refusal> {
        self.number(RANK_WILDCARD, LOCAL_SIZE)
    }

    fn local_rank(&self) -> Result<usize, Refusal> {
        self.number(self.own()?.rank, LOCAL_RANK)
    }

    fn put(&self, key: &str, value: &[u8]) -> Result<(), Refusal> {
        self.own()?;
        let key = c_key(key)?;
        let bytes = Bytes { bytes: value.as_ptr().cast_mut().cast(), size: value.len() };
        let mut value = Value { kind: BYTE_OBJECT, data: Data { all: [0; 3] } };
        value.data.bytes = bytes;
        // SAFETY: PMIx is open. It copies the bytes, as many as are said, and writes to none.
        let status = unsafe { (self.functions.put)(SCOPE_GLOBAL, key.as_ptr(), &raw mut value) };
        self.check("PMIx_Put", status)?;
        // SAFETY: PMIx is open.
        self.check("PMIx_Commit", unsafe { (self.functions.commit)() })
    }

    fn fence(&self, timeout: Duration) -> Result<(), Refusal> {
        self.own()?;
        let mut collect = Value { kind: BOOL, data: Data { all: [0; 3] } };
        collect.data.flag = true;
        let options = [info(COLLECT_DATA, collect), seconds(timeout)];
        // SAFETY: PMIx is open. No processes means all of the job; it reads as many options as are
        // said, which stay where they are until it returns.
        let status =
            unsafe { (self.functions.fence)(ptr::null(), 0, options.as_ptr(), options.len()) };
        self.check("PMIx_Fence", status)
    }

    fn get(&self, rank: u32, key: &str, timeout: Duration) -> Result<Vec<u8>, Refusal> {
        let key = c_key(key)?;
        self.value(rank, &key, &[seconds(timeout)], |value| {
            if value.kind != BYTE_OBJECT {
                return Err(unexpected(&key, value.kind));
            }
            // SAFETY: the kind says which field of the union was written.
            let Bytes { bytes, size } = unsafe { value.data.bytes };
            if bytes.is_null() {
                return Ok(Vec::new());
            }
            // SAFETY: the library wrote so many bytes there, which are this process's own now.
            let copy = unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), size) }.to_vec();
            // SAFETY: the library has allocated them by malloc, for the caller to free.
            unsafe { free(bytes.cast()) };
            Ok(copy)
        })
    }

    fn finalize(&mut self) {
        if self.own.take().is_some() {
            // SAFETY: PMIx is open, and nothing of it is used after this.
            let status = unsafe { (self.functions.finalize)(ptr::null(), 0) };
            if let Err(refusal) = self.check("PMIx_Finalize", status) {
                tracing::debug!("{refusal}");
            }
        }
    }
}

fn unexpected(key: &CStr, kind: u16) -> Refusal {
    Refusal::Other(format!("PMIx_Get: {} is of an unexpected type, {kind}", key.to_string_lossy()))
}

fn c_key(key: &str) -> Result<CString, Refusal> {
    CString::new(key).map_err(|error| Refusal::Other(error.to_string()))
}

fn info(key: &CStr, value: Value) -> Info {
    let mut info = Info { key: [0; KEY_BYTES], flags: 0, value };
    for (to, from) in info.key.iter_mut().zip(key.to_bytes()) {
        *to = c_char::from_ne_bytes([*from]);
    }
    info
}

/// The option that ends an operation after whole seconds, at least 1, as 0 means never.
fn seconds(timeout: Duration) -> Info {
    let seconds = timeout.as_secs_f64().ceil().clamp(1.0, f64::from(c_int::MAX));
    let mut value = Value { kind: INT, data: Data { all: [0; 3] } };
    #[expect(clippy::cast_possible_truncation, reason = "it is in range")]
    let whole = seconds as c_int;
    value.data.integer = whole;
    info(TIMEOUT, value)
}

/// The words behind a pointer to a constant of the library.
fn text(constant: *const c_char) -> String {
    if constant.is_null() {
        return String::new();
    }
    // SAFETY: it is not null, and the library's constants end in a zero and stay.
    unsafe { CStr::from_ptr(constant) }.to_string_lossy().into_owned()
}

/// The first number in a version like `OpenPMIx 4.2.2 (PMIx Standard: 4.1)`.
fn major(version: &str) -> Option<u32> {
    let start = version.find(|it: char| it.is_ascii_digit())?;
    let digits = version[start..].split(|it: char| !it.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests;
