//! Keeps the secrets of TLS sessions from being written to a file.
//!
//! libp2p-tls appends the secrets of each session to the file that the environment variable `SSLKEYLOGFILE` names, and no
//! setting turns that off. To change its own environment a process needs `unsafe` code, so the program executes itself
//! again without the variable, in the same process.

use std::env;

use anyhow::{Context, Result};

const VARIABLE: &str = "SSLKEYLOGFILE";

/// Returns if the variable is not set; otherwise executes the program again without it.
///
/// # Errors
///
/// When the program cannot be executed again.
pub fn disable() -> Result<()> {
    if env::var_os(VARIABLE).is_none() {
        return Ok(());
    }
    execute_without_it()
        .with_context(|| format!("{VARIABLE} is set and restarting without it failed; unset it"))
}

#[cfg(unix)]
fn execute_without_it() -> Result<()> {
    use std::{os::unix::process::CommandExt, process::Command};

    let mut arguments = env::args_os();
    let mut command = Command::new(env::current_exe()?);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    Err(command.args(arguments).env_remove(VARIABLE).exec().into())
}

#[cfg(not(unix))]
fn execute_without_it() -> Result<()> {
    anyhow::bail!("this system cannot replace a process")
}
