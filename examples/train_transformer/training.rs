//! What each rank does: steps on its share of each batch, and a report after each epoch.

use std::error::Error;
use std::time::Instant;

use serde_json::{Map, json};
use unisum::{Communicator, ReduceOp};

use crate::Options;
use crate::checkpoint::{Checkpoints, State};
use crate::events::Events;
use crate::exchange::{Cost, Exchange};
use crate::model::{Judgement, Model, Pass, Size, Weights};
use crate::optimizer::Optimizer;
use crate::text::{Order, Text};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A training, and how far it is.
#[derive(Debug)]
pub(crate) struct Training<'a> {
    options: &'a Options,
    plan: Plan,
    communicator: &'a Communicator,
    text: &'a Text,
    model: Model,
    weights: Weights,
    optimizer: Optimizer,
    exchange: Exchange<'a>,
    step: usize,
    events: Option<Events>,
}

/// How large model, batches and steps are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) size: Size,
    /// Sequences of a step, over all ranks.
    pub(crate) batch: usize,
    /// Steps until the rate is at its highest.
    pub(crate) warm_up: usize,
    /// The highest rate.
    pub(crate) rate: f32,
}

impl Plan {
    /// What `cargo run` trains.
    pub(crate) const fn new(vocabulary: usize) -> Self {
        let size = Size { vocabulary, context: 128, width: 64, heads: 4, blocks: 4 };
        Self { size, batch: 16, warm_up: 50, rate: 4e-3 }
    }
}

impl<'a> Training<'a> {
    /// A training that starts from the last checkpoint, if there is one. Collective.
    pub(crate) fn new(
        options: &'a Options,
        plan: Plan,
        text: &'a Text,
        communicator: &'a Communicator,
    ) -> Result<Self> {
        if communicator.world() > plan.batch {
            let batch = plan.batch;
            return Err(format!("a batch of {batch} sequences is for at most {batch} ranks").into());
        }
        let model = Model::new(plan.size);
        let weights = Weights::new(&model.parameters, options.precision, options.seed);
        let optimizer = Optimizer::new(&model.parameters);
        let exchange = Exchange::new(communicator, &model.parameters)?;
        let events = options.events.as_deref().filter(|_| communicator.rank() == 0);
        let events = events.map(Events::new).transpose()?;
        let mut training = Self {
            options,
            plan,
            communicator,
            text,
            model,
            weights,
            optimizer,
            exchange,
            step: 0,
            events,
        };
        training.resume()?;
        Ok(training)
    }

    /// Trains to the end, and gives how well the model foresees the held-out text then.
    pub(crate) fn run(&mut self) -> Result<Judgement> {
        let (size, share) = (self.plan.size, self.share());
        let mut pass = Pass::new(size, share.len());
        let batches = self.text.batches(size.context, self.plan.batch);
        let steps = self.options.epochs * batches;
        let end = self.options.stop_after.map_or(steps, |stop| stop.min(steps));
        let mut held_out = None;
        while self.step < end {
            let epoch = self.step / batches;
            let order = Order::new(self.text, size.context, self.options.seed, epoch);
            let epoch_end = end.min((epoch + 1) * batches);
            while self.step < epoch_end {
                let batch = (self.step % batches, self.plan.batch);
                let (tokens, targets) = order.sequences(self.text, batch, share.clone());
                self.take_step((&tokens, &targets), steps, &mut pass)?;
            }
            let judgement = self.judge_held_out()?;
            held_out = Some(judgement);
            self.report(epoch + 1, judgement)?;
            self.write_checkpoint()?;
        }
        held_out.map_or_else(|| self.judge_held_out(), Ok)
    }

    /// A hash of the weights' bits.
    ///
    /// # Errors
    /// If it differs between ranks.
    pub(crate) fn hash_on_all_ranks(&self) -> Result<u64> {
        let hash = self.weights.hash();
        let (mut least, mut most) = ([hash], [hash]);
        self.communicator.all_reduce(&mut least, ReduceOp::Min)?;
        self.communicator.all_reduce(&mut most, ReduceOp::Max)?;
        if least == most { Ok(hash) } else { Err("weights differ between ranks".into()) }
    }

    /// This rank's sequences in each batch.
    fn share(&self) -> std::ops::Range<usize> {
        let (rank, world) = (self.communicator.rank(), self.communicator.world());
        self.plan.batch * rank / world..self.plan.batch * (rank + 1) / world
    }

