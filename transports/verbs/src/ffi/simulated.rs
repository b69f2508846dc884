//! Devices that are only simulated, for tests: a thread delivers the writes of all queue pairs,
//! some of them a while after they were posted, reports them later still, and has queue pairs fail
//! when it is told to.

use std::collections::{BTreeMap, VecDeque};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{BorrowedFd, IntoRawFd as _};

use super::*;
use crate::device::{Gid, Port};

/// How many steps a packet is sent again in which nobody takes it.
const STEPS_IN_VAIN: u32 = 400;

#[derive(Debug, Default)]
struct World {
    pairs: BTreeMap<u32, Pair>,
    /// By the address of their `Cq`.
    queues: BTreeMap<usize, Queue>,
    last_number: u32,
    /// A linear congruential generator's state.
    chance: u64,
    /// Of so many steps of a connected queue pair one has it fail; 0: none.
    fails_in: u64,
    failures: u64,
}

#[derive(Debug)]
struct Pair {
    state: c_uint,
    queue: usize,
    peer: u32,
    own_psn: u32,
    peer_psn: u32,
    receives: VecDeque<u64>,
    /// Posted, and not delivered.
    wire: VecDeque<Posted>,
    /// Delivered, and not reported.
    delivered: VecDeque<Posted>,
    in_vain: u32,
}

#[derive(Clone, Copy, Debug)]
struct Posted {
    wr_id: u64,
    signalled: bool,
    from: u64,
    bytes: u32,
    to: u64,
    immediate: u32,
}

#[derive(Debug, Default)]
struct Queue {
    found: VecDeque<Completion>,
    descriptor: c_int,
    is_armed: bool,
}

fn world() -> MutexGuard<'static, World> {
    static WORLD: OnceLock<Mutex<World>> = OnceLock::new();
    let world = WORLD.get_or_init(|| {
        thread::spawn(|| {
            loop {
                world().step();
                thread::sleep(Duration::from_micros(50));
            }
        });
        Mutex::default()
    });
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has connected queue pairs fail, one in so many of their steps; 0: none.
pub(crate) fn fail_one_in(steps: u64) {
    world().fails_in = steps;
}

/// How many queue pairs have failed by themselves so far.
pub(crate) fn failures() -> u64 {
    world().failures
}

/// Has one queue pair fail.
pub(crate) fn fail(number: u32) {
    world().fail(number, WC_FLUSHED);
}

