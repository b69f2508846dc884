//! How jobs start.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use super::*;

/// It dials somebody who is gone, and does not wait for longer than until it is told so.
#[test]
fn a_verdict_ends_the_wait_for_one_that_is_gone() {
    let config = ViewsConfig { connect_timeout: PATIENCE * 10, ..config() };
    let prospect = Prospect::listen(config).unwrap();
    // It is bound and does not listen, so that nobody else can.
    let gone = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    gone.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let refuses = gone.local_addr().unwrap().as_socket().unwrap();
    let addresses = vec![vec![refuses], prospect.addresses().to_vec()];
    let (asked, is_asked) = mpsc::channel();
    let is_known = Arc::new(AtomicBool::new(false));
    let knows = is_known.clone();
    let founding = std::thread::spawn(move || {
        let verdict = || {
            // Nobody counts after the first few.
            let _ = asked.send(());
            // Acquire: as the store below, which only has to be seen.
            knows.load(Ordering::Acquire).then(|| Verdict::died(0, "killed"))
        };
        let ended = prospect.found(SESSION, 1, addresses, &verdict);
        (ended, Instant::now())
    });
    // It goes on dialling while nothing is known.
    for _ in 0..5 {
        is_asked.recv_timeout(PATIENCE).unwrap();
    }
    assert!(!founding.is_finished());
    let told = Instant::now();
    is_known.store(true, Ordering::Release);
    let (ended, at) = founding.join().unwrap();
    assert!(at - told < PATIENCE, "{:?}", at - told);
    let error = ended.unwrap_err();
    assert!(matches!(error, ControlError::Ended(_)), "{error}");
    assert_eq!(error.failed_ranks(), [0]);
}
