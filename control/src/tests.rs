//! The whole control plane on loopback: real sockets and threads, all ranks in one process.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::sync::mpsc;
use std::thread;

use bytes::BytesMut;
use unisum_kernels::Dtype;
use unisum_link::handshake::{Build, Heard, Secret};
#[cfg(feature = "tls")]
use unisum_link::secure::Sealing;
use unisum_link::secure::{self, Credentials, Listening as Handshake, Session};

use super::message::Message;
use super::*;
use unisum_link::Call;

mod alone;
#[cfg(feature = "tls")]
mod altered;
mod exchanges;
mod flaps;
mod late;
pub(crate) mod relay;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// What needs no time but that of its messages.
const AT_ONCE: Duration = Duration::from_secs(1);

pub(super) fn call(number: u64) -> Call {
    Call::all_reduce(number, Dtype::F32, 1000)
}

/// A directory that is removed when dropped.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new() -> Self {
        let name = u64::from_le_bytes(handshake::random().unwrap());
        let path = std::env::temp_dir().join(format!("unisum-test-{name:016x}"));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(crate) const BUILD: Build = Build { version: [1, 2, 3], sources: 4 };

fn credentials() -> Credentials {
    with_token(b"the token of these tests")
}

/// Encrypted where the build can do that.
pub(crate) fn with_token(token: &[u8]) -> Credentials {
    let secret = Secret::new(token);
    #[cfg(feature = "tls")]
    return Credentials::token(secret, Sealing::Everywhere).unwrap();
    #[cfg(not(feature = "tls"))]
    Credentials::clear(secret)
}

pub(super) fn config(rank: Rank, world: usize, rendezvous: Rendezvous) -> ControlConfig {
    ControlConfig {
        rank,
        world,
        rendezvous,
        job: "tests".into(),
        credentials: credentials(),
        secret_origin: "these tests".into(),
        interface: None,
        port_range: None,
        towards: None,
        connect_timeout: PATIENCE,
        heartbeat_timeout: PATIENCE,
        reconnect_timeout: Duration::ZERO,
        publish: None,
        is_moot: None,
        build: BUILD,
        prepare_listener: |_| {},
    }
}

/// A port of this host at which nobody listens, nor will for a moment as at one that was free.
const NOBODYS: u16 = 1;

fn at(port: u16) -> Rendezvous {
    Rendezvous::Tcp { host: "127.0.0.1".into(), port }
}

fn coordinator(world: usize) -> (Control, Rendezvous) {
    let control = Control::start(config(0, world, at(0))).unwrap();
    let rendezvous = at(control.addresses()[0].port());
    (control, rendezvous)
}

pub(crate) fn hello(rank: u32, world: u32) -> Hello {
    let (purpose, job) = (Purpose::Control, job_hash("tests"));
    let (session, build) = ([0; 16], BUILD);
    Hello { purpose, socket: 0, from: rank, to: 0, world, session, job, build }
}

/// All ranks but those in `without`, which the test plays itself.
fn start(world: usize, without: &[Rank]) -> (Vec<Control>, Rendezvous) {
    let (control, rendezvous) = coordinator(world);
    let mut controls = vec![control];
    let ranks = (1..world).filter(|rank| !without.contains(rank));
    let starts: Vec<_> = ranks
        .map(|rank| {
            let config = config(rank, world, rendezvous.clone());
            thread::spawn(|| Control::start(config).unwrap())
        })
        .collect();
    controls.extend(starts.into_iter().map(|start| start.join().unwrap()));
    (controls, rendezvous)
}

/// Joins as a rank that only the test controls.
fn join_by_hand(rank: u32, world: u32, rendezvous: &Rendezvous) -> Proven {
    let reached = dial::reach(rendezvous, &hello(rank, world), &credentials(), PATIENCE).unwrap();
    let mut connection = reached.connection;
    say(&mut connection, &Message::Joined);
    connection
}

/// As a coordinator, admits who connects and welcomes it to a session.
fn admit_by_hand(listener: &TcpListener) -> Proven {
    let (mut stream, _) = listener.accept().unwrap();
    let mut handshake = Handshake::new([1; 32], true);
    let mut buffer = [0; 1024];
    loop {
        let read = stream.read(&mut buffer).unwrap();
        match handshake.feed(&buffer[..read], &credentials(), |_| Ok(())) {
            Heard::Send(send) => stream.write_all(&send).unwrap(),
            Heard::Admitted(_, send) => break stream.write_all(&send).unwrap(),
            other => assert_eq!(other, Heard::More),
        }
    }
    let session = handshake.take_session();
    let mut connection = Proven::new(ParentOnly::new(stream), session);
    say(&mut connection, &Message::Welcome { session: [3; 16] });
    connection
}

