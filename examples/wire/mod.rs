//! What the gradients of the trainings travel as: the option `--wire`.

use std::fmt;
use std::str::FromStr;

use unisum::buckets::{AllReduce, Compressed, Encoding, Hook, LowRank};

/// What gradients travel as between the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wire {
    /// As they are.
    F32,
    /// Encoded, with error feedback.
    Encoded(Encoding),
    /// As products of matrices of that many columns, by PowerSGD.
    PowerSgd(usize),
}

/// What is said of `--wire`.
pub(crate) const HELP: &str = "What gradients travel as: f32, bf16, f16, f8e4m3, f8e5m2, int8, or \
                               powersgd:R with matrices of R columns";

const ENCODINGS: [Encoding; 5] =
    [Encoding::Bf16, Encoding::F16, Encoding::F8E4M3, Encoding::F8E5M2, Encoding::Int8];

/// Gradients change too fast in the first steps to be compressed by PowerSGD.
const POWER_SGD_STARTS_AT: u64 = 10;

impl Wire {
    /// How buckets are averaged then.
    pub(crate) fn hook(self) -> Box<dyn Hook> {
        match self {
            Self::F32 => Box::new(AllReduce),
            Self::Encoded(encoding) => Box::new(Compressed::new(encoding)),
            Self::PowerSgd(rank) => Box::new(LowRank::new(rank).starting_at(POWER_SGD_STARTS_AT)),
        }
    }
}

impl FromStr for Wire {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "f32" {
            return Ok(Self::F32);
        }
        if let Some(encoding) = ENCODINGS.into_iter().find(|it| name(*it) == text) {
            return Ok(Self::Encoded(encoding));
        }
        let rank = text.strip_prefix("powersgd:").and_then(|rank| rank.parse().ok());
        match rank {
            Some(rank) if rank > 0 => Ok(Self::PowerSgd(rank)),
            _ => Err("it is f32, bf16, f16, f8e4m3, f8e5m2, int8 or powersgd:R".into()),
        }
    }
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32 => f.write_str("f32"),
            Self::Encoded(encoding) => f.write_str(name(*encoding)),
            Self::PowerSgd(rank) => write!(f, "powersgd:{rank}"),
        }
    }
}

const fn name(encoding: Encoding) -> &'static str {
    match encoding {
        Encoding::F16 => "f16",
        Encoding::Bf16 => "bf16",
        Encoding::F8E4M3 => "f8e4m3",
        Encoding::F8E5M2 => "f8e5m2",
        Encoding::Int8 => "int8",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wire_is_read_as_it_is_written() {
        let others = [Wire::F32, Wire::PowerSgd(4)];
        for wire in ENCODINGS.map(Wire::Encoded).into_iter().chain(others) {
            assert_eq!(wire.to_string().parse(), Ok(wire));
        }
        for wrong in ["", "f64", "powersgd", "powersgd:0", "powersgd:x"] {
            assert!(wrong.parse::<Wire>().is_err(), "{wrong}");
        }
    }
}
