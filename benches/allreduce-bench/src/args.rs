//! The command line.

use std::fmt::Display;
use std::str::FromStr;
use std::sync::LazyLock;
use std::time::Duration;

use clap::builder::{
    BoolishValueParser, PossibleValue, PossibleValuesParser, RangedU64ValueParser, TypedValueParser,
};
use clap::{ArgAction, Parser, ValueEnum};
use unisum::{Dtype, ReduceOp};

use crate::collective::{Kind, Place};
use crate::replay;

/// Measures unisum's collectives between processes, and checks every result.
///
/// With -n it starts the ranks on this machine; without, it joins the world of the launcher it
/// runs under (mpirun, srun, torchrun, ...) or of the UNISUM_* variables.
#[derive(Clone, Debug, Parser)]
#[command(version, long_version = LONG_VERSION.as_str(), max_term_width = 100)]
pub(crate) struct Args {
    /// Start this many ranks on this machine
    #[arg(short = 'n', long, value_name = "N", value_parser = ranks_parser())]
    pub(crate) ranks: Option<usize>,

    /// Collectives, separated by commas, or all: all_reduce, reduce, broadcast, all_gather,
    /// reduce_scatter, all_to_all, gather, scatter, barrier; with uneven blocks all_gather_v,
    /// reduce_scatter_v, all_to_all_v, gather_v, scatter_v
    #[arg(long, value_name = "NAME", default_value = "all_reduce",
          conflicts_with_all = ["late_ms", "startup"],
          value_parser = |text: &str| list(text, &Kind::ALL))]
    pub(crate) collective: List<Kind>,

    /// The root, or all in turn, of collectives that have one
    #[arg(long, value_name = "RANK", default_value = "0", value_parser = roots)]
    pub(crate) root: Roots,

    /// Whether results take the place of the input, or lie apart [default: as in the call of
    /// that name: in for all_reduce, reduce and broadcast, else out]
    #[arg(long, value_enum)]
    pub(crate) place: Option<Places>,

    /// Smallest size, in bytes (suffixes K, M, G): that of the longer buffer, as in nccl-tests
    #[arg(short = 'b', long, value_name = "BYTES", default_value = "8", value_parser = bytes)]
    pub(crate) min_bytes: u64,

    /// Largest size, in bytes
    #[arg(short = 'e', long, value_name = "BYTES", default_value = "64M", value_parser = bytes)]
    pub(crate) max_bytes: u64,

    /// Each size is this many times the one before
    #[arg(short = 'f', long, value_name = "FACTOR", default_value = "2", value_parser = factor)]
    pub(crate) step_factor: u64,

    /// Element types, separated by commas, or all
    #[arg(short = 'd', long, value_name = "TYPE", default_value = "f32",
          value_parser = |text: &str| list(text, &Dtype::ALL))]
    pub(crate) dtype: List<Dtype>,

    /// Reductions, separated by commas, or all
    #[arg(short = 'o', long, value_name = "OP", default_value = "sum",
          value_parser = |text: &str| list(text, &ReduceOp::ALL))]
    pub(crate) op: List<ReduceOp>,

    /// How the ranks reach each other; cuda: buffers in the memory of a CUDA device for each rank,
    /// by its number on the host [default: UNISUM_TRANSPORT, else auto]
    #[arg(short = 't', long, value_parser = ["auto", "tcp", "shm", "verbs", "cuda"])]
    pub(crate) transport: Option<String>,

    /// Ports that ranks may listen on, LOW-HIGH or one [default: UNISUM_PORT_RANGE, else any]
    #[arg(long, value_name = "PORTS")]
    pub(crate) port_range: Option<String>,

    /// Network interfaces, as in eth,ib or ^docker [default: UNISUM_INTERFACE, else by route]
    #[arg(long, value_name = "NAMES")]
    pub(crate) interface: Option<String>,

    /// The algorithm; auto leaves it to UNISUM_ALGORITHM, else to the library, by size; all
    /// compares them
    #[arg(short = 'a', long, default_value = "auto", value_parser = algorithm_parser())]
    pub(crate) algorithm: String,

    /// Operations before the measured ones [default: 0.1 s worth of them]
    #[arg(short = 'w', long, value_name = "N")]
    pub(crate) warmup: Option<usize>,

    /// Measured operations per size [default: as many as --seconds-per-size gives time for]
    #[arg(short = 'i', long, value_name = "N", conflicts_with = "seconds_per_size",
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_ITERATIONS as u64))]
    pub(crate) iterations: Option<usize>,

    /// Time to measure each size for (at least 3 operations, at most 20,000); with -a all, the
    /// algorithms share it
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub(crate) seconds_per_size: Duration,

    /// Where buffers live: registered with the communicator, or plain memory of the process
    #[arg(long, value_enum, default_value = "registered")]
    pub(crate) memory: Memory,

    /// Check every element on every rank, and that all ranks have the same bits
    #[arg(short = 'c', long, value_name = "BOOL", default_value = "true", num_args = 0..=1,
          default_missing_value = "true", action = ArgAction::Set,
          value_parser = BoolishValueParser::new())]
    pub(crate) check: bool,

    /// Form of the report on standard output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,

    /// Give up on an operation after this long [default: the library's]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) timeout: Option<Duration>,

    /// Instead of speed, measure what waiting costs: one rank comes this late to an operation
    #[arg(long, value_name = "MS")]
    pub(crate) late_ms: Option<u64>,

    /// The rank that comes late [default: the last]
    #[arg(long, value_name = "RANK", requires = "late_ms")]
    pub(crate) late_rank: Option<usize>,

    /// Instead of speed, measure how long worlds of these sizes take to start [default: -n, or
    /// 2,16,64]
    #[arg(long, value_name = "N,...", num_args = 0..=1, default_missing_value = "2,16,64",
          value_delimiter = ',', conflicts_with = "late_ms",
          value_parser = ranks_parser())]
    pub(crate) startup: Vec<usize>,

    #[command(flatten)]
    pub(crate) replay: replay::Options,

    /// Log more on standard error (-vv: debug); UNISUM_LOG chooses in detail
    #[arg(short = 'v', long, action = ArgAction::Count)]
    pub(crate) verbose: u8,

    /// Set for the ranks that this program starts: when it started them (monotonic clock, ns)
    #[arg(long, hide = true)]
    pub(crate) joined: Option<u64>,
}

