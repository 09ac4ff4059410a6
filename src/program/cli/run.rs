//! Starts the relay, runs its main loop, and exits.

mod output;
mod subcommand;

use std::{env, net::TcpListener, process::ExitCode, time::Duration};

use anyhow::{Context, Result, anyhow, bail, ensure};
use async_signal::Signals;
use futures_timer::Delay;
use libp2p::{
    Multiaddr,
    futures::{
        FutureExt, StreamExt,
        future::{Either, pending, poll_fn},
        select_biased, stream,
    },
    identity::Keypair,
};
use log::Level;

use self::output::{exit_with, print};
#[cfg(feature = "websocket")]
use super::tls_files::TlsFiles;
use super::{
    derived::memory_estimate,
    flags::{Flags, message_with_flag},
    identity,
    load::Exit,
    log_summary::LogSummary,
    reload, runtime,
    sd_notify::{self, ServiceManager},
    signals::{self, Phase, SignalAction},
    startup_log,
};
#[cfg(feature = "http")]
use crate::program::http::{monitor::Monitor, stats::StartLimits};
#[cfg(feature = "pnet")]
use crate::program::net::swarm_key;
use crate::{
    address,
    program::{
        component::{Component, poll_due},
        net::{admission::open_files, interfaces, multiaddr},
        node::{Node, NodeEvent, Setup},
    },
};

/// How long to wait for the addresses of wildcard listeners before the relay logs which of them clients can dial.
const ADDRESSES_AFTER: Duration = Duration::from_millis(500);

/// How often the log summary is written.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(60);

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    start().unwrap_or_else(|error| exit_with(&error))
}

