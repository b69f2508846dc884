//! Buckets whose matrices are sent as products of narrow ones.

use unisum_kernels::Dtype;

use super::hook::{AllReduce, Bucket, Hook};
use super::per_bucket::PerBucket;
use super::power::{PowerSgd, Settings, State, Tensor};
use crate::{Buffer, Buffers, Collective, Communicator, Error};

/// Averages buckets of `f32` by PowerSGD: of an n × m matrix, r·(n + m) values are sent. What this
/// loses of a rank's gradient is added in its next step. Vectors, and matrices that would gain
/// little, are sent uncompressed, as are buckets of other types.
///
/// Source: Vogels, Karimireddy and Jaggi, "PowerSGD", NeurIPS 2019, arXiv:1905.13727. Cost: two
/// all-reduces a bucket, and about 4·r multiplications for each element. Memory: 8 bytes for each
/// element that is compressed.
#[derive(Debug)]
pub struct LowRank {
    settings: Settings,
    per_bucket: PerBucket<BucketState>,
    /// What is due, of buckets that have no state yet.
    state: State,
}

#[derive(Debug)]
struct BucketState {
    power: PowerSgd,
    first: Buffer<f32>,
    second: Buffer<f32>,
}

impl LowRank {
    /// Compresses to matrices of `rank` columns. The first 1,000 steps are not compressed, because
    /// gradients change fast in them; see [`LowRank::starting_at`].
    pub fn new(rank: usize) -> Self {
        let settings = Settings { rank, ..Settings::default() };
        Self { settings, per_bucket: PerBucket::new(), state: State::default() }
    }

    /// Compresses from this step on, counted from 0.
    #[must_use]
    pub const fn starting_at(mut self, step: u64) -> Self {
        self.settings.start_step = step;
        self
    }

    /// Compresses only tensors whose data shrinks at least by this factor; 2 by default.
    #[must_use]
    pub const fn at_least(mut self, times: f64) -> Self {
        self.settings.min_compression = times;
        self
    }

    fn bucket_state(&mut self, bucket: &Bucket<'_>) -> Result<&mut BucketState, Error> {
        if self.per_bucket.are_stale(bucket) {
            self.state = self.state();
            self.per_bucket.move_to(bucket);
        }
        self.per_bucket.of(bucket, || {
            let tensors = bucket.parameters().map(|(parameter, elements)| Tensor {
                parameter: parameter.name().into(),
                shape: parameter.shape().to_vec(),
                at: elements.start,
            });
            let tensors: Vec<Tensor> = tensors.collect();
            let power = PowerSgd::new(self.settings, bucket.len(), &tensors);
            let mut power = power.map_err(|error| bucket.lacks_memory(&error))?;
            power.recall(&self.state);
            let communicator = bucket.communicator();
            let (first, second) = (communicator.allocate(0)?, communicator.allocate(0)?);
            Ok(BucketState { power, first, second })
        })
    }

    fn state(&self) -> State {
        let mut state = self.state.clone();
        self.per_bucket.iter().for_each(|it| it.power.keep(&mut state));
        state
    }
}

impl BucketState {
    /// Memory for what travels in this step: there is more in those that compress nothing.
    fn fit(&mut self, communicator: &Communicator) -> Result<(), Error> {
        for (buffer, count) in [
            (&mut self.first, self.power.first_count()),
            (&mut self.second, self.power.second_count()),
        ] {
            if buffer.len() != count {
                *buffer = communicator.allocate(count)?;
            }
        }
        Ok(())
    }

    fn average(&mut self, bucket: &mut Bucket<'_>) -> Result<bool, Error> {
        let communicator = bucket.communicator();
        self.fit(communicator)?;
        let average = Collective::all_reduce(bucket.average());
        let Self { power, first, second } = self;
        power.project(bucket.elements(), first);
        communicator.run(&average, Buffers::InPlace(first))?;
        power.refine(first, second);
        if !second.is_empty() {
            communicator.run(&average, Buffers::InPlace(second))?;
        }
        Ok(power.finish(first, second, bucket.elements()))
    }
}

impl Hook for LowRank {
    fn name(&self) -> String {
        let Settings { rank, start_step, min_compression, seed } = self.settings;
        format!(
            "PowerSGD (rank {rank}, start_step {start_step}, min_compression {min_compression}, \
             seed {seed})"
        )
    }

    fn reduce(&mut self, bucket: &mut Bucket<'_>) -> Result<(), Error> {
        if bucket.dtype() != Dtype::F32 {
            return AllReduce.reduce(bucket);
        }
        let nonfinite = self.bucket_state(bucket)?.average(bucket)?;
        if nonfinite {
            bucket.found_nonfinite();
        }
        Ok(())
    }

    fn settle(&mut self, applied: bool) {
        self.per_bucket.iter_mut().for_each(|it| it.power.settle(applied));
    }

    fn rebuild(&mut self) {
        self.state = self.state();
        self.per_bucket.clear();
    }

    fn rescale(&mut self, factor: f32) {
        self.state.rescale(factor);
        self.per_bucket.iter_mut().for_each(|it| it.power.rescale(factor));
    }

    fn save_common(&self) -> Vec<u8> {
        self.state().without_errors().to_bytes()
    }

    fn save(&self) -> Vec<u8> {
        self.state().to_bytes()
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), String> {
        self.state = State::from_bytes(saved).map_err(|error| error.to_string())?;
        self.per_bucket.clear();
        Ok(())
    }
}