/// Which ranks are the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Roots {
    One(usize),
    All,
}

/// Where results go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Places {
    In,
    Out,
    Both,
}

impl Places {
    pub(crate) fn list(self) -> Vec<Place> {
        match self {
            Self::In => vec![Place::In],
            Self::Out => vec![Place::Out],
            Self::Both => vec![Place::Out, Place::In],
        }
    }
}

/// Where buffers live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Memory {
    /// `Communicator::allocate`.
    Registered,
    /// The process's own heap.
    Private,
    /// That of a CUDA device: `-t cuda`.
    #[value(skip)]
    Device,
}

impl Memory {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Registered => "registered",
            Self::Private => "private",
            Self::Device => "device",
        }
    }
}

/// The form of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns for people.
    Table,
    /// One object per line.
    Json,
    /// Comma-separated values with a header.
    Csv,
}

/// What one argument lists.
#[derive(Clone, Debug)]
pub(crate) struct List<T>(pub(crate) Vec<T>);

impl Args {
    /// What the parser cannot see in one argument alone.
    pub(crate) fn validate(&self) -> Result<(), String> {
        let Self { min_bytes, max_bytes, .. } = self;
        if min_bytes > max_bytes {
            return Err(format!(
                "the smallest buffer (-b, {min_bytes} B) is larger than the largest \
                 (-e, {max_bytes} B)"
            ));
        }
        if self.is_on_device() {
            let others = [
                ("--memory", self.memory != Memory::Registered),
                ("--late-ms", self.late_ms.is_some()),
                ("--startup", !self.startup.is_empty()),
                ("--model", self.replay.model.is_some()),
            ];
            if let Some((name, _)) = others.iter().find(|(_, is_given)| *is_given) {
                return Err(format!(
                    "-t cuda measures collectives on device memory, and {name} others"
                ));
            }
        }
        let largest = self.dtype.0.iter().max_by_key(|dtype| dtype.bytes());
        if let Some(dtype) = largest.filter(|dtype| *min_bytes < dtype.bytes() as u64) {
            let bytes = dtype.bytes();
            return Err(format!(
                "the smallest buffer (-b, {min_bytes} B) does not hold one {dtype} of {bytes} B"
            ));
        }
        let kinds = &self.collective.0;
        if kinds.iter().all(|kind| self.algorithms(*kind).is_empty()) {
            let names = kinds.iter().map(Kind::to_string).collect::<Vec<_>>().join(", ");
            return Err(format!("there is no algorithm {} for {names}", self.algorithm));
        }
        if !kinds.iter().any(|kind| kind.reduces()) {
            return Ok(());
        }
        let nothing = self.dtype.0.iter().all(|&dtype| self.operations(dtype).next().is_none());
        match self.undefined().next() {
            Some(reason) if nothing => Err(reason),
            _ => Ok(()),
        }
    }

    /// Whether buffers are in the memory of CUDA devices.
    pub(crate) fn is_on_device(&self) -> bool {
        self.transport.as_deref() == Some("cuda")
    }

