use proptest::prelude::*;

use super::*;
use crate::doing::tests::doings;
use crate::tests::call;

pub(crate) fn snapshots() -> impl Strategy<Value = Snapshot> {
    let steps = (any::<u32>(), any::<u32>());
    let parts = (any::<Option<u64>>(), any::<bool>(), steps, any::<u64>(), any::<u64>());
    parts.prop_map(|(number, inside, (step, steps), bytes, uncounted)| {
        let call = number.map(|number| call(number >> 16));
        Snapshot { call, inside, step, steps, bytes, uncounted }
    })
}

fn stalled_calls() -> impl Strategy<Value = StalledCall> {
    let parts = (any::<u64>(), any::<u64>(), prop::collection::vec(ranks(), 0..9));
    parts.prop_map(|(number, uncounted, ranks)| {
        let call = call(number >> 16);
        StalledCall { call, uncounted, ranks }
    })
}

fn blobs() -> impl Strategy<Value = Bytes> {
    any::<Vec<u8>>().prop_map(Bytes::from)
}

pub(crate) fn ranks() -> impl Strategy<Value = Rank> {
    any::<u32>().prop_map(|rank| rank as Rank)
}

fn calls() -> impl Strategy<Value = Option<Calls>> {
    let called = || (ranks(), any::<u64>()).prop_map(|(rank, number)| (rank, call(number >> 16)));
    prop::option::of([called(), called()])
}

fn messages() -> impl Strategy<Value = Message> {
    let failed_ranks = prop::collection::vec(ranks(), 0..9);
    let verdict = (1..=19_u8, failed_ranks, calls(), any::<String>(), any::<bool>());
    prop_oneof![
        any::<[u8; 16]>().prop_map(|session| Message::Welcome { session }),
        Just(Message::Joined),
        (any::<u32>(), prop::option::of(0..1_usize << 16), blobs())
            .prop_map(|(round, to, blob)| Message::Blob { round, to, blob }),
        (any::<u32>(), ranks(), blobs()).prop_map(|(round, rank, blob)| Message::Gathered {
            round,
            rank,
            blob
        }),
        (any::<u32>(), ranks(), 0..10_u8, any::<String>(), calls()).prop_map(
            |(communicator, against, code, text, calls)| {
                let finding = Finding::from_code(code).unwrap();
                Message::Accuse(Report { communicator, against, finding, text, calls })
            }
        ),
        any::<u32>().prop_map(|communicator| Message::Recount { communicator }),
        (any::<u32>(), prop::collection::vec(any::<(u64, String)>(), 0..4)).prop_map(
            |(communicator, calls)| {
                let told = |(number, text)| Told { call: call(number >> 16), text };
                let calls = calls.into_iter().map(told).collect();
                Message::Recounted { communicator, calls }
            }
        ),
        stalled_calls().prop_map(Message::Overdue),
        stalled_calls().prop_map(Message::Stalled),
        any::<(u32, u32, bool)>().prop_map(|(query, communicator, is_overdue)| {
            Message::StatusRequest { query, communicator, is_overdue }
        }),
        (any::<u32>(), doings()).prop_map(|(query, doing)| Message::Status { query, doing }),
        verdict.prop_map(|(code, failed_ranks, calls, text, is_own)| {
            let kind = VerdictKind::from_code(code).unwrap();
            let verdict = Verdict { kind, failed_ranks, text, calls: calls.map(Box::new) };
            if is_own { Message::Concluded(verdict) } else { Message::Verdict(verdict) }
        }),
        (ranks(), snapshots(), prop::collection::vec((any::<u32>(), snapshots()), 0..4))
            .prop_map(|(rank, last, left_group)| Message::Left { rank, last, left_group }),
        (any::<u32>(), snapshots())
            .prop_map(|(communicator, last)| Message::LeftGroup { communicator, last }),
        (any::<u32>(), ranks())
            .prop_map(|(communicator, rank)| Message::HasParted { communicator, rank }),
        any::<(u32, u32)>().prop_map(|(round, millis)| Message::Missing { round, millis }),
        any::<String>().prop_map(Message::Keep),
        any::<Vec<u8>>().prop_map(|word| Message::View(word.into())),
        snapshots().prop_map(Message::Bye),
    ]
}

proptest! {
    #[test]
    fn messages_survive_the_wire_in_any_pieces(
        all in prop::collection::vec(messages(), 1..5), piece in 1..50_usize,
    ) {
        let mut wire = BytesMut::new();
        all.iter().for_each(|message| message.encode(&mut wire));
        let (mut buffer, mut decoded) = (BytesMut::new(), Vec::new());
        for piece in wire.chunks(piece) {
            buffer.put_slice(piece);
            while let Some(message) = Message::decode(&mut buffer).unwrap() {
                decoded.push(message);
            }
        }
        prop_assert_eq!(decoded, all);
    }
}

#[test]
fn no_length_field_makes_room_for_more_than_a_frame() {
    let mut wire = BytesMut::from(&u32::MAX.to_le_bytes()[..]);
    assert_eq!(Message::decode(&mut wire), Err(MessageError::Length(u32::MAX)));
}

#[test]
fn of_more_communicators_than_fit_the_newest_are_told() {
    let last = Snapshot { call: Some(call(1)), ..Snapshot::default() };
    let left_group: Vec<_> = (0..=LASTS_MAX as u32).map(|number| (number, last)).collect();
    let mut wire = BytesMut::new();
    Message::Left { rank: 1, last, left_group: left_group.clone() }.encode(&mut wire);
    let told = Message::decode(&mut wire).unwrap().unwrap();
    assert_eq!(told, Message::Left { rank: 1, last, left_group: left_group[1..].to_vec() });
}

#[test]
fn long_texts_are_cut_between_characters() {
    let text = "é".repeat(TEXT_BYTES_MAX);
    let mut wire = BytesMut::new();
    Message::Accuse(Report::new(0, 1, Finding::LinkFailed, text)).encode(&mut wire);
    assert!(wire.len() <= TEXT_BYTES_MAX + 16);
    assert!(matches!(Message::decode(&mut wire), Ok(Some(Message::Accuse(_)))));
}
