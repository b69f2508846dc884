//! Ranks with certificates: who has the wrong one is told why and nothing else happens, and files
//! that are replaced while a job trains disturb nobody.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

#[path = "support/certificates.rs"]
mod certificates;
mod support;

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use certificates::{Authority, Mounted, Says, authority, issue};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme};
use support::{Ended, Running, World, await_others, free_ports, reach, setting, tell, tell_error};
use unisum::{Communicator, Elastic, Message, Messenger, ReduceOp};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("join", join),
        ("train", train),
        ("group_later", group_later),
        ("elastic_group", elastic_group),
    ]);
}

const LIMIT: Duration = Duration::from_secs(100);
const RANKS: usize = 4;
/// In which all that may join have done so.
const CONNECT_TIMEOUT_S: u64 = 10;

/// Ranks with a folder of certificates each.
struct Certified {
    folders: Vec<Mounted>,
    ports: Vec<u16>,
}

impl Certified {
    /// All are of one CA, and named `rank-0`, `rank-1`….
    fn new(ca: &Authority) -> Self {
        let folder = |rank| {
            let issued = issue(ca, &Says::new(format!("rank-{rank}")));
            Mounted::new(&issued, &ca.pem())
        };
        Self { folders: (0..RANKS).map(folder).collect(), ports: free_ports(RANKS) }
    }

    fn world(&self, scenario: &'static str) -> World {
        let words = |rank: usize| {
            let mut words = self.folders[rank].environment();
            words.push(format!("UNISUM_PORT_RANGE={}", self.ports[rank]));
            words
        };
        let words: Vec<_> = (0..RANKS).map(words).collect();
        World::new(RANKS, scenario)
            .set("UNISUM_TRANSPORT", "tcp")
            .set("UNISUM_RENDEZVOUS", format!("tcp://127.0.0.1:{}", self.ports[0]))
            .through(move |rank| words[rank].clone())
    }
}

fn join() {
    let started = Instant::now();
    match Communicator::from_environment() {
        Ok(communicator) => {
            sum(&communicator).unwrap();
            tell(format!("worked: {}", communicator.describe().to_string().replace('\n', " | ")));
        }
        Err(error) => {
            let text = error.to_string().replace('\n', " | ");
            tell(format!("{:?} {:?} {text}", error.kind(), error.failed_ranks()));
        }
    }
    tell(started.elapsed().as_secs());
}

fn sum(communicator: &Communicator) -> Result<(), unisum::Error> {
    let mut data = vec![1_f32; 5000];
    communicator.all_reduce(&mut data, ReduceOp::Sum)?;
    assert!(data.iter().all(|&it| it == communicator.world() as f32));
    Ok(())
}

#[test]
fn ranks_with_certificates_work_and_say_what_is_encrypted() {
    let certified = Certified::new(&authority());
    let names = (0..RANKS).map(|rank| format!("rank-{rank}")).collect::<Vec<_>>().join(",");
    let told = certified.world("join").set("UNISUM_TLS_PEERS", names).succeed(LIMIT);
    let said = "encrypted (TLS 1.3 by certificates and token): control, TCP data";
    assert!(told.iter().all(|told| told[0].contains(said)), "{told:?}");
}

/// What is wrong with a rank's certificate, and how the two sides put it.
struct Fault {
    says: Says,
    is_foreign: bool,
    /// Who looks at it says this, whose it is that.
    seen: &'static str,
    told: &'static str,
}

fn faults(rank: usize) -> Vec<Fault> {
    let good = Says::new(format!("rank-{rank}"));
    let fault = |says: Says, seen, told| Fault { says, is_foreign: false, seen, told };
    vec![
        fault(
            Says { until: 2021, ..good.clone() },
            "its certificate has expired",
            "it says that this rank's certificate has expired, or is not valid yet",
        ),
        fault(
            Says { from: 3000, ..good.clone() },
            "its certificate is not valid yet",
            "it says that this rank's certificate has expired, or is not valid yet",
        ),
        Fault {
            says: good,
            is_foreign: true,
            seen: "its certificate is not signed by a CA of UNISUM_TLS_CA",
            told: "it says that this rank's certificate is not signed by a CA that it knows",
        },
        fault(
            Says::new("stranger"),
            "its certificate names stranger, which this rank does not accept (UNISUM_TLS_PEERS)",
            "it does not accept the names in this rank's certificate (UNISUM_TLS_PEERS there)",
        ),
    ]
}