fn start() -> Result<ExitCode> {
    // Without random numbers the first hash map would panic.
    getrandom::fill(&mut [0])
        .map_err(|error| anyhow!("reading random numbers failed: {error}; provide /dev/urandom"))?;
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    if let Some(code) = subcommand::run(&arguments)? {
        return Ok(code);
    }
    let flags = Flags::of_process()?;
    if flags.print_config {
        let any = Keypair::generate_ed25519().public().to_peer_id(); // creates no key file
        for warning in startup_log::questionable_settings(&flags, any) {
            output::print_problem(Level::Warn, &warning);
        }
        print(&flags.to_file().map_err(Exit::from)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::start_log();
    runtime::keep_freed_memory(flags.given().kept_by_thread());
    runtime::run(flags.threads(), async move { run(&flags).await })?;
    Ok(ExitCode::SUCCESS)
}

async fn run(flags: &Flags) -> Result<()> {
    // 1. Signals, the identity and the node.
    let signals = Signals::new(signals::SIGNALS).context("signals cannot be received")?;
    // `SelectAll` polls a stream only once its waker was called. Polling this one takes two system calls, and the main
    // loop runs each time that a connection makes progress.
    let mut signals = stream::select_all([signals]);
    let identity = identity::load_or_create(&flags.identity)?;
    let setup = Setup {
        limits: flags.limits(),
        streams: flags.stream_limits(),
        one_thread: flags.threads() == 1,
        #[cfg(feature = "pnet")]
        swarm_key: flags.swarm_key.as_deref().map(load_swarm_key).transpose()?,
    };
    let node = Node::with_setup(identity.keypair, flags.config(), setup);
    let mut node = node.map_err(|error| match error.downcast() {
        Ok(error) => Exit::Usage(flags.locate(message_with_flag(error))).into(),
        Err(error) => error,
    })?;
    node.set_proxies(flags.proxies());
    #[cfg(feature = "websocket")]
    node.set_forwarders(flags.forwarders());
    #[cfg(feature = "autonat")]
    if flags.autonat {
        node.serve_autonat(flags.autonat_private)?;
    }
    log::info!("relaylet {} is {}", env!("CARGO_PKG_VERSION"), node.peer_id());
    if let Some(file) = identity.created {
        let file = file.display();
        log::info!("identity created: {file}; keep that file, clients know the relay by it");
        if !flags.announce.is_empty() {
            log::warn!(
                "--announce with a new identity: clients that know the relay by another peer id can no longer \
                 reach it; restore the previous key to {file} if there is one"
            );
        }
    }

    // 2. Components, the DHT, listeners, the HTTP server.
    let mut components: Vec<Box<dyn Component>> = Vec::new();
    #[cfg(feature = "websocket")]
    components.push(Box::new(TlsFiles::start(flags.certificate_files(), &mut node)?));
    #[cfg(feature = "dht")]
    if let Some(dht) = flags.dht_config().map_err(Exit::Usage)? {
        log::info!("{}", startup_log::dht(&dht));
        node.join(dht);
    }
    listen(&mut node, flags)?;
    #[cfg(feature = "http")]
    if let Some(address) = flags.http {
        let (streams, memory) = (flags.stream_limits(), flags.given().estimate());
        let limits = StartLimits { connections: flags.limits(), streams, memory };
        let monitor = Monitor::start(address.0, flags.http_host.clone(), limits, &node)?;
        components.insert(0, Box::new(monitor)); // polled first
    }

    // 3. The startup log, and the notice that the relay is ready.
    log_limits(flags, &node);
    if let Some(warning) = identity.warning {
        log::warn!("{warning}");
    }
    if let Some(manager) = ServiceManager::report_ready(&node) {
        components.push(Box::new(manager));
    }

    main_loop(flags, &mut node, &mut components, &mut signals).await
}

/// Logs the limits, the memory estimate, and warnings about the settings. Raises the limit of open files.
fn log_limits(flags: &Flags, node: &Node) {
    let given = flags.given();
    let (estimate, dht_dials) = (given.estimate(), given.usage.dialed_for_dht());
    log::info!("{}", startup_log::capacity(node.relay().config()));
    log::info!("{}", startup_log::memory(estimate));
    let too_few_files = open_files::raise_limit(&flags.limits(), dht_dials);
    let memory_exceeded = memory_estimate::available().and_then(|available| {
        startup_log::memory_exceeded(estimate, available, flags.memory.is_some())
    });
    let warnings = startup_log::questionable_settings(flags, node.peer_id());
    for warning in warnings.into_iter().chain(too_few_files).chain(memory_exceeded) {
        log::warn!("{warning}");
    }
}

/// Runs the node until a signal, or the end of a drain, ends the program.
async fn main_loop(
    flags: &Flags,
    node: &mut Node,
    components: &mut [Box<dyn Component>],
    signals: &mut stream::SelectAll<Signals>,
) -> Result<()> {
    let mut addresses_are_due = Delay::new(ADDRESSES_AFTER).fuse();
    let mut next_summary = Delay::new(SUMMARY_INTERVAL);
    let mut summary = LogSummary::default();
    let mut settings = reload::Settings { at_start: flags, now: flags.clone() };
    let mut phase = Phase::default();
    let mut drain_timeout = Either::Left(pending()).fuse();
    loop {
        if phase == Phase::Exiting && node.connections() == 0 {
            log::info!("exiting: no connections are left");
            return Ok(());
        }
        select_biased! {
            signal = signals.next() => {
                let signal = match signal {
                    Some(Ok(signal)) => signal,
                    Some(Err(_)) => continue, // interrupted
                    None => bail!("signals can no longer be received"),
                };
                let name = signals::name(signal);
                match phase.on_signal(signal) {
                    Some(SignalAction::Exit) => {
                        log::info!("exiting: {name}");
                        sd_notify::report_stopping(Duration::ZERO);
                        return Ok(());
                    }
                    Some(SignalAction::DrainAndExit) => {
                        let drain = settings.now.drain.0;
                        log::info!("{name}: draining for {drain}, then exiting");
                        sd_notify::report_stopping(drain.into());
                        node.drain(drain.into());
                        drain_timeout = Either::Right(Delay::new(drain.into())).fuse();
                    }
                    Some(SignalAction::Drain) => {
                        log::info!("{name}: draining until the next {name}");
                        node.drain(*settings.now.drain.0);
                    }
                    Some(SignalAction::Resume) => match node.resume() {
                        Ok(()) => log::info!("{name}: admitting clients again"),
                        Err(error) => {
                            phase = Phase::Draining;
                            log::error!("{name}: still draining: listening failed: {error}");
                        }
                    },
                    Some(SignalAction::Reload) => {
                        settings.reload(node);
                        for component in &mut *components {
                            component.on_reload(settings.now.certificate_files(), node);
                        }
                    }
                    None => {}
                }
            }
            () = drain_timeout => {
                let circuits = node.relay().view().circuits.open().count();
                let connections = node.connections();
                log::info!("drain timeout reached: closing {connections} connections with {circuits} circuits");
                return Ok(());
            }
            // Before the node's events, which a busy relay never runs out of.
            index = poll_fn(|cx| poll_due(components, cx)).fuse() => {
                if let Some(component) = components.get_mut(index) {
                    component.on_due(node);
                }
            }
            () = addresses_are_due => log_addresses(node),
            () = (&mut next_summary).fuse() => {
                next_summary.reset(SUMMARY_INTERVAL);
                for line in summary.take_lines(node.buffered(), node.busiest()) {
                    log::info!("{line}");
                }
            }
            event = node.next().fuse() => {
                for component in &mut *components {
                    component.on_event(&event);
                }
                if let Some(warning) = summary.on_event(&event) {
                    log::warn!("{warning}");
                }
                log_listener(node, event);
            }
        }
    }
}

#[cfg(feature = "pnet")]
fn load_swarm_key(file: &std::path::Path) -> Result<swarm_key::PreSharedKey> {
    let key = swarm_key::load(file)?;
    if let Some(warning) = identity::permission_warning("--swarm-key", file) {
        log::warn!("{warning}");
    }
    Ok(key)
}

fn listen(node: &mut Node, flags: &Flags) -> Result<()> {
    let (addresses, are_set) = flags.listen_addresses();
    let mut is_listening = false;
    for address in addresses {
        let ip = multiaddr::listen_address(&address).map(|(socket, _)| socket.ip());
        let has_version = ip.is_none_or(interfaces::has_version_of);
        if are_set && !has_version {
            bail!(
                "--listen {address}: this machine has no address of that IP version; name another"
            );
        }
        // IPv6 may be switched off.
        let can_bind = ip.is_some_and(|ip| has_version && TcpListener::bind((ip, 0)).is_ok());
        if !are_set && !can_bind {
            log::warn!(
                "not listening on {address}: this machine has no address of that IP version"
            );
            continue;
        }
        node.listen_on(address.clone()).map_err(|error| anyhow!("--listen {address}: {error}"))?;
        is_listening = true;
    }
    ensure!(is_listening, "--listen: this machine has neither IPv4 nor IPv6");
    Ok(())
}

fn log_listener(node: &Node, event: NodeEvent) {
    match event {
        NodeEvent::Listening(address) => {
            let line = format!("listening on {address}/p2p/{}", node.peer_id());
            let _ = print(&line); // stdout may be closed
            if !output::is_merged_with_stdout() {
                log::info!("{line}");
            }
        }
        NodeEvent::NotListening(address) => log::info!("no longer listening on {address}"),
        _ => {} // logged elsewhere
    }
}

/// Logs the addresses to paste into clients, and warnings about them.
fn log_addresses(node: &Node) {
    let announce = &node.relay().config().announce;
    let is_known = |address: &&Multiaddr| !address::is_unspecified(address);
    let found: Vec<_> = node.listeners().filter(is_known).cloned().collect();
    let outbound = interfaces::outbound_ip();
    for line in startup_log::client_addresses(node.peer_id(), announce, &found, outbound) {
        log::info!("{line}");
    }
    let unreachable = startup_log::unreachable(announce, &found);
    let too_many = startup_log::too_many_addresses(announce, &found);
    for warning in unreachable.into_iter().chain(too_many) {
        log::warn!("{warning}");
    }
}
