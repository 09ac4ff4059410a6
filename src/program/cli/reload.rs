//! Reloads the settings while the relay runs.

use std::fs;

use toml::Value;

use super::{
    derived::limit::{LIMITS, Limit},
    flags::{Flags, message_with_flag},
    load::Exit,
    startup_log,
    values::{MAX_SHOWN, Parsed},
};
use crate::program::node::Node;

/// The setting that requires a restart only if it is raised.
const PER_PEER: &str = "max-circuits-per-peer";

/// The settings that require a restart.
const REQUIRE_RESTART: &str = "autonat bootstrap dht dht-protocol http http-host identity listen swarm-key threads \
    max-buffered max-buffered-per-connection max-circuits-per-peer max-connections max-handshakes \
    max-connections-per-ip max-connections-per-peer max-connections-per-subnet max-streams max-streams-per-connection \
    stream-rate";

/// The settings at the start, and those since the last reload.
#[derive(Debug)]
pub struct Settings<'a> {
    /// The settings at the start.
    pub at_start: &'a Flags,
    /// The settings since the last reload. Those that require a restart take effect only then.
    pub now: Flags,
}

impl Settings<'_> {
    /// Reads flags, environment and file again, and applies them to the node. On an error, logs it and changes nothing.
    pub fn reload(&mut self, node: &mut Node) {
        match &self.now.config {
            // Reading it again might block for ever, or find nothing and reset all settings.
            Some(file) if fs::metadata(file).is_ok_and(|file| !file.is_file()) => log::error!(
                "SIGHUP: keeping the previous settings: --config {}: not a regular file; name one to reload it",
                file.display()
            ),
            Some(_) => match Flags::of_process().and_then(|flags| self.apply(flags, node)) {
                Err(Exit::Usage(problem)) => {
                    log::error!("SIGHUP: keeping the previous settings: {problem}");
                }
                Ok(()) | Err(Exit::Print(_)) => {} // the same arguments printed nothing at the start
            },
            None if self.now.tls_cert.is_some() => {} // `TlsFiles` reloads it
            None => log::warn!("SIGHUP: no file to reload; name one with --config"),
        }
    }

    /// Applies `flags`, read again, to the node, and logs what has changed.
    fn apply(&mut self, mut flags: Flags, node: &mut Node) -> Result<(), Exit> {
        // 1. Find what has changed, and what of that requires a restart: settings that are given, and derived ones.
        let per_peer = |flags: &Flags| flags.derived().get(Limit::CircuitsPerPeer);
        let limit = per_peer(self.at_start);
        let is_lowered = per_peer(&flags) < limit;
        let mut restart = self.at_start.differing(&flags)?;
        restart.retain(|name| requires_restart(name) && !(is_lowered && name == PER_PEER));
        let (before, after) = (self.at_start.to_table()?, flags.to_table()?);
        let is_given = |name: &String| before.contains_key(name) || after.contains_key(name);
        let (given, derived): (Vec<_>, Vec<_>) = restart.into_iter().partition(is_given);
        // The DHT stays as it is, and the other settings have to fit it.
        (flags.dht, flags.bootstrap) = (self.at_start.dht, self.at_start.bootstrap.clone());
        flags.check().map_err(|problem| flags.locate(problem))?;
        // The limits on streams follow from max-circuits-per-peer at the start.
        if per_peer(&flags) > limit {
            flags.max_circuits_per_peer = Some(Parsed(limit));
        }
        let mut changed = flags.differing(&self.now)?;
        changed.retain(|name| name == PER_PEER || !requires_restart(name));
        // 2. Apply it.
        node.set_config(flags.config()).map_err(|error| flags.locate(message_with_flag(error)))?;
        node.set_proxies(flags.proxies());
        #[cfg(feature = "websocket")]
        node.set_forwarders(flags.forwarders());
        // 3. Log it.
        for name in given {
            log::warn!("SIGHUP: {name} requires a restart");
        }
        if !derived.is_empty() {
            let limits = LIMITS.iter().map(|(_, flag)| flag.trim_start_matches("--"));
            let mut settings: Vec<_> =
                limits.chain(["memory", "listen", "autonat", "dht"]).collect();
            settings.retain(|name| before.get(*name) != after.get(*name));
            let (settings, derived) = (settings.join(", "), derived.join(", "));
            log::warn!("SIGHUP: requires a restart: {derived} (derived from {settings})");
        }
        match changed.is_empty() {
            true => log::info!("SIGHUP: no setting has changed"),
            false => log::info!("SIGHUP: changed: {}", changed.join(", ")),
        }
        for line in self.now.changes(&flags, &changed)? {
            log::info!("SIGHUP: {line}");
        }
        for warning in startup_log::questionable_settings(&flags, node.peer_id()) {
            log::warn!("SIGHUP: {warning}");
        }
        self.now = flags;
        Ok(())
    }
}

