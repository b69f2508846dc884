//! What strangers get at most: handshakes, and lines of the log.

use std::time::{Duration, Instant};

/// Refusals logged per [`LOG_PERIOD`].
const LOG_LINES: usize = 10;
const LOG_PERIOD: Duration = Duration::from_secs(10);

/// So many at a time, and so many in a second.
#[derive(Debug)]
pub(super) struct Allowance {
    most: f64,
    pub(super) per_second: f64,
    pub(super) left: f64,
    at: Option<Instant>,
}

impl Allowance {
    pub(super) fn new(most: usize, per_second: f64) -> Self {
        let most = most as f64;
        Self { most, per_second, left: most, at: None }
    }

    /// Takes one, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let since = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.at = Some(now);
        self.left = (self.left + since.as_secs_f64() * self.per_second).min(self.most);
        let is_there = self.left >= 1.0;
        self.left -= f64::from(u8::from(is_there));
        is_there
    }
}

/// Logs refusals, but not so many that a port scanner fills the disk, nor one again and again of a
/// rank that goes on trying.
#[derive(Debug, Default)]
pub(super) struct RefusalLog {
    since: Option<Instant>,
    refused: u32,
    /// What was logged: of which host, and why.
    told: Vec<(String, String)>,
}

impl RefusalLog {
    pub(super) fn line(&mut self, now: Instant, from: &dyn std::fmt::Display, reason: &str) {
        if self.since.is_none_or(|since| now - since >= LOG_PERIOD) {
            let untold = self.refused - self.told.len() as u32;
            if untold > 0 {
                tracing::info!("refused {untold} more connections");
            }
            (self.since, self.refused) = (Some(now), 0);
            self.told.clear();
        }
        self.refused += 1;
        let from = from.to_string();
        // Each attempt is from another port.
        let host = from.rsplit_once(':').map_or(&*from, |(host, _)| host);
        let is_told = self.told.iter().any(|told| (&*told.0, &*told.1) == (host, reason));
        if !is_told && self.told.len() < LOG_LINES {
            self.told.push((host.to_owned(), reason.to_owned()));
            unisum_link::warning!(%from, reason, "refused a connection");
        }
    }
}
