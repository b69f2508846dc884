//! What TensorBoard shows: a file of events, each with some scalars.
//!
//! Source: TensorFlow's `event.proto`, `summary.proto` and the TFRecord format (length, its masked
//! checksum, bytes, their masked checksum).

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

/// Writes events to a file of its own.
#[derive(Debug)]
pub(crate) struct Events {
    file: File,
}

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    /// The first event says which version of the format follows.
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    /// Optional, so that a zero is written as well.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

impl Events {
    /// A new file in `folder`, which is made if it is not there.
    pub(crate) fn new(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        // TensorBoard looks for this word, and reads the files of a folder in order of their names.
        let name = format!("events.out.tfevents.{:.6}.{}", now(), std::process::id());
        let mut events = Self { file: File::create_new(folder.join(name))? };
        events.write(&Event { file_version: Some("brain.Event:2".into()), ..event(0) })?;
        Ok(events)
    }

    /// Writes the scalars of a step.
    pub(crate) fn scalars(&mut self, step: usize, scalars: &[(&str, f64)]) -> io::Result<()> {
        let value = |(tag, value): &(&str, f64)| Value {
            tag: (*tag).into(),
            simple_value: Some(*value as f32),
        };
        let summary = Summary { values: scalars.iter().map(value).collect() };
        self.write(&Event { summary: Some(summary), ..event(step) })
    }

    fn write(&mut self, event: &Event) -> io::Result<()> {
        // In one piece: who reads along finds whole records.
        self.file.write_all(&record(&event.encode_to_vec()))
    }
}

fn event(step: usize) -> Event {
    Event { wall_time: now(), step: step as i64, ..Event::default() }
}

fn now() -> f64 {
    // A clock before 1970 makes a wrong label, no failed training.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn record(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    let parts = [&length[..], &checksum(&length), bytes, &checksum(bytes)];
    parts.concat()
}

/// CRC-32C, rotated and shifted: a checksum of data that contain such checksums stays good.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that TensorFlow writes for an empty record.
    #[test]
    fn records_have_the_checksums_of_the_format() {
        let expected = [0, 0, 0, 0, 0, 0, 0, 0, 0x29, 0x03, 0x98, 0x07, 0xd8, 0xea, 0x82, 0xa2];
        assert_eq!(record(&[]), expected);
    }

    #[test]
    fn events_are_read_back_as_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = Events::new(folder.path()).unwrap();
        events.scalars(7, &[("loss", 1.5), ("nothing", 0.0)]).unwrap();
        let file = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap();
        let mut bytes = &fs::read(file.path()).unwrap()[..];
        let mut read = || {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let (this, rest) = bytes.split_at(length + 16);
            assert_eq!(this, record(&this[12..12 + length]));
            bytes = rest;
            Event::decode(&this[12..12 + length]).unwrap()
        };
        assert_eq!(read().file_version.as_deref(), Some("brain.Event:2"));
        let event = read();
        let values: Vec<(String, Option<f32>)> =
            event.summary.unwrap().values.into_iter().map(|it| (it.tag, it.simple_value)).collect();
        let expected = [("loss".into(), Some(1.5)), ("nothing".into(), Some(0.0))];
        assert_eq!((event.step, &values[..]), (7, &expected[..]));
        assert!(bytes.is_empty());
    }
}
