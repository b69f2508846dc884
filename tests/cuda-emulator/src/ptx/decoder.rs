//! Decodes one function: names become slots, opcodes become handlers.

use std::collections::HashMap;

use super::parser::{FunctionSource, Instruction as Parsed, Item, Operand, Variable};
use super::symbols::{Symbol, Symbols};
use super::{Refusal, Space};
use crate::machine::{Function, Handler, Instruction, Param, Special};
use crate::ops;

/// What a function sees of its module.
pub(super) struct Surroundings<'t, 'm> {
    /// Variables and functions of the module.
    pub names: &'m [(&'t str, Symbol)],
    /// The module's own shared memory, which comes first in that of each block.
    pub shared_bytes: usize,
}

/// A function while it is decoded.
pub(crate) struct Decoder<'t, 'm> {
    pub(super) symbols: Symbols<'t>,
    pub(crate) function: Function,
    surroundings: &'m Surroundings<'t, 'm>,
    constants: HashMap<u64, u32>,
    labels: HashMap<(u32, &'t str), u32>,
    /// Branches: the instruction, the label, and the scopes in which to look for it.
    branches: Vec<(usize, &'t str, Vec<u32>)>,
    /// Indexed branches: the same for each of their targets.
    tables: Vec<(usize, Vec<&'t str>, Vec<u32>)>,
    line: u32,
}

/// Decodes a function that has a body.
pub(super) fn decode<'t, 'm>(
    source: &FunctionSource<'t>,
    surroundings: &'m Surroundings<'t, 'm>,
) -> Result<Function, Refusal> {
    let mut decoder = Decoder {
        symbols: Symbols::default(),
        function: Function { name: source.name.to_owned(), ..Function::default() },
        surroundings,
        constants: HashMap::new(),
        labels: HashMap::new(),
        branches: Vec::new(),
        tables: Vec::new(),
        line: source.line,
    };
    decoder.function.is_entry = source.is_entry;
    decoder.function.shared_bytes = surroundings.shared_bytes;
    decoder.signature(source);
    for (item, line) in source.body.iter().flatten() {
        decoder.line = *line;
        decoder.item(item)?;
    }
    decoder.emit(ops::leave, 0, [0; 3], 0);
    decoder.resolve_branches()?;
    Ok(decoder.function)
}

/// The least multiple of `align` that is not below `offset`.
pub(super) fn aligned(offset: usize, align: usize) -> usize {
    offset.next_multiple_of(align.max(1))
}

impl<'t> Decoder<'t, '_> {
    fn signature(&mut self, source: &FunctionSource<'t>) {
        self.symbols.open();
        for (name, symbol) in self.surroundings.names {
            self.symbols.define(name, *symbol);
        }
        self.symbols.open();
        for param in &source.params {
            let place = self.param(param);
            self.function.params.push(place);
        }
        for result in &source.results {
            let place = self.param(result);
            self.function.results.push(place);
        }
    }

    fn param(&mut self, variable: &Variable<'t>) -> Param {
        let offset = aligned(self.function.param_bytes, variable.align);
        self.function.param_bytes = offset + variable.size;
        self.symbols.define(variable.name, Symbol::Param(offset));
        Param { offset, bytes: variable.size }
    }

    fn item(&mut self, item: &Item<'t>) -> Result<(), Refusal> {
        match item {
            Item::Open => self.symbols.open(),
            Item::Close => self.symbols.close(),
            Item::Label(name) => self.label(name)?,
            Item::Registers(name, count) => {
                let first = self.slots(count.unwrap_or(1));
                match count {
                    Some(count) => self.symbols.define_family(name, first, *count),
                    None => self.symbols.define(name, Symbol::Register(first)),
                }
            }
            Item::Variable(variable) => self.variable(variable)?,
            Item::Targets(name, labels) => {
                let index = self.function.targets.len();
                self.function.targets.push(Vec::new());
                self.symbols.define(name, Symbol::Targets(index));
                self.tables.push((index, labels.clone(), self.symbols.chain()));
            }
            Item::Instruction(instruction) => self.instruction(instruction)?,
        }
        Ok(())
    }

    fn label(&mut self, name: &'t str) -> Result<(), Refusal> {
        let scope = self.symbols.chain()[0];
        let here = self.here();
        match self.labels.insert((scope, name), here) {
            None => Ok(()),
            Some(_) => self.refuse(format!("label {name} is there twice")),
        }
    }

    fn variable(&mut self, variable: &Variable<'t>) -> Result<(), Refusal> {
        let function = &mut self.function;
        let symbol = match variable.space {
            Space::Shared if !function.is_entry => {
                return self.refuse("shared variables of a called function are not supported");
            }
            Space::Shared if variable.size == 0 => Symbol::DynamicShared,
            Space::Shared => {
                let offset = aligned(function.shared_bytes, variable.align);
                function.shared_bytes = offset + variable.size;
                Symbol::Shared(offset)
            }
            // Parameters of the body are arguments of the calls that it makes.
            Space::Local | Space::Param => {
                let offset = aligned(function.local_bytes, variable.align.max(8));
                function.local_bytes = offset + variable.size;
                Symbol::Local(offset, variable.size)
            }
            _ => return self.refuse(format!("{} is in no space of a function", variable.name)),
        };
        self.symbols.define(variable.name, symbol);
        Ok(())
    }

    fn instruction(&mut self, parsed: &Parsed<'t>) -> Result<(), Refusal> {
        let parts: Vec<&str> = parsed.opcode.split('.').collect();
        let Some((name, inverted)) = parsed.guard else {
            return ops::decode(self, &parts, &parsed.operands);
        };
        let guard = self.register(name)?;
        if parts[0] == "bra" {
            let branch = if inverted { ops::branch_unless } else { ops::branch_if };
            return ops::decode_branch(self, branch, guard, &parsed.operands);
        }
        // Skips what the instruction becomes if the predicate says so.
        let skip = if inverted { ops::branch_if } else { ops::branch_unless };
        let at = self.function.code.len();
        self.emit(skip, 0, [guard, 0, 0], 0);
        ops::decode(self, &parts, &parsed.operands)?;
        self.function.code[at].extra = i64::from(self.here());
        Ok(())
    }

    /// The index of the next instruction.
    pub(crate) fn here(&self) -> u32 {
        u32::try_from(self.function.code.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn emit(&mut self, run: Handler, d: u32, sources: [u32; 3], extra: i64) {
        let [a, b, c] = sources;
        self.function.code.push(Instruction { run, d, a, b, c, extra });
        self.function.lines.push(self.line);
    }

    pub(crate) fn refuse<T>(&self, reason: impl Into<String>) -> Result<T, Refusal> {
        Err(Refusal::new(self.line, reason))
    }

    /// Consecutive new slots; returns the first.
    fn slots(&mut self, count: u32) -> u32 {
        let first = self.function.registers.len();
        self.function.registers.resize(first + count as usize, 0);
        u32::try_from(first).unwrap_or(u32::MAX)
    }

    pub(crate) fn temporary(&mut self) -> u32 {
        self.slots(1)
    }

    /// The slot that holds a constant.
    pub(crate) fn constant(&mut self, value: u64) -> u32 {
        if let Some(slot) = self.constants.get(&value) {
            return *slot;
        }
        let slot = self.slots(1);
        self.function.registers[slot as usize] = value;
        self.constants.insert(value, slot);
        slot
    }

    /// The slot that holds a special register.
    pub(crate) fn special(&mut self, special: Special) -> u32 {
        if let Some((_, slot)) = self.function.specials.iter().find(|(known, _)| *known == special)
        {
            return *slot;
        }
        let slot = self.slots(1);
        self.function.specials.push((special, slot));
        slot
    }

    /// An index of the function's lanes.
    pub(crate) fn lanes(&mut self, slots: &[u32]) -> u32 {
        let mut lanes = [0; 4];
        lanes[..slots.len()].copy_from_slice(slots);
        self.function.lanes.push(lanes);
        u32::try_from(self.function.lanes.len() - 1).unwrap_or(u32::MAX)
    }

    /// Emits a branch, whose target is filled in once all labels are known.
    pub(crate) fn branch(&mut self, run: Handler, guard: u32, label: &'t str) {
        let chain = self.symbols.chain();
        self.branches.push((self.function.code.len(), label, chain));
        self.emit(run, 0, [guard, 0, 0], 0);
    }

    /// The branch targets that a name stands for.
    pub(crate) fn branch_table(&mut self, name: &str) -> Result<i64, Refusal> {
        match self.symbols.find(name) {
            Some(Symbol::Targets(index)) => Ok(index as i64),
            _ => self.refuse(format!("{name} is not a list of branch targets")),
        }
    }

    /// The function that a name stands for, unless it is a register.
    pub(crate) fn callee(&self, operand: &Operand<'t>) -> Option<usize> {
        match operand {
            Operand::Name(name) => match self.symbols.find(name) {
                Some(Symbol::Function(index)) => Some(index),
                _ => None,
            },
            _ => None,
        }
    }

    /// Where the arguments or results of a call are.
    pub(crate) fn call_places(&self, names: &[&'t str]) -> Result<Vec<Param>, Refusal> {
        let place = |name: &&str| match self.symbols.find(name) {
            Some(Symbol::Local(offset, bytes)) => Ok(Param { offset, bytes }),
            _ => self.refuse(format!("{name} is not in parameter memory")),
        };
        names.iter().map(place).collect()
    }

    fn resolve_branches(&mut self) -> Result<(), Refusal> {
        let find = |label: &'t str, chain: &[u32]| {
            chain.iter().find_map(|scope| self.labels.get(&(*scope, label)).copied())
        };
        let unknown = |at: u32, label: &str| Refusal::new(at, format!("there is no label {label}"));
        for (at, label, chain) in &self.branches {
            let line = self.function.lines[*at];
            let target = find(label, chain).ok_or_else(|| unknown(line, label))?;
            self.function.code[*at].extra = i64::from(target);
        }
        for (index, labels, chain) in &self.tables {
            let target =
                |label: &&'t str| find(label, chain).ok_or_else(|| unknown(self.line, label));
            let targets = labels.iter().map(target).collect::<Result<Vec<_>, _>>()?;
            self.function.targets[*index] = targets;
        }
        Ok(())
    }
}
