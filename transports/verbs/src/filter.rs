//! Which devices and ports the user allows, in NCCL's syntax.

use std::fmt;
use std::str::FromStr;

/// A selection of devices in the syntax of `NCCL_IB_HCA`.
///
/// A comma-separated list of device name prefixes, each with an optional port (`mlx5,rxe0:1`). A
/// leading `=` matches whole names (`=mlx5_0:1`), `^` excludes what matches (`^mlx5_3`), and `^=`
/// excludes whole names.
///
/// Source: NCCL user guide, "NCCL_IB_HCA".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFilter {
    exclude: bool,
    exact: bool,
    items: Vec<Item>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Item {
    name: String,
    port: Option<u8>,
}

/// What is expected of a device filter, and what is wrong with a text that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a device filter such as mlx5 or =mlx5_0:1 or ^rxe: {problem}")]
pub struct FilterError {
    problem: &'static str,
}

impl DeviceFilter {
    /// Whether the filter allows this port of the device `name`.
    pub fn allows(&self, name: &str, port: u8) -> bool {
        self.position(name, port).is_some() != self.exclude
    }

    /// Whether the device is allowed because the list names it.
    pub fn names(&self, name: &str, port: u8) -> bool {
        !self.exclude && self.position(name, port).is_some()
    }

    /// The index in the list of the first item that matches: the user's order of preference.
    pub fn position(&self, name: &str, port: u8) -> Option<usize> {
        let fits = |item: &Item| {
            let named = if self.exact { name == item.name } else { name.starts_with(&item.name) };
            named && item.port.is_none_or(|wanted| wanted == port)
        };
        self.items.iter().position(fits)
    }
}

impl FromStr for DeviceFilter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let failed = |problem| FilterError { problem };
        let (exclude, rest) = strip(text.trim(), '^');
        let (exact, rest) = strip(rest, '=');
        let items = rest.split(',').map(|item| parse_item(item.trim()));
        Ok(Self { exclude, exact, items: items.collect::<Result<_, _>>().map_err(failed)? })
    }
}

impl fmt::Display for DeviceFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.exclude { "^" } else { "" })?;
        f.write_str(if self.exact { "=" } else { "" })?;
        for (number, Item { name, port }) in self.items.iter().enumerate() {
            f.write_str(if number == 0 { "" } else { "," })?;
            f.write_str(name)?;
            port.map_or(Ok(()), |port| write!(f, ":{port}"))?;
        }
        Ok(())
    }
}

fn strip(text: &str, mark: char) -> (bool, &str) {
    text.strip_prefix(mark).map_or((false, text), |rest| (true, rest))
}

fn parse_item(text: &str) -> Result<Item, &'static str> {
    let (name, port) = match text.split_once(':') {
        Some((name, port)) => (name, Some(parse_port(port)?)),
        None => (text, None),
    };
    if name.is_empty() {
        return Err("a name is empty");
    }
    if name.len() > MAX_NAME_BYTES {
        return Err("a name is longer than the 63 bytes a device name can have");
    }
    if name.contains(|c: char| c.is_whitespace() || c.is_control() || "/^=".contains(c)) {
        return Err(
            "`^` and `=` stand once, in front of the whole list; names have no space or `/`",
        );
    }
    Ok(Item { name: name.to_owned(), port })
}

fn parse_port(text: &str) -> Result<u8, &'static str> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    let port = text.parse().ok().filter(|&port| is_number && port > 0);
    port.ok_or("a port is a number from 1 to 255")
}

/// `IB_DEVICE_NAME_MAX` less the closing NUL.
const MAX_NAME_BYTES: usize = 63;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_select_as_nccl_does() {
        for (filter, allowed, refused) in [
            ("mlx5", &[("mlx5_0", 1), ("mlx5_10", 2)][..], &[("rxe0", 1)][..]),
            ("mlx5_1", &[("mlx5_1", 1), ("mlx5_10", 1)], &[("mlx5_0", 1)]),
            ("=mlx5_1", &[("mlx5_1", 1)], &[("mlx5_10", 1)]),
            ("=mlx5_0:1,mlx5_1", &[("mlx5_0", 1), ("mlx5_1", 2)], &[("mlx5_0", 2)]),
            ("^mlx5_3", &[("mlx5_0", 1)], &[("mlx5_3", 1), ("mlx5_30", 1)]),
            ("^=mlx5_3:2", &[("mlx5_3", 1), ("mlx5_30", 2)], &[("mlx5_3", 2)]),
        ] {
            let parsed: DeviceFilter = filter.parse().unwrap();
            assert_eq!(parsed.to_string(), filter);
            assert!(allowed.iter().all(|(name, port)| parsed.allows(name, *port)), "{filter}");
            assert!(!refused.iter().any(|(name, port)| parsed.allows(name, *port)), "{filter}");
        }
    }

    #[test]
    fn malformed_filters_are_refused() {
        for text in ["", "^", "=", "mlx5,", "=^mlx5", "a b", "a:0", "a:256", "a:", ":1", "a:+1"] {
            assert!(text.parse::<DeviceFilter>().is_err(), "{text}");
        }
        assert!("x".repeat(64).parse::<DeviceFilter>().is_err());
    }
}
