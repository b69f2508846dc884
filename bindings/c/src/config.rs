//! How a communicator comes to be: the environment, arguments, or a store of the program's.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use unisum::{Builder, Communicator, Store};

use crate::communicator::{Comm, unisum_comm};
use crate::handles::{self, Object};
use crate::memory::{check_place, text};
use crate::status::{Outcome, guard, invalid, unisum_status};

/// Settings for a communicator, on top of the environment.
#[derive(Debug)]
pub struct unisum_config {
    _private: [u8; 0],
}

/// A key-value store that all ranks of a job reach. Its functions are called in unisum_connect and
/// unisum_join, on the thread that calls them; in an elastic job also later, from any thread, when
/// the view changes and when the job ends. One of the values holds the job's secret.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_store {
    /// Stores a value under a key, in place of an earlier one. Gives 0 if that went well.
    pub set: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            key: *const c_char,
            value: *const c_void,
            length: usize,
        ) -> c_int,
    >,
    /// Waits until there is a value under a key, so many seconds at most, copies it to the
    /// `capacity` bytes at `value`, and writes its length. Gives 0 if that went well; anything else
    /// if the time is up, the value does not fit, or the store fails.
    pub get: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            key: *const c_char,
            timeout_s: f64,
            value: *mut c_void,
            capacity: usize,
            length: *mut usize,
        ) -> c_int,
    >,
    /// Given to both functions.
    pub user: *mut c_void,
}

#[derive(Clone, Default)]
struct Settings {
    variables: BTreeMap<String, String>,
    store: Option<CStore>,
}

#[derive(Default)]
struct Config(Mutex<Settings>);

impl Object for Config {
    const KIND: usize = 1;
    const NAME: &'static str = "configuration";
}

#[derive(Clone, Copy)]
struct CStore(unisum_store);

// SAFETY: it is used on the thread that calls `unisum_connect` or `unisum_join`; elastic jobs use
// it from any thread, and the header says so.
unsafe impl Send for CStore {}
// SAFETY: as for `Send`.
unsafe impl Sync for CStore {}

/// Longer than any value that is written.
const VALUE_BYTES_MAX: usize = 64 << 10;

fn key_for_c(key: &str) -> Result<CString, String> {
    CString::new(key).map_err(|_| "the key has a NUL byte".to_owned())
}

impl Store for CStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), String> {
        let (key, set) = (key_for_c(key)?, self.0.set.ok_or("it has no function `set`")?);
        // SAFETY: C promises a function that takes these.
        let failed = unsafe { set(self.0.user, key.as_ptr(), value.as_ptr().cast(), value.len()) };
        if failed == 0 { Ok(()) } else { Err(format!("the function `set` gave {failed}")) }
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, String> {
        let (key, get) = (key_for_c(key)?, self.0.get.ok_or("it has no function `get`")?);
        let (mut value, mut length) = (vec![0_u8; VALUE_BYTES_MAX], 0);
        let (place, seconds) = (value.as_mut_ptr().cast(), timeout.as_secs_f64());
        // SAFETY: C promises a function that takes these, and writes no more than fits.
        let failed = unsafe {
            get(self.0.user, key.as_ptr(), seconds, place, VALUE_BYTES_MAX, &raw mut length)
        };
        if failed != 0 {
            return Err(format!("the function `get` gave {failed}"));
        }
        if length > VALUE_BYTES_MAX {
            return Err(format!("the function `get` says that the value has {length} bytes"));
        }
        value.truncate(length);
        Ok(value)
    }
}

/// Joins the job that this process was started in, as the environment says: torchrun, mpirun, srun
/// and others, or UNISUM_RANK, UNISUM_WORLD and UNISUM_RENDEZVOUS. Collective: every rank calls it.
/// Blocks until all have come. A process without a job is a world of one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_connect_from_environment(
    comm: *mut *mut unisum_comm,
) -> unisum_status {
    guard(|| connect(Settings::default(), comm))
}

/// Joins as rank `rank` of `world`. Where the ranks meet: "tcp://HOST:PORT" of rank 0, or
/// "file:///PATH"; NULL leaves it to the environment. The job's secret, 16 bytes or more, the same
/// on all ranks; NULL leaves it to the environment and to the user's token file. Else as
/// unisum_connect_from_environment.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_connect_to(
    rank: u32,
    world: u32,
    rendezvous: *const c_char,
    token: *const c_char,
    comm: *mut *mut unisum_comm,
) -> unisum_status {
    guard(|| {
        let mut settings = Settings::default();
        let mut set =
            |name: &str, value: &str| settings.variables.insert(name.into(), value.into());
        set("UNISUM_RANK", &rank.to_string());
        set("UNISUM_WORLD", &world.to_string());
        if !rendezvous.is_null() {
            // SAFETY: C promises a text.
            set("UNISUM_RENDEZVOUS", unsafe { text(rendezvous, "the rendezvous") }?);
        }
        if !token.is_null() {
            // SAFETY: C promises a text.
            set("UNISUM_TOKEN", unsafe { text(token, "the token") }?);
        }
        connect(settings, comm)
    })
}

