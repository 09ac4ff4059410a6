//! The configuration, read again while the relay runs.

use super::{flags, flags::Flags, load::Stop};
use crate::program::node::Node;

/// What is read at the start only. `max-circuits-per-peer` can be lowered while the relay runs.
const AT_START: &str = "autonat bootstrap dht dht-protocol http identity listen swarm-key threads \
    max-buffered max-buffered-per-connection max-circuits-per-peer max-connections max-handshakes \
    max-connections-per-ip max-connections-per-peer max-connections-per-subnet max-streams max-streams-per-connection \
    stream-rate";

/// The settings that the relay was started with, and those that hold now.
#[derive(Debug)]
pub struct Settings {
    at_start: Flags,
    /// What holds now.
    pub now: Flags,
}

impl Settings {
    /// A relay that was started with these.
    pub fn new(flags: &Flags) -> Self {
        Self { at_start: flags.clone(), now: flags.clone() }
    }

    /// Reads flags, environment and file once more, and has the node follow. What is wrong is told,
    /// and changes nothing.
    pub fn read_again(&mut self, node: &mut Node) {
        match self.now.config {
            Some(_) => match Flags::of_process().and_then(|flags| self.follow(flags, node)) {
                Err(Stop::Usage(problem)) => log::error!("SIGHUP: nothing has changed: {problem}"),
                Ok(()) | Err(Stop::Asked(_)) => {} // the arguments are those that started it
            },
            None if self.now.tls_cert.is_some() => {}
            None => log::warn!("SIGHUP: there is no file to read again; name one with --config"),
        }
    }

    fn follow(&mut self, mut flags: Flags, node: &mut Node) -> Result<(), Stop> {
        let lowered = flags.max_circuits_per_peer < self.at_start.max_circuits_per_peer;
        let mut restart = self.at_start.differ_in(&flags)?;
        restart.retain(|name| AT_START.split(' ').any(|at_start| at_start == name));
        restart.retain(|name| !(lowered && name == "max-circuits-per-peer"));
        // Connections are made for so many since the start.
        let most = self.at_start.max_circuits_per_peer;
        flags.max_circuits_per_peer = flags.max_circuits_per_peer.min(most);
        let mut changed = flags.differ_in(&self.now)?;
        changed.retain(|name| name == "max-circuits-per-peer" || !restart.contains(name));
        node.set_config(flags.config()).map_err(|error| flags.locate(flags::in_flags(error)))?;
        node.set_proxies(flags.proxies());
        for name in &restart {
            log::warn!("SIGHUP: {name} holds from the next start on");
        }
        match changed.is_empty() {
            true => log::info!("SIGHUP: nothing to change"),
            false => log::info!("SIGHUP: changed: {}", changed.join(", ")),
        }
        self.now = flags;
        Ok(())
    }
}

impl Flags {
    /// The names of the settings in which these flags differ from others.
    ///
    /// # Errors
    ///
    /// As [`Flags::to_table`].
    pub fn differ_in(&self, others: &Self) -> Result<Vec<String>, String> {
        let both = self.settings()?.into_iter().zip(others.settings()?);
        Ok(both.filter(|(one, other)| one != other).map(|((name, _), _)| name).collect())
    }
}

#[cfg(test)]
mod tests {
    use structopt::StructOpt;

    use super::*;

    #[test]
    fn a_number_that_the_running_relay_does_not_take_up_is_known_to_need_a_restart() {
        let defaults = Flags::from_iter([""; 0]);
        let settings = defaults.settings().unwrap();
        let numbers: Vec<_> = settings.iter().filter(|(_, value)| value.is_integer()).collect();
        assert!(numbers.len() > 15);
        for (name, _) in numbers {
            let flags = Flags::from_iter([&format!("--{name}"), "7777777"]);
            let is_taken_up = flags.config() != defaults.config();
            let at_start = AT_START.split(' ').any(|at_start| at_start == name);
            assert!(is_taken_up != at_start || name == "max-circuits-per-peer", "{name}");
        }
    }
}
