//! The main job: every collective, size, type, operation and algorithm that was asked for.

use std::process::ExitCode;

use crate::Result;
use crate::args::Args;
use crate::collective::Case;
use crate::measure::{Effort, measure};
use crate::operation::{Operands, Operation};
use crate::report::{About, Progress, Report, Row};
use crate::value::Value;
use crate::world::{World, with_dtype};

/// Measures and reports. The exit code says whether everything was right.
///
/// # Errors
/// If a collective cannot be measured as the arguments say, an operation fails, or the report
/// cannot be written.
pub(crate) fn run(args: &Args, world: &World) -> Result<ExitCode> {
    let all = args.series(world.comm.world())?;
    if world.is_first() {
        args.notes().iter().for_each(|note| eprintln!("note: {note}"));
    }
    let mut sweep = Sweep::new(args, world, all.iter().map(|series| args.points(series)).sum());
    sweep.report(|report, about| report.begin(about))?;
    for series in &all {
        sweep.report(|report, _| report.series(series))?;
        for &dtype in args.dtypes(series.kind) {
            with_dtype!(dtype, T => sweep.dtype::<T>(series))?;
        }
    }
    let wrong = sweep.wrong;
    sweep.report(|report, _| report.end(wrong))?;
    // The others' results are in rank 0's report.
    Ok(if world.is_first() && wrong > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

struct Sweep<'a> {
    args: &'a Args,
    world: &'a World,
    about: About,
    /// On rank 0.
    report: Option<Box<dyn Report>>,
    progress: Progress,
    wrong: u64,
}

impl<'a> Sweep<'a> {
    fn new(args: &'a Args, world: &'a World, points: usize) -> Self {
        let prints = world.is_first();
        Self {
            args,
            world,
            about: About::new(args, world),
            report: prints.then(|| crate::report::open(args)),
            progress: Progress::new(prints, points),
            wrong: 0,
        }
    }

    fn report(
        &mut self,
        write: impl FnOnce(&mut dyn Report, &About) -> std::io::Result<()>,
    ) -> Result<()> {
        self.progress.clear();
        match &mut self.report {
            Some(report) => write(report.as_mut(), &self.about)
                .map_err(|error| format!("cannot write the report: {error}").into()),
            None => Ok(()),
        }
    }

    fn dtype<T: Value>(&mut self, series: &Case) -> Result<()> {
        let counts = self.args.counts(series, T::DTYPE);
        let cases: Vec<_> = counts.into_iter().map(|count| Case { count, ..*series }).collect();
        let comm = &self.world.comm;
        let mut operands = Operands::<T>::allocate(comm, self.args.place_of_buffers(), &cases)?;
        for op in self.args.reductions(series.kind, T::DTYPE) {
            for &case in &cases {
                let device = self.world.device.as_ref();
                self.size(&mut operands.operation(case, comm.rank(), op, device)?)?;
            }
        }
        Ok(())
    }

    fn size<T: Value>(&mut self, operation: &mut Operation<'_, T>) -> Result<()> {
        let mut rows = Vec::new();
        let (case, op) = (operation.case, operation.op);
        let automatic = self.automatic(operation)?;
        let algorithms = self.args.algorithms(case.kind);
        let effort = Effort::new(self.args, algorithms.len());
        for algorithm in algorithms {
            if algorithm.is_some() {
                self.world.set_algorithm(algorithm)?;
            }
            let taken = self.choice(operation);
            let (kind, bytes) = (case.kind, case.count * T::DTYPE.bytes());
            let by = op.map_or_else(String::new, |op| format!(", {op}"));
            self.progress.step(format_args!("{kind} of {bytes} B, {}{by}, {taken}", T::DTYPE));
            if self.args.compares() && !self.world.is_alone() && algorithm != Some(taken) {
                continue; // Another stands in where one cannot run.
            }
            let measured = measure(self.world, operation, &effort)?;
            self.wrong += measured.wrong.unwrap_or(0);
            rows.push(Row {
                transport: self.about.transport.clone(),
                algorithm: taken,
                automatic: taken == automatic,
                case,
                dtype: T::DTYPE,
                op,
                memory: self.args.place_of_buffers(),
                measured,
            });
        }
        self.report(|report, _| report.size(&rows))
    }

    /// The algorithm that is taken if the command line names none: by the environment
    /// (`UNISUM_ALGORITHM`), else by the library's choice, which the first call of a size settles.
    fn automatic<T: Value>(&self, operation: &mut Operation<'_, T>) -> Result<&'static str> {
        if self.args.algorithm != "auto" {
            self.world.set_algorithm(None)?;
        }
        operation.settle()?;
        operation.run(&self.world.comm)?;
        Ok(self.choice(operation))
    }

    fn choice<T: Value>(&self, operation: &Operation<'_, T>) -> &'static str {
        self.world.choice::<T>(&operation.call, operation.case.count)
    }
}
