//! The flags as settings: their names and values, which of them hold while the relay runs, and what
//! a change of them means.

use std::fmt::Display;

use humantime::Duration;
use structopt::StructOpt;
use toml::Value;

use super::{config_file::Setting, flags::Flags};

/// What is read at the start only. `max-circuits-per-peer` can be lowered while the relay runs.
const AT_START: [&str; 18] = [
    "autonat",
    "bootstrap",
    "dht",
    "dht-protocol",
    "http",
    "identity",
    "listen",
    "max-buffered",
    "max-buffered-per-connection",
    "max-connections",
    "max-connections-per-ip",
    "max-connections-per-peer",
    "max-handshakes",
    "max-streams",
    "max-streams-per-connection",
    "swarm-key",
    "threads",
    "max-circuits-per-peer",
];

/// The settings of features that the program was built without, and those features.
pub const LEFT_OUT: &[(&str, &str)] = &[
    #[cfg(not(feature = "autonat"))]
    ("autonat", "autonat"),
    #[cfg(not(feature = "dht"))]
    ("bootstrap", "dht"),
    #[cfg(not(feature = "dht"))]
    ("dht", "dht"),
    #[cfg(not(feature = "dht"))]
    ("dht-protocol", "dht"),
    #[cfg(not(feature = "http"))]
    ("http", "http"),
    #[cfg(not(feature = "pnet"))]
    ("swarm-key", "pnet"),
    #[cfg(not(feature = "websocket"))]
    ("tls-cert", "websocket"),
    #[cfg(not(feature = "websocket"))]
    ("tls-key", "websocket"),
];

/// Why there is no setting of this name, if it is one of those.
pub fn left_out(name: &str) -> Option<String> {
    let mut all = LEFT_OUT.iter();
    let (_, feature) = all.find(|(own, _)| *own == name.trim_start_matches("--"))?;
    Some(format!(
        "{name}: this relay was built without it; build it with the feature {feature}"
    ))
}

impl Flags {
    /// All settings as they hold, in the order of the flags.
    pub fn settings(&self) -> Vec<Setting> {
        let (listen, listen_is_set) = self.listen_addresses();
        let config = self.config();
        let per_ip = config.reservations_per_ip().unwrap_or(0);
        let per_subnet = config.reservations_per_subnet().unwrap_or(0);
        let identity = self.identity.display();
        let settings = [
            set("listen", list(&listen)).unless(listen_is_set),
            set("announce", list(&self.announce)),
            set("proxy-protocol-from", list(&self.proxy_protocol_from)),
            #[cfg(feature = "websocket")]
            optional("tls-cert", self.tls_cert.as_ref().map(|f| f.display())),
            #[cfg(feature = "websocket")]
            optional("tls-key", self.tls_key.as_ref().map(|f| f.display())),
            #[cfg(feature = "autonat")]
            set("autonat", Value::Boolean(self.autonat)),
            set("identity", text(&identity)),
            set("max-reservations", number(self.max_reservations)),
            set("max-reservations-per-ip", number(per_ip))
                .unless(self.max_reservations_per_ip.is_some()),
            set("max-reservations-per-subnet", number(per_subnet))
                .unless(self.max_reservations_per_subnet.is_some()),
            set("reservation-ttl", time(self.reservation_ttl)),
            set("grace", time(self.grace)),
            set("heartbeat", time(self.heartbeat)),
            set("silence", time(self.silence)),
            set("probe", time(self.probe)),
            set("probe-after", time(self.probe_after)),
            set("sweep", time(self.sweep)),
            set("idle-timeout", time(self.idle_timeout)),
            set("max-circuits", number(self.max_circuits)),
            set("max-circuits-per-peer", number(self.max_circuits_per_peer)),
            set("circuit-duration", time(self.circuit_duration)),
            set("circuit-bytes", number(self.circuit_bytes.as_u64())),
            set("bandwidth", number(self.bandwidth.as_u64())),
            set(
                "bandwidth-per-peer",
                number(self.bandwidth_per_peer.as_u64()),
            ),
            set("reserve-rate", number(self.reserve_rate)),
            set("connect-rate", number(self.connect_rate)),
            set("allow-peer", list(&self.allow_peer)),
            set("deny-peer", list(&self.deny_peer)),
            set("allow-subnet", list(&self.allow_subnet)),
            set("deny-subnet", list(&self.deny_subnet)),
            set("allow-connect-peer", list(&self.allow_connect_peer)),
            #[cfg(feature = "pnet")]
            optional("swarm-key", self.swarm_key.as_ref().map(|f| f.display())),
            set("max-connections", number(self.max_connections()))
                .unless(self.max_connections.is_some()),
            set(
                "max-connections-per-peer",
                number(self.max_connections_per_peer),
            ),
            set(
                "max-connections-per-ip",
                number(self.max_connections_per_ip),
            ),
            set("max-handshakes", number(self.max_handshakes)),
            set("max-streams", number(self.max_streams())).unless(self.max_streams.is_some()),
            set(
                "max-streams-per-connection",
                number(self.max_streams_per_connection()),
            )
            .unless(self.max_streams_per_connection.is_some()),
            set("max-buffered", number(self.max_buffered.as_u64())),
            set(
                "max-buffered-per-connection",
                number(self.max_buffered_per_connection.as_u64()),
            ),
            set("drain", time(self.drain)),
            set("threads", number(self.threads())).unless(self.threads.is_some()),
            #[cfg(feature = "http")]
            optional("http", self.http),
            #[cfg(feature = "dht")]
            set("dht", Value::Boolean(self.dht)),
            #[cfg(feature = "dht")]
            set("bootstrap", list(&self.bootstrap)),
            #[cfg(feature = "dht")]
            set("dht-protocol", text(&self.dht_protocol)),
        ];
        settings.into()
    }

