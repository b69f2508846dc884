//! Cuts PTX text into words, strings and punctuation.

use super::Refusal;

/// A piece of PTX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token<'t> {
    /// A name, register, directive, opcode or number: `%rd1`, `.reg`, `ld.global.u32`, `-8`.
    Word(&'t str),
    /// What stands between quotation marks.
    Text(&'t str),
    /// A punctuation character.
    Mark(u8),
}

/// Tokens with the line, counted from 1, that each stands in.
pub(super) fn tokens(text: &str) -> Result<Vec<(Token<'_>, u32)>, Refusal> {
    let bytes = text.as_bytes();
    let mut found = Vec::with_capacity(text.len() / 4);
    let (mut at, mut line) = (0, 1);
    while at < bytes.len() {
        match bytes[at] {
            b'\n' => {
                line += 1;
                at += 1;
            }
            b' ' | b'\t' | b'\r' | 0 => at += 1,
            b'/' if bytes[at..].starts_with(b"//") => at = end_of_line(bytes, at),
            b'/' if bytes[at..].starts_with(b"/*") => {
                let length =
                    text[at..].find("*/").ok_or_else(|| Refusal::new(line, "an open /*"))?;
                line += count_lines(&bytes[at..at + length]);
                at += length + 2;
            }
            b'"' => {
                let length = text[at + 1..].find('"');
                let length = length.ok_or_else(|| Refusal::new(line, "an open string"))?;
                found.push((Token::Text(&text[at + 1..at + 1 + length]), line));
                at += length + 2;
            }
            _ => {
                let length = word(&bytes[at..]);
                let token = match length {
                    0 => Token::Mark(bytes[at]),
                    _ => Token::Word(&text[at..at + length]),
                };
                found.push((token, line));
                at += length.max(1);
            }
        }
    }
    Ok(found)
}

fn end_of_line(bytes: &[u8], from: usize) -> usize {
    bytes[from..].iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |end| from + end)
}

fn count_lines(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.iter().filter(|byte| **byte == b'\n').count()).unwrap_or(u32::MAX)
}

/// The length of the word that begins here; 0 if none does.
fn word(bytes: &[u8]) -> usize {
    let negative = bytes[0] == b'-' && bytes.get(1).is_some_and(u8::is_ascii_digit);
    let mut length = usize::from(negative);
    while let Some(byte) = bytes.get(length) {
        match byte {
            b'.' | b'_' | b'$' | b'%' => length += 1,
            byte if byte.is_ascii_alphanumeric() => length += 1,
            // `L1::no_allocate` is part of an opcode.
            b':' if length > 0 && bytes.get(length + 1) == Some(&b':') => length += 2,
            _ => break,
        }
    }
    length
}
