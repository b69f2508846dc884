//! Going on without ranks that are lost: those that are left agree on how far they are.

use std::error::Error;

use unisum::{Communicator, ErrorKind};

use crate::checkpoint::State;

/// Whether ranks were lost, and the others can go on.
pub(crate) fn is_change(error: &(dyn Error + 'static)) -> bool {
    let error = error.downcast_ref::<unisum::Error>();
    error.is_some_and(|error| error.kind() == ErrorKind::ViewChanged)
}

/// The communicator of those that are left, and the state of the one that is furthest: it may have
/// taken a step that the others have not. Ranks may be lost here as well. Collective.
pub(crate) fn go_on(
    mut communicator: Communicator,
    state: State,
) -> Result<(Communicator, State), unisum::Error> {
    loop {
        communicator = communicator.rebuild()?;
        match align(&communicator, state.clone()) {
            Ok(state) => return Ok((communicator, state)),
            Err(error) if error.kind() == ErrorKind::ViewChanged => {}
            Err(error) => return Err(error),
        }
    }
}

fn align(communicator: &Communicator, mut state: State) -> Result<State, unisum::Error> {
    let mut progress = vec![0_u64; 2 * communicator.world()];
    let own = [state.step as u64, state.taken as u64];
    communicator.all_gather(&own, &mut progress)?;
    let (progress, _) = progress.as_chunks::<2>();
    let furthest = (0..progress.len()).rev().max_by_key(|&rank| progress[rank][0]).unwrap_or(0);
    let [step, taken] = progress[furthest];
    (state.step, state.taken) = (step as usize, taken as usize);
    communicator.broadcast(&mut state.scaler, furthest)?;
    let State { weights, means, squares, .. } = &mut state;
    for values in weights.iter_mut().chain(means).chain(squares) {
        communicator.broadcast(values, furthest)?;
    }
    if communicator.rank() == 0
        && let Some(view) = communicator.view()
    {
        let world = communicator.world();
        println!("Epoch {} of the job: {world} ranks go on after step {step}", view.epoch);
    }
    Ok(state)
}