    /// Where buffers live.
    pub(crate) fn place_of_buffers(&self) -> Memory {
        if self.is_on_device() { Memory::Device } else { self.memory }
    }

    /// The reductions to measure that elements of this type have.
    pub(crate) fn operations(&self, dtype: Dtype) -> impl Iterator<Item = ReduceOp> {
        self.op.0.iter().copied().filter(move |op| op.is_defined_for(dtype))
    }

    /// Why reductions that were asked for are left out: one sentence an operation.
    pub(crate) fn undefined(&self) -> impl Iterator<Item = String> {
        self.op.0.iter().filter_map(|op| {
            let lacks = |dtype: &&Dtype| !op.is_defined_for(**dtype);
            let names: Vec<_> =
                self.dtype.0.iter().filter(lacks).map(|dtype| dtype.to_string()).collect();
            (!names.is_empty()).then(|| format!("{op} is not defined for {}", names.join(", ")))
        })
    }

    /// Sizes of the worlds that `-n` or `--startup` ask to be started here.
    pub(crate) fn worlds(&self) -> Vec<usize> {
        self.ranks.map_or_else(|| self.startup.clone(), |ranks| vec![ranks])
    }

    /// Whether algorithms are compared.
    pub(crate) fn compares(&self) -> bool {
        self.algorithm == "all"
    }

    /// Buffer sizes in bytes, ascending.
    pub(crate) fn sizes(&self) -> impl Iterator<Item = u64> + use<> {
        let (max, factor) = (self.max_bytes, self.step_factor);
        std::iter::successors(Some(self.min_bytes), move |bytes| bytes.checked_mul(factor))
            .take_while(move |bytes| *bytes <= max)
    }
}

/// Most measured operations per size: their times are kept and compared across ranks.
pub(crate) const MAX_ITERATIONS: usize = 20_000;

static LONG_VERSION: LazyLock<String> = LazyLock::new(|| {
    let (version, isa) = (env!("CARGO_PKG_VERSION"), unisum::isa());
    let transports = unisum::transports().join(", ");
    let mut text = format!("{version}\nreduction kernels: {isa}\ntransports: {transports}");
    let devices = unisum::rdma_devices();
    devices.iter().for_each(|device| text += &format!("\nRDMA device: {device}"));
    if devices.is_empty() {
        text += "\nRDMA device: none";
    }
    text += &format!("\nCUDA: {}", unisum::cuda_driver());
    text
});

/// Reads names separated by commas, with `-` or `_` between their words.
pub(crate) fn list<T>(text: &str, all: &[T]) -> Result<List<T>, String>
where
    T: Copy + Display + FromStr<Err: Display>,
{
    if text == "all" {
        return Ok(List(all.to_vec()));
    }
    let one = |name: &str| {
        let spelt = name.replace('-', "_");
        spelt.parse().or_else(|_| name.parse()).map_err(|error: T::Err| {
            let names = all.iter().map(T::to_string);
            let near = names.filter(|known| is_near(&spelt, known)).min_by_key(|known| {
                let letters = |name: &str| name.replace('_', "");
                (letters(&spelt) != letters(known), letter_changes(&spelt, known))
            });
            let hint = near.map_or_else(String::new, |near| format!("; did you mean {near}?"));
            format!("{error}{hint}")
        })
    };
    text.split(',').map(one).collect::<Result<_, _>>().map(List)
}

/// Whether one name is the other but for a letter or two that are other, missing or too many.
fn is_near(name: &str, known: &str) -> bool {
    letter_changes(name, known) <= known.len().min(6) / 3
}

/// How many letters of a name are other, missing or too many (Levenshtein's distance).
fn letter_changes(name: &str, known: &str) -> usize {
    let mut row: Vec<usize> = (0..=known.len()).collect();
    for (at, letter) in name.bytes().enumerate() {
        let mut before = std::mem::replace(&mut row[0], at + 1);
        for (column, other) in known.bytes().enumerate() {
            let replaced = before + usize::from(letter != other);
            before = row[column + 1];
            row[column + 1] = replaced.min(before + 1).min(row[column] + 1);
        }
    }
    row[known.len()]
}

/// Takes `_` for `-`, and says what is meant by a name that is nearly right.
fn algorithm_parser() -> impl TypedValueParser<Value = String> {
    let names = ["auto", "all"].into_iter().chain(unisum::algorithms());
    // Few names, once.
    let alias = |name: &str| -> &'static str { name.replace('-', "_").leak() };
    let spelt = |name: &'static str| PossibleValue::new(name).alias(alias(name));
    PossibleValuesParser::new(names.map(spelt)).map(|name| name.replace('_', "-"))
}

