//! Events.

use super::{Out, entry_points};
use crate::driver::codes::{Code, Done};
use crate::driver::device::current;
use crate::driver::driver;
use crate::driver::event::{self, Event};
use crate::driver::stream::{self, wait_until};

fn record(event: u64, stream: u64) -> Done {
    let (event, stream) = (event::find(event)?, stream::find(stream)?);
    // An event of another process may be recorded by any stream.
    if event.flags & event::flags::INTERPROCESS == 0 && !std::ptr::eq(event.device, stream.device) {
        return Err(Code::INVALID_HANDLE);
    }
    let record = event.record();
    stream.push(move |_| {
        event.complete(record);
        Ok(())
    })
}

entry_points! {
    fn cuEventCreate(event: Out<u64>, flags: u32) {
        let created = Event::create(flags, current()?)?;
        event.put(driver()?.events.add(created))
    }

    fn cuEventDestroy_v2(event: u64) {
        // What is enqueued keeps the event until it has run.
        driver()?.events.remove(event)?.device.check()
    }

    fn cuEventRecord(event: u64, stream: u64) {
        record(event, stream)
    }

    fn cuEventRecordWithFlags(event: u64, stream: u64, _flags: u32) {
        record(event, stream)
    }

    fn cuEventQuery(event: u64) {
        let event = event::find(event)?;
        event.device.check()?;
        if event.is_complete(event.last_record()) { Ok(()) } else { Err(Code::NOT_READY) }
    }

    fn cuEventSynchronize(event: u64) {
        let event = event::find(event)?;
        let record = event.last_record();
        wait_until(event.device, || event.is_complete(record));
        event.device.check()
    }

    fn cuEventElapsedTime(milliseconds: Out<f32>, start: u64, end: u64) {
        put_elapsed(milliseconds, start, end)
    }

    fn cuEventElapsedTime_v2(milliseconds: Out<f32>, start: u64, end: u64) {
        put_elapsed(milliseconds, start, end)
    }
}

fn put_elapsed(milliseconds: Out<f32>, start: u64, end: u64) -> Done {
    let (start, end) = (event::find(start)?, event::find(end)?);
    let (start, end) = (start.time()?, end.time()?);
    let elapsed_us = end.saturating_sub(start) / 1000;
    // A float of microseconds is exact for hours.
    milliseconds.put(elapsed_us as f32 / 1000.0)
}