fn requires_restart(setting: &str) -> bool {
    REQUIRE_RESTART.split(' ').any(|name| name == setting)
}

impl Flags {
    /// The names of the settings that differ from those of `others`.
    ///
    /// # Errors
    ///
    /// As [`Flags::to_table`].
    pub fn differing(&self, others: &Self) -> Result<Vec<String>, String> {
        let (settings, others) = (self.settings()?, others.settings()?);
        let differing =
            settings.into_iter().filter(|(name, value)| others.get(name) != Some(value));
        Ok(differing.map(|(name, _)| name).collect())
    }

    /// A line for each of the settings `names`, with its value before and after.
    fn changes(&self, after: &Self, names: &[String]) -> Result<Vec<String>, String> {
        let (old, new, given) = (self.settings()?, after.settings()?, after.to_table()?);
        let line = |name: &String| {
            let is_unset = new.get(name).and_then(Value::as_str) == Some("");
            let is_derived = !given.contains_key(name) && !is_unset;
            let derived = if is_derived { " (derived from others)" } else { "" };
            let [before, after] =
                [&old, &new].map(|all| all.get(name).map_or(String::new(), shown));
            format!("{name}: {before} → {after}{derived}")
        };
        Ok(names.iter().map(line).collect())
    }
}

/// A value as it is written in a file, shortened if it is long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    let end = if text.chars().count() > MAX_SHOWN { "…" } else { "" };
    format!("{text:.MAX_SHOWN$}{end}")
}

#[cfg(test)]
mod tests {
    use structopt::StructOpt;

    use super::*;

    #[test]
    fn a_change_is_logged_with_the_value_before_and_after() {
        let before = Flags::from_iter([""; 0]);
        let after = Flags::from_iter([
            "--grace=1m",
            "--max-reservations=4096",
            "--announce=/dns4/a.example/tcp/1",
        ]);
        let mut names = after.differing(&before).unwrap();
        names.retain(|name| ["announce", "grace", "max-connections"].contains(&name.as_str()));
        let expected = [
            r#"announce: [] → ["/dns4/a.example/tcp/1"]"#,
            r#"grace: "30s" → "1m""#,
            "max-connections: 2048 → 8192 (derived from others)",
        ];
        assert_eq!(before.changes(&after, &names).unwrap(), expected);
        let memory = Flags::from_iter(["--memory=24MiB"]);
        let lines = memory.changes(&before, &["memory".into()]).unwrap();
        assert_eq!(lines, [r#"memory: 25165824 → """#], "not set, and derived from nothing");
        assert_eq!(shown(&"x".repeat(1000).into()).chars().count(), MAX_SHOWN + 1);
    }

    #[test]
    fn each_number_that_a_reload_does_not_apply_requires_a_restart() {
        let defaults = Flags::from_iter([""; 0]);
        let settings = defaults.settings().unwrap();
        let numbers: Vec<_> = settings.iter().filter(|(_, value)| value.is_integer()).collect();
        assert!(numbers.len() > 15);
        for (name, _) in numbers {
            let flags = Flags::from_iter([&format!("--{name}"), "7777777"]);
            let is_applied = flags.config() != defaults.config();
            assert!(is_applied != requires_restart(name) || name == PER_PEER, "{name}");
        }
    }
}