impl World {
    fn chance(&mut self, of: u64) -> u64 {
        // Source: Knuth, The Art of Computer Programming, vol. 2, 3.3.4, table 1, line 26.
        self.chance = self
            .chance
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.chance >> 33) % of
    }

    fn step(&mut self) {
        let numbers: Vec<u32> = self.pairs.keys().copied().collect();
        for number in numbers {
            if self.pairs[&number].state != QPS_RTS {
                continue;
            }
            let is_used = !self.pairs[&number].wire.is_empty();
            if is_used && self.fails_in > 0 && self.chance(self.fails_in) == 0 {
                self.failures += 1;
                // Some of what is under way arrives, and is not reported.
                for _ in 0..self.chance(4) {
                    self.deliver(number);
                }
                self.fail(number, WC_RETRIES_EXCEEDED);
                continue;
            }
            for _ in 0..self.chance(8) {
                self.deliver(number);
            }
            for _ in 0..self.chance(6) {
                self.report(number);
            }
        }
    }

    /// Brings the oldest write to the peer, if that takes it.
    fn deliver(&mut self, number: u32) {
        let pair = &self.pairs[&number];
        let Some(&posted) = pair.wire.front() else { return };
        let (peer, psn) = (pair.peer, pair.own_psn);
        let there = self.pairs.get_mut(&peer).filter(|there| {
            let is_open = matches!(there.state, QPS_RTR | QPS_RTS);
            is_open && there.peer == number && there.peer_psn == psn
        });
        let taken = there.map(|there| (there.receives.pop_front(), there.queue));
        let Some((wr_id, queue)) = taken else {
            let pair = self.pairs.get_mut(&number).unwrap();
            pair.in_vain += 1;
            if pair.in_vain > STEPS_IN_VAIN {
                self.fail(number, WC_RETRIES_EXCEEDED);
            }
            return;
        };
        // Who has no room is asked again without an end.
        let Some(wr_id) = wr_id else { return };
        let (from, to) = (posted.from as *const u8, posted.to as *mut u8);
        // SAFETY: as on a device: the memory is registered until the write is reported, or its
        // queue pair gone.
        unsafe { from.copy_to(to, posted.bytes as usize) };
        let completion = Completion {
            wr_id,
            opcode: WC_RECV_RDMA_WITH_IMM,
            byte_len: posted.bytes,
            imm_data: posted.immediate,
            qp_num: peer,
            ..Completion::default()
        };
        self.complete(queue, completion);
        let pair = self.pairs.get_mut(&number).unwrap();
        pair.in_vain = 0;
        pair.wire.pop_front();
        pair.delivered.push_back(posted);
    }

    fn report(&mut self, number: u32) {
        let pair = self.pairs.get_mut(&number).unwrap();
        let queue = pair.queue;
        if let Some(posted) = pair.delivered.pop_front()
            && posted.signalled
        {
            let wr_id = posted.wr_id;
            self.complete(queue, Completion { wr_id, qp_num: number, ..Completion::default() });
        }
    }

    /// Has a queue pair fail: the first write has `status`, all else is flushed.
    fn fail(&mut self, number: u32, status: c_uint) {
        let Some(pair) = self.pairs.get_mut(&number) else { return };
        pair.state = QPS_ERR;
        let queue = pair.queue;
        let writes = pair.delivered.drain(..).chain(pair.wire.drain(..));
        let mut flushed: Vec<u64> = writes.map(|it| it.wr_id).collect();
        flushed.extend(pair.receives.drain(..));
        let mut status = status;
        for wr_id in flushed {
            let failed = Completion { wr_id, status, qp_num: number, ..Completion::default() };
            self.complete(queue, failed);
            status = WC_FLUSHED;
        }
    }

    fn complete(&mut self, queue: usize, completion: Completion) {
        let queue = self.queues.get_mut(&queue).unwrap();
        queue.found.push_back(completion);
        if std::mem::take(&mut queue.is_armed) {
            // SAFETY: an event descriptor that is never closed.
            let descriptor = unsafe { BorrowedFd::borrow_raw(queue.descriptor) };
            rustix::io::write(descriptor, &1_u64.to_ne_bytes()).unwrap();
        }
    }
}

/// The port of a simulated device, with its address.
pub(crate) fn port() -> (Port, Gid) {
    let gid = Gid { index: 0, raw: [7; 16], is_v2: true };
    let port = Port {
        device: "simulated".into(),
        number: 1,
        state: "ACTIVE".into(),
        firmware: String::new(),
        rate: String::new(),
        is_ethernet: true,
        is_software: true,
        gids: vec![gid],
    };
    (port, gid)
}

/// A library of such devices. What it makes is never freed.
pub(crate) fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| Library {
        get_device_list,
        free_device_list,
        get_device_name,
        open_device,
        close_device,
        query_device,
        query_port,
        alloc_pd,
        dealloc_pd,
        reg_mr,
        dereg_mr,
        create_comp_channel,
        destroy_comp_channel,
        create_cq,
        destroy_cq,
        get_cq_event,
        ack_cq_events,
        create_qp,
        modify_qp,
        destroy_qp,
        get_async_event,
        ack_async_event,
        fork_init,
        wc_status_str,
        _library: None,
    })
}

fn leak<T>(value: T) -> *mut T {
    Box::into_raw(Box::new(value))
}

fn new_descriptor() -> c_int {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap().into_raw_fd()
}

/// Something that only has an address.
fn token<T>() -> *mut T {
    leak(0_u64).cast()
}

unsafe extern "C" fn get_device_list(count: *mut c_int) -> *mut *mut Device {
    if !count.is_null() {
        // SAFETY: the caller's.
        unsafe { count.write(1) };
    }
    leak([token::<Device>(), ptr::null_mut()]).cast()
}

