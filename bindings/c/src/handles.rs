//! Handles: what C holds of the library's objects.
//!
//! A handle is a number in the shape of a pointer, which nobody follows: what it stands for is
//! looked up in a table. Numbers are never given twice, and tell the kind of the object and which
//! generation of forked processes made it. So a handle that is stale, of another kind, of the
//! parent or no handle at all is told apart from a good one, and an object that is freed in the
//! middle of a call of another thread lives until that call has ended.

use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Once, PoisonError, RwLock};

use crate::status::{Failure, Outcome, unisum_status};

/// What a handle stands for.
pub(crate) trait Object: Any + Send + Sync {
    /// Tells the kinds apart: 1 to 15.
    const KIND: usize;
    /// What it is called in errors.
    const NAME: &'static str;
}

/// The number of the next handle: none has this or a greater one yet.
static NEXT: AtomicU64 = AtomicU64::new(1);

type Table = BTreeMap<usize, Arc<dyn Any + Send + Sync>>;

/// By generation: a forked child must not touch a lock that another thread may have held.
static TABLES: [RwLock<Table>; GENERATIONS] = [const { RwLock::new(Table::new()) }; GENERATIONS];
/// How many generations have a table of their own. A process forked from so many ones in turn, each
/// of which used the library, shares that of its distant ancestor.
const GENERATIONS: usize = 64;

/// Handles are odd: no pointer to an object is.
const MARK: usize = 1;
const KIND_SHIFT: u32 = 1;
const KIND_MASK: usize = 15;
const GENERATION_SHIFT: u32 = 5;
const NUMBER_SHIFT: u32 = 11;
const _: () = assert!(usize::BITS == 64 && GENERATIONS == 1 << (NUMBER_SHIFT - GENERATION_SHIFT));

/// How many forks lie between the process that used the library first and this one.
pub(crate) fn generation() -> usize {
    static WATCH: Once = Once::new();
    static FORKS: AtomicUsize = AtomicUsize::new(0);
    unsafe extern "C" fn in_child() {
        // Relaxed: the child has one thread.
        FORKS.fetch_add(1, Ordering::Relaxed);
    }
    WATCH.call_once(|| {
        // SAFETY: the handler only adds to an atomic, as any child may.
        let failed = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        assert_eq!(failed, 0, "pthread_atfork fails only for want of memory");
    });
    // Relaxed: it changes only where there is one thread.
    FORKS.load(Ordering::Relaxed) % GENERATIONS
}

/// Gives an object a handle.
pub(crate) fn insert<T: Object>(object: T) -> usize {
    let generation = generation();
    // Relaxed: only that no two are the same matters.
    let number = NEXT.fetch_add(1, Ordering::Relaxed) as usize;
    let handle =
        number << NUMBER_SHIFT | generation << GENERATION_SHIFT | T::KIND << KIND_SHIFT | MARK;
    let mut table = TABLES[generation].write().unwrap_or_else(PoisonError::into_inner);
    table.insert(handle, Arc::new(object));
    handle
}

/// Puts a new object's handle at `place`, which was checked.
///
/// # Safety
/// A handle may be written there.
pub(crate) unsafe fn give<T: Object, H>(object: T, place: *mut *mut H) {
    let handle = ptr::without_provenance_mut(insert(object));
    // SAFETY: the caller vouches for it.
    unsafe { place.write(handle) };
}

/// The object of a handle.
pub(crate) fn get<T: Object, H>(handle: *const H) -> Outcome<Arc<T>> {
    let handle = check::<T>(handle.cast())?;
    let table = TABLES[generation()].read().unwrap_or_else(PoisonError::into_inner);
    table.get(&handle).cloned().and_then(|it| it.downcast().ok()).ok_or_else(stale::<T>)
}

/// Takes the object of a handle, which is then stale.
pub(crate) fn remove<T: Object, H>(handle: *const H) -> Outcome<Arc<T>> {
    let handle = check::<T>(handle.cast())?;
    let mut table = TABLES[generation()].write().unwrap_or_else(PoisonError::into_inner);
    // Whoever looks it up from here on finds nothing; the last to have it drops it, not under the
    // lock.
    table.remove(&handle).and_then(|it| it.downcast().ok()).ok_or_else(stale::<T>)
}

fn check<T: Object>(handle: *const c_void) -> Outcome<usize> {
    let handle = handle.addr();
    let name = T::NAME;
    if handle == 0 {
        return refuse(format!("the {name} is NULL"));
    }
    // Relaxed: whoever has a handle of another thread has seen what that did before.
    let next = NEXT.load(Ordering::Relaxed) as usize;
    if handle & MARK == 0 || !(1..next).contains(&(handle >> NUMBER_SHIFT)) {
        return refuse(format!("{handle:#x} is no handle of unisum, where a {name} is expected"));
    }
    if handle >> KIND_SHIFT & KIND_MASK != T::KIND {
        return refuse(format!("a handle of another kind, where a {name} is expected"));
    }
    if handle >> GENERATION_SHIFT & (GENERATIONS - 1) != generation() {
        let text = format!(
            "this process was forked after the {name} was made: only the parent may use it; make \
             one of its own in the child"
        );
        return Err(Failure::Here(unisum_status::UNISUM_FORKED, text));
    }
    Ok(handle)
}

fn stale<T: Object>() -> Failure {
    let text = format!("the {} was freed", T::NAME);
    Failure::Here(unisum_status::UNISUM_INVALID_HANDLE, text)
}

fn refuse<T>(text: String) -> Outcome<T> {
    Err(Failure::Here(unisum_status::UNISUM_INVALID_HANDLE, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Cat;
    struct Dog(u32);

    impl Object for Cat {
        const KIND: usize = 14;
        const NAME: &'static str = "cat";
    }

    impl Object for Dog {
        const KIND: usize = 15;
        const NAME: &'static str = "dog";
    }

    fn pointer(handle: usize) -> *const c_void {
        ptr::without_provenance(handle)
    }

    #[test]
    fn only_the_handle_of_a_living_object_of_the_kind_is_taken() {
        let (cat, dog) = (pointer(insert(Cat)), pointer(insert(Dog(3))));
        assert_eq!(get::<Dog, _>(dog).unwrap().0, 3);
        let refused = |answer: Outcome<Arc<Dog>>| match answer.map(|_| ()) {
            Err(Failure::Here(unisum_status::UNISUM_INVALID_HANDLE, text)) => text,
            other => panic!("{other:?}"),
        };
        assert!(refused(get(cat)).contains("another kind"));
        assert!(refused(get(ptr::null::<c_void>())).contains("NULL"));
        let somewhere = 7_u64;
        assert!(refused(get(&raw const somewhere)).contains("no handle"));
        assert!(
            refused(get(pointer(dog.addr() + (1 << NUMBER_SHIFT) * 1000))).contains("no handle")
        );
        let held = get::<Dog, _>(dog).unwrap();
        assert_eq!(remove::<Dog, _>(dog).unwrap().0, 3);
        assert!(refused(get(dog)).contains("freed") && refused(remove(dog)).contains("freed"));
        assert_eq!(held.0, 3);
        let again = pointer(insert(Dog(4)));
        assert_ne!(again, dog);
    }

    #[test]
    fn a_handle_of_another_generation_is_of_the_parent() {
        let other = insert(Dog(1)) ^ 1 << GENERATION_SHIFT;
        let answer = get::<Dog, _>(pointer(other)).map(|_| ());
        assert!(matches!(answer, Err(Failure::Here(unisum_status::UNISUM_FORKED, _))));
    }
}
