//! `relaylet [FLAGS]`: the relay as a program.

use std::process::ExitCode;

fn main() -> ExitCode {
    relaylet::program::cli::run::main()
}