unsafe extern "C" fn free_device_list(_: *mut *mut Device) {}

unsafe extern "C" fn get_device_name(_: *mut Device) -> *const c_char {
    c"simulated".as_ptr()
}

unsafe extern "C" fn open_device(device: *mut Device) -> *mut Context {
    let ops = Operations {
        _before_poll: [ptr::null_mut(); 11],
        poll_cq: Some(poll_cq),
        req_notify_cq: Some(req_notify_cq),
        _before_post: [ptr::null_mut(); 12],
        post_send: Some(post_send),
        post_recv: Some(post_recv),
        _after_post: [ptr::null_mut(); 5],
    };
    leak(Context { device, ops, cmd_fd: new_descriptor(), async_fd: new_descriptor() })
}

unsafe extern "C" fn close_device(_: *mut Context) -> c_int {
    0
}

unsafe extern "C" fn query_device(_: *mut Context, attributes: *mut DeviceAttributes) -> c_int {
    // SAFETY: the caller's, and all its fields are numbers, which it has set to 0.
    unsafe { &mut *attributes }.max_cqe = 1 << 20;
    0
}

unsafe extern "C" fn query_port(_: *mut Context, _: u8, attributes: *mut PortAttributes) -> c_int {
    // SAFETY: as above.
    let attributes = unsafe { &mut *attributes };
    attributes.state = 4;
    attributes.active_mtu = 5;
    attributes.link_layer = LINK_LAYER_ETHERNET;
    0
}

unsafe extern "C" fn alloc_pd(_: *mut Context) -> *mut Pd {
    token()
}

unsafe extern "C" fn dealloc_pd(_: *mut Pd) -> c_int {
    0
}

unsafe extern "C" fn reg_mr(pd: *mut Pd, addr: *mut c_void, length: usize, _: c_int) -> *mut Mr {
    let context = ptr::null_mut();
    leak(Mr { context, pd, addr, length, handle: 0, lkey: 1, rkey: 2 })
}

unsafe extern "C" fn dereg_mr(_: *mut Mr) -> c_int {
    0
}

unsafe extern "C" fn create_comp_channel(context: *mut Context) -> *mut Channel {
    leak(Channel { context, fd: new_descriptor() })
}

unsafe extern "C" fn destroy_comp_channel(_: *mut Channel) -> c_int {
    0
}

unsafe extern "C" fn create_cq(
    context: *mut Context,
    _: c_int,
    _: *mut c_void,
    channel: *mut Channel,
    _: c_int,
) -> *mut Cq {
    let cq = leak(Cq { context });
    // SAFETY: made above.
    let descriptor = unsafe { (*channel).fd };
    world().queues.insert(cq as usize, Queue { descriptor, ..Queue::default() });
    cq
}

unsafe extern "C" fn destroy_cq(_: *mut Cq) -> c_int {
    0
}

unsafe extern "C" fn get_cq_event(
    channel: *mut Channel,
    _: *mut *mut Cq,
    _: *mut *mut c_void,
) -> c_int {
    // SAFETY: made above.
    let descriptor = unsafe { &*channel }.fd;
    // SAFETY: it is never closed.
    let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
    if rustix::io::read(descriptor, &mut [0; 8]).is_ok() { 0 } else { -1 }
}

unsafe extern "C" fn ack_cq_events(_: *mut Cq, _: c_uint) {}

unsafe extern "C" fn create_qp(pd: *mut Pd, init: *mut QpInit) -> *mut Qp {
    // SAFETY: the caller's.
    let init = unsafe { &*init };
    // SAFETY: made above.
    let context = unsafe { (*init.send_cq).context };
    let mut world = world();
    world.last_number += 1;
    let qp_num = world.last_number;
    let pair = Pair {
        state: 0,
        queue: init.send_cq as usize,
        peer: 0,
        own_psn: 0,
        peer_psn: 0,
        receives: VecDeque::new(),
        wire: VecDeque::new(),
        delivered: VecDeque::new(),
        in_vain: 0,
    };
    world.pairs.insert(qp_num, pair);
    let (send_cq, recv_cq, srq) = (init.send_cq, init.recv_cq, init.srq);
    let qp_context = ptr::null_mut();
    leak(Qp { context, qp_context, pd, send_cq, recv_cq, srq, handle: 0, qp_num })
}

