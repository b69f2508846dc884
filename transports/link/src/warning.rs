//! Warnings, for programs with a subscriber of `tracing`'s events and for those without.

use std::fmt::{self, Display, Write as _};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Lines of one place in the code per [`PERIOD`].
const LINES: u32 = 10;
const PERIOD: Duration = Duration::from_secs(10);

/// Warns: an event where the program takes them, else a line on standard error. Takes what
/// `tracing::warn!` takes.
#[macro_export]
macro_rules! warning {
    ($($text:tt)*) => { $crate::__warning_event!(warn, $($text)*) };
}

/// As [`warning!`](macro@crate::warning), of what should not happen.
#[macro_export]
macro_rules! fault {
    ($($text:tt)*) => { $crate::__warning_event!(error, $($text)*) };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __warning_event {
    ($level:ident, $($text:tt)*) => {
        match tracing::dispatcher::has_been_set() {
            true => tracing::$level!($($text)*),
            false => {
                static PLACE: $crate::warning::Place = $crate::warning::Place::new();
                $crate::__warning_line!(PLACE, [] $($text)*)
            }
        }
    };
}

/// Takes the fields from the front of an event.
#[doc(hidden)]
#[macro_export]
macro_rules! __warning_line {
    ($place:ident, [$($done:tt)*] % $field:ident, $($rest:tt)+) => {
        $crate::__warning_line!($place, [$($done)* (stringify!($field), &$field)] $($rest)+)
    };
    ($place:ident, [$($done:tt)*] ? $field:ident, $($rest:tt)+) => {
        $crate::__warning_line!(
            $place, [$($done)* (stringify!($field), &format_args!("{:?}", $field))] $($rest)+
        )
    };
    ($place:ident, [$($done:tt)*] $field:ident = $value:expr, $($rest:tt)+) => {
        $crate::__warning_line!($place, [$($done)* (stringify!($field), &$value)] $($rest)+)
    };
    ($place:ident, [$($done:tt)*] $field:ident, $($rest:tt)+) => {
        $crate::__warning_line!($place, [$($done)* (stringify!($field), &$field)] $($rest)+)
    };
    ($place:ident, [$(($name:expr, $value:expr))*] $($text:tt)+) => {
        $place.print(format_args!($($text)+), &[$(($name, $value)),*])
    };
}

/// A place in the code that warns. What it has to say again and again is said so often only.
#[derive(Debug)]
pub struct Place(Mutex<Said>);

#[derive(Debug)]
struct Said {
    since: Option<Instant>,
    lines: u32,
    unsaid: u32,
}

impl Place {
    /// One that has said nothing yet.
    #[expect(clippy::new_without_default, reason = "for statics")]
    pub const fn new() -> Self {
        Self(Mutex::new(Said { since: None, lines: 0, unsaid: 0 }))
    }

    /// Prints a warning on standard error, unless `UNISUM_LOG` is `off` or `error`. What nobody
    /// reads there is lost: no thread waits for a reader.
    pub fn print(&self, text: fmt::Arguments<'_>, fields: &[(&str, &dyn Display)]) {
        let is_silent = |level: String| ["off", "error"].contains(&level.to_lowercase().as_str());
        if std::env::var("UNISUM_LOG").is_ok_and(is_silent) {
            return;
        }
        let Some(unsaid) = self.takes(Instant::now()) else { return };
        let mut line = line(text, fields);
        if unsaid > 0 {
            write!(line, " ({unsaid} more of these were not shown)").expect("strings take all");
        }
        line.push('\n');
        let mut error = io::stderr().lock();
        let mut polled = [PollFd::from_borrowed_fd(error.as_fd(), PollFlags::OUT)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let has_room = poll(&mut polled, Some(&at_once)).is_ok_and(|ready| ready > 0);
        if has_room {
            // Nobody may be there to read it.
            let _ = error.write_all(line.as_bytes());
        }
    }

    /// Whether there is a line left, and how many were not printed before it.
    fn takes(&self, now: Instant) -> Option<u32> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said.since.is_none_or(|since| now.saturating_duration_since(since) >= PERIOD) {
            (said.since, said.lines) = (Some(now), 0);
        }
        if said.lines == LINES {
            said.unsaid = said.unsaid.saturating_add(1);
            return None;
        }
        said.lines += 1;
        Some(std::mem::take(&mut said.unsaid))
    }
}

/// The line, without its end: others' words stay on it.
fn line(text: fmt::Arguments<'_>, fields: &[(&str, &dyn Display)]) -> String {
    let mut line = format!("unisum: warning: {text}");
    for (at, (name, value)) in fields.iter().enumerate() {
        let before = if at == 0 { ": " } else { ", " };
        write!(line, "{before}{name} {value}").expect("strings take all");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_follow_the_text_with_their_names() {
        let said = line(format_args!("refused"), &[("from", &"10.0.0.1:9"), ("reason", &"late")]);
        assert_eq!(said, "unisum: warning: refused: from 10.0.0.1:9, reason late");
        assert_eq!(line(format_args!("alone"), &[]), "unisum: warning: alone");
    }

    /// However fast and long somebody has it warn.
    #[test]
    fn a_place_that_warns_again_and_again_says_so_often_only() {
        let (place, begun) = (Place::new(), Instant::now());
        let mut lines = 0;
        for step in 0..60_000 {
            lines += u32::from(place.takes(begun + Duration::from_millis(step)).is_some());
        }
        assert_eq!(lines, 6 * LINES);
        let next = place.takes(begun + Duration::from_secs(70));
        assert_eq!(next, Some(10_000 - LINES), "and how many it has not said");
    }

    #[test]
    fn all_that_events_have_is_printed() {
        let (error, reason, rank) = ("an error", String::from("a reason"), &7);
        // Compiles, and prints nothing that is compared: see the test of a process without a
        // subscriber.
        crate::warning!(%error, "text {}", 1);
        crate::warning!(?error, reason, rank = *rank, "text");
        crate::fault!("{error}");
    }
}
