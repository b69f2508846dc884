//! A snapshot of environment variables, so that everything that reads them can be tested as data.

use std::collections::BTreeMap;

/// The environment variables of a process at one moment.
///
/// An empty value counts as unset, as launchers and shell scripts often leave one behind. Bytes
/// that are not Unicode are replaced by U+FFFD, by which they are refused.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Reads the variables of this process.
    pub fn from_process() -> Self {
        let text = |value: std::ffi::OsString| value.to_string_lossy().into_owned();
        std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect()
    }

    /// The same with `overrides` on top: what a program says in code wins over its surroundings.
    pub fn with(mut self, overrides: BTreeMap<&'static str, String>) -> Self {
        for (name, value) in overrides {
            self.0.insert(name.to_owned(), value);
        }
        self
    }

    /// The value of `name`, if it is set and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The names that are set and not empty, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let set = self.0.iter().filter(|(_, value)| !value.is_empty());
        set.map(|(name, _)| name.as_str())
    }
}

// Not derived: the values hold tokens and other people's secrets.
impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(variables: I) -> Self {
        Self(variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_values_count_as_unset_and_debug_hides_values() {
        let environment = Environment::from_iter([("A", ""), ("B", "secret")]);
        assert_eq!((environment.get("A"), environment.get("B")), (None, Some("secret")));
        assert_eq!(format!("{environment:?}"), r#"{"B"}"#);
        let with = environment.with([("A", "code".to_owned()), ("B", String::new())].into());
        assert_eq!((with.get("A"), with.get("B")), (Some("code"), None));
    }
}
