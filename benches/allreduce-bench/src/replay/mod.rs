//! The communication of a model's training steps, replayed beside an imitated backward pass: how
//! much of it the gradient buckets hide, and how much other ways to average the gradients do.

mod backward;
mod gradients;
mod memory;
mod options;
mod report;
mod ways;

use std::process::ExitCode;
use std::time::{Duration, Instant};

pub(crate) use options::Options;

use crate::Result;
use crate::args::Args;
use crate::models::{Model, Parameter};
use crate::report::Progress;
use crate::world::World;
use backward::Backward;
use gradients::Gradients;
use report::{About, Report, Row, median};
use ways::{AtEnd, EachTensor, InBuckets, Pass, Way};

/// Measures each way to average the gradients of a model, one after the other, and reports. The
/// exit code says whether all averages were right.
///
/// # Errors
/// If the model does not fit into memory, a reduction fails, or the report cannot be written.
pub(crate) fn run(args: &Args, world: &World, model: Model) -> Result<ExitCode> {
    let options = &args.replay;
    let shrunk = model.parameters().into_iter().map(|it| it.shrunk(options.scale));
    let parameters: Vec<Parameter> = shrunk.collect();
    let counts: Vec<usize> = parameters.iter().map(Parameter::count).collect();
    if let Some(why) = memory::lack(world, counts.iter().sum(), &options.wire.0)? {
        return if world.is_first() { Err(why.into()) } else { Ok(ExitCode::FAILURE) };
    }
    let backward = Backward::new(&counts);
    // Each way takes its steps with and without a backward pass, and one more that is checked.
    let steps = (options.wire.0.len() + 2) * 2 * (options.steps + 1);
    let mut replay = Replay {
        args,
        world,
        model,
        counts,
        backward,
        length: options.backward_ms,
        report: None,
        progress: Progress::new(world.is_first(), steps),
        checks: 0,
        wrong: 0,
    };
    for &wire in &options.wire.0 {
        replay.measure(&mut InBuckets::new(&world.comm, &parameters, options, wire)?)?;
    }
    replay.measure(&mut AtEnd::new(&world.comm, &parameters)?)?;
    replay.measure(&mut EachTensor::new(&world.comm, &parameters)?)?;
    replay.end()
}

struct Replay<'a> {
    args: &'a Args,
    world: &'a World,
    model: Model,
    /// Elements of each parameter.
    counts: Vec<usize>,
    backward: Backward,
    /// Of the backward pass, once it is known.
    length: Option<Duration>,
    /// On rank 0, from the first row on.
    report: Option<Report>,
    progress: Progress,
    /// Checks so far: each has gradients of its own.
    checks: usize,
    wrong: u64,
}

impl Replay<'_> {
    fn measure(&mut self, way: &mut dyn Way) -> Result<()> {
        let before = self.check(way, Duration::ZERO)?;
        let communication_s = median(&self.steps_s(way, Duration::ZERO)?);
        let ratio = self.args.replay.backward_ratio;
        let by_ratio = || Duration::from_secs_f64(ratio * communication_s);
        let length = *self.length.get_or_insert_with(by_ratio);
        let steps_s = self.steps_s(way, length)?;
        let after = self.check(way, length)?;
        let wrong = before.zip(after).map(|(before, after)| before + after);
        self.wrong += wrong.unwrap_or(0);
        self.report(&Row {
            way: way.name(),
            wire: way.wire(),
            launches: way.launches(),
            communication_s,
            steps_s,
            hideable_s: self.backward.hideable_s(communication_s, length.as_secs_f64()),
            wrong,
        })
    }

    /// Each step's time on the rank where it took longest, ascending.
    fn steps_s(&mut self, way: &mut dyn Way, length: Duration) -> Result<Vec<f64>> {
        let pass = Pass { backward: &self.backward, length, gradients: None };
        let (name, mut steps_s) = (self.model.name(), vec![0.0; self.args.replay.steps]);
        for step_s in &mut steps_s {
            self.progress.step(format_args!("{name} by {}, {}", way.name(), way.wire()));
            self.world.align()?;
            let start = Instant::now();
            way.step(&pass)?;
            *step_s = start.elapsed().as_secs_f64();
        }
        self.world.max(&mut steps_s)?;
        steps_s.sort_by(f64::total_cmp);
        Ok(steps_s)
    }

    /// A step on known gradients: how many averages came out wrong, over all ranks, if that is to
    /// be looked at; it takes the step anyway, which connects ranks.
    fn check(&mut self, way: &mut dyn Way, length: Duration) -> Result<Option<u64>> {
        let (rank, world) = (self.world.comm.rank(), self.world.comm.world());
        let name = self.model.name();
        let gradients = Gradients { rank, world, seed: self.checks };
        self.checks += 1;
        self.progress.step(format_args!("{name} by {}, {}", way.name(), way.wire()));
        way.step(&Pass { backward: &self.backward, length, gradients: Some(gradients) })?;
        if !self.args.check {
            return Ok(None);
        }
        let rounding = way.wire().rounding();
        let wrong = |parameter| gradients.wrong(parameter, way.average(parameter), rounding);
        let mut wrong = [(0..self.counts.len()).map(wrong).sum::<u64>() as f64];
        self.world.sum(&mut wrong)?;
        Ok(Some(wrong[0] as u64))
    }

    fn report(&mut self, row: &Row) -> Result<()> {
        if !self.world.is_first() {
            return Ok(());
        }
        self.progress.clear();
        let report = match &mut self.report {
            Some(report) => report,
            None => {
                let report = Report::begin(self.args.format, self.about())?;
                self.report.insert(report)
            }
        };
        Ok(report.row(row)?)
    }

    fn about(&self) -> About {
        About {
            model: self.model,
            ranks: self.world.comm.world(),
            transport: self.world.comm.transport().to_owned(),
            parameters: self.counts.len(),
            elements: self.counts.iter().sum(),
            backward_s: self.length.unwrap_or_default().as_secs_f64(),
        }
    }

    fn end(self) -> Result<ExitCode> {
        if let Some(report) = &self.report {
            report.end(self.args.check.then_some(self.wrong))?;
        }
        // The others' results are in rank 0's report.
        let failed = self.world.is_first() && self.wrong > 0;
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}
