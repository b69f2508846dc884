//! What ranks tell each other on the host: once when they join, and for each call.

use unisum_cuda_ipc::Handle;
use unisum_link::Call;

use super::post::Address;
use crate::ErrorKind;

/// Bytes of a call's card. All cards have as many, so that one small all-gather exchanges them.
pub(super) const CARD_BYTES: usize = 640;
/// Most allocations that one card takes back.
pub(super) const RETIRED_MAX: usize = 8;
/// Most bytes of a refusal's text.
const TEXT_MAX: usize = 256;
/// Most bytes of the terms' text.
const TERMS_MAX: usize = 96;

/// An allocation, and how others get at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exported {
    /// The number that it has in its process.
    pub(super) id: u64,
    /// Where it begins in its process.
    pub(super) base: u64,
    pub(super) via: Via,
}

/// By what a peer opens an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Via {
    Ipc(Handle),
    /// Mapped memory, so long.
    Fabric(Handle, u64),
    /// Mapped memory, whose descriptors are in this message to the peer (`post`).
    Post(u64),
}

/// A place in an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    pub(super) of: Exported,
    pub(super) offset: u64,
}

/// What a rank has for a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Card {
    /// Its history is the fingerprint of its terms.
    pub(super) call: Call,
    /// The terms in words, cut if they are long.
    pub(super) terms: String,
    /// Whether input and output are one memory.
    pub(super) in_place: bool,
    /// All retirements up to this call's have been carried out here.
    pub(super) closed: u64,
    /// The numbers of allocations that this rank wants to free.
    pub(super) retired: Vec<u64>,
    pub(super) scratch_bytes: u64,
    /// Input, output and scratch memory, or why the rank can't take part.
    pub(super) memories: Result<[Option<Spot>; 3], Refusal>,
}

/// Why a rank can't take part in a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) kind: RefusalKind,
    pub(super) text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum RefusalKind {
    /// Its arguments do not fit the call.
    Mismatch = 1,
    /// They can't be used at all.
    Configuration = 2,
    /// Its device failed.
    Device = 3,
}

impl RefusalKind {
    pub(super) const fn error_kind(self) -> ErrorKind {
        match self {
            Self::Mismatch => ErrorKind::Mismatch,
            Self::Configuration => ErrorKind::Configuration,
            Self::Device => ErrorKind::Device,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::Mismatch, Self::Configuration, Self::Device]
            .into_iter()
            .find(|&known| known as u8 == code)
    }
}

impl Refusal {
    pub(super) fn new(kind: RefusalKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }
}

impl Card {
    pub(super) fn encode(&self) -> [u8; CARD_BYTES] {
        let mut writer = Writer(Vec::with_capacity(CARD_BYTES));
        writer.bytes(&self.call.encode());
        writer.text(&self.terms, TERMS_MAX);
        writer.byte(u8::from(self.in_place));
        writer.word(self.closed);
        writer.byte(self.retired.len() as u8);
        self.retired.iter().for_each(|&id| writer.word(id));
        writer.word(self.scratch_bytes);
        match &self.memories {
            Ok(memories) => {
                writer.byte(0);
                memories.iter().for_each(|spot| writer.spot(spot.as_ref()));
            }
            Err(Refusal { kind, text }) => {
                writer.byte(*kind as u8);
                writer.text(text, TEXT_MAX);
            }
        }
        let mut bytes = [0; CARD_BYTES];
        bytes[..writer.0.len()].copy_from_slice(&writer.0);
        bytes
    }

    /// `None` if it makes no sense.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let call = Call::decode(reader.bytes(Call::ENCODED)?.try_into().ok()?)?;
        let (terms, in_place) = (reader.text()?, reader.flag()?);
        let closed = reader.word()?;
        let count = usize::from(reader.byte()?);
        if count > RETIRED_MAX {
            return None;
        }
        let retired = (0..count).map(|_| reader.word()).collect::<Option<Vec<u64>>>()?;
        let scratch_bytes = reader.word()?;
        let memories = match reader.byte()? {
            0 => Ok([reader.spot()?, reader.spot()?, reader.spot()?]),
            code => {
                let text = reader.text()?;
                Err(Refusal { kind: RefusalKind::from_code(code)?, text })
            }
        };
        Some(Self { call, terms, in_place, closed, retired, scratch_bytes, memories })
    }
}

/// What a rank has to offer when it joins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct JoinCard {
    /// Tells the process from all others: handles are for others only.
    pub(super) process: u64,
    pub(super) ordinal: u64,
    pub(super) uuid: [u8; 16],
    /// How many multiprocessors the device has.
    pub(super) multiprocessors: u32,
    /// The page with its flags; `None` if it could not be exported.
    pub(super) page: Option<Exported>,
    /// Where it takes descriptors of mapped memory; `None` if it can't.
    pub(super) door: Option<Address>,
}

