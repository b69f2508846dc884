//! A loaded module: its functions, and where its variables lie.

use std::collections::HashMap;

use super::decoder::{Surroundings, aligned, decode};
use super::parser::{Source, parse};
use super::symbols::Symbol;
use super::{Refusal, Space};
use crate::machine::Function;

/// What an image asks of the device, before anything of it is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Requirements {
    /// The version of the PTX instruction set, times ten.
    pub version: u32,
    /// The least compute capability, times ten.
    pub target: u32,
}

/// A loaded module.
pub(crate) struct Module {
    /// The text, for messages.
    text: String,
    pub functions: Vec<Function>,
    entries: HashMap<String, usize>,
    /// Address and size of the variables in device memory.
    pub variables: HashMap<String, (u64, usize)>,
}

impl Module {
    /// Parses `text`. `accept` may refuse what it requires; `allocate` gives the address of device
    /// memory that holds the bytes it is handed.
    ///
    /// # Errors
    ///
    /// Text that does not parse, or names or instructions that are unknown.
    pub(crate) fn load<E: From<Refusal>>(
        text: &str,
        accept: impl FnOnce(Requirements) -> Result<(), E>,
        allocate: impl FnOnce(&[u8]) -> Result<u64, E>,
    ) -> Result<Self, E> {
        let source = parse(text)?;
        accept(Requirements { version: source.version, target: source.target })?;
        let (image, offsets) = image(&source);
        let base = if image.is_empty() { 0 } else { allocate(&image)? };
        let (names, shared_bytes) = names(&source, base, &offsets);
        let surroundings = Surroundings { names: &names, shared_bytes };
        let mut functions = Vec::new();
        let mut entries = HashMap::new();
        for (index, function) in defined(&source).enumerate() {
            functions.push(decode(function, &surroundings)?);
            if function.is_entry {
                entries.insert(function.name.to_owned(), index);
            }
        }
        let in_memory = source.variables.iter().zip(&offsets);
        let variables = in_memory.filter_map(|(variable, offset)| {
            let address = base + (*offset)? as u64;
            Some((variable.name.to_owned(), (address, variable.size)))
        });
        let variables = variables.collect();
        Ok(Self { text: text.to_owned(), functions, entries, variables })
    }

    /// The index of a kernel.
    pub(crate) fn entry(&self, name: &str) -> Option<usize> {
        self.entries.get(name).copied()
    }

    /// A line of the text, counted from 1.
    pub(crate) fn line(&self, line: u32) -> &str {
        self.text.lines().nth(line as usize - 1).unwrap_or("").trim()
    }
}

/// The functions that have bodies. Declarations of others are of no use: nothing is linked.
fn defined<'s, 't>(
    source: &'s Source<'t>,
) -> impl Iterator<Item = &'s super::parser::FunctionSource<'t>> {
    source.functions.iter().filter(|function| function.body.is_some())
}

/// The initial bytes of all variables in device memory, and where each lies in them.
fn image(source: &Source<'_>) -> (Vec<u8>, Vec<Option<usize>>) {
    let mut image = Vec::new();
    let place = |variable: &super::parser::Variable<'_>| {
        if !matches!(variable.space, Space::Global | Space::Const) {
            return None;
        }
        let offset = aligned(image.len(), variable.align);
        image.resize(offset, 0);
        image.extend(&variable.initial);
        image.resize(offset + variable.size, 0);
        Some(offset)
    };
    let offsets = source.variables.iter().map(place).collect();
    (image, offsets)
}

/// What the module's names stand for, and the size of its own shared memory.
fn names<'t>(
    source: &Source<'t>,
    base: u64,
    offsets: &[Option<usize>],
) -> (Vec<(&'t str, Symbol)>, usize) {
    let mut names = Vec::new();
    let mut shared_bytes = 0;
    for (variable, offset) in source.variables.iter().zip(offsets) {
        let symbol = match offset {
            Some(offset) => Symbol::Global(base + *offset as u64),
            None if variable.size == 0 => Symbol::DynamicShared,
            None => {
                let offset = aligned(shared_bytes, variable.align);
                shared_bytes = offset + variable.size;
                Symbol::Shared(offset)
            }
        };
        names.push((variable.name, symbol));
    }
    for (index, function) in defined(source).enumerate() {
        names.push((function.name, Symbol::Function(index)));
    }
    (names, shared_bytes)
}
