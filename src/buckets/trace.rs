//! Steps as a trace that Chrome and Perfetto show.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use super::report::StepReport;

/// Writes steps in the Trace Event Format: in each step, the computation on one line, the buckets'
/// reductions on a second, the waiting after the computation on a third, and a mark for each bucket
/// that became ready. Each rank is one process of the trace, so that the traces of several ranks
/// may be merged; each counts time from its own beginning.
///
/// Source: "Trace Event Format", Google, 2016.
#[derive(Debug)]
pub struct Trace<W: Write> {
    to: W,
    rank: usize,
    begun: Instant,
    steps: u64,
}

impl<W: Write> Trace<W> {
    /// Begins a trace of rank `rank`; times count from here.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn new(mut to: W, rank: usize) -> io::Result<Self> {
        to.write_all(b"[")?;
        let mut trace = Self { to, rank, begun: Instant::now(), steps: 0 };
        // Only numbers and names without quotes: nothing to escape.
        let name = format!("\"name\":\"process_name\",\"args\":{{\"name\":\"rank {rank}\"}}");
        trace.event('M', 0, Duration::ZERO, &name)?;
        for (line, name) in [(1, "computation"), (2, "communication"), (3, "exposed")] {
            let name = format!("\"name\":\"thread_name\",\"args\":{{\"name\":\"{name}\"}}");
            trace.event('M', line, Duration::ZERO, &name)?;
        }
        Ok(trace)
    }

    /// Adds a step.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn step(&mut self, report: &StepReport) -> io::Result<()> {
        let Some(begun) = report.begun else { return Ok(()) };
        let start = begun.saturating_duration_since(self.begun);
        let number = self.steps;
        self.steps += 1;
        self.span(1, &format!("step {number}"), start, report.computed)?;
        self.span(3, "exposed", start + report.computed, report.exposed())?;
        for (index, bucket) in report.buckets.iter().enumerate() {
            let ready = format!("\"name\":\"bucket {index} ready\",\"s\":\"t\"");
            self.event('i', 2, start + bucket.ready, &ready)?;
            let name = format!("bucket {index}, {} bytes", bucket.bytes);
            let took = bucket.finished.saturating_sub(bucket.started);
            self.span(2, &name, start + bucket.started, took)?;
        }
        Ok(())
    }

    fn span(&mut self, line: u32, name: &str, start: Duration, took: Duration) -> io::Result<()> {
        let rest = format!("\"name\":\"{name}\",\"dur\":{}", micros(took));
        self.event('X', line, start, &rest)
    }

    fn event(&mut self, kind: char, line: u32, at: Duration, rest: &str) -> io::Result<()> {
        let comma = if kind == 'M' && line == 0 { "" } else { "," };
        let (rank, at) = (self.rank, micros(at));
        write!(
            self.to,
            "{comma}\n{{\"ph\":\"{kind}\",\"pid\":{rank},\"tid\":{line},\"ts\":{at},{rest}}}"
        )
    }

    /// Ends the trace. Viewers accept a trace without its end, too.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(mut self) -> io::Result<W> {
        self.to.write_all(b"\n]\n")?;
        self.to.flush()?;
        Ok(self.to)
    }
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buckets::BucketReport;

    #[test]
    fn a_trace_is_json_with_all_that_happened() {
        let mut trace = Trace::new(Vec::new(), 3).unwrap();
        let ms = Duration::from_millis;
        let bucket = BucketReport { bytes: 64, ready: ms(1), started: ms(2), finished: ms(5) };
        let report = StepReport {
            begun: Some(trace.begun + ms(10)),
            computed: ms(4),
            reduced: ms(5),
            ended: ms(5),
            buckets: vec![bucket; 2],
            ..StepReport::default()
        };
        trace.step(&report).unwrap();
        let text = String::from_utf8(trace.finish().unwrap()).unwrap();
        let events: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        let named = |name: &str| events.iter().find(|event| event["name"] == name).unwrap();
        assert_eq!(named("step 0")["ts"], 10_000.0);
        assert_eq!(named("exposed")["dur"], 1000.0);
        assert_eq!(named("bucket 1, 64 bytes")["ts"], 12_000.0);
        assert_eq!(named("bucket 0 ready")["ts"], 11_000.0);
        assert!(events.iter().all(|event| event["pid"] == 3));
        assert_eq!(events.len(), 4 + 2 + 4);
    }
}
