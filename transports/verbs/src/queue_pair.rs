//! A reliable connection to one peer: a pair of queues for writes and for their announcements.

use std::fmt;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use crate::completions::Completions;
use crate::connection::WRITES;
use crate::domain::report;
use crate::error::VerbsError;
use crate::ffi::{self, Gather, ReceiveRequest, SendRequest};

/// What connecting needs to know of both ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    /// The peer's queue pair.
    pub(crate) number: u32,
    pub(crate) gid: [u8; 16],
    pub(crate) lid: u16,
    /// Code of the largest packet that both ports take.
    pub(crate) mtu: u8,
    pub(crate) own_psn: u32,
    pub(crate) peer_psn: u32,
    pub(crate) timeout: u8,
    pub(crate) retries: u8,
    pub(crate) traffic_class: u8,
    pub(crate) service_level: u8,
}

/// A write to the peer's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Write {
    /// Address of the bytes.
    pub(crate) from: u64,
    pub(crate) bytes: u32,
    /// The key of the device for `from`.
    pub(crate) local: u32,
    /// Where to, in the peer's addresses, and its key.
    pub(crate) to: u64,
    pub(crate) remote: u32,
    /// Told to the peer when the bytes are there.
    pub(crate) immediate: Option<u32>,
    /// Whether its completion is reported.
    pub(crate) signalled: bool,
}

/// A queue pair. Dropping it ends all that is under way: the device touches no memory for it after
/// that.
#[derive(Debug)]
pub(crate) struct QueuePair {
    qp: NonNull<ffi::Qp>,
    number: u32,
    /// Which of its connection's queue pairs it is.
    generation: u32,
    /// Bytes that are taken over when a write is posted.
    inline_bytes: u32,
    completions: Arc<Completions>,
    requests: Vec<SendRequest>,
    gathers: Vec<Gather>,
}

