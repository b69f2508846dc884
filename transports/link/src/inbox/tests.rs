use std::io::{Read, Write};
use std::net::TcpListener;

use crate::handshake::{Build, Heard, Purpose, Refusal, Secret, random};
use crate::secure::Listening;

use super::*;

#[derive(Debug)]
struct Silent;

impl Wake for Silent {
    fn wake(&self) {}
}

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

fn credentials() -> Credentials {
    Credentials::clear(Secret::new(b"the token of these tests"))
}

fn inbox() -> Arc<Inbox> {
    Arc::new(Inbox::new(Arc::new(Silent)))
}

fn dial(address: SocketAddr, to: u32, timeout: Duration) -> Dial {
    let (purpose, session, job) = (Purpose::Data, [1; 16], [2; 16]);
    let build = Build::default();
    let hello = Hello { purpose, socket: 0, from: 9, to, world: 10, session, job, build };
    let own = Arc::new(Route::from(SocketAddr::from(([127, 0, 0, 1], 1))));
    Dial {
        route: Arc::new(address.into()),
        own,
        hello,
        credentials: credentials(),
        timeout,
        pause: Duration::ZERO,
        attempt: 1,
        resumes: false,
    }
}

fn next_arrival(inbox: &Inbox) -> Arrived {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(arrived) = inbox.take().pop() {
            return arrived;
        }
        assert!(Instant::now() < until, "nothing arrived");
        thread::sleep(Duration::from_millis(1));
    }
}

fn text(arrived: Arrived) -> String {
    arrived.result.expect_err("no connection").to_string()
}

/// Where a listener ends a handshake.
#[derive(Clone, Debug)]
enum Ends {
    AtOnce,
    BeforeTheChallenge,
    AfterTheChallenge,
    AfterTheProof,
    WithAWord(Refusal),
    Never,
}

/// The listener's half of a handshake, broken off where `ends` says.
fn hear(mut stream: TcpStream, ends: Ends) {
    let mut listening = Listening::new(random().unwrap(), true);
    let mut buffer = [0; 256];
    let reset =
        |stream: &TcpStream| SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
    if matches!(ends, Ends::AtOnce) {
        return reset(&stream);
    }
    if let Ends::WithAWord(refusal) = &ends {
        stream.write_all(&refusal.encode()).unwrap();
        let _ = stream.shutdown(Shutdown::Write);
        while stream.read(&mut buffer).is_ok_and(|read| read > 0) {}
        return;
    }
    loop {
        let read = stream.read(&mut buffer).unwrap();
        assert!(read > 0, "the dialer gave up: {ends:?}");
        match (listening.feed(&buffer[..read], &credentials(), |_| Ok(())), &ends) {
            (Heard::More, _) => {}
            (Heard::Send(_), Ends::BeforeTheChallenge) => return reset(&stream),
            (Heard::Send(send), Ends::AfterTheChallenge) => {
                stream.write_all(&send).unwrap();
                return reset(&stream);
            }
            (Heard::Admitted(..), Ends::AfterTheProof) => return reset(&stream),
            (Heard::Send(send), _) => stream.write_all(&send).unwrap(),
            (Heard::Admitted(_, send), _) => {
                stream.write_all(&send).unwrap();
                // The dialer's end is looked at by the test.
                return drop(stream.read(&mut buffer));
            }
            (Heard::Refused(refusal, _), _) => panic!("{refusal}"),
        }
    }
}

/// Accepts as often as `ends` has entries.
fn listen(ends: Vec<Ends>) -> (SocketAddr, thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serving = thread::spawn(move || {
        for ends in ends {
            hear(listener.accept().unwrap().0, ends);
        }
    });
    (address, serving)
}

#[test]
fn a_connection_that_is_broken_off_before_it_stands_is_opened_anew() {
    let crowded = Ends::WithAWord(Refusal::Crowded);
    let every =
        [Ends::AtOnce, Ends::BeforeTheChallenge, Ends::AfterTheChallenge, Ends::AfterTheProof];
    let mut all = [every.clone(), every].concat();
    all.extend([crowded.clone(), crowded, Ends::Never]);
    let (address, serving) = listen(all);
    let inbox = inbox();
    inbox.dial(dial(address, 3, PATIENCE)).unwrap();
    let arrived = next_arrival(&inbox);
    assert_eq!((arrived.peer, arrived.socket), (3, 0));
    let mut stream = arrived.result.unwrap().stream;
    stream.write_all(&[0]).unwrap();
    serving.join().unwrap();
}

#[test]
fn an_answer_is_final() {
    let (address, serving) = listen(vec![Ends::WithAWord(Refusal::Session)]);
    let inbox = inbox();
    inbox.dial(dial(address, 0, PATIENCE)).unwrap();
    let arrived = next_arrival(&inbox);
    assert!(!arrived.is_late);
    let text = text(arrived);
    assert!(text.contains(&Refusal::Session.to_string()), "{text}");
    serving.join().unwrap();
}