fn say(connection: &mut Proven, message: &Message) {
    let mut encoded = BytesMut::new();
    message.encode(&mut encoded);
    connection.write_all(&encoded).unwrap();
}

/// All ranks exchange blobs that tell rank and round apart.
fn exchange(controls: &[Control], round: u8) {
    thread::scope(|scope| {
        for (rank, control) in controls.iter().enumerate() {
            scope.spawn(move || {
                let blobs = control.exchange(vec![round; rank]).unwrap();
                let expected = (0..controls.len()).map(|rank| vec![round; rank]);
                assert!(blobs.into_iter().eq(expected));
            });
        }
    });
}

#[track_caller]
fn expect_verdict(
    controls: &[Control],
    within: Duration,
    kind: VerdictKind,
    failed_ranks: &[Rank],
) {
    let until = Instant::now() + within;
    for control in controls {
        let verdict = control.await_verdict(until).expect("a verdict in time");
        assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (kind, failed_ranks), "{verdict}");
    }
}

/// Reads until the other end closes.
fn await_close(mut stream: &TcpStream) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut rest = Vec::new();
    if let Err(error) = stream.read_to_end(&mut rest) {
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}

#[test]
fn strangers_neither_come_in_nor_keep_ranks_out() {
    let (first, rendezvous) = coordinator(3);
    let address = first.addresses()[0];
    let connect = || TcpStream::connect(address).unwrap();
    let (mut http, mut garbage, silent) = (connect(), connect(), connect());
    http.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    garbage.write_all(&[0xff; 4096]).unwrap();
    await_close(&http);
    await_close(&garbage);
    // More than are let wait: the oldest is turned away for the newest.
    let crowd: Vec<_> = (0..140).map(|_| connect()).collect();
    await_close(&silent);
    let others: Vec<_> = (1..3)
        .map(|rank| {
            let config = config(rank, 3, rendezvous.clone());
            thread::spawn(|| Control::start(config).unwrap())
        })
        .collect();
    let mut controls = vec![first];
    controls.extend(others.into_iter().map(|start| start.join().unwrap()));
    exchange(&controls, 1);
    drop(crowd);
}

#[test]
fn a_slow_stranger_is_turned_away() {
    let (control, _) = coordinator(2);
    let mut slow = TcpStream::connect(control.addresses()[0]).unwrap();
    slow.write_all(b"usmH").unwrap();
    let started = Instant::now();
    await_close(&slow);
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn ranks_that_do_not_belong_are_told_why() {
    let (_control, rendezvous) = coordinator(3);
    let _first = join_by_hand(1, 3, &rendezvous);
    let refused = |hello: Hello, token: &str| late::refusal(&rendezvous, &hello, token);
    let token = "the token of these tests";
    let second = Hello { session: Hello::of_process(77), ..hello(1, 3) };
    let taken =
        "rank 1 is taken: another process at 127.0.0.1 has joined with it, and process 77 would";
    assert!(refused(second, token).contains(taken));
    assert!(refused(hello(2, 3), "another").contains("wrong token"));
    assert!(refused(hello(2, 4), token).contains("world of 4, but this job's is 3"));
    assert!(refused(hello(3, 3), token).contains("from rank 3"));
    assert!(refused(Hello { job: [0; 16], ..hello(2, 3) }, token).contains("another job"));
    let newer = Build { sources: !BUILD.sources, ..BUILD };
    let told = refused(Hello { build: newer, ..hello(2, 3) }, token);
    assert!(told.contains(&format!("rank 2 runs unisum {newer}, rank 0 runs {BUILD}")), "{told}");
    let data = Hello { purpose: Purpose::Data, ..hello(2, 3) };
    assert!(refused(data, token).contains("another session"));
}

#[test]
fn a_rank_with_the_wrong_token_gives_up_with_the_reason() {
    let (_control, rendezvous) = coordinator(2);
    let wrong = with_token(b"another");
    let started = Instant::now();
    let timeout = Duration::from_secs(1);
    let error = dial::reach(&rendezvous, &hello(1, 2), &wrong, timeout).unwrap_err().to_string();
    assert!(error.contains("wrong token") && error.contains("127.0.0.1"), "{error}");
    let error = dial::reach(&rendezvous, &hello(1, 2), &wrong, timeout).unwrap_err();
    let error = error.with_origin("its file", "a job").to_string();
    assert!(
        error.ends_with("this rank's token is from its file: all ranks need the same"),
        "{error}"
    );
    let other = Hello { job: job_hash("b"), ..hello(1, 2) };
    let error = dial::reach(&rendezvous, &other, &credentials(), timeout).unwrap_err();
    let error = error.with_origin("its file", "b").to_string();
    assert!(error.contains("another job") && error.contains("job is `b`: UNISUM_JOB"), "{error}");
    assert!(started.elapsed() < PATIENCE);
}

#[test]
fn nobody_at_the_rendezvous_is_an_error_with_address_time_and_attempts() {
    let timeout = Duration::from_secs(1);
    let error = dial::reach(&at(NOBODYS), &hello(1, 2), &credentials(), timeout).unwrap_err();
    let ControlError::Unreachable { target, waited, reasons, .. } = error else {
        panic!("{error}");
    };
    assert!(target.contains(&NOBODYS.to_string()) && waited >= timeout && reasons.attempts() > 1);
}

#[test]
fn a_killed_rank_is_named_on_all_others_at_once() {
    let (controls, rendezvous) = start(5, &[4]);
    let dying = join_by_hand(4, 5, &rendezvous);
    drop(dying);
    expect_verdict(&controls, AT_ONCE, VerdictKind::Died, &[4]);
    let error = controls[1].exchange(Vec::new()).unwrap_err();
    assert!(matches!(error, ControlError::Ended(_)));
}

#[test]
fn a_killed_coordinator_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let rendezvous = at(listener.local_addr().unwrap().port());
    let start = thread::spawn(|| Control::start(config(1, 2, rendezvous)).unwrap());
    let connection = admit_by_hand(&listener);
    let control = start.join().unwrap();
    assert_eq!(control.session(), [3; 16]);
    drop(connection);
    expect_verdict(&[control], AT_ONCE, VerdictKind::Died, &[0]);
}

