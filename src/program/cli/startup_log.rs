//! What the relay says of itself when it starts: what it relays, and what to paste into a client.

use std::{net::IpAddr, time::Duration};

use bytesize::ByteSize;
use libp2p::{Multiaddr, PeerId};

#[cfg(feature = "dht")]
use crate::program::dht;
use crate::{
    access::Lists,
    address,
    config::Config,
    program::net::multiaddr::{self, Layer},
};

/// For whom it relays, and how much.
pub fn relays(config: &Config) -> String {
    let whom = match config.access == Lists::default() {
        true => "anyone",
        false => "whom its lists allow",
    };
    format!(
        "relays for {whom}: {} slots, {} circuits at a time; {}",
        config.max_reservations,
        config.max_circuits,
        circuits_carry(config.circuit_bytes, config.circuit_duration)
    )
}

fn circuits_carry(bytes: u64, duration: Duration) -> String {
    let size = ByteSize::b(bytes);
    let time = humantime::format_duration(duration);
    match (bytes == 0, duration.is_zero()) {
        (true, true) => "a circuit may carry any number of bytes for any time".into(),
        (true, false) => format!(
            "a circuit may carry any number of bytes for {time}; --circuit-duration 0s lifts that"
        ),
        (false, true) => format!(
            "a circuit may carry {size} in each direction, for any time; --circuit-bytes 0 lifts \
             that"
        ),
        (false, false) => format!(
            "a circuit may carry {size} in each direction for {time}; --circuit-bytes 0 and \
             --circuit-duration 0s lift that"
        ),
    }
}

/// How much memory it may come to take, at most, in bytes.
pub fn takes(most: u64) -> String {
    const MIB: u64 = 1024 * 1024;
    format!("at most {} MiB under these limits", most.div_ceil(MIB))
}

/// Which DHT it joins, and by whom.
#[cfg(feature = "dht")]
pub fn joins(dht: &dht::Config) -> String {
    match dht.bootstrap.len() {
        0 => format!(
            "joins the DHT {} once others come by this relay; name nodes that are in it with \
             --bootstrap",
            dht.protocol
        ),
        nodes => format!("joins the DHT {} by {nodes} --bootstrap", dht.protocol),
    }
}

/// What clients dial: the first address that is announced, else the best of those found, if any;
/// and then what browsers dial, if that is another.
///
/// Of several in one network that is the one with which the machine itself goes `out`, because
/// machines have others for their containers; and rather IPv4.
pub fn reached_at(
    relay: PeerId,
    announced: &[Multiaddr],
    found: &[Multiaddr],
    out: Option<IpAddr>,
) -> Vec<String> {
    let reach = |who: &str, address: &Multiaddr| {
        let address = address.clone().with_p2p(relay).ok()?;
        Some(format!("{who} reach it at {address}"))
    };
    if let Some(address) = announced.first() {
        return reach("clients", address).into_iter().collect();
    }
    let over = |layer| {
        let of_layer = move |address: &&Multiaddr| layer_of(address) == Some(layer);
        best(found.iter().filter(of_layer), out)
    };
    let websocket = over(Layer::WebSocket);
    let tcp = over(Layer::Tcp);
    let clients =
        tcp.or(websocket).and_then(|(address, whose)| reach(&format!("clients{whose}"), address));
    let browsers = match (websocket, over(Layer::SecureWebSocket)) {
        (Some((address, whose)), _) if tcp.is_some() => reach(&format!("browsers{whose}"), address),
        (None, Some((address, _))) => by_name(address),
        _ => None,
    };
    clients.into_iter().chain(browsers).collect()
}

fn layer_of(address: &Multiaddr) -> Option<Layer> {
    multiaddr::listen_address(address).map(|(_, layer)| layer)
}

/// The best of these addresses, and in which network clients have to be for it.
fn best<'a>(
    addresses: impl Iterator<Item = &'a Multiaddr>,
    out: Option<IpAddr>,
) -> Option<(&'a Multiaddr, &'static str)> {
    let whose = |address: &Multiaddr| match address::ip(address) {
        _ if address::is_global(address) => "",
        Some(ip) if ip.is_loopback() => " on this machine",
        _ => " in the same network",
    };
    addresses.map(|address| (address, whose(address))).min_by_key(|(address, whose)| {
        let ip = address::ip(address);
        let itself = whose.ends_with("machine");
        (itself, !whose.is_empty(), ip != out, ip.is_none_or(|ip| ip.is_ipv6()))
    })
}