    /// The names of the settings in which these flags differ from others.
    pub fn differ_in(&self, others: &Self) -> Vec<&'static str> {
        let both = self.settings().into_iter().zip(others.settings());
        both.filter(|(one, other)| one.value != other.value)
            .map(|(one, _)| one.name)
            .collect()
    }

    /// Those of them that hold only once the relay is started anew, where it was started with these.
    pub fn restart_for(&self, after: &Self) -> Vec<&'static str> {
        let mut names = self.differ_in(after);
        let lowered = after.max_circuits_per_peer < self.max_circuits_per_peer;
        names.retain(|name| {
            AT_START.contains(name) && !(lowered && *name == "max-circuits-per-peer")
        });
        names
    }
}

/// A setting that there is.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// The flag's name, without dashes before it.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
}

/// What a setting takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A value.
    One,
    /// Any number of values.
    List,
    /// None: it is there or not.
    Switch,
}

/// What may stand in a file, and in the environment.
pub fn known() -> Vec<Known> {
    let defaults = Flags::from_iter_safe(["relaylet"]);
    let settings = defaults.map_or_else(|_| Vec::new(), |flags| flags.settings());
    let known = |setting: Setting| Known {
        name: setting.name,
        kind: match setting.value {
            Value::Array(_) => Kind::List,
            Value::Boolean(_) => Kind::Switch,
            _ => Kind::One,
        },
    };
    settings.into_iter().map(known).collect()
}

impl Setting {
    fn unless(self, is_set: bool) -> Self {
        Self {
            follows: !is_set,
            ..self
        }
    }
}

fn set(name: &'static str, value: Value) -> Setting {
    Setting {
        name,
        value,
        follows: false,
    }
}

/// One that nothing stands for while it is not set.
#[cfg(any(feature = "http", feature = "pnet", feature = "websocket"))]
fn optional(name: &'static str, value: Option<impl Display>) -> Setting {
    let is_set = value.is_some();
    let value = value.map_or(String::new(), |value| value.to_string());
    set(name, text(&value)).unless(is_set)
}

fn text(value: &impl Display) -> Value {
    Value::String(value.to_string())
}

fn time(value: Duration) -> Value {
    text(&value)
}

fn list(values: &[impl Display]) -> Value {
    Value::Array(values.iter().map(text).collect())
}

/// TOML knows no larger one than an `i64` holds; a text is as good.
fn number(value: impl TryInto<i64> + Copy + Display) -> Value {
    value
        .try_into()
        .map_or_else(|_| text(&value), Value::Integer)
}
