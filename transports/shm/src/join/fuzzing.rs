//! What must hold of both ends of joining, whatever the other end sends.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use unisum_link::Rank;
use unisum_link::handshake::{Secret, mac, random};

use super::member::ask;
use super::pending::PendingConnections;
use super::{CHALLENGE_BYTES, GRANT_BYTES, Proof, REQUEST_BYTES};
use crate::layout::Layout;
use crate::mapping::{Mapping, create};

/// A leader gives its memory to nobody without the secret, and to a rank that has it only once. The
/// connection sends all of `bytes`; the first one decides whether it knows the secret: four bytes
/// are then its rank and 32 its nonce, followed by the matching proof.
pub(crate) fn check_leader(bytes: &[u8]) {
    let Some((&how, said)) = bytes.split_first() else { return };
    let listener = listen().expect("an abstract socket can be bound");
    let mapping = memory();
    let proof = proof();
    let mut pending = PendingConnections::new(&listener, &proof, &mapping, [1; 16], &CANDIDATES);
    let mut connection = connect(&listener).expect("the listener has room");
    turn(&mut pending);
    let mut challenge = [0; CHALLENGE_BYTES];
    connection.read_exact(&mut challenge).expect("whoever comes is challenged");
    let (request, is_owner) = request(how, said, &proof, &challenge);
    connection.write_all(&request).expect("the socket has room");
    connection.shutdown(Shutdown::Write).expect("the socket is open");
    // It is read in two pieces, and then its end.
    (0..3).for_each(|_| turn(&mut pending));
    let mut answer = Vec::new();
    // Closed with unread bytes, a Unix socket resets the connection.
    let _ = connection.read_to_end(&mut answer);
    assert_eq!(answer.len(), if is_owner { GRANT_BYTES } else { 0 });
    assert!(pending.is_waiting());
}

/// What the connection sends, and whether it may have the memory.
fn request(how: u8, said: &[u8], proof: &Proof, challenge: &[u8]) -> (Vec<u8>, bool) {
    let honest = how % 2 == 1 && said.len() >= REQUEST_BYTES - 32;
    if !honest {
        return (said[..said.len().min(SAID_BYTES_MAX)].to_vec(), false);
    }
    let who = &said[..REQUEST_BYTES - 32];
    let proof = mac(&proof.secret, "shm member", &[&proof.session, who, challenge]);
    let rank = u32::from_le_bytes([who[0], who[1], who[2], who[3]]) as Rank;
    ([who, &proof].concat(), CANDIDATES[1..].contains(&rank))
}

pub(crate) fn leader_seeds() -> Vec<Vec<u8>> {
    let who = |rank: u8| [&[rank, 0, 0, 0][..], &[6; 32]].concat();
    vec![
        [&[1], &who(5)[..]].concat(),
        [&[1], &who(2)[..]].concat(),
        [&[0], &who(5)[..], &[0; 32]].concat(),
    ]
}

/// A member takes nothing from who can't prove the secret, whatever it says, and does not wait
/// for more than that.
pub(crate) fn check_member(bytes: &[u8]) {
    let (mut ours, mut theirs) = UnixStream::pair().expect("a pair of sockets can be had");
    theirs.write_all(&bytes[..bytes.len().min(SAID_BYTES_MAX)]).expect("the socket has room");
    theirs.shutdown(Shutdown::Write).expect("the socket is open");
    let deadline = Instant::now() + PATIENCE;
    let asked = ask(&mut ours, &proof(), (3, 5), deadline.into());
    assert!(asked.is_err(), "an impostor was believed");
    assert!(Instant::now() < deadline);
}

pub(crate) fn member_seeds() -> Vec<Vec<u8>> {
    vec![vec![8; CHALLENGE_BYTES + GRANT_BYTES], vec![8; CHALLENGE_BYTES]]
}

fn proof() -> Proof {
    Proof { secret: Secret::new(b"the token of the fuzz targets"), session: [4; 16] }
}

fn listen() -> io::Result<UnixListener> {
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(random::<16>()?)?)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn connect(listener: &UnixListener) -> io::Result<UnixStream> {
    let stream = UnixStream::connect_addr(&listener.local_addr()?)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn memory() -> Mapping {
    let layout = Layout::new(CANDIDATES.len(), 0).expect("a small layout");
    create(layout).and_then(|memory| Mapping::new(memory, layout)).expect("memory can be had")
}

/// One turn, without waiting.
fn turn(pending: &mut PendingConnections<'_>) {
    pending.turn(Duration::ZERO).expect("polling works");
}

/// The leader, and the two that it waits for: whoever else asks has no business here.
const CANDIDATES: [Rank; 3] = [3, 5, 8];
/// Less than any socket's buffer.
const SAID_BYTES_MAX: usize = 4096;
/// Far more than an answer takes that needs no waiting.
const PATIENCE: Duration = Duration::from_secs(10);