#[test]
fn nonsense_from_a_member_ends_the_job_with_its_name() {
    let (controls, rendezvous) = start(3, &[2]);
    let mut broken = join_by_hand(2, 3, &rendezvous);
    broken.write_all(&[0xff; 1000]).unwrap();
    expect_verdict(&controls, PATIENCE, VerdictKind::Protocol, &[2]);
}

#[test]
fn a_rank_that_does_not_enter_is_named_with_the_others_progress() {
    let (controls, _) = start(3, &[]);
    for control in [&controls[0], &controls[1]] {
        control.status().begin(&call(0));
        control.status().step(2, 5, 64);
    }
    controls[1].overdue(call(0).into());
    expect_verdict(&controls, PATIENCE, VerdictKind::NotEntered, &[2]);
    let text = controls[2].verdict().unwrap().text;
    assert!(text.contains("rank 0: in all_reduce #0") && text.contains("step 2 of 5"), "{text}");
}

#[test]
fn a_rank_that_does_not_answer_is_named() {
    let (controls, rendezvous) = start(3, &[2]);
    let _stopped = join_by_hand(2, 3, &rendezvous);
    controls.iter().for_each(|control| control.status().begin(&call(0)));
    controls[1].overdue(call(0).into());
    expect_verdict(&controls, PATIENCE, VerdictKind::Unresponsive, &[2]);
}

