//! The values of settings as people write them. What cannot be read is shown, with what could be.

use std::str::FromStr;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use toml::Value;

/// How much of a value is shown.
const SHOWN: usize = 80;

/// A value that is read from a text or a number, and written as such.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value", bound = "T: Readable")]
pub struct Parsed<T>(pub T);

/// A type that settings have values of.
pub trait Readable: Clone + FromStr {
    /// What the type is called, and what can be parsed: the end of "`soon` is no ...".
    const EXPECTED: &'static str;

    /// The text from which the same value is read.
    fn text(&self) -> String;
}

macro_rules! readable {
    ($($Type:ty: $expected:literal, $text:expr;)*) => {
        $(impl Readable for $Type {
            const EXPECTED: &'static str = $expected;

            fn text(&self) -> String {
                $text(self)
            }
        })*
    };
}

readable! {
    ByteSize: "size; try 500kB, 128KiB or 1GiB", |size: &ByteSize| size.as_u64().to_string();
    humantime::Duration: "duration; try 30s, 5m or 1h 30m", ToString::to_string;
    ipnet::IpNet: "subnet; try 192.0.2.0/24 or 2001:db8::/32", ToString::to_string;
    libp2p::Multiaddr: "multiaddr; try /ip4/192.0.2.1/tcp/4001", ToString::to_string;
    libp2p::PeerId: "peer id; try one that begins with 12D3KooW or Qm", ToString::to_string;
    std::net::SocketAddr: "address with a port; try 127.0.0.1:9180", ToString::to_string;
    u32: "number that fits; try a whole one from 0 on", ToString::to_string;
    usize: "number that fits; try a whole one from 0 on", ToString::to_string;
}

impl<T: Readable> FromStr for Parsed<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shown: String = text.chars().take(SHOWN).collect();
        let value: T = text.parse().map_err(|_| format!("{shown:?} is no {}", T::EXPECTED))?;
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
