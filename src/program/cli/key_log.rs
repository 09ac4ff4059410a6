//! Keeps the secrets of TLS sessions off the disk.
//!
//! libp2p-tls appends the secrets of each session to the file that the environment variable
//! `SSLKEYLOGFILE` names, and has no setting against it. A process changes its own environment only with
//! `unsafe`, so the program executes itself anew, as the same process and without the variable.

use std::env;

use anyhow::{Context, Result};

const VARIABLE: &str = "SSLKEYLOGFILE";

/// Makes sure that the variable is not set. Returns only if it is not.
///
/// # Errors
///
/// When it is set, and the program cannot be executed anew.
pub fn forbid() -> Result<()> {
    if env::var_os(VARIABLE).is_none() {
        return Ok(());
    }
    execute_without_it().with_context(|| {
        format!("{VARIABLE} is set, and the program could not be started without it; unset it")
    })
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
    anyhow::bail!("it cannot replace its own process here")
}