#[test]
fn a_verdict_wakes_who_sleeps_in_a_link() {
    #[derive(Debug)]
    struct Bell(mpsc::Sender<()>);
    impl Wake for Bell {
        fn wake(&self) {
            self.0.send(()).unwrap();
        }
    }
    let (controls, _) = start(2, &[]);
    let (bell, rung) = mpsc::channel();
    controls[0].add_waker(0, Arc::new(Bell(bell.clone())));
    let text = "rank 1 called a, rank 0 called b".to_owned();
    let finding = Finding::Mismatch;
    controls[1].accuse(Report::new(0, 0, finding, text));
    rung.recv_timeout(PATIENCE).unwrap();
    expect_verdict(&controls, PATIENCE, VerdictKind::Mismatch, &[0, 1]);
    controls[0].add_waker(0, Arc::new(Bell(bell)));
    rung.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn leaving_is_seen_by_others_and_blamed_only_when_somebody_still_waits() {
    let (mut controls, _) = start(4, &[]);
    exchange(&controls, 0);
    drop(controls.remove(3));
    let until = Instant::now() + PATIENCE;
    while !controls.iter().all(|control| control.shared.has_left(3)) {
        assert!(Instant::now() < until);
        thread::yield_now();
    }
    assert!(controls.iter().all(|control| control.verdict().is_none()));
    let text = "link to rank 3: closed by the peer".to_owned();
    let finding = Finding::LinkFailed;
    controls[1].accuse(Report::new(0, 3, finding, text));
    expect_verdict(&controls, PATIENCE, VerdictKind::Left, &[3]);
}

/// As a communicator does that is dropped: its status goes before the goodbye.
#[test]
fn a_rank_that_left_is_known_by_what_it_did_last() {
    for leaver in [0, 2] {
        let (mut controls, _) = start(3, &[]);
        exchange(&controls, 0);
        let leaving = controls.remove(leaver);
        leaving.status().begin(&call(5));
        leaving.status().end();
        leaving.withdraw(0);
        drop(leaving);
        let until = Instant::now() + PATIENCE;
        while !controls.iter().all(|control| control.shared.has_left(leaver)) {
            assert!(Instant::now() < until);
            thread::yield_now();
        }
        for number in [5, 6] {
            controls[1].status().begin(&call(number));
            controls[1].stalled(call(number).into());
        }
        let verdict = controls[1].await_verdict(until).expect("a verdict in time");
        assert_eq!((verdict.kind, &verdict.failed_ranks[..]), (VerdictKind::Left, &[leaver][..]));
        let text = verdict.text;
        assert!(text.contains("waits in all_reduce #6"), "{text}");
        assert!(text.contains("its last call was all_reduce #5"), "{text}");
    }
}

#[test]
fn deaths_are_noticed_also_when_the_coordinator_has_left_in_order() {
    let (mut controls, rendezvous) = start(4, &[3]);
    let dying = join_by_hand(3, 4, &rendezvous);
    let started = Instant::now();
    drop(controls.remove(0));
    assert!(started.elapsed() < PATIENCE, "nobody waits for the others for long");
    drop(dying);
    expect_verdict(&controls, PATIENCE, VerdictKind::Died, &[3]);
}

#[test]
fn ranks_that_leave_in_any_order_give_no_verdict() {
    for first in 0..3 {
        let (mut controls, _) = start(3, &[]);
        exchange(&controls, 0);
        controls.rotate_left(first);
        for control in controls {
            assert_eq!(control.verdict(), None);
            control.leave();
            control.leave();
            assert!(matches!(control.exchange(Vec::new()), Err(ControlError::HasLeft)));
        }
    }
}

#[test]
fn data_connections_reach_the_inbox_early_or_late() {
    let (controls, _) = start(2, &[]);
    let dial = |socket| {
        let purpose = Purpose::Data;
        let session = controls[1].session();
        let hello = Hello { purpose, socket, session, ..hello(1, 2) };
        let mut stream = TcpStream::connect(controls[0].addresses()[0]).unwrap();
        let session: Option<Box<Session>> =
            secure::dial(&mut stream, &hello, &credentials(), true).unwrap();
        assert_eq!(session.is_some(), cfg!(feature = "tls"));
        stream.write_all(&[socket]).unwrap();
        stream
    };
    let early = dial(0);
    let (inbox, arrived) = mpsc::channel();
    controls[0].set_inbox(
        0,
        Arc::new(move |peer, socket, connection: Proven| {
            assert_eq!(connection.session.is_some(), cfg!(feature = "tls"));
            // The receiver is gone at the end of the test.
            let _ = inbox.send((peer, socket, connection.stream));
        }),
    );
    let late = dial(1);
    for socket in [0, 1] {
        let (peer, named, mut stream) = arrived.recv_timeout(PATIENCE).unwrap();
        assert_eq!((peer, named), (1, socket));
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut byte = [9];
        stream.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [socket]);
    }
    drop((early, late));
}

#[test]
fn ranks_that_never_come_are_named_by_the_exchange() {
    let short =
        ControlConfig { connect_timeout: Duration::from_millis(300), ..config(0, 3, at(0)) };
    let control = Control::start(short).unwrap();
    let error = control.exchange(Vec::new()).unwrap_err().to_string();
    assert_eq!(error, "ranks 1 and 2 did not join within 0.3 s");
}