/// A start where one rank's certificate has a fault.
fn start_with(fault: &Fault, culprit: usize) -> Vec<Ended> {
    let (ca, foreign) = (authority(), authority());
    let mut certified = Certified::new(&ca);
    let signer = if fault.is_foreign { &foreign } else { &ca };
    certified.folders[culprit].replace(&issue(signer, &fault.says), &ca.pem());
    let names = (0..RANKS).map(|rank| format!("rank-{rank}")).collect::<Vec<_>>().join(",");
    let world = certified.world("join").set("UNISUM_TLS_PEERS", names);
    world.set("UNISUM_CONNECT_TIMEOUT", CONNECT_TIMEOUT_S).run(LIMIT)
}

#[test]
fn a_rank_whose_certificate_is_not_accepted_is_told_and_so_is_rank_0() {
    for fault in faults(2) {
        let ended = start_with(&fault, 2);
        assert!(ended.iter().all(|it| it.status == 0), "{ended:#?}");
        // The culprit knows why at once; its sentence is the error.
        assert!(ended[2].told[0].contains(fault.told), "{}: {ended:#?}", fault.seen);
        // Rank 0 can't know which rank it is, but says why it let somebody stand outside.
        assert!(ended[0].log.contains(fault.seen), "{}: {ended:#?}", fault.seen);
        for rank in [0, 1, 3] {
            let told = &ended[rank].told[0];
            let why = format!("rank 2 did not join within {CONNECT_TIMEOUT_S} s");
            assert!(told.contains(&why), "{ended:#?}");
            // And what is known of who was refused: where from, why, and the name.
            let refused = format!("somebody at 127.0.0.1 was refused: {}", fault.seen);
            assert!(told.contains(&refused), "{}: {ended:#?}", fault.seen);
            assert!(told.contains(&fault.says.name), "{}: {ended:#?}", fault.seen);
            assert!(told.starts_with("Rendezvous [2]"), "{ended:#?}");
        }
    }
}

#[test]
fn all_are_told_what_is_wrong_with_the_certificate_of_rank_0() {
    for fault in faults(0) {
        let ended = start_with(&fault, 0);
        assert!(ended[0].log.contains(fault.told), "{}: {ended:#?}", fault.seen);
        for rank in 1..RANKS {
            let told = &ended[rank].told[0];
            assert!(told.contains(fault.seen) && told.starts_with("Rendezvous"), "{ended:#?}");
        }
    }
}

fn has(mark: &str) -> bool {
    Path::new(&setting("TEST_MARKS")).join(format!("{mark}.test")).exists()
}

/// Works on, with new groups and messengers in each round, through as many rotations as the test
/// makes. Rank 0 says which one a round follows.
fn train() {
    let communicator = Communicator::from_environment().unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    let (mut round, mut known) = (0_u32, 0_u32);
    loop {
        let mut said = [known + u32::from(has(&format!("rotation-{}", known + 1)))];
        communicator.broadcast(&mut said, 0).unwrap();
        let mut is_over = [u8::from(has("enough"))];
        communicator.broadcast(&mut is_over, 0).unwrap();
        sum(&communicator).unwrap();
        sum(&communicator.duplicate().unwrap()).unwrap();
        let half = communicator.split(Some((rank % 2) as u32), 0).unwrap().unwrap();
        sum(&half).unwrap();
        let messenger = Messenger::new(&communicator).unwrap();
        let (next, last) = ((rank + 1) % world, (rank + world - 1) % world);
        let (mut data, sent) = ([0_u32; 8], [round; 8]);
        let send = Message::Send { data: &sent, to: next, tag: 7 };
        messenger
            .exchange(&mut [send, Message::Receive { data: &mut data, from: last, tag: 7 }])
            .unwrap();
        assert_eq!(data, sent);
        round += 1;
        if said[0] > known || round == 1 {
            known = said[0];
            reach(&format!("after-{known}"));
        }
        if is_over[0] == 1 {
            return tell(round);
        }
    }
}

/// Rotations of a test that is not asked for the whole.
const ROTATIONS: usize = 16;

