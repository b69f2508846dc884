//! The command line's part about models.

use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use unisum::buckets::Encoding;

use crate::args::{List, bytes, list};
use crate::models::Model;

/// What of a model's training is replayed.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Replaying a model")]
pub(crate) struct Options {
    /// Replay the communication of a model's training steps: resnet50, bert-large, gpt2-xl or
    /// llama-7b
    ///
    /// A backward pass is imitated: gradients of the model's shapes become ready in reverse order
    /// of registration, at times in proportion to their element counts; until then the rank
    /// sleeps, so that communication has the cores, as it has beside a GPU. They are averaged by
    /// the gradient buckets, with each wire that was asked for, by one all-reduce after the
    /// backward pass, and by an asynchronous all-reduce for each tensor.
    ///
    /// `communication` is the time of a step whose gradients are all ready at once, `exposed` what
    /// a step takes on the slowest rank beyond the backward pass, `hidden` the difference.
    /// `hideable` is what the best schedule could hide, one that sends each tensor the moment it
    /// is ready, at the speed of `communication` and without latency. `overlap` is the hidden
    /// share of the hideable. Times are medians, in ms.
    #[arg(long, value_name = "NAME", value_parser = |text: &str| text.parse::<Model>(),
          conflicts_with_all = ["collective", "root", "place", "min_bytes", "max_bytes",
              "step_factor", "dtype", "op", "algorithm", "warmup", "iterations",
              "seconds_per_size", "memory", "late_ms", "startup"])]
    pub(crate) model: Option<Model>,

    /// What gradients travel as in the buckets, separated by commas, or all: f32, bf16, f16,
    /// f8e4m3, f8e5m2, int8
    #[arg(long, value_name = "TYPE", default_value = "f32", requires = "model",
          value_parser = |text: &str| list(text, &Wire::ALL))]
    pub(crate) wire: List<Wire>,

    /// Length of the backward pass [default: by --backward-ratio]
    #[arg(long, value_name = "MS", requires = "model", conflicts_with = "backward_ratio",
          value_parser = milliseconds)]
    pub(crate) backward_ms: Option<Duration>,

    /// Length of the backward pass, as a multiple of the first wire's communication time
    #[arg(long, value_name = "RATIO", default_value = "1.5", requires = "model",
          value_parser = ratio)]
    pub(crate) backward_ratio: f64,

    /// How large buckets get [default: the library's]
    #[arg(long, value_name = "BYTES", requires = "model", value_parser = size)]
    pub(crate) bucket_bytes: Option<usize>,

    /// How large the first bucket and the last get [default: the library's]
    #[arg(long, value_name = "BYTES", requires = "model", value_parser = size)]
    pub(crate) end_bucket_bytes: Option<usize>,

    /// Measured steps
    #[arg(long, value_name = "N", default_value = "5", requires = "model",
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=10_000))]
    pub(crate) steps: usize,

    /// Shrink each parameter to about one in X elements
    #[arg(long, value_name = "X", default_value = "1", requires = "model", value_parser = scale)]
    pub(crate) scale: f64,
}

/// What gradients travel as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wire(pub(crate) Option<Encoding>);

impl Wire {
    pub(crate) const F32: Self = Self(None);

    const ALL: [Self; 6] = [
        Self::F32,
        Self(Some(Encoding::Bf16)),
        Self(Some(Encoding::F16)),
        Self(Some(Encoding::F8E4M3)),
        Self(Some(Encoding::F8E5M2)),
        Self(Some(Encoding::Int8)),
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self.0 {
            None => "f32",
            Some(Encoding::Bf16) => "bf16",
            Some(Encoding::F16) => "f16",
            Some(Encoding::F8E4M3) => "f8e4m3",
            Some(Encoding::F8E5M2) => "f8e5m2",
            Some(Encoding::Int8) => "int8",
        }
    }

    /// How far one rounding takes a value, as a share of the largest of its block.
    pub(crate) fn rounding(self) -> f64 {
        match self.0 {
            None => f64::from(f32::EPSILON),
            Some(Encoding::F16) => 2_f64.powi(-11),
            Some(Encoding::Bf16) => 2_f64.powi(-8),
            Some(Encoding::F8E4M3) => 2_f64.powi(-4),
            Some(Encoding::F8E5M2) => 2_f64.powi(-3),
            Some(Encoding::Int8) => 0.5 / 127.0,
        }
    }
}

impl std::fmt::Display for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Wire {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|wire| wire.name() == name);
        found.ok_or_else(|| format!("expected one of {}", Self::ALL.map(Self::name).join(", ")))
    }
}

fn milliseconds(text: &str) -> Result<Duration, String> {
    let ms: f64 = text.parse().map_err(|error| format!("{error}"))?;
    Duration::try_from_secs_f64(ms * 1e-3).map_err(|error| error.to_string())
}

fn ratio(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(ratio) if (0.0..=1e6).contains(&ratio) => Ok(ratio),
        Ok(_) => Err("a ratio from 0 to 1e6 is needed".into()),
        Err(error) => Err(format!("{error}")),
    }
}

fn scale(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(scale) if (1.0..=1e12).contains(&scale) => Ok(scale),
        Ok(_) => Err("shapes are shrunk, by 1 or more".into()),
        Err(error) => Err(format!("{error}")),
    }
}

fn size(text: &str) -> Result<usize, String> {
    bytes(text)?.try_into().map_err(|_| "more than this machine can address".into())
}
