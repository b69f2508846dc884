//! Those who have connected and proven nothing yet: who they are, and who has to go if there are
//! too many.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Instant;

use rustix::process::{Resource, getrlimit};
use unisum_link::fork::ParentOnly;
use unisum_link::secure::Listening;

/// Pending connections at a time, beside one per rank, if descriptors allow that.
const PENDING_SPARE: usize = 128;
/// Pending connections may take this part of the descriptors that the process may have.
const PART_OF_DESCRIPTORS: usize = 4;

/// A connection that has proven nothing yet.
pub(super) struct PendingConnection {
    pub(super) stream: ParentOnly<TcpStream>,
    pub(super) address: SocketAddr,
    pub(super) listening: Listening,
    /// When it has to have proven the token; the same time after its coming for all.
    pub(super) until: Instant,
    /// It has told a claim that would be admitted with a proof.
    pub(super) is_expected: bool,
    /// It was told why it is refused.
    pub(super) is_told: bool,
    /// It is refused for what it has in place of this rank's TLS.
    pub(super) is_unlike: bool,
    /// It was told so in TLS.
    pub(super) is_dismissed: bool,
}

/// The pending connections, and how many there are of each kind.
#[derive(Default)]
pub(super) struct PendingConnections {
    most: usize,
    /// Tokens grow, so that the first pending connection is the oldest.
    by_token: BTreeMap<usize, PendingConnection>,
    /// By where they come from and whether they are expected.
    count: HashMap<(bool, IpAddr), usize>,
    expected: usize,
}

impl PendingConnections {
    pub(super) fn new(most: usize) -> Self {
        Self { most, ..Self::default() }
    }

    /// How many there may be.
    pub(super) const fn most(&self) -> usize {
        self.most
    }

    pub(super) fn are_too_many(&self) -> bool {
        self.by_token.len() > self.most
    }

    pub(super) fn has(&self, token: usize) -> bool {
        self.by_token.contains_key(&token)
    }

    pub(super) fn get_mut(&mut self, token: usize) -> Option<&mut PendingConnection> {
        self.by_token.get_mut(&token)
    }

    /// When the time of the oldest ends.
    pub(super) fn next_end(&self) -> Option<Instant> {
        self.by_token.first_key_value().map(|(_, oldest)| oldest.until)
    }

    pub(super) fn remove_oldest(&mut self) -> Option<PendingConnection> {
        let oldest = *self.by_token.first_key_value()?.0;
        self.remove(oldest)
    }

    /// Takes out who has to go if there are too many: one of those that are not expected, unless
    /// those that claim to be leave others a quarter of the places only; then one of these. Among
    /// them it is the oldest of the source with the most: whoever comes is heard at least once, and
    /// nobody but a source's own pending connections suffers from it.
    pub(super) fn remove_least(&mut self) -> Option<PendingConnection> {
        let is_expected = self.unexpected() == 0 || self.expected > self.most - self.most / 4;
        let count = self.count.iter().filter(|((expected, _), _)| *expected == is_expected);
        let (&(_, from), _) = count.max_by_key(|(_, count)| **count)?;
        let is_it = |pending: &PendingConnection| {
            pending.is_expected == is_expected && source(pending.address) == from
        };
        let (&token, _) = self.by_token.iter().find(|(_, pending)| is_it(pending))?;
        self.remove(token)
    }

    pub(super) fn insert(&mut self, token: usize, pending: PendingConnection) {
        self.counted(&pending, 1);
        self.by_token.insert(token, pending);
    }

    pub(super) fn remove(&mut self, token: usize) -> Option<PendingConnection> {
        let pending = self.by_token.remove(&token)?;
        self.counted(&pending, -1);
        Some(pending)
    }

    /// The pending connection claims to be somebody who is expected.
    pub(super) fn expect(&mut self, token: usize) {
        if let Some(mut pending) = self.remove(token) {
            pending.is_expected = true;
            self.insert(token, pending);
        }
    }

    fn counted(&mut self, pending: &PendingConnection, by: isize) {
        let kind = (pending.is_expected, source(pending.address));
        let count = self.count.entry(kind).or_default();
        *count = count.saturating_add_signed(by);
        if *count == 0 {
            self.count.remove(&kind);
        }
        if pending.is_expected {
            self.expected = self.expected.saturating_add_signed(by);
        }
    }

