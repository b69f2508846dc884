//! The fuzz targets of this crate (see `unisum_link::fuzzing`), and what must hold of the control
//! plane, whatever ranks and files say.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use unisum_kernels::Dtype;
use unisum_link::fuzzing::Target;
use unisum_link::{Call, Rank};

use super::address;
use super::coordinator::{Audience, Coordinator};
use super::elastic::{self, Record};
use super::environment::Environment;
use super::file;
use super::interface;
use super::launcher;
use super::member::Member;
use super::message::{FRAME_BYTES_MAX, Message, MessageError};
use super::resume::{self, Ledger, Word};
use super::shared::{Command, Shared};
use super::status::{self, Snapshot};
use super::verdict::{Finding, Report, Verdict, VerdictKind};

/// The targets of this crate.
pub fn targets() -> Vec<Target> {
    [
        TARGETS,
        address::fuzzing::TARGETS,
        elastic::fuzzing::TARGETS,
        interface::fuzzing::TARGETS,
        launcher::fuzzing::TARGETS,
    ]
    .concat()
}

/// An environment of lines `NAME=VALUE`. It must not say where to make directories.
pub(crate) fn environment(bytes: &[u8]) -> Environment {
    let text = String::from_utf8_lossy(bytes);
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let names_directory = ["XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "HOME"];
    pairs.filter(|(name, _)| !names_directory.contains(name)).collect()
}

const TARGETS: &[Target] = &[
    Target { name: "control_messages", check: check_messages, seeds: message_seeds },
    Target { name: "control_resumption", check: check_resumption, seeds: resumption_seeds },
    Target { name: "coordinator", check: check_coordinator, seeds: coordinator_seeds },
    Target { name: "control_member", check: check_member, seeds: member_seeds },
    Target { name: "rendezvous_file", check: check_file, seeds: file_seeds },
    Target { name: "members_record", check: check_record, seeds: record_seeds },
];

/// Messages that are accepted encode to the bytes that they were read from, and are the same in
/// whatever pieces the bytes arrive (their length comes first).
fn check_messages(bytes: &[u8]) {
    let Some((&piece, wire)) = bytes.split_first() else { return };
    let mut rest = BytesMut::from(wire);
    let (mut decoded, mut encoded) = (Vec::new(), BytesMut::new());
    let end = drain(&mut rest, &mut decoded);
    decoded.iter().for_each(|message| message.encode(&mut encoded));
    assert_eq!(encoded, wire[..encoded.len()]);
    // All but the message that is not whole, or no message, is taken.
    if end.is_ok() {
        assert!(encoded.len() + rest.len() == wire.len() && rest.len() < 4 + FRAME_BYTES_MAX);
    }
    let (mut buffer, mut again, mut end_again) = (BytesMut::new(), Vec::new(), Ok(()));
    for piece in wire.chunks(usize::from(piece).max(1)) {
        buffer.extend_from_slice(piece);
        end_again = end_again.and_then(|()| drain(&mut buffer, &mut again));
    }
    assert_eq!((again, end_again), (decoded, end));
}

/// What the other end says of a connection that may go on in another one takes no more off what is
/// kept than was sent, and none of it twice.
fn check_resumption(bytes: &[u8]) {
    let mut sent = BytesMut::new();
    (0..3).for_each(|_| Message::Joined.encode(&mut sent));
    let mut ledger = Ledger::default();
    ledger.keep(&sent.freeze());
    let (mut inbound, mut kept) = (BytesMut::from(bytes), 3);
    loop {
        let next = resume::next(&mut inbound, Some(&mut ledger));
        let left = ledger.again().count();
        assert!(left <= kept);
        kept = left;
        match next {
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return,
        }
    }
}

fn resumption_seeds() -> Vec<Vec<u8>> {
    let mut message = BytesMut::new();
    Message::Joined.encode(&mut message);
    let taken = |count| Word::Taken(count).encode();
    let words = [taken(1), message.freeze(), taken(3), taken(2)];
    let others = [Word::Resume { attempt: 1, taken: 2 }, Word::Resumed { taken: 3 }];
    vec![words.concat(), others[0].encode().to_vec(), others[1].encode().to_vec()]
}

fn drain(from: &mut BytesMut, to: &mut Vec<Message>) -> Result<(), MessageError> {
    while let Some(message) = Message::decode(from)? {
        to.push(message);
    }
    Ok(())
}

fn message_seeds() -> Vec<Vec<u8>> {
    let (blob, text) = (Bytes::from_static(b"blob"), "why".to_owned());
    let (kind, calls) = (VerdictKind::Mismatch, Some([(0, call(1)), (1, call(2))]));
    let all = [
        Message::Welcome { session: [7; 16] },
        Message::Joined,
        Message::Blob { round: 1, to: None, blob: blob.clone() },
        Message::Blob { round: 1, to: Some(2), blob: blob.clone() },
        Message::Gathered { round: 1, rank: 2, blob },
        Message::Accuse(Report::new(0, 1, Finding::Mismatch, text.clone())),
        Message::Accuse(Report { calls, ..Report::new(0, 1, Finding::Mismatch, text.clone()) }),
        Message::Overdue(call(1).into()),
        Message::Stalled(call(1).into()),
        Message::StatusRequest { query: 3, communicator: 0, is_overdue: true },
        Message::Status { query: 3, doing: snapshot(1, 5).into() },
        Message::Verdict(Verdict::new(kind, vec![1, 2], text).with_calls(calls)),
        Message::Left { rank: 1, last: snapshot(1, 5), left_group: vec![(3, snapshot(2, 4))] },
        Message::LeftGroup { communicator: 3, last: snapshot(1, 5) },
        Message::Keep("settled".into()),
        Message::Bye(Snapshot::default()),
    ];
    let mut seeds: Vec<_> = all.iter().map(|message| encode(&[message])).collect();
    seeds.push(encode(&all.iter().collect::<Vec<_>>()));
    seeds
}

fn encode(messages: &[&Message]) -> Vec<u8> {
    let mut wire = BytesMut::from(&[9][..]);
    messages.iter().for_each(|message| message.encode(&mut wire));
    wire.to_vec()
}

/// In whatever order ranks come, speak and go, and however time passes: the coordinator decides
/// once, gathers only what is whole, and never asks to be woken for what is past. Each operation
/// has three bytes: what, by which rank, and a number.
fn check_coordinator(bytes: &[u8]) {
    let connect_timeout = Duration::from_secs(30);
    let mut coordinator = Coordinator::new([7; 16], WORLD, connect_timeout);
    let (mut now, mut told) = (Instant::now(), Told::default());
    for operation in bytes.chunks_exact(3) {
        let (rank, number) = (usize::from(operation[1]) % WORLD, operation[2]);
        match operation[0] % 17 {
            0 if coordinator.is_vacant(rank) => coordinator.connected(rank),
            1 if rank > 0 => coordinator.lost(rank, "its connection ended"),
            2 => coordinator.violated(rank, "nonsense"),
            3 | 4 => now += Duration::from_millis(100 * u64::from(number)),
            5 => now = coordinator.deadline().map_or(now, |deadline| deadline.max(now)),
            what => coordinator.heard(rank, said(what, number), now),
        }
        coordinator.tick(now);
        assert!(coordinator.deadline().is_none_or(|deadline| deadline > now));
        told.hear(&mut coordinator);
        let is_over = coordinator.deadline().is_none() || coordinator.awaits_ranks();
        assert!(!told.verdict || is_over);
    }
}

fn said(what: u8, number: u8) -> Message {
    let against = usize::from(number) % (WORLD + 1);
    match what {
        6 | 7 => Message::Joined,
        8 | 9 => {
            let to = (number > 127).then_some(usize::from(number >> 2 & 7));
            Message::Blob { round: u32::from(number % 4), to, blob: Bytes::from_static(b"blob") }
        }
        10 => {
            let finding = Finding::from_code(number % 10).unwrap_or(Finding::LinkFailed);
            Message::Accuse(Report::new(0, against, finding, "why"))
        }
        11 if number > 127 => Message::Stalled(call(u64::from(number & 7)).into()),
        11 => Message::Overdue(call(u64::from(number)).into()),
        12 | 13 => {
            let (query, step) = (u32::from(number >> 6), u32::from(number & 7));
            Message::Status { query, doing: snapshot(u64::from(number >> 3 & 7), step).into() }
        }
        14 if number > 127 => {
            Message::LeftGroup { communicator: 0, last: snapshot(u64::from(number & 7), 0) }
        }
        14 => Message::Bye(snapshot(u64::from(number), 0)),
        15 => {
            let (number, history) = (u64::from(number >> 4), u64::from(number & 3));
            let call = Call { history, ..call(number) };
            let calls = vec![status::Told { call, text: "a call".into() }];
            Message::Recounted { communicator: 0, calls }
        }
        _ => Message::StatusRequest {
            query: u32::from(number),
            communicator: 0,
            is_overdue: number > 191,
        },
    }
}

/// What all ranks have been told.
#[derive(Debug, Default)]
struct Told {
    verdict: bool,
    rounds: u32,
    /// Ranks that have been told of the exchange that all are told of one by one.
    ranks: Rank,
}

impl Told {
    fn hear(&mut self, coordinator: &mut Coordinator) {
        while let Some(output) = coordinator.poll() {
            match (&output.messages[..], output.audience) {
                ([Message::Welcome { .. }, ..], Audience::One(rank)) => {
                    assert!(rank > 0);
                    continue;
                }
                ([Message::Gathered { .. }, ..], audience) => {
                    self.gathered(&output.messages, audience);
                    continue;
                }
                ([Message::Recount { .. }], Audience::One(_)) => {
                    assert!(!self.verdict);
                    continue;
                }
                (_, audience) => assert_eq!((audience, self.ranks), (Audience::All, 0)),
            }
            match &output.messages[..] {
                [Message::Verdict(verdict)] => {
                    assert!(!self.verdict, "a second verdict: {verdict:?}");
                    assert!(!verdict.failed_ranks.is_empty() && !verdict.text.is_empty());
                    assert!(verdict.failed_ranks.is_sorted_by(|a, b| a <= b));
                    assert!(verdict.failed_ranks.iter().all(|rank| *rank < WORLD));
                    self.verdict = true;
                }
                [Message::StatusRequest { .. }] => assert!(!self.verdict),
                [Message::Left { .. }] => {}
                other => panic!("nobody expects {other:?}"),
            }
        }
    }

    fn gathered(&mut self, messages: &[Message], audience: Audience) {
        assert!(!self.verdict && messages.len() == WORLD);
        for (expected, message) in messages.iter().enumerate() {
            let Message::Gathered { round, rank, .. } = message else {
                panic!("{message:?} in the middle of an exchange")
            };
            assert_eq!((*round, *rank), (self.rounds, expected));
        }
        match audience {
            Audience::All => assert_eq!(self.ranks, 0),
            Audience::One(rank) => {
                assert_eq!(rank, self.ranks);
                self.ranks = (rank + 1) % WORLD;
            }
        }
        self.rounds += u32::from(self.ranks == 0);
    }
}

fn coordinator_seeds() -> Vec<Vec<u8>> {
    let everybody = |what: u8, ranks: std::ops::Range<u8>, number: u8| -> Vec<u8> {
        ranks.flat_map(|rank| [what, rank, number]).collect()
    };
    let world = 0..WORLD as u8;
    let joined = [everybody(0, 1..world.end, 0), everybody(6, 1..world.end, 0)].concat();
    let exchange = [&joined[..], &everybody(8, world.clone(), 0), &everybody(8, world.clone(), 1)];
    // One rank has a blob for each, the others the same for all.
    let blobs = (0..world.end).flat_map(|to| [8, 2, 0x80 | to << 2]).collect::<Vec<_>>();
    let each = [&joined[..], &everybody(8, 0..2, 0), &blobs, &everybody(8, 3..world.end, 0)];
    let query = [&joined[..], &[11, 1, 5], &everybody(12, world.clone(), 0b0110_1010)];
    let grace = [&joined[..], &[10, 1, 2, 5, 0, 0]];
    let farewell = [&joined[..], &[14, 2, 9, 1, 2, 0, 8, 1, 0]];
    let stalled = [&joined[..], &[11, 1, 0x85], &everybody(12, world.clone(), 0b0110_1010)];
    let differ = [&joined[..], &[10, 1, 17], &[15, 1, 0x11], &[15, 2, 0x12]];
    // All leave a call that one of them said was overdue.
    let moot = [&joined[..], &[11, 1, 5], &everybody(14, world, 9)];
    [exchange, query, stalled, moot]
        .map(|seed| seed.concat())
        .into_iter()
        .chain([differ.concat()])
        .chain([each.concat(), grace.concat(), farewell.concat()])
        .collect()
}

/// A file that is accepted names the addresses that publishing them would, and no part of it is
/// taken for the whole.
fn check_file(bytes: &[u8]) {
    let Ok(line) = std::str::from_utf8(bytes) else { return };
    let Some(addresses) = file::parse(line) else { return };
    let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    assert_eq!(file::parse(&format!("unisum2 00 {}\n", texts.join(" "))), Some(addresses));
    let parts = line.char_indices().map(|(end, _)| &line[..end]);
    parts.for_each(|part| assert_eq!(file::parse(part), None, "{part:?}"));
}

/// A members record that is accepted is read again as it is written, and no part of it is one.
fn check_record(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(record) = Record::decode(text) else { return };
    let written = record.encode();
    let again = Record::decode(&written).map(|it| it.encode());
    assert_eq!(again.as_ref(), Ok(&written));
    assert!(text.char_indices().all(|(end, _)| Record::decode(&text[..end]).is_err()));
}

fn record_seeds() -> Vec<Vec<u8>> {
    let head = "unisum-members1 000102030405060708090a0b0c0d0e0f 7\n";
    let members = "0 10.0.0.1:4000 [2001:db8::1]:4000\n3000000000 127.0.0.1:1\n";
    vec![format!("{head}{members}end\n").into(), format!("{head}end\n").into()]
}

fn file_seeds() -> Vec<Vec<u8>> {
    ["unisum2 00ff 10.0.0.1:40000\n", "unisum2 00 [fe80::1%3]:4000 [::1]:4000\n"]
        .map(Vec::from)
        .to_vec()
}

fn call(number: u64) -> Call {
    Call::all_reduce(number, Dtype::F32, 1000)
}

fn snapshot(number: u64, step: u32) -> Snapshot {
    Snapshot {
        call: Some(call(number)),
        inside: step > 0,
        step,
        steps: 8,
        bytes: 100,
        uncounted: 0,
    }
}

const WORLD: Rank = 4;

/// In whatever order the coordinator speaks, falls silent and goes, and another one comes, and
/// however time passes: a rank comes to one verdict at most, answers only what was asked, and never
/// asks to be woken for what is past. Each operation has three bytes: what, by or about which rank,
/// and a number.
fn check_member(bytes: &[u8]) {
    let shared = Arc::new(Shared::new(1, WORLD));
    let mut member = Member::new(shared.clone());
    let (mut now, mut verdict) = (Instant::now(), None);
    for operation in bytes.chunks_exact(3) {
        let (rank, number) = (usize::from(operation[1]) % (WORLD + 1), operation[2]);
        match operation[0] % 16 {
            0 => drop(member.lost("its connection ended")),
            1 | 2 => now += Duration::from_millis(100 * u64::from(number)),
            3 => now = member.deadline().map_or(now, |deadline| deadline.max(now)),
            4 => member.violated("nonsense"),
            5 => match member.heir() {
                Some(heir) if number > 127 => drop(member.coordinated_by(heir, now)),
                Some(heir) => member.is_unreachable(heir),
                None => member.is_alone(),
            },
            6 => {
                let finding = Finding::from_code(number % 10).unwrap_or(Finding::LinkFailed);
                let report = Report::new(0, rank % WORLD, finding, "why");
                drop(member.command(Command::Accuse(report), now));
            }
            7 => drop(member.command(Command::Overdue(call(u64::from(number)).into()), now)),
            8 => drop(member.command(Command::Stalled(call(u64::from(number)).into()), now)),
            what => {
                let message = told(what, rank, number);
                let is_question =
                    matches!(message, Message::StatusRequest { .. } | Message::Recount { .. });
                let answer = member.heard(message);
                assert!(answer.is_err() || answer.is_ok_and(|it| it.is_some() == is_question));
            }
        }
        member.tick(now);
        drop(member.news());
        assert!(member.deadline().is_none_or(|deadline| deadline > now));
        let known = shared.verdict().cloned();
        assert!(verdict.is_none() || known == verdict, "a second verdict");
        verdict = known;
    }
}

/// What a coordinator may say, and some of what it can't.
fn told(what: u8, rank: Rank, number: u8) -> Message {
    match what {
        9 | 10 => {
            let (round, blob) = (u32::from(number % 4), Bytes::from_static(b"blob"));
            Message::Gathered { round, rank, blob }
        }
        11 if number > 127 => Message::StatusRequest {
            query: 3,
            communicator: number.into(),
            is_overdue: number > 191,
        },
        11 => Message::Recount { communicator: u32::from(number) },
        12 => Message::Verdict(Verdict::new(VerdictKind::Died, vec![rank], "why".to_owned())),
        13 => Message::Left { rank, last: snapshot(u64::from(number), 0), left_group: Vec::new() },
        14 => Message::HasParted { communicator: u32::from(number), rank },
        _ => said(number % 17, number),
    }
}

fn member_seeds() -> Vec<Vec<u8>> {
    let gathered = [[9, 0, 0], [9, 1, 0], [9, 2, 0], [9, 3, 0], [9, 0, 1]];
    let asked = [[11, 0, 200], [11, 0, 3], [7, 0, 4], [2, 0, 30], [12, 2, 0]];
    let followed = [[13, 0, 3], [6, 2, 1], [0, 0, 0], [5, 0, 200], [2, 0, 120]];
    let alone = [[13, 0, 3], [0, 0, 0], [5, 0, 3], [5, 0, 3], [5, 0, 3], [8, 0, 1]];
    [&gathered[..], &asked, &followed, &alone].map(|steps| steps.concat()).to_vec()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_input_breaks_a_parser(
            bytes in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..120),
                "[0-9a-c=,.:^\\[\\]() \n-]{0,60}".prop_map(String::into_bytes),
            ],
        ) {
            super::targets().iter().for_each(|target| target.attack(&bytes));
        }
    }
}
