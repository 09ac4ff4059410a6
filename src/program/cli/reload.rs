//! The configuration, read again while the relay runs.

use toml::Value;

use super::{flags, flags::Flags, load::Stop, values::SHOWN};
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
        for line in self.now.changes(&flags, &changed)? {
            log::info!("SIGHUP: {line}");
        }
        for warning in &flags.warnings {
            log::warn!("SIGHUP: {warning}");
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

    /// A line for each of the settings of these names, with its value before and after.
    fn changes(&self, after: &Self, names: &[String]) -> Result<Vec<String>, String> {
        let (old, new, given) = (self.settings()?, after.settings()?, after.to_table()?);
        let line = |name: &String| {
            let derived = if given.contains_key(name) { "" } else { " (derived from others)" };
            let [before, after] =
                [&old, &new].map(|all| all.get(name).map_or(String::new(), shown));
            format!("{name}: {before} → {after}{derived}")
        };
        Ok(names.iter().map(line).collect())
    }
}

/// A value as a file has it; of a long one the beginning.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use structopt::StructOpt;

    use super::*;

    #[test]
    fn a_change_is_told_with_the_value_before_and_after() {
        let before = Flags::from_iter([""; 0]);
        let after = Flags::from_iter([
            "--grace=1m",
            "--max-reservations=4096",
            "--announce=/dns4/a.example/tcp/1",
        ]);
        let mut names = after.differ_in(&before).unwrap();
        names.retain(|name| ["announce", "grace", "max-connections"].contains(&name.as_str()));
        let expected = [
            r#"announce: [] → ["/dns4/a.example/tcp/1"]"#,
            r#"grace: "30s" → "1m""#,
            "max-connections: 2048 → 8192 (derived from others)",
        ];
        assert_eq!(before.changes(&after, &names).unwrap(), expected);
        assert_eq!(shown(&"x".repeat(1000).into()).chars().count(), SHOWN + 1);
    }

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
