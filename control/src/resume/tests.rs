use super::*;

/// Draws what happens: the same from the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        // Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ word >> 31) % bound as u64) as usize
    }
}

/// One end of a connection, and what is on its way to it.
#[derive(Default)]
struct End {
    ledger: Ledger,
    inbound: BytesMut,
    on_its_way: BytesMut,
    heard: Vec<String>,
    said: usize,
}

impl End {
    /// Says some messages together.
    fn say(&mut self, to: &mut Self, messages: usize) {
        let mut encoded = BytesMut::new();
        for number in self.said..self.said + messages {
            Message::Keep(line(number)).encode(&mut encoded);
        }
        self.said += messages;
        let encoded = encoded.freeze();
        self.ledger.keep(&encoded);
        to.on_its_way.extend_from_slice(&encoded);
    }

    /// So many bytes arrive.
    fn receive(&mut self, from: &mut Self, bytes: usize) {
        let bytes = self.on_its_way.split_to(bytes.min(self.on_its_way.len()));
        self.inbound.extend_from_slice(&bytes);
        while let Some(message) = next(&mut self.inbound, Some(&mut self.ledger)).unwrap() {
            let Message::Keep(line) = message else { panic!("{message:?}") };
            self.heard.push(line);
        }
        if let Some(word) = self.ledger.news() {
            from.on_its_way.extend_from_slice(&word.encode());
        }
    }
}

fn line(number: usize) -> String {
    format!("{number}{}", "x".repeat(number % 7 * 11))
}

/// The connection ends, and with it all that has not arrived or is not whole; another one goes on,
/// unless it is cut as well after so many bytes of what is said again.
fn cut(ends: &mut [End; 2]) {
    for end in ends.iter_mut() {
        end.inbound.clear();
        end.on_its_way.clear();
    }
    let taken = [0, 1].map(|at: usize| ends[at].ledger.taken());
    for at in 0..2 {
        ends[at].ledger.has_taken(taken[1 - at]).unwrap();
        let again: Vec<Bytes> = ends[at].ledger.again().collect();
        again.iter().for_each(|it| ends[1 - at].on_its_way.extend_from_slice(it));
    }
}

#[test]
fn whatever_byte_a_connection_is_cut_at_no_message_is_lost_or_doubled() {
    let mut cuts = 0;
    for seed in 0..400 {
        let (mut random, mut ends) = (Random(seed), <[End; 2]>::default());
        for _ in 0..300 {
            let (from, [one, other]) = (random.below(2), &mut ends);
            let (end, peer) = if from == 0 { (one, other) } else { (other, one) };
            match random.below(8) {
                0..3 => end.say(peer, 1 + random.below(3)),
                3..7 => end.receive(peer, random.below(120)),
                _ => {
                    cuts += 1;
                    cut(&mut ends);
                }
            }
        }
        for _ in 0..2 {
            let [one, other] = &mut ends;
            one.receive(other, usize::MAX);
            other.receive(one, usize::MAX);
        }
        for (end, peer) in [(0, 1), (1, 0)] {
            let said = (0..ends[peer].said).map(line);
            assert!(said.eq(ends[end].heard.iter().cloned()), "seed {seed}");
            assert!(ends[end].ledger.is_settled(), "seed {seed}: what arrived is not kept");
        }
    }
    assert!(cuts > 1000, "{cuts}");
}

#[test]
fn every_byte_of_a_conversation_is_one_where_it_can_be_cut() {
    let whole = {
        let mut ends = <[End; 2]>::default();
        let [one, other] = &mut ends;
        one.say(other, 5);
        other.on_its_way.len()
    };
    for at in 0..=whole {
        let mut ends = <[End; 2]>::default();
        let [one, other] = &mut ends;
        one.say(other, 5);
        other.say(one, 2);
        other.receive(one, at);
        cut(&mut ends);
        let [one, other] = &mut ends;
        other.receive(one, usize::MAX);
        one.receive(other, usize::MAX);
        assert!(other.heard.iter().cloned().eq((0..5).map(line)), "cut at {at}");
        assert!(one.heard.iter().cloned().eq((0..2).map(line)), "cut at {at}");
    }
}

#[test]
fn numbers_that_the_other_end_can_not_mean_are_refused() {
    let mut ends = <[End; 2]>::default();
    let [one, other] = &mut ends;
    one.say(other, 3);
    assert_eq!(one.ledger.has_taken(4), Err(Impossible));
    assert_eq!(one.ledger.has_taken(2), Ok(()));
    assert_eq!(one.ledger.has_taken(1), Err(Impossible));
    assert_eq!(one.ledger.has_taken(u64::MAX), Err(Impossible));
    assert!(!one.ledger.is_settled());
    let mut wire = BytesMut::from(&Word::Taken(9).encode()[..]);
    assert_eq!(next(&mut wire, Some(&mut one.ledger)), Err(MessageError::Body(TAKEN)));
    let word = Word::Resume { attempt: 1, taken: 0 };
    let mut wire = BytesMut::from(&word.encode()[..]);
    assert_eq!(next(&mut wire, Some(&mut one.ledger)), Err(MessageError::Kind(RESUME)));
    let mut wire = BytesMut::from(&[1, 0, 0, 0, TAKEN][..]);
    assert_eq!(next(&mut wire, Some(&mut one.ledger)), Err(MessageError::Body(TAKEN)));
}

#[test]
fn the_welcome_is_not_counted() {
    let (mut ledger, mut encoded) = (Ledger::default(), BytesMut::new());
    Message::Welcome { session: [7; 16] }.encode(&mut encoded);
    Message::Joined.encode(&mut encoded);
    ledger.keep(&encoded.clone().freeze());
    assert_eq!(ledger.again().count(), 1);
    while next(&mut encoded, Some(&mut ledger)).unwrap().is_some() {}
    assert_eq!(ledger.taken(), 1);
}

#[test]
fn words_survive_the_wire_in_any_pieces() {
    for word in [
        Word::Resume { attempt: 1 << 40, taken: 3 },
        Word::Resumed { taken: u64::MAX },
        Word::Taken(5),
    ] {
        let encoded = word.encode();
        let mut buffer = BytesMut::new();
        for at in 0..encoded.len() {
            assert_eq!(Word::take(&mut buffer), Ok(None), "{at} bytes of {word:?}");
            buffer.put_u8(encoded[at]);
        }
        assert_eq!(Word::take(&mut buffer), Ok(Some(word)));
        assert!(buffer.is_empty());
    }
}
