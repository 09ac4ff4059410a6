//! The commands that run no relay: `relaylet check` and `relaylet id`.
//!
//! Their flags are not settings: they are neither in the configuration file nor in the table of `Flags`.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use log::Level;
use structopt::{StructOpt, clap::AppSettings as Set};

use super::output::{print, print_problem};
use crate::program::cli::{
    identity,
    load::{Exit, from_clap_error, to_utf8},
};
#[cfg(feature = "check")]
use crate::program::{
    check,
    cli::{runtime, values::Parsed},
    net::swarm_key,
};

/// Checks whether clients can use a relay, of any libp2p implementation, and says why if they cannot.
///
/// Prints a line for each step with its time: DNS, TCP, TLS, WebSocket, swarm key, Noise or TLS, yamux, identify, a slot,
/// and a circuit to itself. The exit code is 0 if all of them succeed, otherwise 1.
#[cfg(feature = "check")]
#[derive(Debug, StructOpt)]
#[structopt(
    name = "relaylet check",
    usage = "relaylet check <MULTIADDR> [--quick] [--swarm-key <FILE>]"
)]
#[structopt(settings = &[Set::UnifiedHelpMessage, Set::NextLineHelp, Set::DeriveDisplayOrder, Set::DisableVersion, Set::NoBinaryName])]
struct Check {
    /// The relay, with or without its peer id: /dns4/relay.example.org/tcp/443/tls/ws/p2p/12D3KooW…, or /dnsaddr/example.org
    #[structopt(value_name = "MULTIADDR")]
    address: Parsed<libp2p::Multiaddr>,

    /// Stops after identify, and takes no slot: for health checks
    #[structopt(long)]
    quick: bool,

    /// File with the key of the relay's private network
    #[structopt(long, value_name = "FILE", env = "RELAYLET_SWARM_KEY", hide_env_values = true)]
    swarm_key: Option<PathBuf>,
}

/// Prints the relay's peer id, and creates its key if there is none.
#[derive(Debug, StructOpt)]
#[structopt(name = "relaylet id", usage = "relaylet id [--identity <FILE>] [--import <FILE>]")]
#[structopt(settings = &[Set::UnifiedHelpMessage, Set::NextLineHelp, Set::DeriveDisplayOrder, Set::DisableVersion, Set::NoBinaryName])]
struct Id {
    /// File with the relay's private key
    ///
    /// [default: relaylet.key]
    #[structopt(long, value_name = "FILE", env = "RELAYLET_IDENTITY", hide_env_values = true)]
    identity: Option<PathBuf>,

    /// Reads the key from this file, and writes it to that of --identity, which must not hold another key
    ///
    /// It may be kubo's configuration, a key that kubo exported, an Ed25519 key in PEM, or a relaylet key file, also
    /// in base64.
    #[structopt(long, value_name = "FILE")]
    import: Option<PathBuf>,
}

/// Runs the command that the first of these arguments names. Returns its exit code; `None` if it names none.
///
/// # Errors
///
/// When the command is unknown or fails, or is to print its help: an [`Exit`].
pub fn run(arguments: &[OsString]) -> Result<Option<ExitCode>> {
    let Some((name, arguments)) = arguments.split_first() else { return Ok(None) };
    match name.to_str() {
        Some("check") => check(arguments).map(Some),
        Some("id") => parse(arguments).and_then(print_id).map(Some),
        Some(word) if !word.starts_with('-') => {
            let remedy = "try check or id, or see relaylet --help";
            Err(Exit::from(format!("{word}: unknown command; {remedy}")).into())
        }
        _ => Ok(None),
    }
}

fn parse<T: StructOpt>(arguments: &[OsString]) -> Result<T> {
    // Otherwise clap panics at variables that are not UTF-8, and at some words whatever its settings.
    let clap = T::clap().setting(Set::StrictUtf8);
    let name = clap.get_name().to_owned();
    let words = arguments.iter().cloned().map(to_utf8).collect::<Result<Vec<_>, _>>();
    let matches = clap.get_matches_from_safe(words.map_err(Exit::from)?);
    Ok(T::from_clap(&matches.map_err(|error| from_clap_error(error, Some(&name)))?))
}

#[cfg(not(feature = "check"))]
fn check(_: &[OsString]) -> Result<ExitCode> {
    let problem = "check: this relaylet was built without it; build it with the feature check";
    Err(Exit::Usage(problem.into()).into())
}

#[cfg(feature = "check")]
fn check(arguments: &[OsString]) -> Result<ExitCode> {
    let Check { address: Parsed(address), quick, swarm_key } = parse(arguments)?;
    let Some(mut target) = check::Target::parse(&address) else {
        let problem = "not an address over TCP or WebSocket; try /ip4/192.0.2.1/tcp/4001, or \
                       /dns4/relay.example.org/tcp/443/tls/ws";
        return Err(Exit::Usage(format!("{address}: {problem}")).into());
    };
    let file = swarm_key.filter(is_set);
    target.swarm_key = file.map(|file| swarm_key::load(&file)).transpose()?;
    let checked =
        runtime::run(1, check::check(target, quick, |step| drop(print(&step.to_string()))));
    Ok(if checked.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// An empty variable counts as not set.
fn is_set(file: &PathBuf) -> bool {
    file != Path::new("")
}

fn print_id(Id { identity, import }: Id) -> Result<ExitCode> {
    let file = identity.filter(is_set).unwrap_or_else(|| "relaylet.key".into());
    let identity = match import {
        Some(from) => identity::import(&from, &file)?,
        None => identity::load_or_create(&file)?,
    };
    if let Some(warning) = identity.warning {
        print_problem(Level::Warn, &warning);
    }
    print(&identity.keypair.public().to_peer_id().to_string())?;
    Ok(ExitCode::SUCCESS)
}
