//! Messages between two ranks, with tags.

use std::ffi::c_void;

use unisum::{Element, Message, Messenger};

use crate::communicator::{Comm, unisum_comm};
use crate::handles::{self, Object};
use crate::memory::{check, check_apart, check_place, elements, elements_mut, list};
use crate::status::{Outcome, guard, invalid, unisum_status};
use crate::types::{dtype, for_dtype};

/// Sends and receives messages between the ranks of a communicator, from any threads at once.
#[derive(Debug)]
pub struct unisum_messenger {
    _private: [u8; 0],
}

/// One of the messages of unisum_exchange.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct unisum_message {
    /// A unisum_direction.
    pub direction: u32,
    /// The rank at the other end.
    pub peer: u32,
    /// Messages of the same two ranks and the same tag arrive in the order in which they were sent.
    pub tag: u64,
    /// What is sent, which is only read, or where it goes.
    pub data: *mut c_void,
    /// How many elements; the same at both ends.
    pub count: usize,
}

/// Which way a message goes.
#[repr(u32)]
#[derive(Clone, Copy, Debug)]
pub enum unisum_direction {
    /// From this rank.
    UNISUM_SEND = 1,
    /// To this rank.
    UNISUM_RECEIVE = 2,
}

struct Post(Messenger);

impl Object for Post {
    const KIND: usize = 4;
    const NAME: &'static str = "messenger";
}

/// Makes a messenger between the ranks of a communicator, which it may outlive; freed by
/// unisum_messenger_free. Collective: every rank calls it, and nothing else on this communicator
/// meanwhile. Blocks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_messenger_create(
    comm: *const unisum_comm,
    messenger: *mut *mut unisum_messenger,
) -> unisum_status {
    guard(|| {
        let comm = handles::get::<Comm, _>(comm)?;
        check_place(messenger, "the messenger")?;
        let made = Messenger::new(&comm.communicator)?;
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(Post(made), messenger) };
        Ok(())
    })
}

/// Sends a message to rank `to`. Blocks until the data may be overwritten: messages up to 8 KiB are
/// buffered at the receiver, longer ones wait for the receive.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_send(
    messenger: *const unisum_messenger,
    data: *const c_void,
    count: usize,
    dtype: u32,
    to: u32,
    tag: u64,
) -> unisum_status {
    let direction = unisum_direction::UNISUM_SEND as u32;
    let message = unisum_message { direction, peer: to, tag, data: data.cast_mut(), count };
    // SAFETY: C promises the memory.
    guard(|| unsafe { exchange(messenger, &[message], dtype) })
}

/// Receives the next message with this tag of rank `from`, which has the same length and type.
/// Blocks until it is there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_receive(
    messenger: *const unisum_messenger,
    data: *mut c_void,
    count: usize,
    dtype: u32,
    from: u32,
    tag: u64,
) -> unisum_status {
    let direction = unisum_direction::UNISUM_RECEIVE as u32;
    let message = unisum_message { direction, peer: from, tag, data, count };
    // SAFETY: C promises the memory.
    guard(|| unsafe { exchange(messenger, &[message], dtype) })
}

/// Starts all messages, in their order, and waits for all. Ranks that exchange at once what others
/// wait for can't deadlock, in whichever order they list their messages.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_exchange(
    messenger: *const unisum_messenger,
    messages: *const unisum_message,
    count: usize,
    dtype: u32,
) -> unisum_status {
    guard(|| {
        // SAFETY: C promises so many.
        let messages = unsafe { list(messages, count, "the messages") }?;
        // SAFETY: C promises the memory.
        unsafe { exchange(messenger, messages, dtype) }
    })
}

/// Frees a messenger. Messages that nobody has received are lost, so a rank frees it after it has
/// received what was sent to it. Calls of other threads that are under way go on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_messenger_free(
    messenger: *const unisum_messenger,
) -> unisum_status {
    guard(|| handles::remove::<Post, _>(messenger).map(drop))
}

/// # Safety
/// C promises the memory.
unsafe fn exchange(
    messenger: *const unisum_messenger,
    messages: &[unisum_message],
    dtype: u32,
) -> Outcome {
    let messenger = handles::get::<Post, _>(messenger)?;
    for_dtype!(self::dtype(dtype)?, T => {
        let mut pieces = Vec::with_capacity(messages.len());
        for message in messages {
            let receives = receives(message)?;
            pieces.push(check(T::DTYPE, message.data, message.count, receives, "a message")?);
        }
        check_apart(&mut pieces)?;
        // SAFETY: the caller vouches for it; the messages were checked.
        let mut all: Vec<_> = messages.iter().map(|it| unsafe { lend::<T>(it) }).collect();
        Ok(messenger.0.exchange(&mut all)?)
    })
}

fn receives(message: &unisum_message) -> Outcome<bool> {
    match message.direction {
        it if it == unisum_direction::UNISUM_SEND as u32 => Ok(false),
        it if it == unisum_direction::UNISUM_RECEIVE as u32 => Ok(true),
        other => invalid(format!("{other} is no direction of a message")),
    }
}

/// # Safety
/// C promises the memory, which was checked for elements of type `T`, for `'a`.
unsafe fn lend<'a, T: Element>(message: &unisum_message) -> Message<'a, T> {
    let unisum_message { direction, peer, tag, data, count } = *message;
    if direction == unisum_direction::UNISUM_SEND as u32 {
        // SAFETY: the caller vouches for it.
        let data = unsafe { elements(data, count) };
        return Message::Send { data, to: peer as usize, tag };
    }
    // SAFETY: as above; what is received overlaps nothing else.
    let data = unsafe { elements_mut(data, count) };
    Message::Receive { data, from: peer as usize, tag }
}