// SAFETY: libibverbs is thread-safe, and the pointers in `requests` are used only while posting.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// A queue pair for so many writes and announcements, in state INIT.
    ///
    /// # Errors
    /// If the device has none left or none of that size.
    pub(crate) fn new(
        completions: &Arc<Completions>,
        writes: usize,
        announcements: usize,
        generation: u32,
    ) -> Result<Self, VerbsError> {
        let domain = completions.domain();
        let device = &domain.port.device;
        let cap = ffi::QpCapabilities {
            max_send_wr: writes as u32,
            max_recv_wr: announcements as u32,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: INLINE_BYTES,
        };
        let cq = completions.cq();
        let mut init = ffi::QpInit {
            qp_context: ptr::null_mut(),
            send_cq: cq,
            recv_cq: cq,
            srq: ptr::null_mut(),
            cap,
            qp_type: ffi::QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: domain and queue are alive, and held until the queue pair is destroyed.
        let qp = unsafe { (domain.library().create_qp)(domain.pd(), &raw mut init) };
        let qp = NonNull::new(qp)
            .ok_or_else(|| VerbsError::os(format!("making a queue pair on {device}")))?;
        // SAFETY: the library made it, and its head is as declared.
        let number = unsafe { qp.as_ref() }.qp_num;
        let pair = Self {
            qp,
            number,
            generation,
            inline_bytes: init.cap.max_inline_data,
            completions: completions.clone(),
            requests: Vec::with_capacity(writes),
            gathers: Vec::with_capacity(writes),
        };
        let mut attributes = ffi::QpAttributes {
            qp_state: ffi::QPS_INIT,
            port_num: domain.port.number,
            qp_access_flags: ffi::ACCESS_REMOTE_WRITE as u32,
            ..Default::default()
        };
        let mask = ffi::QP_STATE | ffi::QP_PKEY_INDEX | ffi::QP_PORT | ffi::QP_ACCESS_FLAGS;
        pair.modify(&mut attributes, mask, "preparing")?;
        Ok(pair)
    }

    /// One that holds so many receives, and [`WRITES`] writes.
    ///
    /// # Errors
    /// If the device has none left or none of that size.
    pub(crate) fn filled(
        completions: &Arc<Completions>,
        announcements: usize,
        generation: u32,
    ) -> Result<Self, VerbsError> {
        let mut pair = Self::new(completions, WRITES, announcements, generation)?;
        pair.expect(announcements).map_err(|code| {
            let error = io::Error::from_raw_os_error(code.abs());
            VerbsError::Os(format!("filling {pair}"), error)
        })?;
        Ok(pair)
    }

    pub(crate) const fn generation(&self) -> u32 {
        self.generation
    }

    /// Whether a completion with this number is of this queue pair: numbers of queue pairs come
    /// again. If so, whether it is a receive's.
    pub(crate) fn is_receive(&self, wr_id: u64) -> Option<bool> {
        (wr_id >> 1 == u64::from(self.generation)).then_some(wr_id & 1 == 1)
    }

    const fn wr_id(&self, is_receive: bool) -> u64 {
        (self.generation as u64) << 1 | is_receive as u64
    }

    /// Has it fail: the device takes no more packets for it, and all that it holds is flushed.
    ///
    /// # Errors
    /// If the device refuses.
    pub(crate) fn fail(&self) -> Result<(), VerbsError> {
        let mut attributes = ffi::QpAttributes { qp_state: ffi::QPS_ERR, ..Default::default() };
        self.modify(&mut attributes, ffi::QP_STATE, "ending")
    }

    /// Its number, which the peer has to know.
    pub(crate) const fn number(&self) -> u32 {
        self.number
    }

    /// Connects to a peer. Nothing is sent: whether there is a way is not known after it.
    ///
    /// # Errors
    /// If the device refuses the path: for RoCE, if the peer's address can't be resolved.
    pub(crate) fn connect(&self, path: &Path) -> Result<(), VerbsError> {
        let domain = self.completions.domain();
        let is_ethernet = domain.attributes.link_layer == ffi::LINK_LAYER_ETHERNET;
        // InfiniBand needs the global header only between subnets.
        let is_global = is_ethernet || path.gid[..8] != domain.gid.raw[..8];
        let mut ready_to_receive = ffi::QpAttributes {
            qp_state: ffi::QPS_RTR,
            path_mtu: u32::from(path.mtu),
            dest_qp_num: path.number,
            rq_psn: path.peer_psn,
            min_rnr_timer: RECEIVER_NOT_READY_TIMER,
            ah_attr: ffi::AddressHandle {
                grh: ffi::GlobalRoute {
                    dgid: path.gid,
                    sgid_index: domain.gid.index,
                    hop_limit: HOPS,
                    traffic_class: path.traffic_class,
                    flow_label: 0,
                },
                dlid: path.lid,
                sl: path.service_level,
                is_global: u8::from(is_global),
                port_num: domain.port.number,
                ..Default::default()
            },
            ..Default::default()
        };
        let mask = ffi::QP_STATE
            | ffi::QP_AV
            | ffi::QP_PATH_MTU
            | ffi::QP_DEST_QPN
            | ffi::QP_RQ_PSN
            | ffi::QP_MAX_DEST_RD_ATOMIC
            | ffi::QP_MIN_RNR_TIMER;
        self.modify(&mut ready_to_receive, mask, "addressing")?;
        let mut ready_to_send = ffi::QpAttributes {
            qp_state: ffi::QPS_RTS,
            sq_psn: path.own_psn,
            timeout: path.timeout,
            retry_cnt: path.retries,
            rnr_retry: WITHOUT_END,
            ..Default::default()
        };
        let mask = ffi::QP_STATE
            | ffi::QP_SQ_PSN
            | ffi::QP_TIMEOUT
            | ffi::QP_RETRY_CNT
            | ffi::QP_RNR_RETRY
            | ffi::QP_MAX_QP_RD_ATOMIC;
        self.modify(&mut ready_to_send, mask, "starting")
    }

    fn modify(
        &self,
        attributes: &mut ffi::QpAttributes,
        mask: i32,
        doing: &str,
    ) -> Result<(), VerbsError> {
        let domain = self.completions.domain();
        // SAFETY: the queue pair is alive; `mask` names the fields that are set.
        let failed = unsafe { (domain.library().modify_qp)(self.qp.as_ptr(), attributes, mask) };
        if failed == 0 {
            return Ok(());
        }
        let error = io::Error::from_raw_os_error(failed.abs());
        Err(VerbsError::Os(format!("{doing} a queue pair on {}", domain.port.device), error))
    }

    /// Posts writes in their order, with one call. What the peer reads through them stays
    /// unchanged until the write, or one behind it, is reported.
    ///
    /// # Errors
    /// The library's code: the queue is full (a bug), or the connection is broken.
    ///
    /// # Safety
    /// Each `from` is readable for `bytes`, under the key `local` of this device, until the write
    /// is reported or the queue pair dropped.
    pub(crate) unsafe fn write(&mut self, writes: impl Iterator<Item = Write>) -> Result<(), i32> {
        self.requests.clear();
        self.gathers.clear();
        let wr_id = self.wr_id(false);
        for write in writes {
            let Write { from, bytes, local, to, remote, immediate, signalled } = write;
            let mut flags = 0;
            flags |= if signalled { ffi::SEND_SIGNALED } else { 0 };
            flags |= if immediate.is_some() { ffi::SEND_SOLICITED } else { 0 };
            flags |= if bytes <= self.inline_bytes { ffi::SEND_INLINE } else { 0 };
            self.gathers.push(Gather { addr: from, length: bytes, lkey: local });
            self.requests.push(SendRequest {
                wr_id,
                num_sge: i32::from(bytes > 0),
                opcode: if immediate.is_some() {
                    ffi::WR_RDMA_WRITE_WITH_IMM
                } else {
                    ffi::WR_RDMA_WRITE
                },
                send_flags: flags,
                imm_data: immediate.unwrap_or(0).to_be(),
                remote_addr: to,
                rkey: remote,
                ..SendRequest::EMPTY
            });
        }
        let Some(last) = self.requests.len().checked_sub(1) else { return Ok(()) };
        let (requests, gathers) = (self.requests.as_mut_ptr(), self.gathers.as_mut_ptr());
        for (index, request) in self.requests.iter_mut().enumerate() {
            request.sg_list = gathers.wrapping_add(index);
            let next = requests.wrapping_add(index + 1);
            request.next = if index < last { next } else { ptr::null_mut() };
        }
        // SAFETY: the queue pair is alive, so its context is.
        let context = unsafe { self.qp.as_ref().context };
        // SAFETY: the driver has put its functions there when it opened the device.
        let post = unsafe { (*context).ops.post_send };
        let post = post.expect("every driver posts");
        let mut refused = ptr::null_mut();
        // SAFETY: the list ends, points into vectors that stay as they are during the call, and
        // the caller vouches for what it names.
        let failed = unsafe { post(self.qp.as_ptr(), requests, &raw mut refused) };
        if failed == 0 { Ok(()) } else { Err(failed) }
    }

    /// Gets ready for so many more announcements.
    ///
    /// # Errors
    /// The library's code: the queue is full (a bug), or the connection is broken.
    pub(crate) fn expect(&mut self, announcements: usize) -> Result<(), i32> {
        let empty = ReceiveRequest {
            wr_id: self.wr_id(true),
            next: ptr::null_mut(),
            sg_list: ptr::null_mut(),
            num_sge: 0,
        };
        let mut requests = [empty; BATCH];
        let mut left = announcements;
        while left > 0 {
            let count = left.min(BATCH);
            let first = requests.as_mut_ptr();
            for (index, request) in requests[..count].iter_mut().enumerate() {
                let next = first.wrapping_add(index + 1);
                request.next = if index + 1 < count { next } else { ptr::null_mut() };
            }
            // SAFETY: the queue pair is alive, so its context is.
            let context = unsafe { self.qp.as_ref().context };
            // SAFETY: the driver has put its functions there when it opened the device.
            let post = unsafe { (*context).ops.post_recv };
            let post = post.expect("every driver posts");
            let mut refused = ptr::null_mut();
            // SAFETY: the list ends and stays as it is during the call; it names no memory.
            let failed = unsafe { post(self.qp.as_ptr(), first, &raw mut refused) };
            if failed != 0 {
                return Err(failed);
            }
            left -= count;
        }
        Ok(())
    }
}

impl fmt::Display for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = &self.completions.domain().port;
        write!(f, "queue pair {} of {}:{}", self.number, port.device, port.number)
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        let domain = self.completions.domain();
        if !domain.is_ours() {
            return;
        }
        // SAFETY: made by `new`, and dropped once.
        let failed = unsafe { (domain.library().destroy_qp)(self.qp.as_ptr()) };
        report("destroying a queue pair", failed);
    }
}

/// What is asked for; devices give what they have. Enough for a small message with its header.
const INLINE_BYTES: u32 = 64;
/// Announcements that are posted with one call.
const BATCH: usize = 32;
/// How long a peer waits before it tries again when there was no place for an announcement: code
/// of 0.64 ms. There always is one, but for peers that are being set up.
const RECEIVER_NOT_READY_TIMER: u8 = 12;
/// Code: the peer's being not ready is no error, however long it lasts.
const WITHOUT_END: u8 = 7;
/// Routers that a packet may pass.
const HOPS: u8 = 64;
