//! What the relay says of itself when it starts: what it relays, and what to paste into a client.

use std::{net::IpAddr, time::Duration};

use bytesize::ByteSize;
use libp2p::{Multiaddr, PeerId};

use super::flags::Flags;
#[cfg(feature = "dht")]
use crate::program::dht;
use crate::{
    access::Lists,
    address::{self, Known},
    config::Config,
    program::net::multiaddr::{self, Layer},
};

const MIB: u64 = 1024 * 1024;

/// Reservations for a shorter time lapse before some clients renew them.
const SHORT_TTL: Duration = Duration::from_secs(3 * 60);

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

/// A warning that clients elsewhere cannot reach it, if nothing is announced and they cannot.
pub fn unreachable(announced: &[Multiaddr], found: &[Multiaddr]) -> Option<String> {
    let reachable = !announced.is_empty() || found.iter().any(address::is_global);
    (!reachable).then(|| {
        "no address of this machine can be dialed from the internet: clients elsewhere need one; \
         if a router or a load balancer has it, say so: --announce /ip4/…/tcp/4001"
            .into()
    })
}

/// A warning that names the announced addresses that clients elsewhere cannot use, or that do not fit into an
/// answer.
pub fn announced_in_vain(announced: &[Multiaddr], relay: PeerId) -> Option<String> {
    let told = address::for_reservation(Known { announced, ..Known::default() }, relay);
    let is_told = |address: &Multiaddr| {
        let with_relay = address.clone().with_p2p(relay);
        with_relay.is_ok_and(|address| told.contains(&address))
    };
    let problem = |address: &Multiaddr| {
        let does_not_fit = (!is_told(address)).then_some("does not fit beside those before it");
        let problem = multiaddr::unusable(address).or(does_not_fit)?;
        Some(format!("{address} {problem}"))
    };
    let problems: Vec<_> = announced.iter().filter_map(problem).collect();
    let line = format!("--announce: clients elsewhere get no use of {}", problems.join("; of "));
    (!problems.is_empty()).then_some(line)
}

/// A warning that clients are told only some of the addresses that were found, if they are.
pub fn too_many(announced: &[Multiaddr], found: &[Multiaddr]) -> Option<String> {
    (announced.is_empty() && found.len() > address::MAX_TOLD).then(|| {
        format!(
            "this relay listens on {} addresses: clients are told {} of them, global ones first; choose with \
             --announce",
            found.len(),
            address::MAX_TOLD
        )
    })
}

/// A warning for each setting that an operator may regret, with the remedy.
pub fn regrettable(flags: &Flags) -> Vec<String> {
    let trusts_all = flags.proxies().into_iter().find(|subnet| subnet.prefix_len() == 0);
    let ttl = flags.config().reservation_ttl;
    let proxies = trusts_all.map(|subnet| {
        format!(
            "--proxy-protocol-from {subnet}: any client can claim any address; name only the subnets of \
             your proxies"
        )
    });
    let short = (ttl < SHORT_TTL).then(|| {
        format!(
            "--reservation-ttl {}: go-libp2p looks once a minute whether to renew, and would be without a slot \
             in between; try 3m or more",
            humantime::format_duration(ttl)
        )
    });
    proxies.into_iter().chain(short).collect()
}

/// A warning that it may come to take more memory than there is, both in bytes.
pub fn takes_too_much(most: u64, available: u64) -> Option<String> {
    (most > available).then(|| {
        format!(
            "{}, which is more than the {} MiB that it can have here; lower --max-connections or \
             --max-buffered",
            takes(most),
            available / MIB
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<Multiaddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn announced_addresses_that_are_of_no_use_are_named_in_one_warning() {
        let relay = PeerId::random();
        let good = addresses(&["/dns4/relay.example.org/tcp/4001", "/ip4/8.8.8.8/tcp/4001"]);
        assert_eq!(announced_in_vain(&good, relay), None);
        assert_eq!(announced_in_vain(&[], relay), None);
        let mixed = [&good[..], &addresses(&["/ip4/10.0.0.1/tcp/1", "/ip4/8.8.8.8/udp/1/quic-v1"])]
            .concat();
        let warning = announced_in_vain(&mixed, relay).unwrap();
        assert!(warning.contains("/ip4/10.0.0.1/tcp/1 is not global"), "{warning}");
        assert!(warning.contains("quic-v1 this relay has no such transport"), "{warning}");
        assert!(!warning.contains("relay.example.org"), "{warning}");
        assert!(
            too_many(&[], &vec![good[0].clone(); 11]).unwrap().contains("listens on 11 addresses")
        );
        assert_eq!(too_many(&[], &vec![good[0].clone(); 10]), None);
        assert_eq!(too_many(&good, &vec![good[0].clone(); 11]), None);
        let many: Vec<_> = (1..100).map(|port| format!("/ip4/8.8.8.8/tcp/{port}")).collect();
        let many = addresses(&many.iter().map(String::as_str).collect::<Vec<_>>());
        let warning = announced_in_vain(&many, relay).unwrap();
        assert!(
            warning.contains("tcp/99 does not fit") && !warning.contains("tcp/1 "),
            "{warning}"
        );
    }

    #[test]
    fn what_an_operator_may_regret_is_warned_about() {
        use structopt::StructOpt;

        let warnings = |words: &[&str]| regrettable(&Flags::from_iter(words));
        assert!(warnings(&["--proxy-protocol-from=10.0.0.0/8", "--reservation-ttl=3m"]).is_empty());
        for (word, named) in [
            ("--proxy-protocol-from=0.0.0.0/0", "--proxy-protocol-from 0.0.0.0/0: "),
            ("--proxy-protocol-from=::/0", "--proxy-protocol-from ::/0: "),
            ("--reservation-ttl=45s", "--reservation-ttl 45s: "),
        ] {
            let warnings = warnings(&[word]);
            assert!(warnings.len() == 1 && warnings[0].starts_with(named), "{warnings:?}");
        }
        assert_eq!(takes_too_much(MIB, MIB), None);
        assert!(takes_too_much(2 * MIB, MIB).unwrap().starts_with("at most 2 MiB"));
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
