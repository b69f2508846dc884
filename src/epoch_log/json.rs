//! As much of JSON as the epoch log has: an object of whole numbers, texts, nulls, and lists of
//! these.

use std::fmt::Write as _;

/// What a field has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Null,
    Number(u64),
    Text(String),
    /// Of anything but lists.
    List(Vec<Self>),
}

/// An object's fields, in their order.
pub(super) type Fields = Vec<(String, Value)>;

/// The object that the text is.
///
/// # Errors
/// What is wrong with it.
pub(super) fn object(text: &str) -> Result<Fields, String> {
    let mut reader = Reader { text, at: 0 };
    let mut fields = Fields::new();
    reader.expect('{')?;
    if !reader.takes('}') {
        loop {
            let name = reader.text()?;
            if fields.iter().any(|(known, _)| *known == name) {
                return Err(format!("`{name}` twice"));
            }
            reader.expect(':')?;
            fields.push((name, reader.value(true)?));
            if reader.takes('}') {
                break;
            }
            reader.expect(',')?;
        }
    }
    reader.skip_space();
    if reader.at < text.len() { Err(reader.expected("the end of the line")) } else { Ok(fields) }
}

/// A text as JSON has it.
pub(super) fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            '\0'..='\x1f' => {
                // Writing to a `String` can't fail.
                let _ = write!(quoted, "\\u{:04x}", u32::from(character));
            }
            _ => quoted.push(character),
        }
    }
    quoted + "\""
}

struct Reader<'t> {
    text: &'t str,
    at: usize,
}

impl Reader<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start_matches([' ', '\t', '\r']).len();
    }

    fn takes(&mut self, character: char) -> bool {
        self.skip_space();
        let takes = self.rest().starts_with(character);
        self.at += if takes { character.len_utf8() } else { 0 };
        takes
    }

    fn expect(&mut self, character: char) -> Result<(), String> {
        if self.takes(character) { Ok(()) } else { Err(self.expected(&format!("`{character}`"))) }
    }

    fn expected(&self, what: &str) -> String {
        let found: String = self.rest().chars().take(20).collect();
        match found.is_empty() {
            true => format!("expected {what}, and the line ends"),
            false => format!("expected {what} at `{found}`"),
        }
    }

    fn value(&mut self, allows_list: bool) -> Result<Value, String> {
        self.skip_space();
        match self.rest().bytes().next() {
            Some(b'"') => self.text().map(Value::Text),
            Some(b'0'..=b'9') => self.number().map(Value::Number),
            Some(b'[') if allows_list => self.list().map(Value::List),
            _ if self.rest().starts_with("null") => {
                self.at += "null".len();
                Ok(Value::Null)
            }
            _ => Err(self.expected("a number, a text, null or a list")),
        }
    }

    fn list(&mut self) -> Result<Vec<Value>, String> {
        self.expect('[')?;
        let mut list = Vec::new();
        if self.takes(']') {
            return Ok(list);
        }
        loop {
            list.push(self.value(false)?);
            if self.takes(']') {
                return Ok(list);
            }
            self.expect(',')?;
        }
    }

    fn number(&mut self) -> Result<u64, String> {
        let rest = self.rest();
        let digits = &rest[..rest.bytes().take_while(u8::is_ascii_digit).count()];
        let is_plain = digits == "0" || !digits.starts_with('0');
        let number = digits.parse().ok().filter(|_| is_plain);
        let number = number.ok_or_else(|| self.expected("a whole number of 64 bits"))?;
        self.at += digits.len();
        Ok(number)
    }

    fn text(&mut self) -> Result<String, String> {
        self.expect('"')?;
        let mut text = String::new();
        loop {
            let mut rest = self.rest().chars();
            let character = rest.next().ok_or_else(|| self.expected("`\"`"))?;
            self.at += character.len_utf8();
            match character {
                '"' => return Ok(text),
                '\\' => text.push(self.escaped()?),
                '\0'..='\x1f' => return Err("a text with a control character".to_owned()),
                _ => text.push(character),
            }
        }
    }

    fn escaped(&mut self) -> Result<char, String> {
        let rest = self.rest().as_bytes();
        let short = match rest.first() {
            Some(&byte @ (b'"' | b'\\' | b'/')) => Some(char::from(byte)),
            Some(b'n') => Some('\n'),
            Some(b't') => Some('\t'),
            Some(b'r') => Some('\r'),
            Some(b'b') => Some('\u{8}'),
            Some(b'f') => Some('\u{c}'),
            _ => None,
        };
        if let Some(short) = short {
            self.at += 1;
            return Ok(short);
        }
        let digits = rest.strip_prefix(b"u").and_then(|it| it.get(..4));
        let digits = digits.filter(|it| it.iter().all(u8::is_ascii_hexdigit));
        let code = digits.and_then(|it| std::str::from_utf8(it).ok());
        let code = code.and_then(|it| u32::from_str_radix(it, 16).ok());
        let escaped = code.and_then(char::from_u32);
        let escaped = escaped.ok_or_else(|| self.expected("a character"))?;
        self.at += 5;
        Ok(escaped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_survive_being_quoted() {
        for text in ["", "UNISUM_ALGORITHM=ring", "\"\\\u{1}\n ünï{}", "\u{7f}\u{10ffff}"] {
            let line = format!("{{\"a\":{}}}", quoted(text));
            assert_eq!(object(&line), Ok(vec![("a".into(), Value::Text(text.into()))]), "{line}");
        }
    }

    #[test]
    fn other_writers_of_json_may_put_spaces_and_escapes() {
        let text = " { \"a\" : [ 1 , null, \"\\u00fc\\n\" ] , \"b\":18446744073709551615 } \r";
        let list = vec![Value::Number(1), Value::Null, Value::Text("ü\n".into())];
        let b = ("b".to_owned(), Value::Number(u64::MAX));
        assert_eq!(object(text), Ok(vec![("a".into(), Value::List(list)), b]));
    }

    #[test]
    fn what_is_no_such_object_is_refused() {
        let refused = [
            ("", "expected `{`, and the line ends"),
            ("{", "expected `\"`, and the line ends"),
            ("{}x", "expected the end of the line at `x`"),
            ("{\"a\":1,}", "expected `\"` at `}`"),
            ("{\"a\":1,\"a\":1}", "`a` twice"),
            ("{\"a\":[[1]]}", "expected a number, a text, null or a list at `[1]]}`"),
            ("{\"a\":-1}", "expected a number, a text, null or a list at `-1}`"),
            ("{\"a\":1.5}", "expected `,` at `.5}`"),
            ("{\"a\":01}", "expected a whole number of 64 bits at `01}`"),
            ("{\"a\":18446744073709551616}", "expected a whole number of 64 bits at `184"),
            ("{\"a\":\"\u{1}\"}", "a text with a control character"),
            ("{\"a\":\"\\ud800\"}", "expected a character at `ud800"),
            ("{\"a\":\"\\u+123\"}", "expected a character at `u+123"),
        ];
        for (text, why) in refused {
            let refused = object(text).unwrap_err();
            assert!(refused.starts_with(why), "{text}: {refused}");
        }
    }
}
