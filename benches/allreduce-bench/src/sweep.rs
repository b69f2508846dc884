//! The main job: every size, type, operation and algorithm that was asked for.

use std::process::ExitCode;

use unisum::ReduceOp;

use crate::Result;
use crate::args::Args;
use crate::measure::{Effort, measure};
use crate::report::{About, Progress, Report, Row};
use crate::value::Value;
use crate::world::{Data, World, elements, with_dtype};

/// Measures and reports. The exit code says whether everything was right.
///
/// # Errors
/// If an operation fails or the report cannot be written.
pub(crate) fn run(args: &Args, world: &World) -> Result<ExitCode> {
    let mut sweep = Sweep::new(args, world);
    sweep.report(|report, about| report.begin(about))?;
    for &dtype in &args.dtype.0 {
        with_dtype!(dtype, T => sweep.dtype::<T>())?;
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
    effort: Effort,
    /// On rank 0.
    report: Option<Box<dyn Report>>,
    progress: Progress,
    wrong: u64,
}

impl<'a> Sweep<'a> {
    fn new(args: &'a Args, world: &'a World) -> Self {
        let prints = world.is_first();
        let points = args.sizes().count() * args.dtype.0.len() * args.op.0.len();
        Self {
            args,
            world,
            about: About::new(args, &world.comm),
            effort: Effort::new(args, args.algorithms().len()),
            report: prints.then(|| crate::report::open(args)),
            progress: Progress::new(prints, points * args.algorithms().len()),
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

    fn dtype<T: Value>(&mut self) -> Result<()> {
        let largest = self.args.sizes().last().unwrap_or(0);
        let (count, _) = elements(largest, T::DTYPE);
        let mut data = Data::<T>::allocate(&self.world.comm, self.args.memory, count)?;
        for &op in &self.args.op.0 {
            for bytes in self.args.sizes() {
                let (count, note) = elements(bytes, T::DTYPE);
                if let Some(note) = note.filter(|_| self.world.is_first()) {
                    self.progress.clear();
                    eprintln!("{note}");
                }
                self.size(&mut data[..count], op)?;
            }
        }
        Ok(())
    }

    fn size<T: Value>(&mut self, data: &mut [T], op: ReduceOp) -> Result<()> {
        let mut rows = Vec::new();
        let automatic = self.automatic::<T>(data.len())?;
        for algorithm in self.args.algorithms() {
            if algorithm.is_some() {
                self.world.comm.set_algorithm(algorithm)?;
            }
            let algorithm = algorithm.unwrap_or(automatic);
            self.progress.step(size_of_val(data), T::DTYPE, op, algorithm);
            let measured = measure(self.world, data, op, &self.effort)?;
            self.wrong += measured.wrong.unwrap_or(0);
            rows.push(Row {
                transport: self.about.transport.clone(),
                algorithm,
                automatic: algorithm == automatic,
                ranks: self.about.ranks,
                count: data.len(),
                dtype: T::DTYPE,
                op,
                memory: self.args.memory,
                measured,
            });
        }
        self.report(|report, _| report.size(&rows))
    }

    /// The algorithm that is taken if the command line names none: by the environment
    /// (`UNISUM_ALGORITHM`), else by the library's choice.
    fn automatic<T: Value>(&self, count: usize) -> Result<&'static str> {
        if self.args.algorithm != "auto" {
            self.world.comm.set_algorithm(None)?;
        }
        Ok(self.world.comm.choice::<T>(count))
    }
}