/// Makes a configuration that says nothing; freed by unisum_config_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_config_create(config: *mut *mut unisum_config) -> unisum_status {
    guard(|| {
        check_place(config, "the configuration")?;
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(Config::default(), config) };
        Ok(())
    })
}

/// Sets a variable of docs/configuration.md by its name, as "UNISUM_TIMEOUT" to "30": it wins over
/// the environment.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_config_set(
    config: *const unisum_config,
    variable: *const c_char,
    value: *const c_char,
) -> unisum_status {
    guard(|| {
        let config = handles::get::<Config, _>(config)?;
        // SAFETY: C promises a text.
        let variable = unsafe { text(variable, "the variable") }?;
        // SAFETY: as above.
        let value = unsafe { text(value, "the value") }?;
        // Refuses what does not exist.
        let _checked = Communicator::builder().variable(variable, value)?;
        config.lock().variables.insert(variable.to_owned(), value.to_owned());
        Ok(())
    })
}

/// Has the ranks meet by a store of the program's, unless the environment or the configuration says
/// where: rank 0 writes its addresses and a fresh token under the key "unisum", or under KEY if
/// UNISUM_RENDEZVOUS is set to "store://KEY". The structure is copied; what `user` points to lives
/// until the last unisum_connect with this configuration has returned, and in an elastic job, which
/// keeps a record of its members under KEY.members, until all of its communicators and buckets were
/// freed. NULL takes the store away.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_config_set_store(
    config: *const unisum_config,
    store: *const unisum_store,
) -> unisum_status {
    guard(|| {
        let config = handles::get::<Config, _>(config)?;
        if store.is_null() {
            config.lock().store = None;
            return Ok(());
        }
        if !store.is_aligned() {
            return invalid("the store is misaligned");
        }
        // SAFETY: C promises a structure.
        let store = unsafe { store.read() };
        if store.set.is_none() || store.get.is_none() {
            return invalid("a function of the store is NULL");
        }
        config.lock().store = Some(CStore(store));
        Ok(())
    })
}

/// Joins a job as the configuration says, which may be used again. Else as
/// unisum_connect_from_environment.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_connect(
    config: *const unisum_config,
    comm: *mut *mut unisum_comm,
) -> unisum_status {
    guard(|| {
        let config = handles::get::<Config, _>(config)?;
        let settings = config.lock().clone();
        connect(settings, comm)
    })
}

/// Joins an elastic job that runs (UNISUM_ELASTIC, as its ranks have it), as a new rank behind the
/// others. The configuration, with the environment, says how the job is found: by the same file or
/// store as its ranks were given. Rank and world count for nothing. Not collective: the job's ranks
/// let this process in by unisum_comm_admit or unisum_buckets_admit.
///
/// Blocks until they have, for UNISUM_CONNECT_TIMEOUT at most. UNISUM_CONFIGURATION if the job is
/// not said to be elastic, or meets by neither a file nor a store; UNISUM_RENDEZVOUS if there is no
/// such job, it ends, refuses this process, or lets nobody in.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_join(
    config: *const unisum_config,
    comm: *mut *mut unisum_comm,
) -> unisum_status {
    guard(|| {
        let config = handles::get::<Config, _>(config)?;
        check_place(comm, "the communicator")?;
        let settings = config.lock().clone();
        let joined = settings.builder()?.join()?;
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(Comm::new(joined), comm) };
        Ok(())
    })
}

/// Frees a configuration. Communicators are not concerned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_config_free(config: *const unisum_config) -> unisum_status {
    guard(|| handles::remove::<Config, _>(config).map(drop))
}

impl Config {
    fn lock(&self) -> std::sync::MutexGuard<'_, Settings> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Settings {
    /// What they make of the environment.
    fn builder(self) -> Outcome<Builder> {
        let mut builder = Communicator::builder();
        for (variable, value) in &self.variables {
            builder = builder.variable(variable, value)?;
        }
        Ok(match self.store {
            Some(store) => builder.store(store),
            None => builder,
        })
    }
}

fn connect(settings: Settings, comm: *mut *mut unisum_comm) -> Outcome {
    check_place(comm, "the communicator")?;
    let communicator = settings.builder()?.connect()?;
    // SAFETY: C promises that it may be written.
    unsafe { handles::give(Comm::new(communicator), comm) };
    Ok(())
}
