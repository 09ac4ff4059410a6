//! The program from its first line to its last: what it says, and what ends it.

use std::{
    error::Error,
    fmt,
    io::{self, IsTerminal, Write},
    net::TcpListener,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use async_signal::Signals;
use futures_timer::Delay;
use libp2p::{
    Multiaddr,
    futures::{
        FutureExt, StreamExt,
        future::{Either, pending, poll_fn},
        select_biased, stream,
    },
};
use log::LevelFilter;

#[cfg(feature = "websocket")]
use super::tls_files::Certificates;
#[cfg(feature = "http")]
use super::values::Parsed;
use super::{
    flags::{Flags, in_flags},
    identity, key_log,
    load::Stop,
    log_summary::Digest,
    memory_estimate, reload, runtime, sd_notify,
    signals::{self, Order, Phase},
    startup_log,
};
#[cfg(feature = "http")]
use crate::program::http::monitor::Watch;
#[cfg(feature = "pnet")]
use crate::program::net::swarm_key;
use crate::{
    address,
    config::ConfigError,
    program::{
        component::{Component, poll_due},
        net::{admission::open_files, interfaces, multiaddr},
        node::{Node, NodeEvent, Setup},
    },
};

/// How long the machine gets to name its addresses before the relay says that none is global.
const SETTLED: Duration = Duration::from_millis(500);

/// How often the log says what was refused, and what came back.
const MINUTE: Duration = Duration::from_secs(60);

/// What logs as errors or warnings what any stranger can provoke, and so has to be asked for by its
/// name. soketto is WebSocket.
const TOO_LOUD: [&str; 1] = ["soketto"];

/// Something in the command line that makes no sense.
#[derive(Debug)]
struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Usage {}

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    // Without any, the first hash map would panic.
    if let Err(error) = getrandom::fill(&mut [0]) {
        return failed(&anyhow!(
            "this system has no random numbers: {error}; give it /dev/urandom"
        ));
    }
    if let Err(error) = key_log::forbid() {
        return failed(&error);
    }
    let flags = match Flags::of_process() {
        Ok(flags) => flags,
        Err(Stop::Asked(text)) => {
            say(&text);
            return ExitCode::SUCCESS;
        }
        Err(Stop::Usage(line)) => return failed(&Usage(line).into()),
    };
    start_log();
    runtime::keep_what_is_freed();
    match runtime::run(flags.threads(), async move { run(&flags).await }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

/// The log on standard error, as `RUST_LOG` has it.
fn start_log() {
    let mut log = env_logger::Builder::new();
    log.filter_level(LevelFilter::Info);
    for library in TOO_LOUD {
        log.filter_module(library, LevelFilter::Off);
    }
    log.parse_default_env().init();
}

/// One line that says why there is no relay, and the status: 2 for bad usage, else 1.
fn failed(error: &anyhow::Error) -> ExitCode {
    let _ = writeln!(io::stderr(), "relaylet: {error:#}");
    ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
}

async fn run(flags: &Flags) -> Result<()> {
    let signals = Signals::new(signals::SIGNALS).context("signals cannot be received")?;
    // As a set of one, because a set asks only who has called: to ask for signals takes two system
    // calls, and the relay comes by here each time that a connection gets on.
    let mut signals = stream::select_all([signals]);
    let identity = identity::load_or_make(&flags.identity)?;
    let mut node = Node::with_setup(identity.keypair, flags.config(), setup(flags)?)
        .map_err(|error| usage_if_config(flags, error))?;
    node.set_proxies(flags.proxies());
    #[cfg(feature = "autonat")]
    if flags.autonat {
        node.serve_autonat(flags.autonat_private)?;
    }
    log::info!("relaylet {} is {}", env!("CARGO_PKG_VERSION"), node.peer_id());
    if let Some(file) = identity.new {
        let file = file.display();
        log::info!("new identity in {file}: keep that file, clients know the relay by it");
        if !flags.announce.is_empty() {
            log::warn!(
                "--announce with a new identity: clients that know the relay by another peer id can no longer \
                 reach it; restore its key to {file} if it had one"
            );
        }
    }
    let mut components: Vec<Box<dyn Component>> = Vec::new();
    #[cfg(feature = "websocket")]
    components.push(Box::new(Certificates::start(flags, &mut node)?));
    #[cfg(feature = "dht")]
    if let Some(dht) = flags.joins().map_err(Usage)? {
        log::info!("{}", startup_log::joins(&dht));
        node.join(dht);
    }
    if let Some(watchdog) = sd_notify::Watchdog::of_process() {
        components.push(Box::new(watchdog));
    }
    listen(&mut node, flags)?;
    #[cfg(feature = "http")]
    if let Some(Parsed(address)) = flags.http {
        components.insert(0, Box::new(Watch::start(address, &node)?)); // polled first
    }
    log::info!("{}", startup_log::relays(&flags.config()));
    let behind_proxy = !flags.proxy_protocol_from.is_empty();
    let dialed = flags.dials();
    let most = memory_estimate::most(
        &flags.config(),
        &flags.limits(),
        &flags.stream_limits(),
        memory_estimate::Uses {
            threads: flags.threads(),
            dialed: dialed + flags.dials_back(),
            websocket: flags.listens_on_websocket(),
        },
    );
    log::info!("{}", startup_log::takes(most));
    let too_few_files = open_files::raise_limit(&flags.limits(), behind_proxy, dialed);
    let too_much = memory_estimate::available()
        .and_then(|available| startup_log::takes_too_much(most, available));
    let in_vain = startup_log::announced_in_vain(&flags.config().announce, node.peer_id());
    let warnings =
        flags.warnings.iter().cloned().chain(startup_log::regrettable(flags)).chain(in_vain);
    for warning in warnings.chain(identity.warning).chain(too_few_files).chain(too_much) {
        log::warn!("{warning}");
    }
    sd_notify::ready(node.peer_id());

    let mut settled = Delay::new(SETTLED).fuse();
    let mut minute = Delay::new(MINUTE);
    let mut digest = Digest::default();
    let mut settings = reload::Settings::new(flags);
    let mut phase = Phase::default();
    let mut time_is_over = Either::Left(pending()).fuse();
    loop {
        if phase == Phase::Ending && node.connections() == 0 {
            log::info!("ending: nobody is left");
            return Ok(());
        }
        select_biased! {
            signal = signals.next() => {
                let signal = match signal {
                    Some(Ok(signal)) => signal,
                    Some(Err(_)) => continue, // one that was interrupted
                    None => bail!("signals are received no longer"),
                };
                let name = signals::name(signal);
                match phase.order(signal) {
                    Some(Order::End) => {
                        log::info!("ending: {name}");
                        sd_notify::stopping(Duration::ZERO);
                        return Ok(());
                    }
                    Some(Order::DrainAndEnd) => {
                        let drain = settings.now.drain.0;
                        log::info!("{name}: draining for {drain}, then ending");
                        sd_notify::stopping(drain.into());
                        node.drain(drain.into());
                        time_is_over = Either::Right(Delay::new(drain.into())).fuse();
                    }
                    Some(Order::Drain) => {
                        log::info!("{name}: draining; another one resumes");
                        node.drain(*settings.now.drain.0);
                    }
                    Some(Order::Resume) => match node.resume() {
                        Ok(()) => log::info!("{name}: taking clients in again"),
                        Err(error) => {
                            phase = Phase::Draining;
                            log::error!("{name}: still draining, for it cannot listen: {error}");
                        }
                    },
                    Some(Order::Reload) => {
                        settings.read_again(&mut node);
                        for component in &mut components {
                            component.on_reload(settings.now.certificate_files(), &mut node);
                        }
                    }
                    None => {}
                }
            }
            () = time_is_over => {
                log::info!("ending: {} connections had circuits to the last", node.connections());
                return Ok(());
            }
            // Before what happens: that never stops on a busy relay.
            index = poll_fn(|cx| poll_due(&mut components, cx)).fuse() => {
                if let Some(component) = components.get_mut(index) {
                    component.on_due(&mut node);
                }
            }
            () = settled => tell_where(&node, &flags.config().announce),
            () = (&mut minute).fuse() => {
                minute.reset(MINUTE);
                for line in digest.lines(node.buffered(), node.busiest()) {
                    log::info!("{line}");
                }
            }
            event = node.next().fuse() => {
                for component in &mut components {
                    component.on_event(&event);
                }
                if let Some(warning) = digest.note(&event) {
                    log::warn!("{warning}");
                }
                tell(&node, event);
            }
        }
    }
}

fn setup(flags: &Flags) -> Result<Setup> {
    Ok(Setup {
        limits: flags.limits(),
        streams: flags.stream_limits(),
        one_thread: flags.threads() == 1,
        #[cfg(feature = "pnet")]
        swarm_key: match &flags.swarm_key {
            Some(file) => {
                let key = swarm_key::load(file)?;
                if let Some(warning) = identity::open_to_others("--swarm-key", file) {
                    log::warn!("{warning}");
                }
                Some(key)
            }
            None => None,
        },
    })
}

fn listen(node: &mut Node, flags: &Flags) -> Result<()> {
    let (mut addresses, asked_for) = flags.listen_addresses();
    if !asked_for {
        addresses.retain(|address| {
            let has = machine_has(address);
            if !has {
                log::warn!("not listening on {address}: this machine has no such address");
            }
            has
        });
    }
    if addresses.is_empty() {
        bail!("--listen: this machine has neither IPv4 nor IPv6");
    }
    for address in addresses {
        if !has_family(&address) {
            bail!("--listen {address}: this machine has no address of that kind; name another");
        }
        node.listen_on(address.clone()).map_err(|error| anyhow!("--listen {address}: {error}"))?;
    }
    Ok(())
}

/// Whether the machine has this kind of address at all: IPv6 may be switched off.
fn machine_has(address: &Multiaddr) -> bool {
    let bound = multiaddr::listen_address(address)
        .is_some_and(|(socket, _)| TcpListener::bind((socket.ip(), 0)).is_ok());
    bound && has_family(address)
}

fn has_family(address: &Multiaddr) -> bool {
    multiaddr::listen_address(address)
        .is_none_or(|(socket, _)| interfaces::has_one_like(socket.ip()))
}

fn usage_if_config(flags: &Flags, error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<ConfigError>() {
        Ok(error) => Usage(flags.locate(in_flags(error))).into(),
        Err(error) => error,
    }
}

fn tell(node: &Node, event: NodeEvent) {
    match event {
        NodeEvent::Listening(address) => {
            let line = format!("listening on {address}/p2p/{}", node.peer_id());
            say(&line);
            // In a terminal both are in one place.
            if !(io::stdout().is_terminal() && io::stderr().is_terminal()) {
                log::info!("{line}");
            }
        }
        NodeEvent::NotListening(address) => log::info!("no longer listening on {address}"),
        _ => {} // logged where it happened
    }
}

/// Standard output may be closed, or a pipe that nobody reads any more; the relay goes on.
fn say(text: &str) {
    let mut out = io::stdout();
    let _ = writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush());
}

/// The machine has named its addresses by now.
fn tell_where(node: &Node, announce: &[Multiaddr]) {
    let is_known = |address: &&Multiaddr| !address::is_unspecified(address);
    let found: Vec<_> = node.listeners().filter(is_known).cloned().collect();
    let out = interfaces::way_out();
    for line in startup_log::reached_at(node.peer_id(), announce, &found, out) {
        log::info!("{line}");
    }
    for address in announce.iter().skip(1) {
        let address = address.clone().with_p2p(node.peer_id()).unwrap_or_else(|other| other);
        log::info!("and at {address}");
    }
    let unreachable = startup_log::unreachable(announce, &found);
    for warning in unreachable.into_iter().chain(startup_log::too_many(announce, &found)) {
        log::warn!("{warning}");
    }
}
