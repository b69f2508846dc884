//! The names that are visible at a place of a function.

use std::collections::HashMap;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Symbol {
    /// A slot of the register file.
    Register(u32),
    /// An offset in the block's shared memory.
    Shared(usize),
    /// Shared memory whose size the launch decides.
    DynamicShared,
    /// Offset and size in the function's frame of local memory.
    Local(usize, usize),
    /// Offset in the function's parameters.
    Param(usize),
    /// An address in device memory.
    Global(u64),
    /// An index of the module's functions.
    Function(usize),
    /// An index of the function's branch targets.
    Targets(usize),
}

/// Registers `name0`, `name1` and so on, in consecutive slots.
#[derive(Debug)]
struct Family<'t> {
    name: &'t str,
    first: u32,
    count: u32,
}

#[derive(Debug)]
struct Scope<'t> {
    id: u32,
    names: HashMap<&'t str, Symbol>,
    families: Vec<Family<'t>>,
}

/// Nested scopes, the outermost first.
#[derive(Debug, Default)]
pub(super) struct Symbols<'t> {
    scopes: Vec<Scope<'t>>,
    opened: u32,
}

impl<'t> Symbols<'t> {
    pub(super) fn open(&mut self) {
        self.opened += 1;
        let id = self.opened;
        self.scopes.push(Scope { id, names: HashMap::new(), families: Vec::new() });
    }

    pub(super) fn close(&mut self) {
        self.scopes.pop();
    }

    /// The identities of the open scopes, the innermost first.
    pub(super) fn chain(&self) -> Vec<u32> {
        self.scopes.iter().rev().map(|scope| scope.id).collect()
    }

    pub(super) fn define(&mut self, name: &'t str, symbol: Symbol) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.names.insert(name, symbol);
        }
    }

    pub(super) fn define_family(&mut self, name: &'t str, first: u32, count: u32) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.families.push(Family { name, first, count });
        }
    }

    pub(super) fn find(&self, name: &str) -> Option<Symbol> {
        self.scopes.iter().rev().find_map(|scope| {
            // Nearly all names are those of registers, and nearly all registers are in families.
            let family = scope.families.iter().find_map(|family| family.member(name));
            family.or_else(|| scope.names.get(name).copied())
        })
    }
}

impl Family<'_> {
    fn member(&self, name: &str) -> Option<Symbol> {
        let number: u32 = name.strip_prefix(self.name)?.parse().ok()?;
        (number < self.count).then(|| Symbol::Register(self.first + number))
    }
}
