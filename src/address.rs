//! Addresses: the client prefix that a slot counts towards, and the addresses that clients are told to dial.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

/// The most addresses in one reservation. Clients dial all of them.
pub const MAX_ADDRESSES: usize = 10;

/// The most bytes of addresses in one reservation, so that the answer, with a voucher of any key,
/// stays below [`crate::wire::MAX_MESSAGE`].
const MAX_BYTES: usize = 2048;

/// The address range of one client: an IPv4 address, or an IPv6 /64. What a client holds counts towards it.
///
/// An IPv4-mapped, NAT64 or 6to4 address counts as the IPv4 address in it.
///
/// Stored as the upper half of an IPv6 address, eight bytes, because a slot has several prefixes. IPv4 uses the
/// unassigned `0:ffff::/32`.
#[derive(
    Clone, Copy, derive_more::Debug, derive_more::Display, PartialEq, Eq, Hash, PartialOrd, Ord,
)]
#[debug("{self}")]
#[display("{}{}", self.ip(), if self.ip().is_ipv4() { "" } else { "/64" })]
pub struct ClientPrefix(u64);

/// An IPv4 /24 or an IPv6 /48: about what one site or one customer of a hoster has. What its clients hold counts towards
/// it, too.
#[derive(Clone, Copy, Debug, derive_more::Display, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[display("{}/{}", _0.ip(), if _0.ip().is_ipv4() { 24 } else { 48 })]
pub struct Subnet(pub(crate) ClientPrefix);

/// The bits that mark an IPv4 address: `0:ffff::/32`.
const IPV4: u64 = 0xffff << 32;

impl ClientPrefix {
    /// The prefix of a multiaddr; `None` if that does not begin with an IP address.
    #[doc(hidden)]
    pub fn of(address: &Multiaddr) -> Option<Self> {
        ip(address).map(Self::from)
    }

    /// The subnet that it is in: an IPv4 address's /24, an IPv6 address's /48.
    #[doc(hidden)]
    pub fn subnet(self) -> Subnet {
        let host_bits = if self.0 >> 32 == IPV4 >> 32 { 8 } else { 16 };
        Subnet(Self(self.0 >> host_bits << host_bits))
    }

    /// The IPv6 /32 that it is in, about what one provider has; `None` for IPv4.
    #[doc(hidden)]
    pub fn wide(self) -> Option<Self> {
        self.ip().is_ipv6().then_some(Self(self.0 >> 32 << 32))
    }

    /// The IPv4 address, or the first of the /64.
    pub fn ip(self) -> IpAddr {
        match self.0 >> 32 == IPV4 >> 32 {
            true => Ipv4Addr::from_bits(self.0 as u32).into(),
            false => Ipv6Addr::from_bits(u128::from(self.0) << 64).into(),
        }
    }
}

impl From<IpAddr> for ClientPrefix {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self(IPV4 | u64::from(ip.to_bits())),
            IpAddr::V6(ip) => match ipv4_within(ip) {
                Some(ip) => IpAddr::from(ip).into(),
                None => Self((ip.to_bits() >> 64) as u64),
            },
        }
    }
}

/// The IPv4 address of a client that came over IPv6: IPv4-mapped, NAT64 (64:ff9b::/96, RFC 6052), or 6to4
/// (2002::/16, RFC 3056).
fn ipv4_within(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let ipv4 = |high, low| Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low));
    match ip.segments() {
        [0x2002, high, low, ..] => Some(ipv4(high, low)),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(ipv4(high, low)),
        _ => ip.to_ipv4_mapped(),
    }
}

/// Whether this address can be dialed from anywhere on the internet. Names count as global: the operator chose them.
pub fn is_global(address: &Multiaddr) -> bool {
    match ip(address) {
        Some(IpAddr::V4(ip)) => {
            let is_local = ip.is_private() || ip.is_loopback() || ip.is_link_local();
            // 0: this network. From 224: multicast and reserved. The others: protocols (RFC 6890), and relays of 6to4
            // (RFC 7526).
            let is_reserved =
                matches!(ip.octets(), [0 | 224.., ..] | [192, 0, 0, _] | [192, 88, 99, _]);
            // Carrier-grade NAT (RFC 6598), and benchmarks (RFC 2544).
            let is_shared = matches!(ip.octets(), [100, 64..128, ..] | [198, 18..20, ..]);
            !(is_local || is_reserved || is_shared || ip.is_documentation())
        }
        // Of IPv6 only 2000::/3 is assigned: some of it for protocols such as Teredo, for documentation, and for 6to4, whose
        // addresses have IPv4 addresses in them, maybe private ones.
        Some(IpAddr::V6(ip)) => {
            let [first, second, ..] = ip.segments();
            let is_special =
                matches!((first, second), (0x2001, ..0x200 | 0xdb8) | (0x3fff, ..0x1000));
            first & 0xe000 == 0x2000 && !is_special && first != 0x2002
        }
        None => matches!(
            address.iter().next(),
            Some(Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_) | Protocol::Dnsaddr(_))
        ),
    }
}

