//! The configuration, read again while the relay runs.

use humantime::Duration;

use super::{
    command_line::{Stop, in_flags},
    flags::Flags,
    node::Node,
};

/// The settings that the relay was started with, and those that hold now.
#[derive(Debug)]
pub struct Settings {
    at_start: Flags,
    now: Flags,
}

impl Settings {
    /// A relay that was started with these.
    pub fn new(flags: &Flags) -> Self {
        Self {
            at_start: flags.clone(),
            now: flags.clone(),
        }
    }

    /// How long a drain takes.
    pub fn drain(&self) -> Duration {
        self.now.drain
    }

    /// What holds now.
    pub fn now(&self) -> &Flags {
        &self.now
    }

    /// Reads flags, environment and file once more, and has the node follow. What is wrong is told,
    /// and changes nothing.
    pub fn read_again(&mut self, node: &mut Node) {
        if self.now.config.is_none() {
            if !self.now.has_certificate() {
                log::warn!("SIGHUP: there is no file to read again; name one with --config");
            }
            return;
        }
        match Flags::of_process() {
            Ok(flags) => self.follow(flags, node),
            Err(Stop::Usage(problem)) => log::error!("SIGHUP: nothing has changed: {problem}"),
            Err(Stop::Asked(_)) => {} // the arguments are those that started it
        }
    }

    fn follow(&mut self, mut flags: Flags, node: &mut Node) {
        let restart = self.at_start.restart_for(&flags);
        // Connections are made for so many since the start.
        let most = self.at_start.max_circuits_per_peer;
        flags.max_circuits_per_peer = flags.max_circuits_per_peer.min(most);
        if let Err(error) = node.set_config(flags.config()) {
            let problem = flags.locate(in_flags(&error));
            log::error!("SIGHUP: nothing has changed: {problem}");
            return;
        }
        node.set_proxies(flags.proxy_protocol_from.clone());
        for name in &restart {
            log::warn!("SIGHUP: {name} holds from the next start on");
        }
        let mut changed = flags.differ_in(&self.now);
        changed.retain(|name| *name == "max-circuits-per-peer" || !restart.contains(name));
        match changed.is_empty() {
            true => log::info!("SIGHUP: nothing to change"),
            false => log::info!("SIGHUP: changed: {}", changed.join(", ")),
        }
        self.now = flags;
    }
}
