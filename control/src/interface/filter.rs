//! Which network interfaces the user allows, in the syntax NCCL's users know.

use std::fmt;
use std::str::FromStr;

/// A choice of network interfaces in the syntax of `NCCL_SOCKET_IFNAME`.
///
/// A comma list of name prefixes (`eth,ib`); `=` in front for whole names (`=eth0,eth1`), `^` to
/// exclude what matches (`^docker,lo`), `^=` to exclude whole names.
///
/// Source: NCCL user guide, "NCCL_SOCKET_IFNAME".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceFilter {
    exclude: bool,
    exact: bool,
    names: Vec<String>,
}

/// What is expected of an interface filter, and what is wrong with a text that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an interface filter such as eth,ib or =eth0 or ^docker: {problem}")]
pub struct FilterError {
    problem: &'static str,
}

impl InterfaceFilter {
    /// The interfaces named in a comma list of whole names, as `GLOO_SOCKET_IFNAME` means it.
    ///
    /// # Errors
    /// [`FilterError`] if a name is empty or cannot be an interface's.
    pub fn exact(names: &str) -> Result<Self, FilterError> {
        let failed = |problem| FilterError { problem };
        Ok(Self { exclude: false, exact: true, names: parse_names(names).map_err(failed)? })
    }

    /// Whether the filter allows the interface `name`.
    pub fn allows(&self, name: &str) -> bool {
        self.position(name).is_some() != self.exclude
    }

    /// The place in the list of the first item that fits `name`: the user's order of preference.
    pub(super) fn position(&self, name: &str) -> Option<usize> {
        let fits = |item: &String| {
            if self.exact { name == item } else { name.starts_with(item) }
        };
        self.names.iter().position(fits)
    }
}

impl FromStr for InterfaceFilter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let failed = |problem| FilterError { problem };
        let (exclude, rest) = strip(text.trim(), '^');
        let (exact, rest) = strip(rest, '=');
        Ok(Self { exclude, exact, names: parse_names(rest).map_err(failed)? })
    }
}

impl fmt::Display for InterfaceFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exclude = if self.exclude { "^" } else { "" };
        let exact = if self.exact { "=" } else { "" };
        write!(f, "{exclude}{exact}{}", self.names.join(","))
    }
}

fn strip(text: &str, mark: char) -> (bool, &str) {
    text.strip_prefix(mark).map_or((false, text), |rest| (true, rest))
}

fn parse_names(list: &str) -> Result<Vec<String>, &'static str> {
    list.split(',').map(|name| check_name(name.trim()).map(str::to_owned)).collect()
}

fn check_name(name: &str) -> Result<&str, &'static str> {
    if name.is_empty() {
        return Err("a name is empty");
    }
    if name.len() > MAX_NAME_BYTES {
        return Err("a name is longer than the 15 bytes an interface name can have");
    }
    if name.contains(|c: char| c.is_whitespace() || c.is_control() || "/^=".contains(c)) {
        return Err(
            "`^` and `=` stand once, in front of the whole list; names have no space or `/`",
        );
    }
    Ok(name)
}

/// `IFNAMSIZ` less the closing NUL (netdevice(7)).
const MAX_NAME_BYTES: usize = 15;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_select_as_nccl_does() {
        for (filter, allowed, refused) in [
            ("eth", &["eth0", "eth10", "eth"][..], &["ib0", "veth1", "lo"][..]),
            ("eth,ib", &["eth0", "ib0"], &["lo"]),
            ("=eth0,ib0", &["eth0", "ib0"], &["eth01", "ib", "lo"]),
            ("^docker,lo", &["eth0", "ib0"], &["docker0", "lo"]),
            ("^=eth0", &["eth01", "lo"], &["eth0"]),
            (" eth0 , ib0 ", &["eth0", "ib0"], &["lo"]),
        ] {
            let filter: InterfaceFilter = filter.parse().unwrap();
            assert!(allowed.iter().all(|name| filter.allows(name)), "{filter}");
            assert!(!refused.iter().any(|name| filter.allows(name)), "{filter}");
        }
    }

    #[test]
    fn gloo_names_are_whole_names() {
        let filter = InterfaceFilter::exact("eth0,eth1").unwrap();
        assert_eq!(filter.to_string(), "=eth0,eth1");
        assert!(InterfaceFilter::exact("^eth0").is_err());
    }

    #[test]
    fn malformed_filters_are_refused() {
        for text in
            ["", "^", "=", "^=", "eth0,", ",eth0", "=^eth0", "eth0,^lo", "a b", "sixteen-letters0"]
        {
            assert!(text.parse::<InterfaceFilter>().is_err(), "{text}");
        }
    }
}