/// Whether this address stands for all addresses of a machine.
pub fn is_unspecified(address: &Multiaddr) -> bool {
    ip(address).is_some_and(|ip| ip.is_unspecified())
}

/// The addresses at which a client may reach the relay, by their source.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known<'a> {
    /// Given by the operator. If there are any, clients are told no others.
    pub announced: &'a [Multiaddr],
    /// Confirmed to be reachable from outside.
    pub confirmed: &'a [Multiaddr],
    /// The relay's listening addresses.
    pub listening: &'a [Multiaddr],
    /// The address at which the client says that it reached the relay, or else the relay's end of its connection.
    pub reported: Option<&'a Multiaddr>,
}

impl<'a> Known<'a> {
    /// The addresses to tell, best first: the announced ones if there are any; otherwise the confirmed ones, the global
    /// listening ones, the reported one, and the other listening ones.
    pub fn best_first(self) -> Vec<&'a Multiaddr> {
        if !self.announced.is_empty() {
            return self.announced.iter().collect();
        }
        let own = self.listening.iter().filter(|own| !self.confirmed.contains(own));
        let (global, local): (Vec<_>, Vec<_>) = own.partition(|own| is_global(own));
        let known = self.confirmed.iter().chain(global).chain(self.reported).chain(local);
        known.filter(|known| !is_unspecified(known)).collect()
    }
}

/// The addresses for one client's reservation, [best first](Known::best_first), without duplicates and with
/// `/p2p/<relay>` at the end; at most as many as fit into the answer.
pub fn for_reservation(known: Known<'_>, relay: PeerId) -> Vec<Multiaddr> {
    let (mut addresses, mut bytes) = (Vec::new(), 0);
    // Those of another peer are left out.
    let own = known.best_first().into_iter().filter_map(|own| own.clone().with_p2p(relay).ok());
    for address in own {
        let is_relayed = address.iter().any(|part| part == Protocol::P2pCircuit);
        let fits = addresses.len() < MAX_ADDRESSES && bytes + address.len() <= MAX_BYTES;
        if fits && !is_relayed && !addresses.contains(&address) {
            bytes += address.len();
            addresses.push(address);
        }
    }
    addresses
}

