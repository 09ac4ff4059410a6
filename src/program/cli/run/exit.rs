//! How the program ends: its exit codes, and what it prints.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use super::log_output;
use crate::program::cli::load::Exit;

/// Prints an error in one line, or the text that the program exits with. Returns the exit code: 0 for a text, 2 for an error
/// in the settings, otherwise 1.
pub fn exit_with(error: &anyhow::Error) -> ExitCode {
    let code = match error.downcast_ref() {
        Some(Exit::Print(text)) => {
            print(text);
            return ExitCode::SUCCESS;
        }
        Some(Exit::Usage(_)) => 2,
        None => 1,
    };
    log_output::write_error(error);
    code.into()
}

/// Prints a line. Ignores errors: standard output may be closed.
pub fn print(text: &str) {
    let mut out = io::stdout();
    let _ = writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush());
}