/// A certificate is for a name, which only the operator knows.
fn by_name(address: &Multiaddr) -> Option<String> {
    let (socket, _) = multiaddr::listen_address(address)?;
    let port = socket.port();
    Some(format!(
        "browsers reach it at the name in its certificate; announce that: --announce \
         /dns4/…/tcp/{port}/tls/ws"
    ))
}

/// That strangers cannot reach it, if they cannot.
pub fn unreachable(announced: &[Multiaddr], found: &[Multiaddr]) -> Option<String> {
    let reachable = !announced.is_empty() || found.iter().any(address::is_global);
    (!reachable).then(|| {
        "no address of this machine can be dialed from the internet: clients elsewhere need one; \
         if a router or a load balancer has it, say so: --announce /ip4/…/tcp/4001"
            .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<Multiaddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn what_it_relays_is_one_sentence() {
        let relayed = relays(&Config::default());
        let expected = "relays for anyone: 1024 slots, 1024 circuits at a time; a circuit may \
                        carry 128.0 KiB in each direction for 2m; --circuit-bytes 0 and \
                        --circuit-duration 0s lift that";
        assert_eq!(relayed, expected);
        let mut own =
            Config { circuit_bytes: 0, circuit_duration: Duration::ZERO, ..Config::default() };
        own.access.allow_peer.insert(PeerId::random());
        let relayed = relays(&own);
        assert!(relayed.starts_with("relays for whom its lists allow: "), "{relayed}");
        assert!(relayed.ends_with("any number of bytes for any time"), "{relayed}");
    }

    #[test]
    fn the_address_to_paste_is_the_best_and_says_for_whom() {
        let relay = PeerId::random();
        let out = Some([192, 168, 1, 7].into());
        let itself = "/ip4/127.0.0.1/tcp/4001";
        let containers = "/ip4/172.17.0.1/tcp/4001";
        let home = "/ip4/192.168.1.7/tcp/4001";
        let home6 = "/ip6/fd00::2/tcp/4001";
        let global = "/ip6/2a00:1450::1/tcp/4001";
        let named = "/dns4/relay.example.org/tcp/4001";
        for (announced, found, clients, best) in [
            (&[][..], &[itself][..], "clients on this machine", itself),
            (&[], &[itself, containers, home], "clients in the same network", home),
            (&[], &[home6, home, itself], "clients in the same network", home),
            (&[], &[home6, containers], "clients in the same network", containers),
            (&[], &[itself, home, global], "clients", global),
            (&[named], &[itself, home], "clients", named),
            (&[home], &[itself, global], "clients", home),
        ] {
            let (announced, found) = (addresses(announced), addresses(found));
            let expected = format!("{clients} reach it at {best}/p2p/{relay}");
            assert_eq!(reached_at(relay, &announced, &found, out), [expected]);
            let warned = unreachable(&announced, &found).is_some();
            assert_eq!(warned, clients != "clients");
        }
        assert!(reached_at(relay, &[], &[], out).is_empty());
    }

    #[test]
    fn browsers_have_an_address_of_their_own_to_paste() {
        let relay = PeerId::random();
        let out = Some([192, 168, 1, 7].into());
        let itself = "/ip4/127.0.0.1/tcp/4002/ws";
        let home = "/ip4/192.168.1.7/tcp/4002/ws";
        let tcp = "/ip4/192.168.1.7/tcp/4001";
        let secure = "/ip4/192.168.1.7/tcp/4003/tls/ws";
        let line = |who: &str, address: &str| format!("{who} reach it at {address}/p2p/{relay}");
        let named = "browsers reach it at the name in its certificate; announce that: --announce \
                     /dns4/…/tcp/4003/tls/ws";
        for (found, expected) in [
            (
                &[itself, tcp, secure, home][..],
                vec![
                    line("clients in the same network", tcp),
                    line("browsers in the same network", home),
                ],
            ),
            (&[itself], vec![line("clients on this machine", itself)]),
            (&[tcp, secure], vec![line("clients in the same network", tcp), named.into()]),
            (&[secure], vec![named.into()]),
        ] {
            let found = addresses(found);
            assert_eq!(reached_at(relay, &[], &found, out), expected);
            let announced = addresses(&[secure]);
            let announced_line = line("clients", secure);
            assert_eq!(reached_at(relay, &announced, &found, out), [announced_line]);
        }
    }
}