/// The IP address at the beginning of a multiaddr, if there is one; an IPv4-mapped one as IPv4.
pub fn ip(address: &Multiaddr) -> Option<IpAddr> {
    match address.iter().next()? {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(IpAddr::from(ip).to_canonical()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Multiaddr {
        text.parse().expect("a multiaddr")
    }

    #[test]
    fn a_client_prefix_is_an_ipv6_64_or_an_ipv4_address_also_if_mapped() {
        let prefix = |text: &str| ClientPrefix::of(&address(text)).map(|to| to.to_string());
        assert_eq!(prefix("/ip4/1.2.3.4/tcp/1"), Some("1.2.3.4".into()));
        for around in ["::ffff:1.2.3.4", "64:ff9b::1.2.3.4", "2002:102:304:5::6"] {
            assert_eq!(prefix(&format!("/ip6/{around}/tcp/1")), Some("1.2.3.4".into()));
        }
        let other = "/ip6/64:ff9b::1:0:1.2.3.4/tcp/1"; // outside 64:ff9b::/96
        assert_eq!(prefix(other), Some("64:ff9b::/64".into()));
        let one = prefix("/ip6/2001:db8:1:2:3::1/tcp/1");
        assert_eq!(one, Some("2001:db8:1:2::/64".into()));
        assert_eq!(one, prefix("/ip6/2001:db8:1:2:ffff::9/tcp/7"));
        assert_eq!(prefix("/memory/7"), None);
    }

    /// The events of a node are printed by their `Debug`.
    #[test]
    fn the_debug_format_of_a_prefix_is_its_address() {
        let prefix = ClientPrefix::of(&address("/ip4/192.0.2.1/tcp/1")).unwrap();
        assert_eq!(format!("{prefix:?}"), "192.0.2.1");
        assert_eq!(format!("{:?}", prefix.subnet()), "Subnet(192.0.2.0)");
    }

    #[test]
    fn a_subnet_is_an_ipv4_24_or_an_ipv6_48() {
        let subnet =
            |text: &str| ClientPrefix::of(&address(text)).map(|to| to.subnet().to_string());
        assert_eq!(subnet("/ip4/1.2.3.4/tcp/1"), Some("1.2.3.0/24".into()));
        assert_eq!(subnet("/ip6/::ffff:1.2.3.4"), Some("1.2.3.0/24".into()));
        let of_v6 = subnet("/ip6/2001:db8:1:2:3::1/tcp/1");
        assert_eq!(of_v6, Some("2001:db8:1::/48".into()));
    }

    #[test]
    fn an_address_is_global_if_any_host_on_the_internet_can_dial_it() {
        for global in [
            "/ip4/8.8.8.8/tcp/1",
            "/ip6/2a00:1450::1/tcp/1",
            "/dns4/relay.example.org/tcp/1",
            "/ip6/::ffff:8.8.8.8/tcp/1",
        ] {
            assert!(is_global(&address(global)), "{global}");
        }
        for local in [
            "/ip4/127.0.0.1/tcp/1",
            "/ip4/10.1.2.3/tcp/1",
            "/ip4/192.168.1.1/tcp/1",
            "/ip4/100.64.0.1/tcp/1",
            "/ip4/0.0.0.0/tcp/1",
            "/ip4/169.254.1.1/tcp/1",
            "/ip6/::1/tcp/1",
            "/ip6/fe80::1/tcp/1",
            "/ip6/fd00::1/tcp/1",
            "/ip6/::ffff:10.0.0.1/tcp/1",
            "/ip4/192.0.0.8/tcp/1",
            "/ip4/192.88.99.1/tcp/1",
            "/ip6/2002:7f00:1::1/tcp/1",
            "/ip6/2001::7f00:1/tcp/1",
            "/ip6/3fff:1::1/tcp/1",
            "/memory/7",
        ] {
            assert!(!is_global(&address(local)), "{local}");
        }
    }

    #[test]
    fn addresses_are_sorted_best_first_and_end_in_the_relays_peer_id() {
        let relay = PeerId::random();
        let confirmed = [address("/ip4/5.5.5.5/tcp/1")];
        let listening = [
            address("/ip4/127.0.0.1/tcp/1"),
            address("/ip6/2a00:1450::1/tcp/1"),
            address("/ip4/192.168.1.7/tcp/1"),
        ];
        let reported = address("/ip4/192.168.1.7/tcp/1");
        let known = Known {
            announced: &[],
            confirmed: &confirmed,
            listening: &listening,
            reported: Some(&reported),
        };
        let expected = [
            "/ip4/5.5.5.5/tcp/1",
            "/ip6/2a00:1450::1/tcp/1",
            "/ip4/192.168.1.7/tcp/1",
            "/ip4/127.0.0.1/tcp/1",
        ];
        let expected: Vec<_> = expected.map(|a| address(&format!("{a}/p2p/{relay}"))).into();
        assert_eq!(for_reservation(known, relay), expected);
    }

    #[test]
    fn announced_addresses_replace_discovered_ones() {
        let relay = PeerId::random();
        let with_relay = address(&format!("/dns4/relay.example.org/tcp/1/p2p/{relay}"));
        let known = Known {
            announced: std::slice::from_ref(&with_relay),
            listening: &[address("/ip4/5.5.5.5/tcp/1")],
            ..Known::default()
        };
        assert_eq!(for_reservation(known, relay), [with_relay]);
    }

    #[test]
    fn identify_lists_the_best_addresses_first_and_announced_ones_exclusively() {
        let [confirmed, global, local] =
            ["/ip4/5.5.5.5/tcp/1", "/ip6/2a00:1450::1/tcp/1", "/ip4/10.0.0.1/tcp/1"].map(address);
        let listening = [local.clone(), confirmed.clone(), global.clone()];
        let found = Known {
            confirmed: std::slice::from_ref(&confirmed),
            listening: &listening,
            ..Known::default()
        };
        assert_eq!(found.best_first(), [&confirmed, &global, &local]);
        let announced = [address("/dns4/relay.example.org/tcp/1"), local];
        let known = Known { announced: &announced, ..found };
        assert_eq!(known.best_first(), [&announced[0], &announced[1]]);
    }

    #[test]
    fn unspecified_addresses_are_left_out() {
        let listening = ["/ip4/0.0.0.0/tcp/1", "/ip6/::/tcp/1", "/ip4/10.0.0.1/tcp/1"].map(address);
        // The local address of a connection over QUIC is that of its listener.
        let reported = Some(&listening[0]);
        let known = Known { listening: &listening, reported, ..Known::default() };
        assert_eq!(known.best_first(), [&listening[2]]);
    }

    #[test]
    fn a_thousand_addresses_are_cut_to_fit_into_one_answer() {
        let many: Vec<_> =
            (0..1000u16).map(|n| address(&format!("/ip6/2a00:1450::{n:x}/tcp/4001"))).collect();
        let known = Known { listening: &many, ..Known::default() };
        let addresses = for_reservation(known, PeerId::random());
        assert_eq!(addresses.len(), MAX_ADDRESSES);
        assert!(addresses.iter().map(Multiaddr::len).sum::<usize>() <= MAX_BYTES);
    }
}