#[test]
fn rotations_during_training_disturb_nobody_and_new_connections_use_the_new_ones() {
    let whole = std::env::var_os("UNISUM_TEST_WHOLE").is_some();
    let rotations = if whole { 100 } else { ROTATIONS };
    let mut ca = authority();
    let mut certified = Certified::new(&ca);
    let running = certified.world("train").start();
    running.wait_for("after-0", RANKS, LIMIT);
    // Two replacements make a change of the CA: first all trust the next one beside the last, then
    // all certificates are of the next one. So who still used an old one would be refused.
    let mut issued: Vec<_> =
        (0..RANKS).map(|rank| issue(&ca, &Says::new(format!("rank-{rank}")))).collect();
    let mut bundle = ca.pem();
    for rotation in 1..=rotations {
        let is_new_ca = rotation % 2 == 1;
        if is_new_ca {
            let next = authority();
            bundle = ca.pem() + &next.pem();
            ca = next;
        } else {
            let of = |rank| issue(&ca, &Says::new(format!("rank-{rank}")));
            issued = (0..RANKS).map(of).collect();
        }
        for (rank, folder) in certified.folders.iter_mut().enumerate() {
            folder.replace(&issued[rank], &bundle);
        }
        running.mark(&format!("rotation-{rotation}"));
        let rank = rotation % RANKS;
        assert!(shown_by(certified.ports[rank]) == issued[rank].der, "rotation {rotation}");
        running.wait_for(&format!("after-{rotation}"), RANKS, LIMIT);
    }
    keep_the_old_if_the_new_are_broken(&mut certified, &running, &issued, rotations);
    running.mark("enough");
    let ended = running.wait(LIMIT);
    for ended in &ended {
        assert_eq!(ended.status, 0, "{ended:#?}");
    }
    let kept = "the certificates read before are kept";
    assert!(ended[1].log.contains(kept), "{:#?}", ended[1]);
    // They were replaced at once, so nobody ever saw half of them.
    let unwarned = [0, 2, 3].iter().all(|&rank| !ended[rank].log.contains(kept));
    assert!(unwarned, "{ended:#?}");
    println!("{rotations} rotations in {} rounds", ended[0].told[0]);
}

fn keep_the_old_if_the_new_are_broken(
    certified: &mut Certified,
    running: &Running,
    issued: &[certificates::Issued],
    rotations: usize,
) {
    let good = fs::read_to_string(certified.folders[1].at("ca.crt")).unwrap();
    let other = issue(&authority(), &Says::new("rank-1"));
    let broken = [
        // Key and certificate that do not go together; a key that is cut off; none.
        (&issued[1].certificate[..], &other.key[..]),
        (&other.certificate[..], &other.key[..40]),
        ("", ""),
    ];
    for (at, (certificate, key)) in broken.into_iter().enumerate() {
        let rotation = rotations + 1 + at;
        let (certificate, key) = (certificate.to_owned(), key.to_owned());
        let broken = certificates::Issued { certificate, key, der: Vec::new() };
        certified.folders[1].replace(&broken, &good);
        running.mark(&format!("rotation-{rotation}"));
        assert!(shown_by(certified.ports[1]) == issued[1].der, "broken files {at}");
        running.wait_for(&format!("after-{rotation}"), RANKS, LIMIT);
    }
}