impl JoinCard {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut writer = Writer(Vec::new());
        writer.word(self.process);
        writer.word(self.ordinal);
        writer.bytes(&self.uuid);
        writer.word(self.multiprocessors.into());
        writer.spot(self.page.map(|of| Spot { of, offset: 0 }).as_ref());
        writer.byte(u8::from(self.door.is_some()));
        if let Some(Address { name, token }) = &self.door {
            writer.bytes(name);
            writer.bytes(token);
        }
        writer.0
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let (process, ordinal) = (reader.word()?, reader.word()?);
        let uuid = reader.array()?;
        let multiprocessors = reader.word()?.try_into().ok()?;
        let page = reader.spot()?.map(|spot| spot.of);
        let door = match reader.flag()? {
            true => Some(Address { name: reader.array()?, token: reader.array()? }),
            false => None,
        };
        let card = Self { process, ordinal, uuid, multiprocessors, page, door };
        reader.0.is_empty().then_some(card)
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }

    fn word(&mut self, word: u64) {
        self.bytes(&word.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn text(&mut self, text: &str, bytes_max: usize) {
        // Not `floor_char_boundary`, which compilers of the oldest supported version lack.
        let fits = |end: &usize| *end <= bytes_max && text.is_char_boundary(*end);
        let end = (0..=text.len()).rev().find(fits).unwrap_or(0);
        self.word(end as u64);
        self.bytes(&text.as_bytes()[..end]);
    }

    fn spot(&mut self, spot: Option<&Spot>) {
        self.byte(u8::from(spot.is_some()));
        if let Some(Spot { of, offset }) = spot {
            self.word(of.id);
            self.word(of.base);
            self.via(&of.via);
            self.word(*offset);
        }
    }

    fn via(&mut self, via: &Via) {
        let (kind, handle, word) = match via {
            Via::Ipc(handle) => (0, *handle, 0),
            Via::Fabric(handle, bytes) => (1, *handle, *bytes),
            Via::Post(number) => (2, Handle([0; Handle::BYTES]), *number),
        };
        self.byte(kind);
        self.bytes(&handle.0);
        self.word(word);
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array(&mut self) -> Option<[u8; 16]> {
        self.bytes(16)?.try_into().ok()
    }

    fn byte(&mut self) -> Option<u8> {
        self.bytes(1).map(|bytes| bytes[0])
    }

    fn flag(&mut self) -> Option<bool> {
        match self.byte()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    fn word(&mut self) -> Option<u64> {
        self.bytes(8)?.try_into().ok().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Option<String> {
        let length = usize::try_from(self.word()?).ok()?;
        String::from_utf8(self.bytes(length)?.to_vec()).ok()
    }

    fn spot(&mut self) -> Option<Option<Spot>> {
        if !self.flag()? {
            return Some(None);
        }
        let (id, base) = (self.word()?, self.word()?);
        let of = Exported { id, base, via: self.via()? };
        Some(Some(Spot { of, offset: self.word()? }))
    }

    fn via(&mut self) -> Option<Via> {
        let kind = self.byte()?;
        let handle = Handle(self.bytes(Handle::BYTES)?.try_into().ok()?);
        match (kind, self.word()?) {
            (0, 0) => Some(Via::Ipc(handle)),
            (1, bytes) => Some(Via::Fabric(handle, bytes)),
            (2, number) if handle.0 == [0; Handle::BYTES] => Some(Via::Post(number)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use unisum_kernels::Dtype;

    use super::*;

    fn spot(id: u64) -> Spot {
        let handle = Handle([id as u8; 64]);
        let via = [Via::Ipc(handle), Via::Fabric(handle, 2 << 20), Via::Post(id)];
        Spot { of: Exported { id, base: id << 40, via: via[id as usize % 3] }, offset: 512 }
    }

    #[test]
    fn cards_survive_the_wire() {
        let whole = Card {
            call: Call::all_reduce(7, Dtype::Bf16, 1 << 40),
            in_place: true,
            terms: ", factor 0.5".into(),
            closed: 6,
            retired: (0..RETIRED_MAX as u64).collect(),
            scratch_bytes: 1 << 33,
            memories: Ok([Some(spot(1)), Some(spot(2)), Some(spot(3))]),
        };
        let refusal = |text: String| Err(Refusal::new(RefusalKind::Device, text));
        let cards = [
            Card { retired: vec![], memories: Ok([None; 3]), ..whole.clone() },
            Card { memories: refusal(String::new()), ..whole.clone() },
            Card { memories: refusal("é".repeat(TEXT_MAX / 2)), ..whole.clone() },
            whole,
        ];
        for card in cards {
            assert_eq!(Card::decode(&card.encode()), Some(card));
        }
    }

    #[test]
    fn long_texts_are_cut_between_letters() {
        let text = "x".to_owned() + &"é".repeat(TEXT_MAX);
        let refusal = Err(Refusal::new(RefusalKind::Mismatch, text));
        let card = Card {
            call: Call::all_reduce(0, Dtype::F32, 1),
            in_place: false,
            terms: String::new(),
            closed: 0,
            retired: vec![],
            scratch_bytes: 0,
            memories: refusal,
        };
        let text = Card::decode(&card.encode()).unwrap().memories.unwrap_err().text;
        assert_eq!(text.len(), TEXT_MAX - 1);
    }

    #[test]
    fn nonsense_is_no_card() {
        assert_eq!(Card::decode(&[0xff; CARD_BYTES]), None);
        assert_eq!(Card::decode(&[0; CARD_BYTES]), None);
        let page = Some(spot(5).of);
        let door = Some(Address { name: [7; 16], token: [8; 16] });
        let (process, ordinal, uuid, multiprocessors) = (1, 2, [3; 16], 132);
        let card = JoinCard { process, ordinal, uuid, multiprocessors, page, door };
        let bytes = card.encode();
        assert_eq!(JoinCard::decode(&bytes), Some(card));
        assert_eq!(JoinCard::decode(&bytes[1..]), None);
        assert_eq!(JoinCard::decode(&[bytes, vec![0]].concat()), None);
    }
}
