//! Where the memories of a call lie, as others can open them: the program's own, or others that are
//! kept for that.

use unisum_cuda_ipc::{CudaError, PlaceError};
use unisum_kernels::cuda::CopyTask;
use unisum_link::CollectiveKind as Kind;

use super::call::Calling;
use super::card::{Exported, Refusal, RefusalKind, Spot};
use super::memories::Owned;
use crate::collective::Extents;

/// Within one bounce buffer, memories begin at multiples of this.
const ALIGNMENT: usize = 256;
/// Memory beside the buffers grows by doubling up to here, and then by this much.
const STEP: usize = 64 << 20;

/// Memory that peers can open, or none.
#[derive(Clone, Copy, Default)]
pub(super) struct Area {
    pub(super) address: u64,
    pub(super) bytes: usize,
    pub(super) spot: Option<Spot>,
}

/// Where input and output of a call lie.
#[derive(Default)]
pub(super) struct Areas {
    pub(super) input: Area,
    pub(super) output: Area,
    pub(super) in_place: bool,
    /// Copies before and after the collective.
    pub(super) before: Option<CopyTask>,
    pub(super) after: Option<CopyTask>,
}

impl Calling<'_> {
    /// Where input and output are, as others can open them.
    pub(super) fn areas(&mut self, owners: &[&Owned], extents: &Extents) -> Result<Areas, Refusal> {
        let device = self.communicator.device.clone();
        if self.state.direct.is_none() || self.collective.fold(self.buffers.dtype).custom.is_some()
        {
            return self.areas_at_hand(owners, extents);
        }
        for owner in owners {
            self.state.exports.adopt(&device, owner).map_err(place_refusal)?;
        }
        let (puts, gets) = extents.bytes(self.buffers.dtype);
        let (output_at, input_at) =
            (self.buffers.output.0, self.buffers.input.unwrap_or(self.buffers.output).0);
        let in_place = self.buffers.is_in_place() && self.collective.kind() != Kind::AllToAll;
        let mut areas = Areas {
            input: self.area(input_at + puts.start as u64, puts.len())?,
            output: self.area(output_at + gets.start as u64, gets.len())?,
            in_place,
            ..Areas::default()
        };
        let lacks = |area: &Area| area.bytes > 0 && area.spot.is_none();
        if in_place {
            if lacks(&areas.input) || lacks(&areas.output) {
                self.bounce_in_place(&mut areas)?;
            }
            return Ok(areas);
        }
        // In place, what goes out may not be overwritten by what comes in.
        let copies_input = lacks(&areas.input) || self.buffers.is_in_place();
        let copies_output = lacks(&areas.output);
        let rooms = [(copies_input, puts.len()), (copies_output, gets.len())];
        let [input, output] = rooms.map(|(copies, bytes)| if copies { bytes } else { 0 });
        let behind = input.next_multiple_of(ALIGNMENT);
        if input + output > 0 {
            let (address, of) = self.bounce(behind + output)?;
            let area = |offset: usize, bytes| Area {
                address: address + offset as u64,
                bytes,
                spot: Some(Spot { of, offset: address + offset as u64 - of.base }),
            };
            if input > 0 {
                areas.before = Some(task(address, areas.input.address, input));
                areas.input = area(0, input);
            }
            if output > 0 {
                areas.after = Some(task(areas.output.address, address + behind as u64, output));
                areas.output = area(behind, output);
            }
        }
        Ok(areas)
    }

    /// Where input and output are, for this rank alone: any memory will do, if it is the device's.
    pub(super) fn areas_at_hand(
        &self,
        owners: &[&Owned],
        extents: &Extents,
    ) -> Result<Areas, Refusal> {
        for (at, count) in self.buffers.input.into_iter().chain([self.buffers.output]) {
            let bytes = count * self.buffers.dtype.bytes();
            let is_owned = owners.iter().any(|owner| owner.memory().address() == at);
            if bytes > 0 && !is_owned {
                self.communicator.device.origin(at, bytes).map_err(place_refusal)?;
            }
        }
        let (puts, gets) = extents.bytes(self.buffers.dtype);
        let area = |at: u64, range: std::ops::Range<usize>| Area {
            address: at + range.start as u64,
            bytes: range.len(),
            spot: None,
        };
        let (output_at, input_at) =
            (self.buffers.output.0, self.buffers.input.unwrap_or(self.buffers.output).0);
        let in_place = self.buffers.is_in_place();
        let (input, output) = (area(input_at, puts), area(output_at, gets));
        Ok(Areas { input, output, in_place, ..Areas::default() })
    }

    /// Has a call in place run in the bounce buffer: what lies side by side does so there.
    fn bounce_in_place(&mut self, areas: &mut Areas) -> Result<(), Refusal> {
        let used = [areas.input, areas.output].into_iter().filter(|area| area.bytes > 0);
        let begin = used.clone().map(|area| area.address).min().unwrap_or(0);
        let end = used.map(|area| area.address + area.bytes as u64).max().unwrap_or(0);
        let (address, of) = self.bounce((end - begin) as usize)?;
        let there = |area: Area| {
            let at = address + (area.address - begin);
            Area { address: at, spot: Some(Spot { of, offset: at - of.base }), ..area }
        };
        if areas.input.bytes > 0 {
            let moved = there(areas.input);
            areas.before = Some(task(moved.address, areas.input.address, moved.bytes));
            areas.input = moved;
        }
        if areas.output.bytes > 0 {
            let moved = there(areas.output);
            areas.after = Some(task(areas.output.address, moved.address, moved.bytes));
            areas.output = moved;
        }
        Ok(())
    }

    fn area(&mut self, address: u64, bytes: usize) -> Result<Area, Refusal> {
        if bytes == 0 {
            return Ok(Area::default());
        }
        let this = (&self.communicator.device, self.communicator.rank());
        let direct = self.state.direct.as_mut().expect("areas are for others only then");
        let spot = self.state.exports.spot(this, &mut direct.post, (address, bytes));
        let spot = spot.map_err(place_refusal)?;
        Ok(Area { address, bytes, spot })
    }

    pub(super) fn scratch(&mut self, bytes: usize) -> Result<Area, Refusal> {
        let mut kept = self.state.scratch.take();
        let grown = self.grown(&mut kept, bytes);
        self.state.scratch = kept;
        let Some((address, of)) = grown? else { return Ok(Area::default()) };
        let room = self.state.scratch.as_ref().map_or(0, |it| it.memory().bytes());
        Ok(Area { address, bytes: room, spot: Some(Spot { of, offset: address - of.base }) })
    }

    fn bounce(&mut self, bytes: usize) -> Result<(u64, Exported), Refusal> {
        let mut kept = self.state.bounce.take();
        let grown = self.grown(&mut kept, bytes);
        self.state.bounce = kept;
        grown.map(|grown| grown.expect("there are bytes"))
    }

    /// Memory of at least so many bytes that others can open.
    fn grown(
        &mut self,
        kept: &mut Option<Owned>,
        bytes: usize,
    ) -> Result<Option<(u64, Exported)>, Refusal> {
        let device = &self.communicator.device;
        if bytes > kept.as_ref().map_or(0, |it| it.memory().bytes()) {
            let room = rounded(bytes);
            let new = Owned::zeroed(device, room).map_err(|error| {
                let text = format!("{room} bytes beside the buffers: {error}");
                Refusal::new(RefusalKind::Device, text)
            })?;
            *kept = Some(new);
        }
        let Some(owned) = kept.as_ref().filter(|_| bytes > 0) else { return Ok(None) };
        let exported = self.state.exports.adopt(device, owned).map_err(place_refusal)?;
        let exported = exported.ok_or_else(|| {
            Refusal::new(RefusalKind::Device, "the driver gives no handles for its own memory")
        })?;
        Ok(Some((owned.memory().address(), exported)))
    }
}

/// How much memory is taken where so many bytes are needed.
pub(super) fn rounded(bytes: usize) -> usize {
    match bytes {
        ..STEP => bytes.next_power_of_two().max(64 << 10),
        _ => bytes.next_multiple_of(STEP),
    }
}

const fn task(to: u64, from: u64, bytes: usize) -> CopyTask {
    CopyTask { to, from, bytes: bytes as u64 }
}

pub(super) fn device_refusal(error: CudaError) -> Refusal {
    Refusal::new(RefusalKind::Device, error.to_string())
}

fn place_refusal(error: PlaceError) -> Refusal {
    match error {
        PlaceError::Cuda(error) => device_refusal(error),
        _ => Refusal::new(RefusalKind::Configuration, error.to_string()),
    }
}
