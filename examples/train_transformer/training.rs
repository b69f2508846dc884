//! What each rank does: steps on its share of each batch, and a report after each epoch.

use std::error::Error;
use std::fs::File;
use std::io::BufWriter;
use std::time::Instant;

use serde_json::{Map, json};
use unisum::buckets::{StepReport, Trace};
use unisum::{Communicator, ReduceOp};

use crate::Options;
use crate::checkpoint::{Checkpoints, State};
use crate::elastic::Turn;
use crate::events::Events;
use crate::exchange::{Cost, Exchange};
use crate::model::{Judgement, Model, Pass, Size, Weights};
use crate::optimizer::Optimizer;
use crate::scaling::Scaling;
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
    scaling: Scaling,
    exchange: Exchange,
    step: usize,
    /// Of the steps since the last report.
    cost: Cost,
    events: Option<Events>,
    trace: Option<Trace<BufWriter<File>>>,
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
    /// Of gradient buckets.
    pub(crate) bucket_bytes: usize,
}

impl Plan {
    /// What `cargo run` trains.
    pub(crate) const fn new(vocabulary: usize) -> Self {
        let size = Size { vocabulary, context: 128, width: 64, heads: 4, blocks: 4 };
        // The gradient of a block is 200 KB.
        Self { size, batch: 16, warm_up: 50, rate: 4e-3, bucket_bytes: 256 << 10 }
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
        let scaling = Scaling::new(options.precision, options.loss_scale)?;
        let saved = match checkpoints(options, communicator) {
            Some(folder) => {
                folder.read(&identity(options, plan, text, communicator), &model.parameters)?
            }
            None => None,
        };
        let layout = saved.as_ref().map(|(state, _)| &state.layout[..]);
        let how = (options.wire, plan.bucket_bytes);
        let exchange = Exchange::new(communicator, &model.parameters, how, layout)?;
        let first = communicator.rank() == 0;
        let events = options.events.as_deref().filter(|_| first);
        let events = events.map(Events::new).transpose()?;
        let trace = options.trace.as_deref().filter(|_| first);
        let trace = trace.map(|path| Trace::new(BufWriter::new(File::create(path)?), 0));
        let trace = trace.transpose()?;
        let mut training = Self {
            options,
            plan,
            communicator,
            text,
            model,
            weights,
            optimizer,
            scaling,
            exchange,
            step: 0,
            cost: Cost::default(),
            events,
            trace,
        };
        if let Some((state, own)) = saved {
            training.resume(state, &own)?;
        }
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
        if let Some(trace) = self.trace.take() {
            trace.finish()?;
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
        let (loss_scale, rate) = (self.scaling.scale(), self.rate(steps));
        // The average over the ranks is then the mean over the tokens of the batch, however it was
        // shared out.
        let tokens = self.plan.batch * self.plan.size.context;
        let scale = loss_scale * self.communicator.world() as f32 / tokens as f32;
        let Self { model, weights, exchange, .. } = self;
        let (judgement, report) =
            exchange.step(|gradients| model.learn(weights, batch, scale, pass, gradients))?;
        self.step += 1;
        let update = self.scaling.update(report.nonfinite);
        let update = update.map_err(|why| format!("step {}: {why}", self.step))?;
        if update.applies {
            let gradient = |parameter| self.exchange.gradient(parameter);
            self.optimizer.step(&mut self.weights, gradient, (rate, loss_scale))?;
        }
        if update.factor != 1.0 {
            self.exchange.rescale(update.factor);
        }
        self.record(judgement, &report, start.elapsed().as_secs_f64())?;
        match &report {
            // The batches are shared out anew.
            StepReport { change: Some(_), .. } => Err(Turn::Losses.into()),
            StepReport { newcomers: true, .. } => Err(Turn::Newcomers.into()),
            _ => Ok(()),
        }
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
        let cost = std::mem::take(&mut self.cost);
        if self.communicator.rank() == 0 {
            let scale = self.scaling.report().map_or_else(String::new, |scale| {
                format!(", loss times {scale}, {} steps skipped", self.step - self.optimizer.steps)
            });
            println!(
                "Epoch {epoch}, loss {loss:.4}, accuracy {:.1}%, {:.2} ms of a step in exposed \
                 communication, {:.3} GB/s{scale}",
                accuracy * 100.0,
                cost.exposed_s_per_step() * 1e3,
                cost.gigabytes_per_s(),
            );
        }
        if let Some(events) = &mut self.events {
            let scalars = [("held_out/loss", loss), ("held_out/accuracy", accuracy)];
            events.scalars(self.step, &scalars)?;
        }
        Ok(())
    }

    fn record(&mut self, judgement: Judgement, report: &StepReport, step_s: f64) -> Result<()> {
        let cost = Cost::of(report);
        self.cost += cost;
        if let Some(trace) = &mut self.trace {
            trace.step(report)?;
        }
        if let Some(events) = &mut self.events {
            let scalars = [
                ("rank_0/loss", judgement.mean_loss()),
                ("rank_0/accuracy", judgement.accuracy()),
                ("rank_0/step_s", step_s),
                ("rank_0/exposed_communication_s", cost.exposed_s_per_step()),
                ("rank_0/communication_gigabytes_per_s", cost.gigabytes_per_s()),
                ("loss_scale", self.scaling.scale().into()),
                ("skipped_steps", (self.step - self.optimizer.steps) as f64),
            ];
            events.scalars(self.step, &scalars)?;
        }
        Ok(())
    }

    fn write_checkpoint(&self) -> Result<()> {
        let checkpoints = checkpoints(self.options, self.communicator);
        let Some(checkpoints) = checkpoints else { return Ok(()) };
        checkpoints.write(&self.state(), &self.model.parameters, &self.exchange.state())
    }

    /// All that the next steps follow from, after the last step that all ranks took.
    pub(crate) fn state(&self) -> State {
        let Self { options, plan, communicator, text, .. } = *self;
        let parameters = &self.model.parameters;
        State {
            step: self.step,
            taken: self.optimizer.steps,
            training: identity(options, plan, text, communicator),
            weights: (0..parameters.len()).map(|it| self.weights.exact(it).to_vec()).collect(),
            means: self.optimizer.means.clone(),
            squares: self.optimizer.squares.clone(),
            layout: self.exchange.layout(),
            scaler: self.scaling.save(),
        }
    }

    /// The communicator of the view that steps have led into, if they have.
    pub(crate) fn take_communicator(&mut self) -> Option<Communicator> {
        self.exchange.take_communicator()
    }

    /// Goes on from what a checkpoint has; the exchange has its layout already.
    fn resume(&mut self, state: State, own: &[u8]) -> Result<()> {
        self.set(state)?;
        self.exchange.restore(own).map_err(Into::into)
    }

    /// Goes on from another state. All ranks do, from the same.
    pub(crate) fn set(&mut self, state: State) -> Result<()> {
        self.step = state.step;
        self.weights = Weights::from_values(state.weights, self.options.precision);
        self.optimizer.means = state.means;
        self.optimizer.squares = state.squares;
        self.optimizer.steps = state.taken;
        self.scaling.restore(&state.scaler)?;
        if self.communicator.rank() == 0 {
            println!("Resumed after step {}", self.step);
        }
        Ok(())
    }
}

fn checkpoints<'a>(options: &Options, communicator: &'a Communicator) -> Option<Checkpoints<'a>> {
    let folder = options.checkpoint.as_deref();
    folder.map(|folder| Checkpoints::new(folder, communicator))
}

/// What decides over the bits of the next step, besides the state.
fn identity(
    options: &Options,
    plan: Plan,
    text: &Text,
    communicator: &Communicator,
) -> Map<String, serde_json::Value> {
    let identity = [
        ("seed", json!(options.seed)),
        ("epochs", json!(options.epochs)),
        ("precision", json!(format!("{:?}", options.precision))),
        ("wire", json!(options.wire.to_string())),
        ("bucket_bytes", json!(plan.bucket_bytes)),
        ("world", json!(communicator.world())),
        ("batch", json!(plan.batch)),
        ("text", json!(text.checksum())),
    ];
    identity.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}
