//! The values of flags as people write them. What cannot be read is shown, with what could be.

#[cfg(feature = "http")]
use std::net::SocketAddr;
use std::{fmt::Display, str::FromStr};

use bytesize::ByteSize;
use humantime::Duration;
use ipnet::IpNet;
use libp2p::{Multiaddr, PeerId};

/// How much of a value is shown.
const SHOWN: usize = 80;

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    read(text, "duration", "30s, 5m or 1h 30m")
}

pub(super) fn multiaddr(text: &str) -> Result<Multiaddr, String> {
    read(text, "multiaddr", "/ip4/192.0.2.1/tcp/4001")
}

pub(super) fn peer(text: &str) -> Result<PeerId, String> {
    read(text, "peer id", "one that begins with 12D3KooW or Qm")
}

pub(super) fn subnet(text: &str) -> Result<IpNet, String> {
    read(text, "subnet", "192.0.2.0/24 or 2001:db8::/32")
}

pub(super) fn number<N: FromStr>(text: &str) -> Result<N, String> {
    read(text, "number that fits", "a whole one from 0 on")
}

/// bytesize takes what is beyond counting for the last number.
pub(super) fn size(text: &str) -> Result<ByteSize, String> {
    match read(text, "size", "500kB, 128KiB or 1GiB")? {
        ByteSize(u64::MAX) => Err(format!(
            "{} is more than can be counted; 0 stands for no limit",
            shown(text)
        )),
        size => Ok(size),
    }
}

#[cfg(feature = "http")]
pub(super) fn place(text: &str) -> Result<SocketAddr, String> {
    read(text, "address with a port", "127.0.0.1:9180")
}

fn read<T: FromStr>(text: &str, what: &str, like: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("{} is no {what}; try {like}", shown(text)))
}

fn shown(text: &str) -> impl Display {
    let short: String = text.chars().take(SHOWN).collect();
    format!("{short:?}")
}