unsafe extern "C" fn modify_qp(qp: *mut Qp, attributes: *mut QpAttributes, _: c_int) -> c_int {
    // SAFETY: made above.
    let number = unsafe { &*qp }.qp_num;
    // SAFETY: the caller's.
    let attributes = unsafe { &*attributes };
    let mut world = world();
    if attributes.qp_state == QPS_ERR {
        world.fail(number, WC_FLUSHED);
        return 0;
    }
    let pair = world.pairs.get_mut(&number).unwrap();
    match attributes.qp_state {
        QPS_RTR => (pair.peer, pair.peer_psn) = (attributes.dest_qp_num, attributes.rq_psn),
        QPS_RTS => pair.own_psn = attributes.sq_psn,
        _ => {}
    }
    pair.state = attributes.qp_state;
    0
}

unsafe extern "C" fn destroy_qp(qp: *mut Qp) -> c_int {
    // SAFETY: made above. Nobody uses it any more, but completions still name it.
    world().pairs.remove(&unsafe { (*qp).qp_num });
    0
}

unsafe extern "C" fn get_async_event(_: *mut Context, _: *mut AsyncEvent) -> c_int {
    -1
}

unsafe extern "C" fn ack_async_event(_: *mut AsyncEvent) {}

unsafe extern "C" fn fork_init() -> c_int {
    0
}

unsafe extern "C" fn wc_status_str(_: c_uint) -> *const c_char {
    c"simulated".as_ptr()
}

unsafe extern "C" fn poll_cq(cq: *mut Cq, most: c_int, found: *mut Completion) -> c_int {
    let mut world = world();
    let queue = world.queues.get_mut(&(cq as usize)).unwrap();
    let count = queue.found.len().min(most as usize);
    for (at, completion) in queue.found.drain(..count).enumerate() {
        // SAFETY: the caller has room for `most`.
        unsafe { found.wrapping_add(at).write(completion) };
    }
    count as c_int
}

unsafe extern "C" fn req_notify_cq(cq: *mut Cq, _: c_int) -> c_int {
    world().queues.get_mut(&(cq as usize)).unwrap().is_armed = true;
    0
}

unsafe extern "C" fn post_send(
    qp: *mut Qp,
    mut request: *mut SendRequest,
    _: *mut *mut SendRequest,
) -> c_int {
    // SAFETY: made above.
    let number = unsafe { (*qp).qp_num };
    let mut world = world();
    // SAFETY: a list of the caller's that ends.
    while let Some(it) = unsafe { request.as_ref() } {
        // SAFETY: as above.
        let gather = unsafe { &*it.sg_list };
        let posted = Posted {
            wr_id: it.wr_id,
            signalled: it.send_flags & SEND_SIGNALED != 0,
            from: gather.addr,
            bytes: if it.num_sge > 0 { gather.length } else { 0 },
            to: it.remote_addr,
            immediate: it.imm_data,
        };
        let pair = world.pairs.get_mut(&number).unwrap();
        pair.wire.push_back(posted);
        request = it.next;
    }
    if world.pairs[&number].state == QPS_ERR {
        world.fail(number, WC_FLUSHED);
    }
    0
}

unsafe extern "C" fn post_recv(
    qp: *mut Qp,
    mut request: *mut ReceiveRequest,
    _: *mut *mut ReceiveRequest,
) -> c_int {
    // SAFETY: made above.
    let number = unsafe { (*qp).qp_num };
    let mut world = world();
    // SAFETY: a list of the caller's that ends.
    while let Some(it) = unsafe { request.as_ref() } {
        world.pairs.get_mut(&number).unwrap().receives.push_back(it.wr_id);
        request = it.next;
    }
    if world.pairs[&number].state == QPS_ERR {
        world.fail(number, WC_FLUSHED);
    }
    0
}
