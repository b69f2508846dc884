//! Warnings, for programs with a subscriber of `tracing`'s events and for those without.

use std::borrow::Cow;
use std::fmt::{self, Display, Write as _};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::io::{Errno, ReadWriteFlags, pwritev2, write};

/// Lines of one place in the code per [`PERIOD`].
const LINES: u32 = 10;
const PERIOD: Duration = Duration::from_secs(10);

/// The longest line, with its end: a pipe takes as much as a whole or not at all (`PIPE_BUF`).
const LINE_BYTES_MAX: usize = 4096;

/// Lines that standard error did not take, of all places, and that no later line has told of.
static UNWRITTEN: AtomicU32 = AtomicU32::new(0);

/// How bad it is. `UNISUM_LOG=error` leaves out what is not an [`Error`](Self::Error).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// It goes on.
    Warning,
    /// Something has ended, or does not what it was to do.
    Error,
}

/// Warns: an event where the program takes them, else a line on standard error. Takes what
/// `tracing::warn!` takes.
#[macro_export]
macro_rules! warning {
    ($($text:tt)*) => { $crate::__warning_event!(warn Warning, $($text)*) };
}

/// As [`warning!`](macro@crate::warning), of what should not happen and of what ends something
/// that is not said by an error as well.
#[macro_export]
macro_rules! fault {
    ($($text:tt)*) => { $crate::__warning_event!(error Error, $($text)*) };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __warning_event {
    ($event:ident $level:ident, $($text:tt)*) => {
        match $crate::warning::is_taken() {
            true => tracing::$event!($($text)*),
            false => {
                static PLACE: $crate::warning::Place =
                    $crate::warning::Place::new($crate::warning::Level::$level);
                $crate::__warning_line!(PLACE, [] $($text)*)
            }
        }
    };
}

/// Whether this thread's events go to a subscriber now. One that some threads have, or had for a
/// while, takes nothing of the others.
pub fn is_taken() -> bool {
    tracing::dispatcher::get_default(|it| !it.is::<tracing::subscriber::NoSubscriber>())
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
pub struct Place {
    level: Level,
    said: Mutex<Said>,
}

#[derive(Debug)]
struct Said {
    since: Option<Instant>,
    lines: u32,
    unsaid: u32,
}

impl Place {
    /// One that has said nothing yet.
    pub const fn new(level: Level) -> Self {
        Self { level, said: Mutex::new(Said { since: None, lines: 0, unsaid: 0 }) }
    }

    /// Prints a line on standard error, as far as `UNISUM_LOG` lets it. What nobody reads there is
    /// lost, and counted: no thread waits for a reader, or for one that writes, unless it is a
    /// terminal of another user.
    pub fn print(&self, text: fmt::Arguments<'_>, fields: &[(&str, &dyn Display)]) {
        if !is_asked_for(self.level, &std::env::var("UNISUM_LOG").unwrap_or_default()) {
            return;
        }
        if let Some(unsaid) = self.takes(Instant::now()) {
            let line = line(self.level, text, fields);
            say(io::stderr().as_fd(), &UNWRITTEN, line, unsaid);
        }
    }

    /// Whether there is a line left, and how many were not printed before it.
    fn takes(&self, now: Instant) -> Option<u32> {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
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

/// Whether `UNISUM_LOG` leaves a line of this level.
fn is_asked_for(level: Level, log: &str) -> bool {
    match log.to_lowercase().as_str() {
        "off" => false,
        "error" => level == Level::Error,
        _ => true,
    }
}

/// The line, without its end and without limit: others' words stay on it, and a text of several
/// lines goes on behind the margin, so that nobody else's looks like one of these.
fn line(level: Level, text: fmt::Arguments<'_>, fields: &[(&str, &dyn Display)]) -> String {
    let level = match level {
        Level::Warning => "warning",
        Level::Error => "error",
    };
    let text = text.to_string();
    let lines: Vec<Cow<'_, str>> = text.split('\n').map(legible).collect();
    let mut line = format!("unisum: {level}: {}", lines.join("\n  "));
    for (at, (name, value)) in fields.iter().enumerate() {
        let before = if at == 0 { ": " } else { ", " };
        let value = value.to_string();
        write!(line, "{before}{name} {}", legible(&value)).expect("strings take all");
    }
    line
}

/// The text without what a terminal obeys or a reader does not see, control characters and those
/// that turn the direction: they are escaped (`\n`, `\u{1b}`).
pub fn legible(text: &str) -> Cow<'_, str> {
    let is_odd = |it: char| {
        let turns = matches!(it, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}');
        it.is_control() || turns || matches!(it, '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    if !text.contains(is_odd) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len());
    for it in text.chars() {
        if is_odd(it) {
            escaped.extend(it.escape_default());
        } else {
            escaped.push(it);
        }
    }
    Cow::Owned(escaped)
}

/// Writes a line, and behind it how many there would have been before it: of its place, which had
/// said enough (`unsaid`), and of all that could not be written. If it can't be written either, it
/// is one more of these.
fn say(error: BorrowedFd<'_>, unwritten: &AtomicU32, mut line: String, unsaid: u32) {
    // Only a number: whoever takes it says it, and orders nothing else by it.
    let lost = unwritten.swap(0, Ordering::Relaxed);
    let mut end = String::new();
    if unsaid > 0 {
        write!(end, " ({unsaid} more of these were not shown)").expect("strings take all");
    }
    if lost > 0 {
        write!(end, " ({lost} lines before it could not be written)").expect("strings take all");
    }
    end.push('\n');
    let room = LINE_BYTES_MAX - end.len();
    if line.len() > room {
        let fits = |it: &usize| line.is_char_boundary(*it);
        let end = (0..=room - '…'.len_utf8()).rev().find(fits).expect("0 is one");
        line.truncate(end);
        line.push('…');
    }
    line.push_str(&end);
    if !write_at_once(error, line.as_bytes()) {
        let count = lost.saturating_add(unsaid).saturating_add(1);
        // As above. It wraps after 4 billion lines that nobody reads.
        unwritten.fetch_add(count, Ordering::Relaxed);
    }
}

/// Writes all of a line without waiting; whether it could. A file waits for its disk, as everything
/// that writes there does.
fn write_at_once(to: BorrowedFd<'_>, line: &[u8]) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    // A pipe that nobody can read any more would answer with a signal.
    let has_room =
        poll(&mut polled, Some(&at_once)).is_ok() && polled[0].revents() == PollFlags::OUT;
    if !has_room {
        return false;
    }
    let is_file =
        fstat(to).is_ok_and(|it| FileType::from_raw_mode(it.st_mode) == FileType::RegularFile);
    if is_file {
        // Some systems of files refuse what is not to wait, though there is room.
        return write(to, line) == Ok(line.len());
    }
    // Others may have filled it since.
    let written = match pwritev2(to, &[IoSlice::new(line)], u64::MAX, ReadWriteFlags::NOWAIT) {
        // Terminals, and pipes of kernels before 6.4.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => write_to_own(to, line),
        written => written,
    };
    written == Ok(line.len())
}

/// Opens anew what others have open, too, which may wait there if they like, and writes what there
/// is room for. Waits only where that can't be opened: another user's terminal.
fn write_to_own(to: BorrowedFd<'_>, line: &[u8]) -> Result<usize, Errno> {
    let path = format!("/proc/self/fd/{}", to.as_raw_fd());
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match open(path, flags, Mode::empty()) {
        Ok(own) => write(own, line),
        Err(_) => write(to, line),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const NONE: &[(&str, &dyn Display)] = &[];

    fn warned(text: &str, fields: &[(&str, &dyn Display)]) -> String {
        line(Level::Warning, format_args!("{text}"), fields)
    }

    #[test]
    fn fields_follow_the_text_with_their_names() {
        let said = warned("refused", &[("from", &"10.0.0.1:9"), ("reason", &"late")]);
        assert_eq!(said, "unisum: warning: refused: from 10.0.0.1:9, reason late");
        assert_eq!(line(Level::Error, format_args!("alone"), NONE), "unisum: error: alone");
    }

    #[test]
    fn log_error_leaves_errors_and_off_leaves_nothing() {
        for (log, warns, errs) in [
            ("", true, true),
            ("warn", true, true),
            ("unisum_control=off,error", true, true),
            ("error", false, true),
            ("ERROR", false, true),
            ("off", false, false),
        ] {
            assert_eq!(is_asked_for(Level::Warning, log), warns, "{log}");
            assert_eq!(is_asked_for(Level::Error, log), errs, "{log}");
        }
    }

    #[test]
    fn words_of_others_neither_end_the_line_nor_steer_a_terminal() {
        let name = "a\nunisum: error: forged\r\u{1b}[2J\u{9b}1m\u{202e}é\0\u{2028}";
        let said = warned(name, &[("from", &name)]);
        assert!(!said.contains(|it: char| it.is_control() && it != '\n'), "{said:?}");
        assert!(!said.contains(['\u{202e}', '\u{2028}']), "{said:?}");
        // Of the text, which may have several lines, each is behind the margin.
        assert_eq!(said.lines().count(), 2);
        assert!(said.lines().skip(1).all(|it| it.starts_with("  ")), "{said}");
        assert!(
            said.contains("forged\\r\\u{1b}[2J\\u{9b}1m\\u{202e}é\\u{0}\\u{2028}: from a\\nuni")
        );
        assert!(matches!(legible("é, \"ß\" and \\"), Cow::Borrowed(_)), "nothing to escape");
    }

    /// A pipe with nobody in a hurry to read it.
    struct Pipe {
        read: io::PipeReader,
        write: io::PipeWriter,
        unwritten: AtomicU32,
    }

    impl Pipe {
        fn new() -> Self {
            let (read, write) = io::pipe().unwrap();
            Self { read, write, unwritten: AtomicU32::new(0) }
        }

        fn say(&self, text: &str, unsaid: u32) {
            say(self.write.as_fd(), &self.unwritten, warned(text, NONE), unsaid);
        }

        fn fill(&self) {
            rustix::io::ioctl_fionbio(&self.write, true).unwrap();
            while write(&self.write, &[b'x'; 4096]).is_ok() {}
            while write(&self.write, b"x").is_ok() {}
            rustix::io::ioctl_fionbio(&self.write, false).unwrap();
        }

        /// All that is there now.
        fn drain(&self) -> String {
            let mut all = Vec::new();
            let mut piece = [0; 65536];
            rustix::io::ioctl_fionbio(&self.read, true).unwrap();
            while let Ok(bytes) = rustix::io::read(&self.read, &mut piece) {
                all.extend_from_slice(&piece[..bytes]);
            }
            String::from_utf8(all).unwrap()
        }
    }

    #[test]
    fn no_warning_waits_for_a_reader_and_the_next_says_how_many_are_lost() {
        let pipe = Pipe::new();
        pipe.fill();
        (0..3).for_each(|_| pipe.say("lost", 0));
        pipe.say("lost", 4);
        assert!(!pipe.drain().contains("lost"));
        pipe.say("read", 2);
        let counts = "(2 more of these were not shown) (8 lines before it could not be written)";
        assert_eq!(pipe.drain(), format!("unisum: warning: read {counts}\n"));
        pipe.say("read", 0);
        assert_eq!(pipe.drain(), "unisum: warning: read\n");
    }

    /// Room for a part is not enough: what is there is whole lines.
    #[test]
    fn a_pipe_with_room_for_a_part_of_a_line_takes_none_of_it() {
        let pipe = Pipe::new();
        pipe.fill();
        // A page, of which the line takes more than the rest once a byte is there.
        rustix::io::read(&pipe.read, &mut [0; 4096]).unwrap();
        pipe.say(&"a".repeat(4000), 0);
        pipe.say(&"b".repeat(4000), 0);
        let said = pipe.drain();
        assert_eq!((said.matches("warning").count(), said.contains('b')), (1, false));
        assert!(said.ends_with("aaa\n"));
        assert_eq!(pipe.unwritten.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_pipe_without_a_reader_costs_the_line_and_no_signal() {
        let Pipe { read, write, unwritten } = Pipe::new();
        drop(read);
        say(write.as_fd(), &unwritten, warned("lost", NONE), 0);
        assert_eq!(unwritten.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_line_that_is_too_long_is_cut_and_files_and_sockets_take_lines_too() {
        let pipe = Pipe::new();
        for count in [4000, 4079, 4080, 4096, 5000, 100_000] {
            pipe.unwritten.store(3, Ordering::Relaxed);
            pipe.say(&"é".repeat(count), 7);
            let said = pipe.drain();
            assert!(said.len() <= LINE_BYTES_MAX && said.len() > LINE_BYTES_MAX - 4, "{count}");
            assert!(said.contains("…(") || said.contains("… (7 more"), "{count}");
            assert!(said.ends_with("(3 lines before it could not be written)\n"), "{count}");
        }
        let file = tempfile::tempfile().unwrap();
        assert!(write_at_once(file.as_fd(), b"a line\n"));
        let (mine, other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(write_at_once(mine.as_fd(), b"a line\n"));
        drop(other);
        assert!(!write_at_once(mine.as_fd(), b"a line\n"));
    }

    #[test]
    fn a_thread_without_the_subscriber_of_another_says_its_warnings_itself() {
        struct Takes;
        impl tracing::Subscriber for Takes {
            fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
                true
            }
            fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
                tracing::span::Id::from_u64(1)
            }
            fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
            fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
            fn event(&self, _: &tracing::Event<'_>) {}
            fn enter(&self, _: &tracing::span::Id) {}
            fn exit(&self, _: &tracing::span::Id) {}
        }
        assert!(!is_taken());
        tracing::subscriber::with_default(Takes, || {
            assert!(is_taken());
            thread::scope(|scope| scope.spawn(|| assert!(!is_taken())).join().unwrap());
        });
        assert!(!is_taken(), "it was there for a while");
    }

    /// However fast and long somebody has it warn.
    #[test]
    fn a_place_that_warns_again_and_again_says_so_often_only() {
        let (place, begun) = (Place::new(Level::Warning), Instant::now());
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
