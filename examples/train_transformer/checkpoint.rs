//! Checkpoints: all that a training needs to go on as if it had never stopped.
//!
//! A checkpoint is a folder `step-00000400` with `model.safetensors` (weights, the optimiser's
//! running means, where gradients lie in their buckets, the loss scale, and which training it is;
//! rank 0 writes it, as all ranks have the same) and a file `rank-3` with what only that rank
//! knows: what compression has lost of its gradients so far. It gets
//! its name when all of it is on the disk, so one that is there is whole.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde_json::{Map, Value};
use unisum::Communicator;

use crate::model::Parameter;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What is the same on all ranks.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct State {
    /// How many steps there were.
    pub(crate) step: usize,
    /// How many of them the optimiser took.
    pub(crate) taken: usize,
    /// What must be the same in the training that goes on: it decides over the next bits.
    pub(crate) training: Map<String, Value>,
    /// For each parameter its values, and the optimiser's running means.
    pub(crate) weights: Vec<Vec<f32>>,
    pub(crate) means: Vec<Vec<f32>>,
    pub(crate) squares: Vec<Vec<f32>>,
    /// The layout of the gradient buckets.
    pub(crate) layout: Vec<u8>,
    /// The loss scaler's state.
    pub(crate) scaler: Vec<u8>,
}

/// A folder of checkpoints that all ranks reach.
#[derive(Debug)]
pub(crate) struct Checkpoints<'a> {
    folder: PathBuf,
    communicator: &'a Communicator,
}

const MODEL: &str = "model.safetensors";
const TRAINING: &str = "training";

impl<'a> Checkpoints<'a> {
    /// Those in `folder`, which is made with the first one if it is not there.
    pub(crate) fn new(folder: &Path, communicator: &'a Communicator) -> Self {
        Self { folder: folder.to_owned(), communicator }
    }

    /// Writes a checkpoint and, when it is whole, removes those before it. Collective; `own` is
    /// what only this rank knows.
    ///
    /// # Errors
    /// If it can't be written, on all ranks: those whose part was written see a rank leave.
    pub(crate) fn write(&self, state: &State, parameters: &[Parameter], own: &[u8]) -> Result<()> {
        let whole = self.folder.join(name(state.step));
        let unfinished = whole.with_extension("unfinished");
        let first = self.communicator.rank() == 0;
        if first {
            fs::create_dir_all(&unfinished)?;
            write_through(&unfinished.join(MODEL), &state.to_bytes(parameters)?)?;
        }
        self.communicator.barrier()?;
        write_through(&unfinished.join(self.own_file()), own)?;
        self.communicator.barrier()?;
        if first {
            // The same checkpoint may be there already, from a training that ended here before.
            let before = steps(&self.folder)?;
            if before.contains(&state.step) {
                fs::remove_dir_all(&whole)?;
            }
            fs::rename(&unfinished, &whole)?;
            File::open(&self.folder)?.sync_all()?;
            for step in before.into_iter().filter(|step| *step != state.step) {
                fs::remove_dir_all(self.folder.join(name(step)))?;
            }
        }
        Ok(self.communicator.barrier()?)
    }

    /// The last checkpoint and what this rank alone knew, or `None` if there is none yet.
    /// Collective.
    ///
    /// # Errors
    /// If it can't be read, or is of another training than `training`.
    pub(crate) fn read(
        &self,
        training: &Map<String, Value>,
        parameters: &[Parameter],
    ) -> Result<Option<(State, Vec<u8>)>> {
        // Rank 0 says which: all have to take the same.
        let mut next = [steps(&self.folder)?.last().map_or(0, |step| *step as u64 + 1)];
        self.communicator.broadcast(&mut next, 0)?;
        let Some(step) = next[0].checked_sub(1) else { return Ok(None) };
        let folder = self.folder.join(name(step as usize));
        let read = |file: &str| {
            let path = folder.join(file);
            fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))
        };
        let state = State::from_bytes(&read(MODEL)?, parameters)
            .map_err(|error| format!("{}: {error}", folder.join(MODEL).display()))?;
        for (key, value) in training {
            let other = state.training.get(key).unwrap_or(&Value::Null);
            if value != other {
                let folder = folder.display();
                return Err(format!("{folder} has {key} {other}, this training {value}").into());
            }
        }
        Ok(Some((state, read(&self.own_file())?)))
    }

    fn own_file(&self) -> String {
        format!("rank-{}", self.communicator.rank())
    }
}

