//! Parses PTX into functions, variables and instructions whose names are not resolved yet.

use super::lexer::{Token, tokens};
use super::{Refusal, Space, size_of_type};

/// A parsed module.
#[derive(Debug, Default)]
pub(super) struct Source<'t> {
    /// The version of the PTX instruction set, times ten.
    pub version: u32,
    /// The least compute capability, times ten.
    pub target: u32,
    pub variables: Vec<Variable<'t>>,
    pub functions: Vec<FunctionSource<'t>>,
}

/// A variable of the module or of a function, a parameter, or a result.
#[derive(Clone, Debug)]
pub(super) struct Variable<'t> {
    pub space: Space,
    pub name: &'t str,
    pub align: usize,
    /// In bytes; 0 if the launch decides (dynamic shared memory).
    pub size: usize,
    pub initial: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct FunctionSource<'t> {
    pub name: &'t str,
    pub is_entry: bool,
    pub results: Vec<Variable<'t>>,
    pub params: Vec<Variable<'t>>,
    /// `None` if the function is only declared.
    pub body: Option<Vec<(Item<'t>, u32)>>,
    pub line: u32,
}

/// A line of a function's body.
#[derive(Debug)]
pub(super) enum Item<'t> {
    Open,
    Close,
    Label(&'t str),
    /// Registers: one, or with a count those from `name0` on.
    Registers(&'t str, Option<u32>),
    Variable(Variable<'t>),
    /// The labels that an indexed branch may take.
    Targets(&'t str, Vec<&'t str>),
    Instruction(Instruction<'t>),
}

#[derive(Debug)]
pub(super) struct Instruction<'t> {
    /// The predicate and whether it must be false.
    pub guard: Option<(&'t str, bool)>,
    pub opcode: &'t str,
    pub operands: Vec<Operand<'t>>,
}

/// An operand whose names are not resolved yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Operand<'t> {
    Name(&'t str),
    /// `!%p1`
    Not(&'t str),
    /// `%p1|%p2`
    Both(&'t str, &'t str),
    /// `{%r1, %r2}`
    Vector(Vec<&'t str>),
    /// `[%rd1+8]`
    Address(&'t str, i64),
    /// `(param0, param1)`
    List(Vec<&'t str>),
}

pub(super) fn parse(text: &str) -> Result<Source<'_>, Refusal> {
    let mut parser = Parser { tokens: tokens(text)?, at: 0 };
    let mut source = Source::default();
    while parser.at < parser.tokens.len() {
        parser.directive(&mut source)?;
    }
    if source.version == 0 || source.target == 0 {
        return Err(Refusal::new(1, "there is no .version or no .target"));
    }
    Ok(source)
}

struct Parser<'t> {
    tokens: Vec<(Token<'t>, u32)>,
    at: usize,
}

impl<'t> Parser<'t> {
    fn line(&self) -> u32 {
        let last = self.tokens.len().saturating_sub(1);
        self.tokens.get(self.at.min(last)).map_or(1, |(_, line)| *line)
    }

    fn refuse<T>(&self, reason: impl Into<String>) -> Result<T, Refusal> {
        Err(Refusal::new(self.line(), reason))
    }

    fn peek(&self) -> Option<Token<'t>> {
        self.tokens.get(self.at).map(|(token, _)| *token)
    }

    fn next(&mut self) -> Result<Token<'t>, Refusal> {
        let token = self.peek().map_or_else(|| self.refuse("the text ends early"), Ok)?;
        self.at += 1;
        Ok(token)
    }

    fn take(&mut self, mark: u8) -> bool {
        let there = self.peek() == Some(Token::Mark(mark));
        self.at += usize::from(there);
        there
    }

    fn expect(&mut self, mark: u8) -> Result<(), Refusal> {
        if self.take(mark) {
            return Ok(());
        }
        self.refuse(format!("{:?} instead of {:?}", self.peek(), char::from(mark)))
    }

    fn word(&mut self) -> Result<&'t str, Refusal> {
        match self.next()? {
            Token::Word(word) => Ok(word),
            other => self.refuse(format!("{other:?} instead of a name")),
        }
    }

    fn number<N: TryFrom<i128>>(&mut self) -> Result<N, Refusal> {
        let word = self.word()?;
        let value = integer(word).and_then(|value| N::try_from(value).ok());
        value.map_or_else(|| self.refuse(format!("{word} instead of a number")), Ok)
    }

    fn skip_past(&mut self, mark: u8) -> Result<(), Refusal> {
        while self.next()? != Token::Mark(mark) {}
        Ok(())
    }

    fn skip_line(&mut self) {
        let line = self.line();
        while self.at < self.tokens.len() && self.line() == line {
            self.at += 1;
        }
    }

    /// Words between commas, up to the closing mark.
    fn names(&mut self, closing: u8) -> Result<Vec<&'t str>, Refusal> {
        let mut names = Vec::new();
        while !self.take(closing) {
            if !self.take(b',') {
                names.push(self.word()?);
            }
        }
        Ok(names)
    }

    fn directive(&mut self, source: &mut Source<'t>) -> Result<(), Refusal> {
        match self.peek() {
            Some(Token::Word(".version")) => {
                self.at += 1;
                source.version = self.version()?;
            }
            Some(Token::Word(".target")) => source.target = self.target()?,
            Some(Token::Word(".address_size")) => {
                self.at += 1;
                if self.number::<u32>()? != 64 {
                    return self.refuse("addresses must have 64 bits");
                }
            }
            Some(Token::Word(".file" | ".loc")) => self.skip_line(),
            Some(Token::Word(".section")) => self.skip_past(b'}')?,
            Some(Token::Word(_)) => self.definition(source)?,
            other => return self.refuse(format!("{other:?} instead of a directive")),
        }
        Ok(())
    }

    fn version(&mut self) -> Result<u32, Refusal> {
        let word = self.word()?;
        let parts = word.split_once('.');
        let parts = parts.and_then(|(a, b)| Some((a.parse::<u32>().ok()?, b.parse::<u32>().ok()?)));
        parts.map_or_else(|| self.refuse("not a version"), |(major, minor)| Ok(major * 10 + minor))
    }

    fn target(&mut self) -> Result<u32, Refusal> {
        let line = self.line();
        self.at += 1;
        let name = self.word()?;
        let digits = name.trim_start_matches("sm_").trim_end_matches(['a', 'f']);
        // Modes of textures and debugging.
        while self.take(b',') {
            self.word()?;
        }
        digits.parse().map_err(|_| Refusal::new(line, format!("target {name}")))
    }

    /// A function or a variable, after its linkage.
    fn definition(&mut self, source: &mut Source<'t>) -> Result<(), Refusal> {
        let line = self.line();
        while let Some(Token::Word(".visible" | ".extern" | ".weak" | ".common")) = self.peek() {
            self.at += 1;
        }
        match self.peek() {
            Some(Token::Word(kind @ (".entry" | ".func"))) => {
                self.at += 1;
                let function = self.function(kind == ".entry", line)?;
                source.functions.push(function);
            }
            _ => {
                let variable = self.variable()?;
                self.expect(b';')?;
                source.variables.push(variable);
            }
        }
        Ok(())
    }

    fn function(&mut self, is_entry: bool, line: u32) -> Result<FunctionSource<'t>, Refusal> {
        while let Some(Token::Word(".noinline" | ".unique")) = self.peek() {
            self.at += 1;
        }
        let results = if self.take(b'(') { self.variables()? } else { Vec::new() };
        let name = self.word()?;
        let params = if self.take(b'(') { self.variables()? } else { Vec::new() };
        // Performance directives: .maxntid 256, 1, 1 and the like.
        while !matches!(self.peek(), Some(Token::Mark(b'{' | b';')) | None) {
            self.at += 1;
        }
        let body = if self.take(b';') { None } else { Some(self.body()?) };
        Ok(FunctionSource { name, is_entry, results, params, body, line })
    }

    fn variables(&mut self) -> Result<Vec<Variable<'t>>, Refusal> {
        let mut found = Vec::new();
        while !self.take(b')') {
            if !self.take(b',') {
                found.push(self.variable()?);
            }
        }
        Ok(found)
    }

    /// `.global .align 4 .b8 name[12] = {1, 2}`, up to what follows it.
    fn variable(&mut self) -> Result<Variable<'t>, Refusal> {
        let mut space = None;
        let (mut align, mut element, mut lanes) = (0, 0, 1);
        while let Some(Token::Word(word)) = self.peek() {
            let Some(directive) = word.strip_prefix('.') else { break };
            self.at += 1;
            match directive {
                "align" => align = self.number()?,
                "ptr" | "volatile" | "attribute" => {}
                "v2" => lanes = 2,
                "v4" => lanes = 4,
                _ if Space::named(directive).is_some() => {
                    // `.param .u64 .ptr .global .align 4 name` names two.
                    space = space.or_else(|| Space::named(directive));
                }
                _ => match size_of_type(directive) {
                    Some(size) => element = size,
                    None => return self.refuse(format!("unknown directive {word}")),
                },
            }
        }
        let name = self.word()?;
        if element == 0 {
            return self.refuse(format!("{name} has no type"));
        }
        let mut size = element * lanes;
        while self.take(b'[') {
            let count = if self.take(b']') { 0 } else { self.number()? };
            size *= count;
            if count > 0 {
                self.expect(b']')?;
            }
        }
        let initial = if self.take(b'=') { self.initial(element)? } else { Vec::new() };
        let align = if align == 0 { element * lanes } else { align };
        Ok(Variable { space: space.unwrap_or(Space::Global), name, align, size, initial })
    }

    fn initial(&mut self, element: usize) -> Result<Vec<u8>, Refusal> {
        let words = if self.take(b'{') { self.names(b'}')? } else { vec![self.word()?] };
        let mut bytes = Vec::with_capacity(words.len() * element);
        for word in words {
            match constant(word) {
                Some(value) => bytes.extend(&value.to_le_bytes()[..element.min(8)]),
                None => return self.refuse(format!("the initial value {word} is not supported")),
            }
        }
        Ok(bytes)
    }

    fn body(&mut self) -> Result<Vec<(Item<'t>, u32)>, Refusal> {
        self.expect(b'{')?;
        let mut items = Vec::new();
        let mut depth = 1;
        loop {
            let line = self.line();
            if self.take(b'{') {
                depth += 1;
                items.push((Item::Open, line));
            } else if self.take(b'}') {
                depth -= 1;
                if depth == 0 {
                    return Ok(items);
                }
                items.push((Item::Close, line));
            } else if !self.take(b';') {
                self.item(&mut items)?;
            }
        }
    }

    fn item(&mut self, items: &mut Vec<(Item<'t>, u32)>) -> Result<(), Refusal> {
        let line = self.line();
        match self.peek() {
            Some(Token::Word(word)) if word == ".reg" || word.starts_with(".reg.") => {
                self.registers(items)?;
            }
            Some(Token::Word(".loc" | ".file")) => self.skip_line(),
            Some(Token::Word(".pragma")) => self.skip_past(b';')?,
            Some(Token::Word(word)) if word.starts_with('.') => {
                let variable = self.variable()?;
                self.expect(b';')?;
                items.push((Item::Variable(variable), line));
            }
            Some(Token::Word(word))
                if self.tokens.get(self.at + 1).is_some_and(|(t, _)| *t == Token::Mark(b':')) =>
            {
                self.at += 2;
                self.label(word, items)?;
            }
            _ => {
                let instruction = self.instruction()?;
                items.push((Item::Instruction(instruction), line));
            }
        }
        Ok(())
    }

    fn label(&mut self, name: &'t str, items: &mut Vec<(Item<'t>, u32)>) -> Result<(), Refusal> {
        let line = self.line();
        match self.peek() {
            Some(Token::Word(".branchtargets")) => {
                self.at += 1;
                let targets = self.names(b';')?;
                items.push((Item::Targets(name, targets), line));
            }
            // The call itself says where the arguments are.
            Some(Token::Word(".callprototype")) => self.skip_past(b';')?,
            _ => items.push((Item::Label(name), line)),
        }
        Ok(())
    }

    fn registers(&mut self, items: &mut Vec<(Item<'t>, u32)>) -> Result<(), Refusal> {
        let line = self.line();
        // `.reg .b32` or `.reg.b32`: the type does not matter, since a register has 64 bits.
        if self.word()? == ".reg" {
            self.word()?;
        }
        loop {
            let name = self.word()?;
            let count = if self.take(b'<') {
                let count = self.number()?;
                self.expect(b'>')?;
                Some(count)
            } else {
                None
            };
            items.push((Item::Registers(name, count), line));
            if !self.take(b',') {
                return self.expect(b';');
            }
        }
    }

    fn instruction(&mut self) -> Result<Instruction<'t>, Refusal> {
        let guard = if self.take(b'@') {
            let inverted = self.take(b'!');
            Some((self.word()?, inverted))
        } else {
            None
        };
        let opcode = self.word()?;
        let mut operands = Vec::new();
        while !self.take(b';') {
            if !self.take(b',') {
                operands.push(self.operand()?);
            }
        }
        Ok(Instruction { guard, opcode, operands })
    }

    fn operand(&mut self) -> Result<Operand<'t>, Refusal> {
        if self.take(b'!') {
            return Ok(Operand::Not(self.word()?));
        }
        if self.take(b'{') {
            return Ok(Operand::Vector(self.names(b'}')?));
        }
        if self.take(b'(') {
            return Ok(Operand::List(self.names(b')')?));
        }
        if self.take(b'[') {
            let base = self.word()?;
            let offset = if self.take(b'+') { self.number()? } else { 0 };
            self.expect(b']')?;
            return Ok(Operand::Address(base, offset));
        }
        let name = self.word()?;
        if self.take(b'|') {
            return Ok(Operand::Both(name, self.word()?));
        }
        Ok(Operand::Name(name))
    }
}

/// An integer literal.
fn integer(word: &str) -> Option<i128> {
    let digits = word.trim_end_matches('U');
    match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(digits) => i128::from_str_radix(digits, 16).ok(),
        None => digits.parse().ok(),
    }
}

/// The bits of a literal: an integer, or a float in hexadecimal.
pub(super) fn constant(word: &str) -> Option<u64> {
    if !word.starts_with(|first: char| first.is_ascii_digit() || first == '-') {
        return None;
    }
    if let Some(digits) = word.strip_prefix("0f").or_else(|| word.strip_prefix("0F")) {
        return u32::from_str_radix(digits, 16).ok().map(u64::from);
    }
    if let Some(digits) = word.strip_prefix("0d").or_else(|| word.strip_prefix("0D")) {
        return u64::from_str_radix(digits, 16).ok();
    }
    integer(word).map(|value| value as u64)
}
