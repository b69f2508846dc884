//! How jobs start.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use super::*;
use crate::address::Rendezvous;
use crate::{ControlConfig, tests};

const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1);
/// For documentation (RFC 5737).
const NOBODY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 1);

/// It dials somebody who is gone, and does not wait for longer than until it is told so.
#[test]
fn a_verdict_ends_the_wait_for_one_that_is_gone() {
    let config = ViewsConfig { connect_timeout: PATIENCE * 10, ..config() };
    let prospect = Prospect::listen(config, None).unwrap();
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

/// No interface is named: the network is that of the start, for newcomers, later views and groups,
/// too.
#[test]
fn a_job_on_loopback_tells_loopback_addresses_only() {
    let config = ViewsConfig { interface: None, ..config() };
    let prospect = Prospect::listen(config.clone(), Some(LOOPBACK)).unwrap();
    let addresses = vec![prospect.addresses().to_vec()];
    let mut all = vec![prospect.found(SESSION, 0, addresses, &|| None).unwrap()];
    let asking = ask(record(&all), config, soon());
    await_asking(&all, 1);
    admit(&all);
    all.push(asking.join().unwrap().unwrap());
    let told = record(&[all.remove(0)]).members;
    assert_eq!(told.len(), 2, "{told:?}");
    let mut told = told.iter().flat_map(|(_, addresses)| addresses);
    assert!(told.all(|it| it.ip().is_loopback()), "{told:?}");
    let later = Rendezvous::Store { key: "epoch 2".into(), addresses: Vec::new() };
    let towards = all[0].listens_at();
    let config = ControlConfig { towards, ..tests::config(0, 2, later) };
    let control = Control::start(config).unwrap();
    let told = control.addresses();
    assert!(!told.is_empty() && told.iter().all(|it| it.ip().is_loopback()), "{told:?}");
}

#[test]
fn who_has_no_way_to_the_network_of_the_start_listens_elsewhere() {
    let config = config();
    let strict = listen::at_free_port(config.interface.as_ref(), Some(NOBODY), None);
    assert!(matches!(strict, Err(ControlError::Interface(_))), "{strict:?}");
    let prospect = Prospect::listen(config, Some(NOBODY)).unwrap();
    assert!(prospect.addresses().iter().all(|it| it.ip().is_loopback()), "{prospect:?}");
}