impl State {
    /// The state in the safetensors format.
    ///
    /// # Errors
    /// If a tensor has not the shape of its parameter.
    pub(crate) fn to_bytes(&self, parameters: &[Parameter]) -> Result<Vec<u8>> {
        let kinds =
            [("weights", &self.weights), ("means", &self.means), ("squares", &self.squares)];
        let mut tensors = Vec::new();
        for (kind, values) in kinds {
            for (parameter, values) in parameters.iter().zip(values) {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                let name = format!("{kind}/{}", parameter.name);
                tensors.push((name, Dtype::F32, parameter.shape.clone(), bytes));
            }
        }
        for (name, bytes) in [("layout", &self.layout), ("scaler", &self.scaler)] {
            tensors.push((name.into(), Dtype::U8, vec![bytes.len()], bytes.clone()));
        }
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?))
        });
        let mut training = self.training.clone();
        training.insert("step".into(), self.step.into());
        training.insert("taken".into(), self.taken.into());
        let training = (TRAINING.into(), Value::Object(training).to_string());
        Ok(serialize(views.collect::<Result<Vec<_>>>()?, Some([training].into()))?)
    }

    /// The state that [`State::to_bytes`] wrote.
    ///
    /// # Errors
    /// If the bytes are none, or of other parameters.
    pub(crate) fn from_bytes(bytes: &[u8], parameters: &[Parameter]) -> Result<Self> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        let training = header.metadata().as_ref().and_then(|all| all.get(TRAINING));
        let training = training.ok_or("it does not say which training it is of")?;
        let mut training: Map<String, Value> = serde_json::from_str(training)?;
        let mut count = |of: &str| {
            let count = training.remove(of).and_then(|count| count.as_u64());
            count.map(|count| count as usize).ok_or_else(|| format!("it does not say its `{of}`"))
        };
        let (step, taken) = (count("step")?, count("taken")?);
        let tensors = SafeTensors::deserialize(bytes)?;
        let read = |kind: &str| {
            let values = |parameter: &Parameter| {
                let name = format!("{kind}/{}", parameter.name);
                let tensor = tensors.tensor(&name)?;
                if tensor.dtype() != Dtype::F32 || tensor.shape() != parameter.shape {
                    return Err(format!("{name} has another type or shape").into());
                }
                let (numbers, _) = tensor.data().as_chunks();
                Ok(numbers.iter().map(|number| f32::from_le_bytes(*number)).collect())
            };
            parameters.iter().map(values).collect::<Result<Vec<Vec<f32>>>>()
        };
        Ok(Self {
            step,
            taken,
            weights: read("weights")?,
            means: read("means")?,
            squares: read("squares")?,
            layout: tensors.tensor("layout")?.data().to_vec(),
            scaler: tensors.tensor("scaler")?.data().to_vec(),
            training,
        })
    }
}

fn name(step: usize) -> String {
    format!("step-{step:08}")
}

/// The steps that whole checkpoints are there of, in order.
fn steps(folder: &Path) -> Result<Vec<usize>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut steps = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?.file_name();
        let step: Option<usize> =
            entry.to_str().and_then(|entry| entry.strip_prefix("step-")?.parse().ok());
        steps.extend(step);
    }
    steps.sort_unstable();
    Ok(steps)
}

/// Writes a file and waits until it is on the disk.
fn write_through(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    Ok(file.sync_all()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Start;

    fn parameters() -> Vec<Parameter> {
        let start = Start::Constant(0.0);
        vec![
            Parameter { name: "matrix".into(), shape: vec![2, 2], start },
            Parameter { name: "vector".into(), shape: vec![1], start },
        ]
    }

    fn state(step: usize) -> State {
        let values = |first: f32| vec![vec![first, f32::MIN_POSITIVE, -0.0, 1e38], vec![first]];
        let training = Map::from_iter([("seed".into(), 7.into())]);
        let (weights, means, squares) = (values(0.1), values(0.2), values(0.3));
        let (layout, scaler) = (vec![1, 2, 3], Vec::new());
        State { step, taken: step - 1, training, weights, means, squares, layout, scaler }
    }

    fn alone() -> Communicator {
        Communicator::builder().rank(0).world(1).connect().unwrap()
    }

    #[test]
    fn what_is_read_is_what_was_written_last() {
        let (folder, communicator) = (tempfile::tempdir().unwrap(), alone());
        let folder = folder.path().join("checkpoints");
        let (checkpoints, training) = (Checkpoints::new(&folder, &communicator), state(1).training);
        assert_eq!(checkpoints.read(&training, &parameters()).unwrap(), None);
        for step in [9, 10, 10, 100_000_000] {
            checkpoints.write(&state(step), &parameters(), &[step as u8; 3]).unwrap();
            let (read, own) = checkpoints.read(&training, &parameters()).unwrap().unwrap();
            assert_eq!((&read, &own[..]), (&state(step), &[step as u8; 3][..]));
            let bits = |state: &State| state.weights.concat().into_iter().map(f32::to_bits);
            assert!(bits(&read).eq(bits(&state(step))));
            assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "one checkpoint is kept");
        }
    }

    #[test]
    fn a_checkpoint_of_another_training_is_refused() {
        let (folder, communicator) = (tempfile::tempdir().unwrap(), alone());
        let checkpoints = Checkpoints::new(folder.path(), &communicator);
        checkpoints.write(&state(1), &parameters(), &[]).unwrap();
        let other = Map::from_iter([("seed".into(), 8.into())]);
        let error = checkpoints.read(&other, &parameters()).unwrap_err().to_string();
        assert!(error.ends_with("has seed 7, this training 8"), "{error}");
        let mut wider = parameters();
        wider[0].shape = vec![4, 4];
        let error = checkpoints.read(&state(1).training, &wider).unwrap_err().to_string();
        assert!(error.contains("weights/matrix"), "{error}");
    }

    #[test]
    fn a_checkpoint_that_was_cut_short_is_refused() {
        let bytes = state(1).to_bytes(&parameters()).unwrap();
        assert_eq!(State::from_bytes(&bytes, &parameters()).unwrap(), state(1));
        for length in 0..bytes.len() {
            assert!(State::from_bytes(&bytes[..length], &parameters()).is_err(), "{length} bytes");
        }
    }
}
