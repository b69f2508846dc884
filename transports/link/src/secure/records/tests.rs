use proptest::prelude::*;

use super::*;

fn pair() -> (Sealer, Opener) {
    (Sealer::new(Zeroizing::new([7; 32])), Opener::new(Zeroizing::new([7; 32])))
}

fn sealed(sealer: &mut Sealer, text: &[u8]) -> Vec<u8> {
    let mut record = vec![0; text.len() + RECORD_OVERHEAD];
    sealer.seal(&[], text, &mut record);
    record
}

/// What a receiver makes of a stream of bytes: the texts until the first error or the end.
fn opened(opener: &mut Opener, mut wire: &[u8]) -> (Vec<Vec<u8>>, Option<Altered>) {
    let mut texts = Vec::new();
    loop {
        let bytes = match opener.length(wire) {
            Ok(Some(bytes)) if wire.len() >= bytes + RECORD_OVERHEAD => bytes,
            Ok(_) => return (texts, None),
            Err(altered) => return (texts, Some(altered)),
        };
        let (record, rest) = wire.split_at(bytes + RECORD_OVERHEAD);
        let mut text = vec![0; bytes];
        match opener.open(record, &mut text) {
            Ok(()) => texts.push(text),
            Err(altered) => return (texts, Some(altered)),
        }
        wire = rest;
    }
}

#[test]
fn what_is_sealed_is_opened_in_two_parts_or_one() {
    let (mut sealer, mut opener) = pair();
    let mut at = 0;
    for bytes in [0, 1, 15, 16, 17, 4096, RECORD_BYTES_MAX] {
        for head in [0, bytes / 3, bytes] {
            let text: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8).collect();
            let mut record = vec![0; bytes + RECORD_OVERHEAD];
            sealer.seal(&text[..head], &text[head..], &mut record);
            assert_eq!(opener.length(&record), Ok(Some(bytes)));
            assert_eq!(opener.length(&record[..3]), Ok(None));
            let mut back = vec![1; bytes];
            assert_eq!(opener.opened(), at);
            opener.open(&record, &mut back).unwrap();
            assert_eq!(back, text);
            at += bytes as u64;
        }
    }
}

/// Both ends change keys after the same records, and old keys open nothing.
#[test]
fn keys_change_at_their_limits_on_both_ends() {
    for limits in [Limits { records: 3, bytes: u64::MAX }, Limits { records: 99, bytes: 24 }] {
        let ((mut sealer, mut opener), (_, mut old)) = (pair(), pair());
        (sealer.0.limits, opener.keys.limits) = (limits, limits);
        let records: Vec<_> = (0..10).map(|at| sealed(&mut sealer, &[at; 8])).collect();
        let (texts, altered) = opened(&mut opener, &records.concat());
        assert_eq!((texts.len(), altered), (10, None));
        let (texts, altered) = opened(&mut old, &records.concat());
        assert_eq!((texts.len(), altered), (3, Some(Altered { at: 24 })));
    }
}

/// Both ends of a connection may be of different builds. The bytes are those of another
/// implementation of HKDF and AES-256-GCM.
#[test]
fn the_bytes_of_records_are_these() {
    let (mut sealer, _) = pair();
    sealer.0.limits.records = 2;
    // The length is the additional data; the third has the next key.
    for expected in [
        "050000003c528900e1d310d0e21e0e5981affebabd486e169c",
        "0500000013624cede5cf3468b54db4b848934dfa875c46d89e",
        "050000005c970d487b214823b0f66446d83cd3e804dd0add96",
    ] {
        let record = sealed(&mut sealer, b"hello");
        let text: String = record.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(text, expected);
    }
}

#[test]
fn the_same_text_looks_different_each_time_and_nothing_of_it_shows() {
    let (mut sealer, _) = pair();
    let text = [0; 64];
    let (first, second) = (sealed(&mut sealer, &text), sealed(&mut sealer, &text));
    assert_ne!(first[4..], second[4..]);
    assert!(!first[4..].windows(8).any(|part| part == [0; 8]));
}

#[test]
fn secrets_are_not_printed() {
    let (sealer, opener) = pair();
    let text = format!("{sealer:?} {opener:?}");
    assert_eq!(text, "Sealer(..) Opener { opened: 0, is_broken: false, .. }");
}

/// What somebody in between may do to the bytes under way.
#[derive(Clone, Debug)]
enum Attack {
    Flip(usize),
    Cut {
        at: usize,
        bytes: usize,
    },
    Insert {
        at: usize,
        bytes: Vec<u8>,
    },
    /// Records: one left out, one repeated, two swapped.
    Leave(usize),
    Repeat(usize, usize),
    Swap(usize, usize),
}

fn attacks() -> impl Strategy<Value = Attack> {
    prop_oneof![
        (0..1_usize << 20).prop_map(Attack::Flip),
        (0..1_usize << 16, 1..200_usize).prop_map(|(at, bytes)| Attack::Cut { at, bytes }),
        (0..1_usize << 16, prop::collection::vec(any::<u8>(), 1..64))
            .prop_map(|(at, bytes)| Attack::Insert { at, bytes }),
        (0..8_usize).prop_map(Attack::Leave),
        (0..8_usize, 0..8_usize).prop_map(|(which, to)| Attack::Repeat(which, to)),
        (0..8_usize, 0..8_usize).prop_map(|(a, b)| Attack::Swap(a, b)),
    ]
}

fn attacked(mut records: Vec<Vec<u8>>, attack: Attack) -> Vec<u8> {
    let count = records.len();
    match attack {
        Attack::Leave(which) => drop(records.remove(which % count)),
        Attack::Repeat(which, to) => records.insert(to % count, records[which % count].clone()),
        Attack::Swap(a, b) => records.swap(a % count, b % count),
        _ => {}
    }
    let mut wire = records.concat();
    let length = wire.len();
    match attack {
        Attack::Flip(bit) => wire[bit / 8 % length] ^= 1 << (bit % 8),
        Attack::Cut { at, bytes } => {
            let at = at % length;
            wire.drain(at..(at + bytes).min(length));
        }
        Attack::Insert { at, bytes } => drop(wire.splice(at % length..at % length, bytes)),
        _ => {}
    }
    wire
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever is done to the wire, what is opened is a beginning of what was sealed.
    #[test]
    fn nobody_in_between_changes_what_is_opened(
        texts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..8),
        attack in attacks(),
    ) {
        let (mut sealer, mut opener) = pair();
        let records: Vec<_> = texts.iter().map(|text| sealed(&mut sealer, text)).collect();
        let honest = records.concat();
        let wire = attacked(records, attack);
        let (heard, altered) = opened(&mut opener, &wire);
        prop_assert!(texts.starts_with(&heard));
        if wire == honest {
            prop_assert_eq!((heard.len(), altered), (texts.len(), None));
        } else {
            // All the same, something repeated at the end comes after all texts.
            let is_more = wire.len() > honest.len() && wire.starts_with(&honest);
            prop_assert!(heard.len() < texts.len() || is_more);
        }
        if let Some(Altered { at }) = altered {
            let before: usize = heard.iter().map(Vec::len).sum();
            prop_assert_eq!(at, before as u64);
            // Nothing is opened after it, be it as it was sealed.
            let next = &sealed(&mut pair().0, b"");
            prop_assert!(opener.open(next, &mut []).is_err());
            prop_assert!(opener.length(&[0; 4]).is_err());
        }
    }
}