    fn take_step(&mut self, batch: (&[u8], &[u8]), steps: usize, pass: &mut Pass) -> Result<()> {
        let start = Instant::now();
        // The sum over the ranks is then the mean over the tokens of the batch, however it was
        // shared out.
        let scale = 1.0 / (self.plan.batch * self.plan.size.context) as f32;
        self.exchange.begin();
        let judgement = self.model.learn(&self.weights, batch, scale, pass, &mut self.exchange);
        let cost = self.exchange.finish()?;
        let rate = self.rate(steps);
        self.step += 1;
        let gradient = |parameter| self.exchange.gradient(parameter);
        self.optimizer.step(&mut self.weights, gradient, (self.step, rate))?;
        self.record(judgement, cost, start.elapsed().as_secs_f64())
    }

    /// Rises to its highest within the first steps, then falls to zero at the last.
    fn rate(&self, steps: usize) -> f32 {
        let Plan { warm_up, rate, .. } = self.plan;
        let risen = (self.step + 1) as f32 / warm_up as f32;
        let left = (steps - self.step) as f32 / steps.saturating_sub(warm_up).max(1) as f32;
        rate * risen.min(left).min(1.0)
    }

    /// How well the model foresees the held-out text: the ranks take its windows in turns.
    /// Collective.
    fn judge_held_out(&self) -> Result<Judgement> {
        let context = self.plan.size.context;
        let mut pass = Pass::new(self.plan.size, 1);
        let windows = (self.text.held_out.len() - 1) / context;
        let mut sums = [0.0; 3];
        for window in (self.communicator.rank()..windows).step_by(self.communicator.world()) {
            let (first, text) = (window * context, &self.text.held_out);
            let batch = (&text[first..first + context], &text[first + 1..first + 1 + context]);
            let Judgement { loss, right, tokens } =
                self.model.judge(&self.weights, batch, &mut pass);
            for (sum, part) in sums.iter_mut().zip([loss, right, tokens]) {
                *sum += part;
            }
        }
        self.communicator.all_reduce(&mut sums, ReduceOp::Sum)?;
        let [loss, right, tokens] = sums;
        Ok(Judgement { loss, right, tokens })
    }

    fn report(&mut self, epoch: usize, judgement: Judgement) -> Result<()> {
        let (loss, accuracy) = (judgement.mean_loss(), judgement.accuracy());
        if self.communicator.rank() == 0 {
            println!("Epoch {epoch}, loss {loss:.4}, accuracy {:.1}%", accuracy * 100.0);
        }
        if let Some(events) = &mut self.events {
            let scalars = [("held_out/loss", loss), ("held_out/accuracy", accuracy)];
            events.scalars(self.step, &scalars)?;
        }
        Ok(())
    }

    fn record(&mut self, judgement: Judgement, cost: Cost, step_s: f64) -> Result<()> {
        if let Some(events) = &mut self.events {
            let scalars = [
                ("rank_0/loss", judgement.mean_loss()),
                ("rank_0/accuracy", judgement.accuracy()),
                ("rank_0/step_s", step_s),
                ("rank_0/exposed_communication_s", cost.exposed.as_secs_f64()),
                ("rank_0/communication_gigabytes_per_s", cost.gigabytes_per_s()),
            ];
            events.scalars(self.step, &scalars)?;
        }
        Ok(())
    }

    /// What decides over the bits of the next step, besides the state.
    fn identity(&self) -> Map<String, serde_json::Value> {
        let identity = [
            ("seed", json!(self.options.seed)),
            ("epochs", json!(self.options.epochs)),
            ("precision", json!(format!("{:?}", self.options.precision))),
            ("world", json!(self.communicator.world())),
            ("batch", json!(self.plan.batch)),
            ("text", json!(self.text.checksum())),
        ];
        identity.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    fn checkpoints(&self) -> Option<Checkpoints<'a>> {
        let folder = self.options.checkpoint.as_deref();
        folder.map(|folder| Checkpoints::new(folder, self.communicator))
    }

    fn write_checkpoint(&self) -> Result<()> {
        let Some(checkpoints) = self.checkpoints() else { return Ok(()) };
        let parameters = &self.model.parameters;
        let state = State {
            step: self.step,
            training: self.identity(),
            weights: (0..parameters.len()).map(|it| self.weights.exact(it).to_vec()).collect(),
            means: self.optimizer.means.clone(),
            squares: self.optimizer.squares.clone(),
        };
        checkpoints.write(&state, parameters, &self.exchange.state())
    }

    fn resume(&mut self) -> Result<()> {
        let Some(checkpoints) = self.checkpoints() else { return Ok(()) };
        let read = checkpoints.read(&self.identity(), &self.model.parameters)?;
        let Some((state, own)) = read else { return Ok(()) };
        self.step = state.step;
        self.weights = Weights::from_values(state.weights, self.options.precision);
        self.optimizer.means = state.means;
        self.optimizer.squares = state.squares;
        self.exchange.restore(&own)?;
        if self.communicator.rank() == 0 {
            println!("Resumed after step {}", self.step);
        }
        Ok(())
    }
}
