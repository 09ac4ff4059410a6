//! The variables of the environment that are settings: `RELAYLET_GRACE` is `--grace`.
//!
//! A misspelled name must not be ignored silently: with `RELAYLET_ALLOW_PEERS` the relay would be open to everyone.

use std::{collections::BTreeMap, ffi::OsString};

use strsim::damerau_levenshtein;
use toml::Table;

use crate::program::cli::identity;

const PREFIX: &str = "RELAYLET_";

/// A name is a misspelled setting if it differs in at most this many letters, and in at most one of four.
const MAX_DISTANCE: usize = 2;

/// Variables of the environment, by name.
pub type Variables = BTreeMap<String, OsString>;

/// The variables whose names begin with the prefix. An empty one counts as not set.
pub fn of_relaylet(environment: impl IntoIterator<Item = (OsString, OsString)>) -> Variables {
    let named =
        environment.into_iter().map(|(name, value)| (name.to_string_lossy().into_owned(), value));
    named
        .filter(|(name, value)| name.to_uppercase().starts_with(PREFIX) && !value.is_empty())
        .collect()
}

/// The name of a setting's variable.
pub fn name_of(setting: &str) -> String {
    format!("{PREFIX}{}", setting.replace('-', "_").to_uppercase())
}

/// Returns a warning for each variable that is not a setting.
///
/// # Errors
///
/// When one is a misspelled setting, or begins like the settings of access.
pub fn check_names(variables: &Variables, known: &Table) -> Result<Vec<String>, String> {
    let is_known = |name: &str| {
        let is_setting = known.keys().any(|known| name_of(known) == name);
        is_setting || name == name_of("config") || name == identity::VARIABLE
    };
    let mut warnings = Vec::new();
    for (name, value) in variables.iter().filter(|(name, _)| !is_known(name)) {
        let setting = name.get(PREFIX.len()..).unwrap_or_default().to_lowercase().replace('_', "-");
        if is_of_kubernetes(&setting, &value.to_string_lossy()) {
            continue;
        }
        let (nearest, distance) = nearest(&setting, known);
        let is_of_access = setting.starts_with("allow") || setting.starts_with("deny");
        if is_of_access || distance <= MAX_DISTANCE.min(setting.len() / 4) {
            return Err(format!("{name}: unknown setting; try {}", name_of(nearest)));
        }
        warnings.push(format!("{name} ignored: unknown setting; see relaylet --help"));
    }
    Ok(warnings)
}

/// The setting with the most similar name, and in how many letters it differs.
pub fn nearest<'a>(name: &str, known: &'a Table) -> (&'a str, usize) {
    let distances = known.keys().map(|known| (known.as_str(), damerau_levenshtein(name, known)));
    distances.min_by_key(|(_, distance)| *distance).unwrap_or_default()
}

/// Whether this variable describes a service named relaylet, or relaylet-something. Kubernetes sets such variables in each
/// pod ("Discovering services").
fn is_of_kubernetes(name: &str, value: &str) -> bool {
    let is_port = name == "port" || name.ends_with("-port");
    let is_service = name.starts_with("service-") || name.contains("-service-");
    let is_protocol = ["-tcp", "-udp", "-sctp"].iter().any(|protocol| name.contains(protocol));
    is_service || (is_port && value.contains("://")) || (is_protocol && name.contains("port-"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::cli::flags::Flags;

    fn check(name: &str, value: &str) -> Result<Vec<String>, String> {
        let environment = of_relaylet([(name.into(), value.into())]);
        check_names(&environment, &Flags::default().settings().unwrap())
    }

    #[test]
    fn a_misspelled_variable_is_an_error_that_names_the_setting() {
        for (name, meant) in [
            ("RELAYLET_ALLOW_PEERS", "RELAYLET_ALLOW_PEER"),
            ("RELAYLET_ALLOWED_SUBNETS", "RELAYLET_ALLOW_SUBNET"),
            ("RELAYLET_DENY", "RELAYLET_DENY_PEER"),
            ("RELAYLET_ANOUNCE", "RELAYLET_ANNOUNCE"),
            ("RELAYLET_MAX_RESERVATION", "RELAYLET_MAX_RESERVATIONS"),
            ("relaylet_allow_peer", "RELAYLET_ALLOW_PEER"),
        ] {
            let error = check(name, "1").unwrap_err();
            assert!(error.starts_with(&format!("{name}: ")), "{error}");
            if name != "RELAYLET_DENY" {
                assert!(error.ends_with(&format!("try {meant}")), "{error}");
            }
        }
    }

    #[test]
    fn other_variables_are_warned_about_but_not_those_of_kubernetes() {
        assert_eq!(check("RELAYLET_COLOR", "1").unwrap().len(), 1);
        for (name, value) in [
            ("RELAYLET_GRACE", "1s"),
            ("RELAYLET_CONFIG", "file"),
            ("RELAYLET_IDENTITY_KEY", "CAES"),
            ("RELAYLET_COLOR", ""),
            ("RELAY_COLOR", "1"),
            ("RELAYLET_PORT", "tcp://10.0.0.1:4001"),
            ("RELAYLET_SERVICE_HOST", "10.0.0.1"),
            ("RELAYLET_SERVICE_PORT_HTTP", "9180"),
            ("RELAYLET_PORT_4001_TCP", "tcp://10.0.0.1:4001"),
            ("RELAYLET_PORT_4001_TCP_ADDR", "10.0.0.1"),
            ("RELAYLET_HTTP_PORT_9180_TCP_PROTO", "tcp"),
            ("RELAYLET_HTTP_SERVICE_PORT", "9180"),
        ] {
            assert_eq!(check(name, value), Ok(Vec::new()), "{name}");
        }
    }
}
