//! What both ends of a control connection are told when its bytes are altered on their way.

use std::io;

use bytes::Bytes;
use unisum_link::Rank;

use super::{COORDINATOR, ControlThread, encode};
use crate::connection::is_altered;
use crate::verdict::{Finding, Report, Verdict};

impl ControlThread {
    /// A connection is broken, and no other one goes on in its place. If its bytes were altered,
    /// the job ends for that: who sees nothing but its end would take the other one for dead. The
    /// other direction still leads there.
    pub(super) fn tell_if_altered(&mut self, token: usize, error: &io::Error) {
        let Some((rank, _)) = self.connections.get(&token).filter(|_| is_altered(error)) else {
            return;
        };
        let verdict = verdict(self.identity.rank, *rank, error);
        match &mut self.coordinator {
            Some(coordinator) => {
                coordinator.conclude(verdict);
                self.deliver(std::time::Instant::now());
            }
            None => {
                self.member.conclude(verdict);
                let told = self.member.news().map_or_else(Bytes::new, |it| encode(&[it]));
                self.send(COORDINATOR, told);
            }
        }
        if let Some((_, connection)) = self.connections.get_mut(&token) {
            connection.finish();
            // Best effort: who hears nothing sees the connection end.
            let _ = connection.flush();
        }
    }
}

fn verdict(by: Rank, against: Rank, error: &io::Error) -> Verdict {
    let text = format!("control connection to rank {against}: {error}");
    Report::new(0, against, Finding::Protocol, text).verdict(by)
}
