//! Warnings, for programs with a subscriber of `tracing`'s events and for those without.

/// Warns: an event where the program takes them, else a line on standard error.
macro_rules! warning {
    ($($text:tt)*) => {
        match tracing::dispatcher::has_been_set() {
            true => tracing::warn!($($text)*),
            false => $crate::warning::print(format_args!($($text)*)),
        }
    };
}
pub(crate) use warning;

/// Prints a warning on standard error, unless `UNISUM_LOG` is `off` or `error`.
pub(crate) fn print(text: std::fmt::Arguments<'_>) {
    let is_silent = |level: String| ["off", "error"].contains(&level.to_lowercase().as_str());
    if !std::env::var("UNISUM_LOG").is_ok_and(is_silent) {
        eprintln!("unisum: warning: {text}");
    }
}
