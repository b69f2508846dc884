//! A world whose ranks share one thread: real engines over real links, advanced in turn, so that
//! nobody ever waits and each run takes the same way.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use unisum_algorithms::{Algorithm, Shape, Topology};
use unisum_kernels::Dtype;
use unisum_kernels::Fold;
use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{Heard, Hello, Listening, Secret, random};
use unisum_link::secure::Credentials;
use unisum_link::{Call, Link, Rank, Region, Regions};
use unisum_shm::{Block, Offer, ShmLink};
use unisum_tcp::{Inbox, TcpConfig, TcpLink};

use crate::Result;
use unisum_engine::{Advance, Engine, GroupShape, Links, Program, Source, Tuning};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Shm,
    Tcp,
}

/// Where the buffers lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    Private,
    /// In the heaps that the ranks of a node map; shared memory only.
    Registered,
}

/// The engines, and what they reduce.
pub(crate) struct World {
    engines: Vec<Engine>,
    regions: Vec<Region>,
    /// Owns the memory of the regions.
    _buffers: Vec<Buffer>,
    count: usize,
    next_number: u64,
}

#[expect(dead_code, reason = "holds the memory")]
enum Buffer {
    Private(Vec<u64>),
    Registered(Block),
}

const DEADLINE: Duration = Duration::from_secs(60);

impl World {
    /// Connects `world` ranks with buffers of `bytes` bytes.
    pub(crate) fn new(
        transport: Transport,
        memory: Memory,
        world: usize,
        bytes: usize,
    ) -> Result<Self> {
        let mut buffers = Vec::new();
        let mut regions = Vec::new();
        let mut engines = Vec::new();
        let links = match transport {
            Transport::Shm => shm_links(world)?.into_iter().map(End::Shm).collect::<Vec<_>>(),
            Transport::Tcp => tcp_links(world)?.into_iter().map(End::Tcp).collect(),
        };
        for (rank, end) in links.into_iter().enumerate() {
            let (buffer, region) = end.buffer(memory, bytes)?;
            buffers.push(buffer);
            regions.push(region);
            let group = (transport == Transport::Shm).then_some(0);
            let links = Links { all: vec![end.into_link()], route: vec![0; world], group };
            engines.push(Engine::new(rank, links, 1.0));
        }
        let count = bytes / Dtype::F32.bytes();
        Ok(Self { engines, regions, _buffers: buffers, count, next_number: 0 })
    }

    /// Each rank's program.
    pub(crate) fn compile(
        &mut self,
        algorithm: &dyn Algorithm,
        tuning: Tuning,
    ) -> Vec<Arc<Program>> {
        let shape = Shape::all_reduce(Topology::flat(self.engines.len()), self.count);
        let mut program = |(rank, engine): (Rank, &mut Engine)| {
            let group = engine.group();
            let members = group.as_ref().map_or_else(Vec::new, |group| group.members().to_vec());
            Arc::new(Program::build(&Source {
                algorithm,
                shape: &shape,
                rank,
                element_bytes: Dtype::F32.bytes(),
                average: false,
                scales: false,
                in_place: true,
                tuning,
                group: group
                    .map(|group| GroupShape { members: &members, slot_bytes: group.slot_bytes() }),
            }))
        };
        self.engines.iter_mut().enumerate().map(&mut program).collect()
    }

    /// Reduces all buffers: starts every rank, then advances them in turn until all are done.
    ///
    /// # Panics
    /// If a link fails, or nothing moves for a minute.
    pub(crate) fn all_reduce(&mut self, programs: &[Arc<Program>]) {
        let call = Call::all_reduce(self.next_number, Dtype::F32, self.count as u64);
        self.next_number += 1;
        for (rank, engine) in self.engines.iter_mut().enumerate() {
            let regions = Regions::in_place(self.regions[rank]);
            let fold = Fold::new(call.dtype, call.op);
            engine.start(&call, fold, &regions, &programs[rank]);
        }
        let mut stuck = None;
        loop {
            let (mut done, mut moved) = (true, false);
            for engine in &mut self.engines {
                let advance = engine.advance().expect("all ranks are here");
                done &= advance == Advance::Done;
                moved |= advance == Advance::Moved;
            }
            if done {
                return;
            }
            if moved {
                stuck = None;
            } else {
                // Only while connections are being opened, which other threads do.
                let since = *stuck.get_or_insert_with(Instant::now);
                assert!(since.elapsed() < DEADLINE, "nothing moves");
                thread::yield_now();
            }
        }
    }
}