fn roots(text: &str) -> Result<Roots, String> {
    match text.parse() {
        Ok(root) => Ok(Roots::One(root)),
        Err(_) if text == "all" => Ok(Roots::All),
        Err(error) => Err(format!("{error}; a rank or all")),
    }
}

fn ranks_parser() -> impl TypedValueParser<Value = usize> {
    RangedU64ValueParser::<usize>::new().range(1..=4096)
}

pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    match unisum::parse_bytes(text) {
        Ok(0) => Err("an empty buffer has no speed".into()),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(error.to_string()),
    }
}

fn factor(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(0 | 1) => Err("sizes would never grow: 2 is the smallest factor".into()),
        Ok(factor) => Ok(factor),
        Err(error) => Err(format!("{error}")),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|error| format!("{error}"))?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("a time in seconds above 0 is needed".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, String> {
        let words = ["allreduce-bench"].into_iter().chain(line.split_whitespace());
        let args = Args::try_parse_from(words).map_err(|error| error.to_string())?;
        args.validate().map(|()| args)
    }

    #[test]
    fn defaults_go_from_8_bytes_to_64_mebibytes() {
        let sizes: Vec<_> = parse("").unwrap().sizes().collect();
        assert_eq!((sizes.len(), sizes[0], sizes[23]), (24, 8, 64 << 20));
    }

    #[test]
    fn checking_is_on_unless_switched_off() {
        let on = ["", "-c", "-c 1", "--check=true"];
        assert!(on.iter().all(|line| parse(line).unwrap().check));
        assert!(["-c 0", "--check=false"].iter().all(|line| !parse(line).unwrap().check));
    }

    #[test]
    fn types_and_operations_may_be_listed() {
        let args = parse("-d f16,u8 -o all").unwrap();
        assert_eq!(args.dtype.0, [Dtype::F16, Dtype::U8]);
        assert_eq!(args.op.0, ReduceOp::ALL);
    }

    #[test]
    fn names_may_be_spelt_with_either_sign_and_nearly_right_ones_are_told() {
        let args = parse("--collective all-reduce,all_gather_v -a double_tree").unwrap();
        assert_eq!(args.collective.0.len(), 2);
        assert_eq!(args.algorithm, "double-tree");
        for (line, hint) in [
            ("--collective allreduce", "did you mean all_reduce?"),
            ("--collective all-gatherv", "did you mean all_gather_v?"),
            ("-o summ", "did you mean sum?"),
            ("-a rings", "'ring'"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(hint), "{line}: {error}");
        }
        assert!(!parse("--collective vgg").unwrap_err().contains("did you mean"));
    }

    #[test]
    fn all_wires_may_be_replayed_at_once() {
        let replay = parse("--model gpt2-xl --wire all --backward-ms 2.5").unwrap().replay;
        assert_eq!(replay.wire.0.len(), 6);
        assert_eq!(replay.backward_ms, Some(Duration::from_micros(2500)));
    }

    #[test]
    fn useless_arguments_are_refused_with_the_reason() {
        let refusals = [
            ("-b 2M -e 1M", "larger than the largest"),
            ("-b 4 -d f64", "does not hold one f64"),
            ("-f 1", "never grow"),
            ("-d f33", "expected one of f16, "),
            ("-o nand", "expected one of sum, prod, min, max, avg, bitand, bitor, bitxor"),
            ("-d f32,bf16 -o xor", "bitxor is not defined for f32, bf16"),
            ("--collective all_reduces", "expected one of all_reduce, reduce, "),
            ("--collective barrier -a bruck", "no algorithm bruck for barrier"),
            ("--root last", "a rank or all"),
            ("--collective reduce --late-ms 5", "cannot be used with"),
            ("-a fastest", "possible values: auto, all, "),
            ("-n 0", "0 is not in 1"),
            ("-b 0", "no speed"),
            ("--timeout 0", "above 0"),
            ("-i 5 --seconds-per-size 2", "cannot be used with"),
            ("--model vgg16", "bert-large"),
            ("--model resnet50 -b 1M", "cannot be used with"),
            ("-t cuda --memory private", "-t cuda measures collectives on device memory"),
            ("-t cuda --late-ms 5", "and --late-ms others"),
            ("-t cuda --startup", "and --startup others"),
            ("-t cuda --model resnet50", "and --model others"),
            ("-t cuda --memory device", "possible values: registered, private"),
            ("--model resnet50 --wire f32,int4", "expected one of f32, bf16, "),
            ("--model resnet50 --scale 0.5", "by 1 or more"),
            ("--model resnet50 --backward-ms 5 --backward-ratio 2", "cannot be used with"),
            ("--wire bf16", "--model <NAME>"),
        ];
        for (line, reason) in refusals {
            let error = parse(line).unwrap_err();
            assert!(error.contains(reason), "{line}: {error}");
        }
    }
}
