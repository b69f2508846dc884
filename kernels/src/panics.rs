//! Panics of user code, caught where the library calls it.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// A caught panic.
///
/// Its payload is not dropped unless it is a text: another's destructor is user code as well, and
/// could panic again.
pub struct Panic(ManuallyDrop<Box<dyn Any + Send>>);

impl Panic {
    /// Runs user code. The caller ensures that nothing the code left half done is used as if it
    /// were complete.
    ///
    /// # Errors
    /// If the code panicked.
    pub fn catch<R>(code: impl FnOnce() -> R) -> Result<R, Self> {
        catch_unwind(AssertUnwindSafe(code)).map_err(|payload| Self(ManuallyDrop::new(payload)))
    }

    /// The panic message.
    pub fn text(&self) -> &str {
        let payload = &**self.0;
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        text.unwrap_or("no text")
    }

    /// Resumes the panic on this thread.
    pub fn resume(self) -> ! {
        let mut kept = ManuallyDrop::new(self);
        // SAFETY: `kept` is not dropped, so that nobody uses the payload again.
        resume_unwind(unsafe { ManuallyDrop::take(&mut kept.0) })
    }
}

impl Drop for Panic {
    fn drop(&mut self) {
        if self.0.is::<&str>() || self.0.is::<String>() {
            // SAFETY: this is the last use of the payload.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

impl fmt::Debug for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Panic").field(&self.text()).finish()
    }
}

thread_local! {
    /// The message of the last panic of a reduction on this thread. The kernels' results are too
    /// small to carry it.
    static REDUCTION: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps the message of a reduction's panic for [`said_by_reduction`].
pub(crate) fn keep_for_reduction(panic: &Panic) {
    REDUCTION.with_borrow_mut(|said| panic.text().clone_into(said));
}

/// Takes the message of the reduction that panicked last on this thread.
pub fn said_by_reduction() -> String {
    REDUCTION.take()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_panic_said_is_told_and_a_payload_of_its_own_is_never_dropped() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("this panic is part of a test: it must not come");
            }
        }
        let said = |code: fn()| Panic::catch(code).unwrap_err().text().to_owned();
        assert_eq!(said(|| panic!("this is part of a test")), "this is part of a test");
        let formatted = said(|| panic!("{}", String::from("this is part of a test, too")));
        assert_eq!(formatted, "this is part of a test, too");
        assert_eq!(said(|| std::panic::panic_any(Bomb)), "no text");
        assert_eq!(Panic::catch(|| 7).unwrap(), 7);
    }

    #[test]
    fn a_panic_that_goes_on_is_the_one_that_was_caught() {
        let again = Panic::catch(|| {
            Panic::catch(|| assert_eq!(1, 2, "this is part of a test")).unwrap_err().resume();
        });
        assert!(again.unwrap_err().text().contains("this is part of a test"));
    }
}
