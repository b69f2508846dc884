//! What must hold of members of an elastic job, whatever others tell them.

use bytes::Bytes;
use unisum_link::fuzzing::Target;
use unisum_views::{
    Ballot, Member, Message, Output, Participant, Promise, Standing, Timer, View, decode, encode,
};

use super::words::Word;

pub(crate) const TARGETS: &[Target] = &[
    Target { name: "members_words", check: check_words, seeds: word_seeds },
    Target { name: "views_participant", check: check_participant, seeds: participant_seeds },
];

/// A word that is accepted says the same when it is said again, by the same bytes but for
/// addresses, which may be written in several ways.
fn check_words(bytes: &[u8]) {
    let Some(word) = Word::decode(Bytes::copy_from_slice(bytes)) else { return };
    let said = word.encode();
    assert!(said == bytes || matches!(word, Word::Directory(_)));
    assert_eq!(Word::decode(said), Some(word));
}

fn word_seeds() -> Vec<Vec<u8>> {
    let at = |text: &str| text.parse().expect("it is an address");
    let directory = vec![(Member(7), vec![at("10.0.0.1:40"), at("[fe80::1]:4")])];
    let words = [
        Word::Bye,
        Word::Tell { epoch: 3, value: Bytes::from_static(b"value") },
        Word::Directory(directory),
        Word::Terms("minimum:2 transport=auto".into()),
    ];
    let messages = messages().map(Word::Agreement);
    words.into_iter().chain(messages).map(|word| word.encode().to_vec()).collect()
}

/// Members of the view that a participant is in, the first of which it is.
const MEMBERS: u64 = 4;

fn view() -> View {
    View::first((0..MEMBERS).map(Member).collect())
}

/// In whatever order members and others speak, are lost, ask, and time passes: a participant goes
/// from view to later view, is excluded for good, and says a bounded number of things at a time.
/// Each operation has three bytes: what, by or about whom, and a number; where a
/// message follows, that is its length.
fn check_participant(mut bytes: &[u8]) {
    let mut participant = Participant::new(Member(0), view());
    while let Some((&[what, whom, number], rest)) = bytes.split_first_chunk() {
        bytes = rest;
        // Nobody speaks with itself.
        let (own, whom) = (whom == 255, Member(1 + u64::from(whom) % (MEMBERS + 1)));
        let (epoch, standing) = (participant.view().epoch, participant.standing());
        let output = match what % 8 {
            0 => participant.lose(whom),
            1 => participant.ask(whom),
            2 => participant.change(epoch, &[if own { Member(0) } else { whom }], number > 127),
            3 => match participant.waits() {
                Some(wait) => participant.expire(wait.timer),
                None => participant.expire(Timer::Patience),
            },
            _ => {
                let (message, rest) = bytes.split_at(bytes.len().min(number.into()));
                bytes = rest;
                let Ok(message) = decode(message) else { continue };
                participant.hear(whom, message)
            }
        };
        check_step(&participant, (epoch, standing), &output);
    }
}

fn check_step(participant: &Participant, (epoch, standing): (u64, Standing), output: &Output) {
    let view = participant.view();
    assert!(view.epoch >= epoch);
    assert!(standing != Standing::Excluded || participant.standing() == Standing::Excluded);
    let is_in = matches!(participant.standing(), Standing::Inside | Standing::Stranded);
    assert_eq!(is_in, view.has(Member(0)));
    // At most two rounds of questions, a decision, and news for who asks; to members of the view
    // before as well.
    let most = 8 * (view.members.len() + participant.newcomers() + 300);
    assert!(output.sends.len() <= most, "{output:?}");
    for (_, message) in &output.sends {
        // One whose numbers are at their end is not understood, and ends nobody else.
        let understood = decode(&encode(message));
        assert!(understood.is_err() || understood.as_ref() == Ok(message));
    }
}

fn messages() -> impl Iterator<Item = Message> {
    let (ballot, epoch) = (Ballot { round: 2, rank: 1 }, 1);
    let next = View { epoch: 2, members: vec![Member(0), Member(2), Member(5)] };
    let accepted = Some((Ballot { round: 1, rank: 0 }, next.clone()));
    let promise = Promise { accepted, out: vec![Member(3)] };
    let all = [
        Message::Wish { view: view(), out: vec![Member(1)], admits: true },
        Message::Join(Member(5)),
        Message::Prepare { view: view(), ballot },
        Message::Promised { epoch, ballot: Ballot { round: 1, rank: 0 }, promise },
        Message::Refused { epoch, ballot },
        Message::Accept { ballot, next: next.clone() },
        Message::Accepted { epoch, ballot: Ballot { round: 1, rank: 0 } },
        Message::Decided(next),
    ];
    all.into_iter()
}

fn participant_seeds() -> Vec<Vec<u8>> {
    let hear = |from: u8, message: &Message| {
        let from = from - 1;
        let encoded = encode(message);
        [&[4, from, encoded.len() as u8][..], &encoded].concat()
    };
    let empty = |from: u64| {
        let ballot = Ballot { round: 1, rank: 0 };
        hear(from as u8, &Message::Promised { epoch: 1, ballot, promise: Promise::default() })
    };
    let accepted =
        |from| hear(from, &Message::Accepted { epoch: 1, ballot: Ballot { round: 1, rank: 0 } });
    let loses = [vec![0, 0, 0], empty(2), empty(3), accepted(2), accepted(3)].concat();
    let silent = [&[2, 0, 200][..], &empty(2), &[3, 0, 0], &accepted(2), &[3, 0, 0]].concat();
    let far = View { epoch: 1 << 62, ..view() };
    let ends = [hear(1, &Message::Decided(far)), vec![0, 0, 0, 2, 1, 0]].concat();
    let ballot = Ballot { round: 1 << 31, rank: 0 };
    let beaten = [hear(1, &Message::Refused { epoch: 1, ballot }), vec![0, 0, 0, 3, 0, 0]].concat();
    let others = messages().map(|message| hear(1, &message));
    others.chain([loses, silent, ends, beaten]).collect()
}
