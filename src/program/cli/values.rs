//! The values of settings as people write them. What cannot be read is shown, with what could be.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
};

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use toml::Value;

use crate::program::net::multiaddr;

/// How many characters of a value are shown.
pub const SHOWN: usize = 80;

/// A value that is read from a text or a number, and written as such.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value", bound = "T: Readable")]
pub struct Parsed<T>(pub T);

/// A type that settings have values of.
pub trait Readable: Clone + FromStr {
    /// What the type is called: "`soon` is no ...".
    const NAME: &'static str;

    /// What can be parsed.
    const EXAMPLES: &'static str;

    /// The text from which the same value is read.
    fn text(&self) -> String;

    /// Parses a text.
    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    /// What somebody probably means by a text that cannot be parsed.
    fn meant(_text: &str) -> Option<String> {
        None
    }
}

macro_rules! readable {
    ($($Type:ty: $name:literal, $examples:literal, $text:expr;)*) => {
        $(impl Readable for $Type {
            const NAME: &'static str = $name;
            const EXAMPLES: &'static str = $examples;

            fn text(&self) -> String {
                $text(self)
            }
        })*
    };
}

readable! {
    ByteSize: "size", "500kB, 128KiB or 1GiB", |size: &ByteSize| size.as_u64().to_string();
    humantime::Duration: "duration", "30s, 5m or 1h 30m", ToString::to_string;
    ipnet::IpNet: "subnet", "192.0.2.0/24 or 2001:db8::/32", ToString::to_string;
    libp2p::PeerId: "peer id", "one that begins with 12D3KooW or Qm", ToString::to_string;
    u32: "number that fits", "a whole one from 0 on", ToString::to_string;
    usize: "number that fits", "a whole one from 0 on", ToString::to_string;
}

impl Readable for libp2p::Multiaddr {
    const NAME: &'static str = "multiaddr";
    const EXAMPLES: &'static str = "/ip4/192.0.2.1/tcp/4001";

    fn text(&self) -> String {
        self.to_string()
    }

    fn meant(text: &str) -> Option<String> {
        multiaddr::meant(text)
    }
}

impl Readable for SocketAddr {
    const NAME: &'static str = "address with a port";
    const EXAMPLES: &'static str = "127.0.0.1:9180";

    fn text(&self) -> String {
        self.to_string()
    }

    /// `localhost:9180` is on this machine alone, `:9180` on all of its IPv4 addresses.
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
        let shown: String = text.chars().take(SHOWN).collect();
        let value = T::read(text).ok_or_else(|| {
            let remedy = T::meant(text).unwrap_or_else(|| T::EXAMPLES.into());
            format!("{shown:?} is no {}; try {remedy}", T::NAME)
        })?;
        // bytesize reads the largest number where the text says more.
        let is_largest = value.text() == u64::MAX.to_string();
        match is_largest && text.parse::<u64>().is_err() {
            true => Err(format!("{shown:?} is more than can be counted; 0 stands for no limit")),
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
    /// A number if it is one that TOML knows, which has none beyond an `i64`.
    fn from(value: Parsed<T>) -> Self {
        let text = value.0.text();
        text.parse().map_or(Self::String(text), Self::Integer)
    }
}

/// Returns the values themselves.
pub fn unwrapped<T: Clone>(list: &[Parsed<T>]) -> impl Iterator<Item = T> {
    list.iter().map(|value| value.0.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed<T: Readable>(text: &str) -> Result<T, String> {
        text.parse::<Parsed<T>>().map(|value| value.0)
    }

    #[test]
    fn an_address_with_a_port_may_be_of_this_machine_or_of_all_of_its_addresses() {
        for (text, expected) in [
            ("localhost:9180", "127.0.0.1:9180"),
            (":9180", "0.0.0.0:9180"),
            ("[::1]:9180", "[::1]:9180"),
        ] {
            assert_eq!(parsed::<SocketAddr>(text), Ok(expected.parse().unwrap()), "{text}");
        }
        for text in ["localhost", ":", "localhost:70000", "::1", "example.org:9180"] {
            let error = parsed::<SocketAddr>(text).unwrap_err();
            assert!(error.ends_with("is no address with a port; try 127.0.0.1:9180"), "{error}");
        }
    }

    #[test]
    fn what_is_no_multiaddr_is_told_with_the_one_that_is_meant() {
        let error = parsed::<libp2p::Multiaddr>("0.0.0.0:4001").unwrap_err();
        assert_eq!(error, r#""0.0.0.0:4001" is no multiaddr; try /ip4/0.0.0.0/tcp/4001"#);
        let error = parsed::<libp2p::Multiaddr>("here").unwrap_err();
        assert_eq!(error, r#""here" is no multiaddr; try /ip4/192.0.2.1/tcp/4001"#);
    }
}
