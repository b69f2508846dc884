//! Reckons what all-reduces take on a network that is not at hand, by the cost model that chooses
//! the algorithms.
//!
//! `cargo run --release -p unisum-algorithms --example reckon -- latency-us=1.2 gbit=192`
//!
//! Arguments are `name=value`, in any order:
//! - `latency-us`: one way for 8 bytes, as `ib_write_lat` tells it.
//! - `gbit`: Gbit/s of one stream of large messages, as `ib_write_bw` tells it.
//! - `line-gbit`: the rate that shares are told of; else `gbit`.
//! - `hosts`, `ranks`: numbers of hosts, and of ranks on each, with commas between.
//! - `bytes`: sizes, with commas between.
//! - `inside-us`, `inside-gbyte`: the same between ranks of a host, which share memory.
//! - `reduce-gbyte`: GB/s that a core adds to a buffer in cache.
//!
//! What the model leaves out is listed in docs/performance.md. Worlds of some hundred ranks take
//! minutes.

use std::process::ExitCode;

use unisum_algorithms::{CostModel, LinkCost, PlanKind, Shape, Topology, algorithms, cost};

struct Request {
    model: CostModel,
    line_bytes_per_s: f64,
    hosts: Vec<usize>,
    ranks: Vec<usize>,
    bytes: Vec<usize>,
}

fn main() -> ExitCode {
    match Request::from_arguments(std::env::args().skip(1)) {
        Ok(request) => request.print(),
        Err(error) => {
            eprintln!("reckon: {error}; the beginning of examples/reckon.rs tells the arguments");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

impl Request {
    fn from_arguments(arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut latency_us, mut gbit, mut line_gbit) = (1.7, 195.0, None);
        // As measured on two cores of a Zen 4 (docs/performance.md).
        let (mut inside_us, mut inside_gbyte, mut reduce_gbyte) = (0.5, 25.0, 50.0);
        let mut hosts = vec![2, 8, 16, 64];
        let mut ranks = vec![1, 8];
        let mut bytes = vec![8, 1 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20, 1 << 30];
        for argument in arguments {
            let (name, value) =
                argument.split_once('=').ok_or_else(|| format!("{argument:?} has no ="))?;
            match name {
                "latency-us" => latency_us = figure(name, value)?,
                "gbit" => gbit = figure(name, value)?,
                "line-gbit" => line_gbit = Some(figure(name, value)?),
                "inside-us" => inside_us = figure(name, value)?,
                "inside-gbyte" => inside_gbyte = figure(name, value)?,
                "reduce-gbyte" => reduce_gbyte = figure(name, value)?,
                "hosts" => hosts = numbers(name, value)?,
                "ranks" => ranks = numbers(name, value)?,
                "bytes" => bytes = numbers(name, value)?,
                _ => return Err(format!("{name:?} is unknown")),
            }
        }
        let (latency_s, inside_s) = (latency_us * 1e-6, inside_us * 1e-6);
        let inside = LinkCost::new(inside_s, 1e-9 / inside_gbyte);
        // As a communicator makes its model of measured links: a third of a short message's time
        // once more for the processors, and what is reduced lands in a slot before.
        let model = CostModel {
            inside,
            across: LinkCost::new(latency_s, 8e-9 / gbit),
            gamma_s_per_byte: 1e-9 / reduce_gbyte + inside.beta_cached_s_per_byte / 2.0,
            message_s: latency_s.max(inside_s) / 3.0,
            wait_s: latency_s.max(inside_s) / 2.0,
            slice_elements: (256 << 10) / 4,
            window: 4,
            ..CostModel::default()
        };
        let line_bytes_per_s = line_gbit.unwrap_or(gbit) * 1e9 / 8.0;
        Ok(Self { model, line_bytes_per_s, hosts, ranks, bytes })
    }

    fn print(&self) {
        println!("reckoned, not measured; all-reduce of f32, one network device for each host");
        println!(
            "hosts x ranks       bytes  algorithm                  us   bus GB/s  of the line"
        );
        for &hosts in &self.hosts {
            for &ranks in &self.ranks {
                for &bytes in &self.bytes {
                    self.print_line(hosts, ranks, bytes);
                }
            }
        }
    }

    fn print_line(&self, hosts: usize, ranks: usize, bytes: usize) {
        let topology = Topology::nodes(&vec![ranks; hosts]);
        let group_steps = ranks > 1;
        let model = CostModel { group_steps, ..self.model };
        let shape = Shape::all_reduce(topology, (bytes / model.bytes_per_element).max(1));
        let timed = algorithms(PlanKind::AllReduce)
            .iter()
            .filter(|algorithm| algorithm.supports(&shape))
            .filter_map(|algorithm| Some((cost(*algorithm, &shape, &model).ok()?, algorithm)));
        let Some((seconds, algorithm)) = timed.min_by(|(a, _), (b, _)| a.total_cmp(b)) else {
            return;
        };
        let passes = |n: usize| 2.0 * (n as f64 - 1.0) / n as f64 * bytes as f64;
        let bus = passes(hosts * ranks) / seconds * 1e-9;
        // A host's device carries this much each way, whatever its ranks do among themselves.
        let share = passes(hosts) / seconds / self.line_bytes_per_s * 100.0;
        println!(
            "{hosts:>5} x {ranks:<5} {bytes:>11}  {:<20} {:>9.1} {bus:>10.3} {share:>10.1} %",
            algorithm.name(),
            seconds * 1e6
        );
    }
}

fn figure(name: &str, value: &str) -> Result<f64, String> {
    let figure = value.parse().ok().filter(|figure: &f64| figure.is_finite() && *figure > 0.0);
    figure.ok_or_else(|| format!("{name}={value} is no positive number"))
}

fn numbers(name: &str, value: &str) -> Result<Vec<usize>, String> {
    let number = |text: &str| text.parse().ok().filter(|&number| number > 0);
    let numbers: Option<Vec<usize>> = value.split(',').map(number).collect();
    numbers.ok_or_else(|| format!("{name}={value} are no positive numbers"))
}
