//! All-reduces in the switch between the devices of a host (NVLink SHARP): what ranks set up for
//! them when they join, if `UNISUM_MULTIMEM` asks for it.
//!
//! Rank 0 creates a multicast object and sends its descriptor to the others; each adds its device,
//! and then binds memory to it, through which calls go. After each step the ranks tell each other
//! how it went: nobody binds before all devices have been added, since that blocks in the driver,
//! and nobody uses the address before all have bound. If one of them can't, all go without.

use std::collections::HashSet;
use std::sync::Arc;

use unisum_cuda_ipc::{Bound, CudaError, Device, Multicast};
use unisum_link::{Rank, warning};

use super::card::JoinCard;
use super::page::has_staging;
use super::post::Post;
use crate::{Communicator, Error};

/// Most bytes of one launch: of the memory that each rank binds. Longer calls are several launches.
pub(super) const PIECE_BYTES: usize = 8 << 20;
/// The number of the object in messages of descriptors; no export has it.
const OBJECT: u64 = u64::MAX;

/// What a rank has for all-reduces in the switch, once all have it.
#[derive(Debug)]
pub(super) struct Multimem {
    pub(super) bound: Bound,
    /// How many there were.
    pub(super) launches: u64,
}

/// What the ranks do together, one step after the other.
struct Steps<'a> {
    communicator: &'a Communicator,
    device: &'a Arc<Device>,
    post: &'a mut Post,
}

/// Whether this job wants it: the same on all ranks.
fn is_wanted(communicator: &Communicator) -> bool {
    let wants = |settings: &crate::settings::Settings| settings.multimem && !settings.reproducible;
    communicator.member.as_ref().is_some_and(|member| wants(&member.core.job.settings))
}

/// Sets it up, if the job wants it; without it where one of the ranks can't, of which rank 0 warns.
/// `cards` are those of all ranks, whose devices reach each other.
///
/// # Errors
/// If ranks can't tell each other any more.
pub(super) fn join(
    communicator: &Communicator,
    device: &Arc<Device>,
    cards: &[JoinCard],
    post: &mut Post,
) -> Result<Option<Multimem>, Error> {
    if !is_wanted(communicator) || !has_staging(cards.len()) {
        return Ok(None);
    }
    let made = Steps { communicator, device, post }.take(cards)?;
    if let Err(why) = &made
        && communicator.rank() == 0
    {
        warning!("no all-reduce of device memory is done in the switch: {why}");
    }
    Ok(made.ok().map(|bound| Multimem { bound, launches: 0 }))
}

/// What went wrong on a rank, or on another one.
type Step<T> = Result<T, String>;

impl Steps<'_> {
    fn take(&mut self, cards: &[JoinCard]) -> Result<Step<Bound>, Error> {
        let devices: HashSet<[u8; 16]> = cards.iter().map(|card| card.uuid).collect();
        if devices.len() < cards.len() {
            return Ok(Err("ranks share a device".into()));
        }
        let created = self.create();
        let told = created.as_ref().map(|(_, number)| number.to_le_bytes().to_vec());
        let all = match self.agree(told)? {
            Ok(all) => all,
            Err(why) => {
                // What rank 0 has sent must not be taken for something else.
                if self.communicator.rank() != 0 {
                    self.post.forget(self.device, 0, OBJECT);
                }
                return Ok(Err(why));
            }
        };
        let (object, _) = created.unwrap_or_else(|_| unreachable!("all ranks have said so"));
        let added = self.add(object, &all[0]);
        if let Err(why) = self.agree(added.as_ref().map(|_| Vec::new()))? {
            return Ok(Err(why));
        }
        let bound = added.and_then(|object| self.bind(object));
        let agreed = self.agree(bound.as_ref().map(|_| Vec::new()))?;
        Ok(agreed.and(bound))
    }

    /// Tells all ranks how a step has gone here; what they tell, or the first reason why one can't
    /// go on.
    fn agree(&self, own: Result<Vec<u8>, &String>) -> Result<Step<Vec<Vec<u8>>>, Error> {
        let own = match own {
            Ok(told) => [&[1][..], &told].concat(),
            Err(why) => [&[0][..], why.as_bytes()].concat(),
        };
        let all = self.communicator.exchange(own)?;
        let read = |(rank, told): (Rank, Vec<u8>)| match told.split_first() {
            Some((1, told)) => Ok(told.to_vec()),
            Some((_, why)) => Err(format!("rank {rank}: {}", String::from_utf8_lossy(why))),
            None => Err(format!("rank {rank} told nothing")),
        };
        Ok(all.into_iter().enumerate().map(read).collect())
    }

    /// Whether this rank's device can take part. On rank 0 also the object, whose descriptor is on
    /// its way to all others, and the number of that message.
    fn create(&mut self) -> Step<(Option<Multicast>, u64)> {
        let lacks = self.device.lacks_multicast().map_err(text)?;
        lacks.map_or(Ok(()), Err)?;
        self.device.multimem_kernels().map_err(text)?;
        if self.communicator.rank() != 0 {
            return Ok((None, 0));
        }
        let object = Multicast::new(self.device, self.communicator.world(), PIECE_BYTES);
        let object = object.map_err(text)?;
        let file = object.file().map_err(text)?.ok_or("the driver gives no descriptor of it")?;
        let number = self.post.send(0, OBJECT, &[file])?;
        Ok((Some(object), number))
    }

    /// Adds this rank's device to the object that rank 0 has made, and sent in this message.
    fn add(&mut self, object: Option<Multicast>, message: &[u8]) -> Step<Multicast> {
        let object = match object {
            Some(own) => own,
            None => {
                let number = message.try_into().map_err(|_| "rank 0 told of no message")?;
                let number = u64::from_le_bytes(number);
                self.post.receive(self.device, 0, number).map_err(|error| error.to_string())?;
                let parts = self.post.take(0, OBJECT).unwrap_or_default();
                let part = parts.into_iter().next().ok_or("rank 0 has sent something else")?;
                Multicast::imported(part)
            }
        };
        object.add().map_err(text)?;
        Ok(object)
    }

    /// Binds memory to it: all devices have been added.
    fn bind(&self, object: Multicast) -> Step<Bound> {
        object.bind().map_err(text)
    }
}

fn text(error: CudaError) -> String {
    error.to_string()
}