/// The certificate that a rank shows to somebody who connects now. Who does not know the job's
/// session is a stranger, and may have to come again: for those there are so many handshakes in a
/// second.
fn shown_by(port: u16) -> Vec<u8> {
    let until = Instant::now() + LIMIT;
    loop {
        match try_shown_by(port) {
            Ok(shown) => return shown,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn try_shown_by(port: u16) -> std::io::Result<Vec<u8>> {
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    let name = ServerName::try_from("anybody").unwrap();
    let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(LIMIT))?;
    // The knock of a session that nobody has.
    stream.write_all(&[b"\xfeknk", &[0; 16][..]].concat())?;
    while client.peer_certificates().is_none() {
        client.complete_io(&mut stream)?;
    }
    Ok(client.peer_certificates().unwrap()[0].to_vec())
}

/// Looks at certificates and believes all of them.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Calls on connections that stand, and later in a group that needs new ones.
fn group_later() {
    let communicator = Communicator::from_environment().unwrap();
    sum(&communicator).unwrap();
    reach("working");
    await_others("changed", 1, LIMIT);
    sum(&communicator).unwrap();
    tell("those that stand go on");
    let started = Instant::now();
    // Ranks 0 and 1 do not need anybody else.
    let half = communicator.split(Some((communicator.rank() / 2) as u32), 0).unwrap().unwrap();
    if communicator.rank() < 2 {
        sum(&half).unwrap();
        tell("so does a group of the others");
        reach("half");
    } else {
        await_others("half", 2, LIMIT);
    }
    let done = communicator.duplicate().and_then(|all| sum(&all));
    match done {
        Ok(()) => tell("worked"),
        Err(error) => tell_error(&error),
    }
    tell(started.elapsed().as_secs());
}

/// A rank that is no longer accepted, or whose certificate has expired meanwhile: connections that
/// stand go on, as do groups without it; a new one is refused, which all ranks hear.
#[test]
fn a_rank_that_is_no_longer_accepted_gets_no_new_connection() {
    for is_removed in [true, false] {
        let ca = authority();
        let mut certified = Certified::new(&ca);
        let list = tempfile::NamedTempFile::new().unwrap();
        let names = |ranks: std::ops::Range<usize>| {
            let lines: Vec<String> = ranks.map(|rank| format!("rank-{rank}\n")).collect();
            lines.concat()
        };
        fs::write(list.path(), names(0..4)).unwrap();
        let world = certified.world("group_later");
        let world = world.set("UNISUM_TLS_PEERS", format!("@{}", list.path().display()));
        // The same algorithm in each call, and so the same connections.
        let world = world.set("UNISUM_REPRODUCIBLE", 1);
        let running = world.start();
        running.wait_for("working", RANKS, LIMIT);
        if is_removed {
            fs::write(list.path(), names(0..3)).unwrap();
        } else {
            let expired = Says { until: 2021, ..Says::new("rank-3") };
            certified.folders[3].replace(&issue(&ca, &expired), &ca.pem());
        }
        running.mark("changed");
        let ended = running.wait(LIMIT);
        let why = if is_removed { "UNISUM_TLS_PEERS" } else { "expired" };
        for (rank, ended) in ended.iter().enumerate() {
            assert_eq!(ended.status, 0, "{ended:#?}");
            assert_eq!(ended.told[0], "those that stand go on");
            let told = &ended.told[if rank < 2 { 2 } else { 1 }];
            assert!(told.contains(why) && told.contains('3'), "rank {rank}: {ended:#?}");
            // Whose certificate it is, wherever that is read.
            assert!(told.starts_with("RankLost [3]"), "rank {rank}: {ended:#?}");
            assert!(told.contains("rank-3"), "rank {rank}: {ended:#?}");
            assert!(!told.contains("this rank"), "rank {rank}: {ended:#?}");
        }
        let seconds: u64 = ended[0].told.last().unwrap().parse().unwrap();
        assert!(seconds < 30, "nobody waits for the deadline: {ended:#?}");
    }
}

fn elastic_group() {
    let communicator = Communicator::builder().elastic(Elastic { minimum: 1 }).connect().unwrap();
    sum(&communicator).unwrap();
    reach("working");
    await_others("changed", 1, LIMIT);
    let color = Some((communicator.rank() / 2) as u32);
    tell_error(&communicator.split(color, 0).unwrap_err());
    sum(&communicator).unwrap();
    assert_eq!(communicator.view().unwrap().epoch, 1);
}

/// In an elastic job, such a rank gets into no group with control connections of its own.
#[test]
fn groups_of_elastic_jobs_ask_for_certificates_as_well() {
    let ca = authority();
    let certified = Certified::new(&ca);
    let list = tempfile::NamedTempFile::new().unwrap();
    let names = ["rank-0\n", "rank-1\n", "rank-2\n", "rank-3\n"];
    fs::write(list.path(), names.concat()).unwrap();
    let words: Vec<_> = certified.folders.iter().map(Mounted::environment).collect();
    let world = World::new(RANKS, "elastic_group")
        .set("UNISUM_TRANSPORT", "tcp")
        .set("UNISUM_TLS_PEERS", format!("@{}", list.path().display()))
        .through(move |rank| words[rank].clone());
    let running = world.start();
    running.wait_for("working", RANKS, LIMIT);
    fs::write(list.path(), names[..3].concat()).unwrap();
    running.mark("changed");
    for (rank, ended) in running.wait(LIMIT).iter().enumerate() {
        assert_eq!(ended.status, 0, "{ended:#?}");
        let told = &ended.told[0];
        assert!(told.contains("UNISUM_TLS_PEERS"), "rank {rank}: {ended:#?}");
    }
}

/// Each of the two is told in what it differs from the other.
#[test]
fn ranks_with_and_without_certificates_are_told_that_unisum_tls_differs() {
    for (culprit, word) in [(0, "UNISUM_TLS=token"), (2, "UNISUM_TLS=auto")] {
        let certified = Certified::new(&authority());
        let words: Vec<_> = (0..RANKS)
            .map(|rank| {
                let mut words = certified.folders[rank].environment();
                if rank == culprit {
                    words = vec![words[0].clone(), word.into()];
                }
                words
            })
            .collect();
        let world = certified.world("join").through(move |rank| words[rank].clone());
        let world = world.set("UNISUM_CONNECT_TIMEOUT", CONNECT_TIMEOUT_S);
        let ended = world.run(LIMIT);
        for ended in [&ended[0], &ended[2]] {
            assert!(ended.told[0].contains("UNISUM_TLS must be the same"), "{ended:#?}");
        }
    }
}