#[test]
fn a_stale_rendezvous_file_is_outlived() {
    let scratch = Scratch::new();
    let path = scratch.path().join("meeting");
    fs::write(&path, format!("unisum2 00 127.0.0.1:{NOBODYS}\n")).unwrap();
    let meeting = || Rendezvous::File(path.clone());
    let second = config(1, 2, meeting());
    let second = thread::spawn(|| Control::start(second).unwrap());
    let first = Control::start(config(0, 2, meeting())).unwrap();
    let controls = [first, second.join().unwrap()];
    exchange(&controls, 0);
    assert!(!path.exists(), "the file is removed when all have come");
}

#[test]
fn a_rendezvous_file_that_cannot_be_written_is_an_error_that_names_it() {
    let scratch = Scratch::new();
    let missing = scratch.path().join("missing/meeting");
    let error = Control::start(config(0, 2, Rendezvous::File(missing))).unwrap_err().to_string();
    assert!(error.contains("missing/meeting") && error.contains("No such file"), "{error}");
}

#[test]
fn a_full_disk_is_an_error_that_says_so() {
    let scratch = Scratch::new();
    let mount = Process::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4096", "unisum-test"])
        .arg(scratch.path())
        .output();
    if !mount.is_ok_and(|mount| mount.status.success()) {
        eprintln!("skipped: this user may not mount a small file system");
        return;
    }
    let filled = fs::write(scratch.path().join("full"), [0; 4096]);
    let meeting = scratch.path().join("meeting");
    let started = Control::start(config(0, 2, Rendezvous::File(meeting)));
    let left_behind = fs::read_dir(scratch.path()).unwrap().count();
    Process::new("umount").arg(scratch.path()).status().unwrap();
    filled.unwrap();
    let error = started.unwrap_err().to_string();
    assert!(error.contains("No space left on device"), "{error}");
    assert_eq!(left_behind, 1, "the draft is removed");
}

#[test]
fn a_forked_childs_drop_does_not_say_goodbye() {
    let (mut controls, _) = start(2, &[]);
    let mut second = controls.remove(1);
    // What a forked child sees: the same handle in another process.
    let ours = std::mem::replace(&mut second.process, u32::MAX);
    second.leave();
    exchange_after(&controls[0], &second);
    second.process = ours;
}

fn exchange_after(first: &Control, second: &Control) {
    thread::scope(|scope| {
        scope.spawn(|| first.exchange(Vec::new()).unwrap());
        scope.spawn(|| second.exchange(Vec::new()).unwrap());
    });
    assert!(!first.shared.has_left(1));
}

#[test]
fn a_half_closed_connection_is_a_death_too() {
    let (controls, rendezvous) = start(2, &[1]);
    let dying = join_by_hand(1, 2, &rendezvous);
    dying.stream.shutdown(Shutdown::Write).unwrap();
    expect_verdict(&controls, PATIENCE, VerdictKind::Died, &[1]);
}

#[test]
fn another_program_on_the_port_is_outlived() {
    let stranger = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = stranger.local_addr().unwrap().port();
    let second = thread::spawn(move || Control::start(config(1, 2, at(port))).unwrap());
    // Longer than a refusal would be borne.
    let until = Instant::now() + Duration::from_secs(6);
    while Instant::now() < until {
        let (mut dialer, _) = stranger.accept().unwrap();
        let _ = dialer.write_all(b"SSH-2.0-OpenSSH_9.9\r\n");
    }
    drop(stranger);
    let first = Control::start(config(0, 2, at(port))).unwrap();
    exchange(&[first, second.join().unwrap()], 0);
}

#[test]
fn a_rank_that_can_not_listen_tells_all_others() {
    let (controls, rendezvous) = start(3, &[2]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap();
    let range = format!("{0}-{0}", taken.port()).parse().unwrap();
    let config = ControlConfig { port_range: Some(range), ..config(2, 3, rendezvous) };
    let error = Control::start(config).unwrap_err().to_string();
    expect_verdict(&controls, PATIENCE, VerdictKind::Failed, &[2]);
    let verdict = controls[1].verdict().unwrap();
    assert_eq!(verdict.text, format!("rank 2 can't join: {error}"));
    assert!(error.contains(&taken.port().to_string()), "{error}");
}

#[test]
fn a_silent_server_is_called_that() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let rendezvous = at(silent.local_addr().unwrap().port());
    let timeout = Duration::from_millis(500);
    let error =
        dial::reach(&rendezvous, &hello(1, 2), &credentials(), timeout).unwrap_err().to_string();
    assert!(error.contains("took the connection and said nothing"), "{error}");
    assert!(!error.contains("temporarily unavailable"), "{error}");
}
