//! The links of a communicator, and sleeping on several of them.

use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use unisum_link::{Group, Link, LinkError, Rank};

/// The links, and which of them reaches each rank.
#[derive(Debug)]
pub struct Links {
    /// The links, at most one for each transport.
    pub all: Vec<Box<dyn Link>>,
    /// By rank; this rank's own entry is unused.
    pub route: Vec<usize>,
    /// The link whose group executes the group actions.
    pub group: Option<usize>,
}

impl Links {
    /// The link that reaches `peer`.
    pub fn to(&mut self, peer: Rank) -> &mut dyn Link {
        self.all[self.route[peer]].as_mut()
    }

    /// The group that executes the group actions, if there is one.
    pub fn group(&mut self) -> Option<&mut dyn Group> {
        self.all[self.group?].group()
    }

    /// The group of a program with group actions.
    pub fn the_group(&mut self) -> &mut dyn Group {
        self.group().expect("programs have group actions only where a group is")
    }

    /// Marks the collective on all links.
    pub fn mark(&mut self) {
        self.all.iter_mut().for_each(|link| link.mark());
    }

    /// Whether the collective is marked on any of them.
    pub fn is_marked(&self) -> bool {
        self.all.iter().any(|link| link.is_marked())
    }

    /// Aborts everything: afterwards no link touches any memory.
    pub fn abort(&mut self) {
        self.all.iter_mut().for_each(|link| link.abort());
    }

    /// Sleeps until progress may be possible on a link that has tickets in flight, until woken, or
    /// until `until`. At least `wanted` tickets must complete before the caller can continue.
    /// `rank` is this rank, for the error.
    ///
    /// # Errors
    /// Only if sleeping itself is impossible.
    pub fn park(
        &mut self,
        in_flight: &[usize],
        until: Instant,
        wanted: usize,
        rank: Rank,
    ) -> Result<(), LinkError> {
        let mut busy = (0..in_flight.len()).filter(|&link| in_flight[link] > 0);
        if let (Some(only), None) = (busy.next(), busy.next()) {
            return self.all[only].park(until, wanted);
        }
        let busy: Vec<usize> = (0..in_flight.len()).filter(|&link| in_flight[link] > 0).collect();
        let armed = busy.iter().take_while(|&&link| self.all[link].arm()).count();
        let slept = if armed == busy.len() { self.poll(&busy, until) } else { Ok(()) };
        for &link in &busy[..armed] {
            self.all[link].disarm();
        }
        slept.map_err(|error| LinkError::os(rank, "waiting for several links", error))
    }

    fn poll(&self, busy: &[usize], until: Instant) -> rustix::io::Result<()> {
        let mut descriptors: Vec<PollFd<'_>> = busy
            .iter()
            .map(|&link| PollFd::from_borrowed_fd(self.all[link].wake_fd(), PollFlags::IN))
            .collect();
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
        match poll(&mut descriptors, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
