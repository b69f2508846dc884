//! Going on without ranks that are lost, and with others that join: all that are there agree on how
//! far the training is.

use std::error::Error;
use std::fmt;

use unisum::{Communicator, ErrorKind};

use crate::checkpoint::State;
use crate::model::Parameter;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Why a training stops between two steps: other processes ask to be let in, on all ranks, or ranks
/// were lost in the step, which the others have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    Newcomers,
    Losses,
}

impl fmt::Display for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Newcomers => "other processes ask to be let in",
            Self::Losses => "ranks were lost",
        })
    }
}

impl Error for Turn {}

/// Whether a training stopped because the job's ranks change, and can go on.
pub(crate) fn is_change(error: &(dyn Error + 'static)) -> bool {
    let unisum = error.downcast_ref::<unisum::Error>();
    error.is::<Turn>() || unisum.is_some_and(|error| error.kind() == ErrorKind::ViewChanged)
}

/// The communicator of those that are there now, and the state of those that are furthest.
/// `communicator` is the last one that there was. Collective, for newcomers as well, which call
/// [`align`].
pub(crate) fn go_on(
    communicator: Communicator,
    why: &(dyn Error + 'static),
    (state, parameters): (Option<State>, &[Parameter]),
) -> Result<(Communicator, State)> {
    let next = match why.downcast_ref::<Turn>() {
        Some(Turn::Newcomers) => communicator.admit()?,
        // The step has led into the next view.
        Some(Turn::Losses) => communicator,
        None => communicator.rebuild()?,
    };
    align(next, (state, parameters))
}

/// Gives all ranks the state of those that are furthest: they may have taken a step that others
/// have not, and newcomers have none. Ranks may be lost here as well. Collective.
pub(crate) fn align(
    mut communicator: Communicator,
    (state, parameters): (Option<State>, &[Parameter]),
) -> Result<(Communicator, State)> {
    loop {
        match share(&communicator, state.as_ref(), parameters) {
            Ok(state) => return Ok((communicator, state)),
            Err(error) if is_change(&*error) => communicator = communicator.rebuild()?,
            Err(error) => return Err(error),
        }
    }
}

fn share(
    communicator: &Communicator,
    state: Option<&State>,
    parameters: &[Parameter],
) -> Result<State> {
    let mut steps = vec![0_u64; communicator.world()];
    let own = state.map_or(0, |state| state.step as u64 + 1);
    communicator.all_gather(&[own], &mut steps)?;
    let furthest = steps.iter().max().copied().unwrap_or(0);
    let state = state.filter(|_| own == furthest);
    let bytes = state.map(|state| state.to_bytes(parameters)).transpose()?;
    let told = communicator.share_state(bytes.as_deref())?;
    let told = told.map(|told| State::from_bytes(&told, parameters)).transpose()?;
    let state = told.or_else(|| state.cloned()).ok_or("no rank has a state")?;
    if communicator.rank() == 0
        && let Some(view) = communicator.view()
    {
        let (world, step) = (communicator.world(), state.step);
        println!("Epoch {} of the job: {world} ranks go on after step {step}", view.epoch);
    }
    Ok(state)
}
