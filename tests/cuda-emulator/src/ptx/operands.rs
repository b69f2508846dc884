//! Resolves operands to slots of the register file.

use super::decoder::Decoder;
use super::parser::{Operand, constant};
use super::symbols::Symbol;
use super::{Refusal, Space};
use crate::machine::{LaneMask, Special, tag};
use crate::ops;

/// A memory operand: a slot that holds the base, an offset, and the space that the base is in, if
/// it is the name of a variable.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub base: u32,
    pub offset: i64,
    pub space: Option<Space>,
}

impl<'t> Decoder<'t, '_> {
    /// The slot of a register that is written.
    pub(crate) fn destination(&mut self, operand: &Operand<'t>) -> Result<u32, Refusal> {
        match operand {
            Operand::Name("_") => Ok(self.temporary()),
            Operand::Name(name) => self.register(name),
            other => self.refuse(format!("{other:?} instead of a register")),
        }
    }

    pub(crate) fn register(&mut self, name: &str) -> Result<u32, Refusal> {
        match self.symbols.find(name) {
            Some(Symbol::Register(slot)) => Ok(slot),
            _ => self.refuse(format!("{name} is not a register")),
        }
    }

    /// The slot of a value that is read.
    pub(crate) fn source(&mut self, operand: &Operand<'t>) -> Result<u32, Refusal> {
        match operand {
            Operand::Name(name) => self.value(name),
            Operand::Not(name) => {
                let a = self.register(name)?;
                let d = self.temporary();
                self.emit(ops::not_predicate, d, [a, 0, 0], 0);
                Ok(d)
            }
            other => self.refuse(format!("{other:?} instead of a value")),
        }
    }

    fn value(&mut self, name: &'t str) -> Result<u32, Refusal> {
        if let Some(value) = constant(name) {
            return Ok(self.constant(value));
        }
        if let Some(symbol) = self.symbols.find(name) {
            let address = match symbol {
                Symbol::Register(slot) => return Ok(slot),
                Symbol::Function(index) => tag::FUNCTION | index as u64,
                Symbol::Param(offset) => offset as u64,
                Symbol::Shared(offset) => offset as u64,
                Symbol::Global(address) => address,
                Symbol::DynamicShared => return Ok(self.special(Special::DynamicShared)),
                Symbol::Local(offset, _) => {
                    let base = self.special(Special::LocalBase);
                    let d = self.temporary();
                    self.emit(ops::add_offset, d, [base, 0, 0], offset as i64);
                    return Ok(d);
                }
                Symbol::Targets(_) => return self.refuse(format!("{name} is not a value")),
            };
            return Ok(self.constant(address));
        }
        if matches!(name, "%clock" | "%clock64" | "%globaltimer") {
            let d = self.temporary();
            self.emit(ops::clock, d, [0; 3], 0);
            return Ok(d);
        }
        match special(name) {
            Some(Value::Special(special)) => Ok(self.special(special)),
            Some(Value::Constant(value)) => Ok(self.constant(value)),
            None => self.refuse(format!("unknown name {name}")),
        }
    }

    pub(crate) fn address(&mut self, operand: &Operand<'t>) -> Result<Address, Refusal> {
        let Operand::Address(name, offset) = *operand else {
            return self.refuse(format!("{operand:?} instead of an address"));
        };
        let offset_by = |by: usize| offset.wrapping_add_unsigned(by as u64);
        let (base, offset, space) = match self.symbols.find(name) {
            Some(Symbol::Register(slot)) => (slot, offset, None),
            Some(Symbol::Param(at)) => (self.constant(0), offset_by(at), Some(Space::Param)),
            Some(Symbol::Shared(at)) => (self.constant(0), offset_by(at), Some(Space::Shared)),
            Some(Symbol::DynamicShared) => {
                (self.special(Special::DynamicShared), offset, Some(Space::Shared))
            }
            Some(Symbol::Local(at, _)) => {
                (self.special(Special::LocalBase), offset_by(at), Some(Space::Local))
            }
            Some(Symbol::Global(address)) => (self.constant(address), offset, Some(Space::Global)),
            _ => match constant(name) {
                Some(address) => (self.constant(address), offset, None),
                None => return self.refuse(format!("unknown address {name}")),
            },
        };
        Ok(Address { base, offset, space })
    }

    /// The registers of a vector, or one register, that are written.
    pub(crate) fn written_lanes(&mut self, operand: &Operand<'t>) -> Result<Vec<u32>, Refusal> {
        match operand {
            Operand::Vector(names) => {
                names.iter().map(|name| self.destination(&Operand::Name(name))).collect()
            }
            single => Ok(vec![self.destination(single)?]),
        }
    }

    /// The values of a vector, or one value, that are read.
    pub(crate) fn read_lanes(&mut self, operand: &Operand<'t>) -> Result<Vec<u32>, Refusal> {
        match operand {
            Operand::Vector(names) => names.iter().map(|name| self.value(name)).collect(),
            single => Ok(vec![self.source(single)?]),
        }
    }
}

enum Value {
    Special(Special),
    Constant(u64),
}

fn special(name: &str) -> Option<Value> {
    let axis = |name: &str| match name {
        "x" => Some(0),
        "y" => Some(1),
        "z" => Some(2),
        _ => None,
    };
    let special = match name.trim_start_matches('%').split_once('.') {
        Some(("tid", name)) => Special::Thread(axis(name)?),
        Some(("ntid", name)) => Special::Threads(axis(name)?),
        Some(("ctaid", name)) => Special::Block(axis(name)?),
        Some(("nctaid", name)) => Special::Blocks(axis(name)?),
        Some(_) => return None,
        None => match name {
            "%laneid" => Special::Lane,
            "%warpid" => Special::Warp,
            "%nwarpid" => Special::Warps,
            "%lanemask_eq" => Special::LaneMask(LaneMask::Equal),
            "%lanemask_lt" => Special::LaneMask(LaneMask::Less),
            "%lanemask_le" => Special::LaneMask(LaneMask::LessOrEqual),
            "%lanemask_gt" => Special::LaneMask(LaneMask::Greater),
            "%lanemask_ge" => Special::LaneMask(LaneMask::GreaterOrEqual),
            "%dynamic_smem_size" => Special::DynamicSharedBytes,
            "%smid" | "%gridid" => return Some(Value::Constant(0)),
            "%nsmid" => return Some(Value::Constant(1)),
            "WARP_SZ" => return Some(Value::Constant(32)),
            _ => return None,
        },
    };
    Some(Value::Special(special))
}
