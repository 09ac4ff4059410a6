//! Parses and writes the values of settings. Errors show the value, and examples of valid ones.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
};

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use toml::Value;

use crate::program::net::multiaddr;

/// How many characters of a value are shown.
pub const MAX_SHOWN: usize = 80;

/// A value that is parsed from a string or a number, and written as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value", bound = "T: Readable")]
pub struct Parsed<T>(pub T);

/// A type of settings.
pub trait Readable: Clone + FromStr + ToString {
    /// The name of the type, for errors: "not a …".
    const NAME: &'static str;

    /// Examples of valid values.
    const EXAMPLES: &'static str;

    /// The text that is parsed as the same value.
    fn text(&self) -> String {
        self.to_string()
    }

    /// Parses a text.
    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    /// Suggests a valid text for one that cannot be parsed.
    fn suggest(_text: &str) -> Option<String> {
        None
    }
}

macro_rules! readable {
    ($($Type:ty: $name:literal, $examples:literal;)*) => {
        $(impl Readable for $Type {
            const NAME: &'static str = $name;
            const EXAMPLES: &'static str = $examples;
        })*
    };
}

readable! {
    humantime::Duration: "duration", "30s, 5m or 1h 30m";
    ipnet::IpNet: "subnet", "192.0.2.0/24 or 2001:db8::/32";
    libp2p::PeerId: "peer id", "one that begins with 12D3KooW or Qm";
    u32: "whole number in range", "0 or more";
    usize: "whole number in range", "0 or more";
}

impl Readable for ByteSize {
    const NAME: &'static str = "size";
    const EXAMPLES: &'static str = "500kB, 128KiB or 1GiB";

    /// Not rounded, as its `Display` is.
    fn text(&self) -> String {
        self.as_u64().to_string()
    }
}

impl Readable for libp2p::Multiaddr {
    const NAME: &'static str = "multiaddr";
    const EXAMPLES: &'static str = "/ip4/192.0.2.1/tcp/4001";

    fn suggest(text: &str) -> Option<String> {
        multiaddr::suggest(text)
    }
}

impl Readable for SocketAddr {
    const NAME: &'static str = "host and port";
    const EXAMPLES: &'static str = "127.0.0.1:9180";

    /// `localhost:9180` is on this machine only, `:9180` on all of its IPv4 addresses.
    fn read(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let ip = match host {
            "localhost" => Ipv4Addr::LOCALHOST,
            "" => Ipv4Addr::UNSPECIFIED,
            _ => return text.parse().ok(),
        };
        Some(Self::new(IpAddr::V4(ip), port.parse().ok()?))
    }
}

impl<T: Readable> FromStr for Parsed<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shown: String = text.chars().take(MAX_SHOWN).collect();
        let value = T::read(text).ok_or_else(|| {
            let remedy = T::suggest(text).unwrap_or_else(|| T::EXAMPLES.into());
            format!("{shown:?} is not a {}; try {remedy}", T::NAME)
        })?;
        // bytesize parses a larger number as the largest one.
        let is_largest = value.text() == u64::MAX.to_string();
        match is_largest && text.parse::<u64>().is_err() {
            true => Err(format!("{shown:?} is too large; try {}", T::EXAMPLES)),
            false => Ok(Self(value)),
        }
    }
}

impl<T: Readable> TryFrom<Value> for Parsed<T> {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        value.as_str().map_or_else(|| value.to_string().parse(), str::parse)
    }
}

impl<T: Readable> From<Parsed<T>> for Value {
    /// An integer if TOML can represent it, which is an `i64`; otherwise a text.
    fn from(value: Parsed<T>) -> Self {
        let text = value.0.text();
        text.parse().map_or(Self::String(text), Self::Integer)
    }
}

/// Returns the values of a list.
pub fn unwrap_all<T: Clone>(list: &[Parsed<T>]) -> impl Iterator<Item = T> {
    list.iter().map(|value| value.0.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed<T: Readable>(text: &str) -> Result<T, String> {
        text.parse::<Parsed<T>>().map(|value| value.0)
    }

    #[test]
    fn a_host_and_port_may_be_loopback_or_unspecified() {
        for (text, expected) in [
            ("localhost:9180", "127.0.0.1:9180"),
            (":9180", "0.0.0.0:9180"),
            ("[::1]:9180", "[::1]:9180"),
        ] {
            assert_eq!(parsed::<SocketAddr>(text), Ok(expected.parse().unwrap()), "{text}");
        }
        for text in ["localhost", ":", "localhost:70000", "::1", "example.org:9180"] {
            let error = parsed::<SocketAddr>(text).unwrap_err();
            assert!(error.ends_with("is not a host and port; try 127.0.0.1:9180"), "{error}");
        }
    }

    /// Not for each setting is 0 no limit: a relay of `--memory 0` does not start.
    #[test]
    fn a_size_that_is_too_large_is_an_error_with_examples() {
        let error = parsed::<ByteSize>("99999999TiB").unwrap_err();
        assert_eq!(error, "\"99999999TiB\" is too large; try 500kB, 128KiB or 1GiB");
    }

    #[test]
    fn an_invalid_multiaddr_is_an_error_with_a_suggestion() {
        let error = parsed::<libp2p::Multiaddr>("0.0.0.0:4001").unwrap_err();
        assert_eq!(error, r#""0.0.0.0:4001" is not a multiaddr; try /ip4/0.0.0.0/tcp/4001"#);
        let error = parsed::<libp2p::Multiaddr>("here").unwrap_err();
        assert_eq!(error, r#""here" is not a multiaddr; try /ip4/192.0.2.1/tcp/4001"#);
    }
}