enum End {
    Shm(ShmLink),
    Tcp(TcpLink),
}

impl End {
    fn buffer(&self, memory: Memory, bytes: usize) -> Result<(Buffer, Region)> {
        match (self, memory) {
            (Self::Shm(link), Memory::Registered) => {
                let block = link.heap().allocate(bytes)?;
                // SAFETY: the block is that long; the world keeps it and lets only the engine
                // touch it.
                let region = unsafe { Region::new(block.address(), bytes, Some(block.offset())) };
                Ok((Buffer::Registered(block), region))
            }
            (_, Memory::Private) => {
                let mut words = vec![0_u64; bytes.div_ceil(size_of::<u64>())];
                let base = NonNull::from(words.as_mut_slice()).cast();
                // SAFETY: the words are that long; the world keeps them and lets only the engine
                // touch them.
                let region = unsafe { Region::new(base, bytes, None) };
                Ok((Buffer::Private(words), region))
            }
            (Self::Tcp(_), Memory::Registered) => Err("TCP registers no memory".into()),
        }
    }

    fn into_link(self) -> Box<dyn Link> {
        match self {
            Self::Shm(link) => Box::new(link),
            Self::Tcp(link) => Box::new(link),
        }
    }
}

fn secret() -> Secret {
    Secret::new(b"the secret of one process's ranks")
}

fn shm_links(world: usize) -> Result<Vec<ShmLink>> {
    let deadline = Instant::now() + DEADLINE;
    let offers =
        (0..world).map(|_| Offer::new(&secret())).collect::<std::result::Result<Vec<_>, _>>()?;
    let cards: Vec<Vec<u8>> = offers.iter().map(Offer::card).collect();
    let members: Vec<Rank> = (0..world).collect();
    let connect = |rank: Rank, offer: Offer| {
        let candidate = offer.join(rank, &cards, [7; 16], Some(1 << 20), deadline)?;
        candidate.connect(&members, deadline)
    };
    thread::scope(|scope| {
        let connect = &connect;
        let offers = offers.into_iter().enumerate();
        let ranks: Vec<_> =
            offers.map(|(rank, offer)| scope.spawn(move || connect(rank, offer))).collect();
        ranks.into_iter().map(|rank| Ok(rank.join().expect("joining does not panic")?)).collect()
    })
}

fn tcp_links(world: usize) -> Result<Vec<TcpLink>> {
    let listeners = (0..world)
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect::<std::io::Result<Vec<_>>>()?;
    let addresses =
        listeners.iter().map(TcpListener::local_addr).collect::<std::io::Result<Vec<_>>>()?;
    let listeners = listeners.into_iter().enumerate();
    listeners.map(|(rank, listener)| tcp_link(rank, listener, &addresses)).collect()
}

fn tcp_link(rank: Rank, listener: TcpListener, addresses: &[SocketAddr]) -> Result<TcpLink> {
    let link = TcpLink::new(TcpConfig {
        rank,
        routes: addresses.iter().map(|&address| Arc::new(address.into())).collect(),
        session: [7; 16],
        job: [8; 16],
        credentials: Credentials::clear(secret()),
        sockets_per_peer: 1,
        connect_timeout: DEADLINE,
        heartbeat_timeout: DEADLINE,
        reconnect_timeout: Duration::ZERO,
    })?;
    let inbox = link.inbox();
    // The thread ends with the process if fewer connections are opened than could be.
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            if let Err(error) = admit(stream, &inbox) {
                eprintln!("instructions: a connection failed: {error}");
            }
        }
    });
    Ok(link)
}

/// What the control thread does in a job: checks the token, delivers.
fn admit(mut stream: TcpStream, inbox: &Inbox) -> Result<()> {
    let mut listening = Listening::new(random()?);
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        match listening.feed(&byte, &secret(), |_: &Hello| Ok(())) {
            Heard::More => {}
            Heard::Send(bytes) => stream.write_all(&bytes)?,
            Heard::Admitted(Hello { from, socket, .. }, bytes) => {
                stream.write_all(&bytes)?;
                inbox.deliver(from as Rank, socket, ParentOnly::new(stream).into());
                return Ok(());
            }
            Heard::Refused(refusal, _) => return Err(format!("{refusal:?}").into()),
        }
    }
}
