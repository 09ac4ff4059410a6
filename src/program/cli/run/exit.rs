//! How the program ends: its errors, its exit codes, and what it prints.

use std::{
    error::Error,
    fmt,
    io::{self, Write},
    process::ExitCode,
};

use super::log_output;

/// An error in the settings.
#[derive(Debug)]
pub struct UsageError(pub String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for UsageError {}

/// Prints an error in one line. Returns the exit code: 2 for an error in the settings, otherwise 1.
pub fn exit_with(error: &anyhow::Error) -> ExitCode {
    log_output::write_error(error);
    ExitCode::from(if error.is::<UsageError>() { 2 } else { 1 })
}

/// Prints a line. Ignores errors: standard output may be closed.
pub fn print(text: &str) {
    let mut out = io::stdout();
    let _ = writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush());
}