#[test]
fn where_nobody_listens_nobody_is_waited_for() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (inbox, start) = (inbox(), Instant::now());
    inbox.dial(dial(address, 0, 10 * PATIENCE)).unwrap();
    let arrived = next_arrival(&inbox);
    assert!(!arrived.is_late);
    let text = text(arrived);
    assert!(text.contains(&address.to_string()), "{text}");
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn attempts_end_at_the_deadline_and_are_told() {
    let (inbox, listener) = (inbox(), TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap();
    let start = Instant::now();
    inbox.dial(dial(address, 0, Duration::from_millis(2500))).unwrap();
    let arrived = next_arrival(&inbox);
    assert!(start.elapsed() >= Duration::from_secs(2), "{:?}", start.elapsed());
    // A host whose process says nothing is there.
    assert!(arrived.is_late);
    let text = text(arrived);
    assert!(text.contains(&address.to_string()) && text.contains("attempts"), "{text}");
}

/// The last attempt may have had but a moment.
#[test]
fn what_an_attempt_was_told_is_told_though_later_ones_hear_nothing() {
    let (inbox, listener) = (inbox(), TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap();
    inbox.dial(dial(address, 0, Duration::from_millis(2500))).unwrap();
    hear(listener.accept().unwrap().0, Ends::WithAWord(Refusal::Crowded));
    let arrived = next_arrival(&inbox);
    assert!(arrived.is_late);
    let text = text(arrived);
    let told = format!("attempts, the last one that had an answer: {address} (");
    assert!(text.contains(&told) && text.contains(&Refusal::Crowded.to_string()), "{text}");
}

/// What came first was over by then.
#[test]
fn an_attempt_that_ends_all_others_is_the_one_that_is_told() {
    let (inbox, listener) = (inbox(), TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap();
    inbox.dial(dial(address, 0, PATIENCE)).unwrap();
    let stream = listener.accept().unwrap().0;
    drop(listener);
    hear(stream, Ends::WithAWord(Refusal::Crowded));
    let arrived = next_arrival(&inbox);
    assert!(!arrived.is_late);
    let text = text(arrived);
    assert!(text.contains(&io::Error::from_raw_os_error(libc::ECONNREFUSED).to_string()), "{text}");
    assert!(!text.contains(&Refusal::Crowded.to_string()), "{text}");
}

#[test]
fn a_peer_that_is_silent_keeps_nobody_waiting_long() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, serving) = listen(vec![Ends::Never]);
    let inbox = inbox();
    for to in 1..4 {
        inbox.dial(dial(silent.local_addr().unwrap(), to, PATIENCE)).unwrap();
    }
    inbox.dial(dial(address, 0, PATIENCE)).unwrap();
    let arrived = next_arrival(&inbox);
    assert_eq!(arrived.peer, 0);
    arrived.result.unwrap();
    serving.join().unwrap();
    // The thread that waits for the silent ones ends.
    let watched = Arc::downgrade(&inbox);
    inbox.close();
    drop(inbox);
    let until = Instant::now() + PATIENCE;
    while watched.strong_count() > 0 {
        assert!(Instant::now() < until, "the dialler still runs");
        thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(feature = "tls")]
fn encrypted(token: &[u8]) -> Credentials {
    use crate::secure::Sealing;
    Credentials::token(Secret::new(token), Sealing::Everywhere).unwrap()
}

/// The listener's half of an encrypted handshake, to its end.
#[cfg(feature = "tls")]
fn hear_encrypted(mut stream: &TcpStream, credentials: &Credentials) {
    let mut listening = Listening::new(random().unwrap(), true);
    let mut buffer = [0; 1024];
    loop {
        let read = stream.read(&mut buffer).unwrap();
        assert!(read > 0, "the dialer gave up");
        match listening.feed(&buffer[..read], credentials, |_| Ok(())) {
            Heard::More => {}
            Heard::Send(send) => stream.write_all(&send).unwrap(),
            Heard::Admitted(_, send) | Heard::Refused(_, send) => {
                return stream.write_all(&send).unwrap();
            }
        }
    }
}

/// Somebody in between who answers in the peer's place, or returns what was said, ends nothing.
#[test]
#[cfg(feature = "tls")]
fn what_anybody_on_the_path_can_answer_is_not_final() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serving = thread::spawn(move || {
        // Alerts: a handshake that failed, a message that made no sense, a record that was altered.
        for alert in [40, 50, 20, 40] {
            let mut stream = listener.accept().unwrap().0;
            let read = stream.read(&mut [0; 1024]).unwrap();
            assert!(read > 0);
            stream.write_all(&[21, 3, 3, 0, 2, 2, alert]).unwrap();
            let mut stream = listener.accept().unwrap().0;
            let mut said = [0; 24];
            stream.read_exact(&mut said).unwrap();
            stream.write_all(&said).unwrap();
        }
        let stream = listener.accept().unwrap().0;
        hear_encrypted(&stream, &encrypted(b"token"));
        stream
    });
    let inbox = inbox();
    inbox.dial(Dial { credentials: encrypted(b"token"), ..dial(address, 3, PATIENCE) }).unwrap();
    next_arrival(&inbox).result.expect("the ninth is the peer's own");
    drop(serving.join().unwrap());
}

#[test]
#[cfg(feature = "tls")]
fn a_refusal_is_final_once_it_is_steady() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let inbox = inbox();
    inbox.dial(Dial { credentials: encrypted(b"token"), ..dial(address, 3, PATIENCE) }).unwrap();
    for _ in 0..STEADY {
        hear_encrypted(&listener.accept().unwrap().0, &encrypted(b"another"));
    }
    let text = text(next_arrival(&inbox));
    assert!(text.contains("3 attempts") && text.contains("refused: wrong token"), "{text}");
}