    pub(super) fn unexpected(&self) -> usize {
        self.by_token.len() - self.expected
    }
}

/// Whom a pending connection is counted with: all addresses that one host may have for the asking.
fn source(address: SocketAddr) -> IpAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let network = address.to_bits() >> 64 << 64;
            IpAddr::V6(network.into())
        }
    }
}

/// How many pending connections there may be at a rank: those of a world that starts at once and
/// some more, but never so many that the rank itself lacks descriptors.
pub(super) fn most(world: usize) -> usize {
    let descriptors = getrlimit(Resource::Nofile).current;
    let descriptors = descriptors.and_then(|limit| usize::try_from(limit).ok());
    let spared = descriptors.unwrap_or(usize::MAX) / PART_OF_DESCRIPTORS;
    (PENDING_SPARE + world).min(spared).max(2)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Duration;

    use super::*;

    /// A room with so many places, and a socket for its pending connections to share.
    struct Room {
        pending: PendingConnections,
        stream: TcpStream,
        next: usize,
    }

    impl Room {
        fn new(most: usize) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            Self { pending: PendingConnections::new(most), stream, next: 0 }
        }

        /// Lets a pending connection in; who had to go for it.
        fn come(&mut self, from: &str, is_expected: bool) -> Option<(String, u16)> {
            self.next += 1;
            let pending = PendingConnection {
                stream: ParentOnly::new(self.stream.try_clone().unwrap()),
                address: SocketAddr::new(from.parse().unwrap(), self.next as u16),
                listening: Listening::new([0; 32], true),
                until: Instant::now() + Duration::from_secs(5),
                is_expected: false,
                is_told: false,
                is_unlike: false,
                is_dismissed: false,
            };
            self.pending.insert(self.next, pending);
            if is_expected {
                self.pending.expect(self.next);
            }
            let gone = self.pending.are_too_many().then(|| self.pending.remove_least())?;
            let address = gone.unwrap().address;
            Some((address.ip().to_string(), address.port()))
        }
    }

    fn gone(from: &str, number: u16) -> Option<(String, u16)> {
        Some((from.to_owned(), number))
    }

    #[test]
    fn the_oldest_of_the_source_with_the_most_goes() {
        let mut room = Room::new(4);
        for from in ["10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.3"] {
            assert_eq!(room.come(from, false), None);
        }
        assert_eq!(room.come("10.0.0.4", false), gone("10.0.0.2", 2));
        for number in 6..100 {
            let (from, _) = room.come("10.0.0.9", false).unwrap();
            assert!(number < 8 || from == "10.0.0.9", "{number}: {from}");
        }
    }

    #[test]
    fn addresses_of_one_network_are_one_source() {
        let mut room = Room::new(3);
        room.come("fd00:0:0:1::1", false);
        room.come("::ffff:10.0.0.1", false);
        room.come("fd00:0:0:1:ffff::2", false);
        assert_eq!(room.come("10.0.0.2", false), gone("fd00:0:0:1::1", 1));
    }

    #[test]
    fn who_is_expected_stays_until_a_quarter_is_left_to_others() {
        let mut room = Room::new(8);
        for number in 1..=6 {
            assert_eq!(room.come("10.0.0.1", true), None, "{number}");
        }
        room.come("10.0.0.2", false);
        room.come("10.0.0.2", false);
        assert_eq!(room.come("10.0.0.3", false), gone("10.0.0.2", 7));
        // Those that only claim to be can't keep the others out.
        assert_eq!(room.come("10.0.0.1", true), gone("10.0.0.1", 1));
        assert_eq!(room.come("10.0.0.1", true), gone("10.0.0.1", 2));
    }

    #[test]
    fn all_are_expected_and_one_goes_still() {
        let mut room = Room::new(2);
        room.come("10.0.0.1", true);
        room.come("10.0.0.1", true);
        assert!(room.come("10.0.0.1", true).is_some());
        room.pending.remove_oldest().unwrap();
        room.pending.remove_oldest().unwrap();
        assert!(room.pending.remove_oldest().is_none());
        assert_eq!((room.pending.unexpected(), room.pending.count.len()), (0, 0));
    }
}
