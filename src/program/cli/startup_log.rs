//! The lines that the relay logs at its start: its limits, its addresses to paste into a client, and warnings.

use std::{fmt::Display, net::IpAddr, time::Duration};

use bytesize::ByteSize;
use libp2p::{Multiaddr, PeerId};

use super::{derived::limit::Limit, flags::Flags};
#[cfg(feature = "dht")]
use crate::program::dht;
use crate::{
    access::Lists,
    address::{self, Known},
    config::Config,
    program::net::multiaddr::{self, Layer},
};

const MIB: u64 = 1024 * 1024;

/// With a shorter term, a reservation expires before some clients renew it.
const SHORT_TTL: Duration = Duration::from_secs(3 * 60);

/// Which peers the relay serves, and its limits.
pub fn capacity(config: &Config) -> String {
    let clients = match config.access == Lists::default() {
        true => "anyone",
        false => "the peers that its lists allow",
    };
    format!(
        "relays for {clients}: {} slots, {} circuits at a time; {}",
        config.max_reservations,
        config.max_circuits,
        circuit_limits(config.circuit_bytes, config.circuit_duration)
    )
}

fn circuit_limits(bytes: u64, duration: Duration) -> String {
    let data = match bytes {
        0 => "any number of bytes".into(),
        _ => format!("{} in each direction", ByteSize::b(bytes)),
    };
    let time = match duration.is_zero() {
        true => "any time".into(),
        false => humantime::format_duration(duration).to_string(),
    };
    let remedy = match (bytes, duration.is_zero()) {
        (0, true) => "",
        (0, false) => "; --circuit-duration 0s removes the limit",
        (_, true) => "; --circuit-bytes 0 removes the limit",
        (_, false) => "; --circuit-bytes 0 and --circuit-duration 0s remove the limits",
    };
    format!("a circuit may carry {data} for {time}{remedy}")
}

/// The memory estimate, in bytes.
pub fn memory(estimate: u64) -> String {
    format!("memory: at most {} MiB under these limits", estimate.div_ceil(MIB))
}

/// Which DHT the relay joins.
#[cfg(feature = "dht")]
pub fn dht(dht: &dht::Config) -> String {
    let nodes = match dht.bootstrap.len() {
        0 => "no --bootstrap is named, so other nodes have to dial this relay".into(),
        nodes => format!("{nodes} --bootstrap addresses"),
    };
    format!("joining the DHT {}: {nodes}", dht.protocol)
}

/// A line for each address that clients dial: the announced ones, or else the best of those found, and the best for
/// browsers if that is another one.
///
/// Of several addresses in one network the best is `outbound`, from which the machine reaches the internet: others may
/// belong to its containers. Of the rest, IPv4 is preferred.
pub fn client_addresses(
    relay: PeerId,
    announced: &[Multiaddr],
    found: &[Multiaddr],
    outbound: Option<IpAddr>,
) -> Vec<String> {
    let line = |clients: &str, address: &Multiaddr| {
        let address = address.clone().with_p2p(relay).ok()?;
        Some(format!("{clients} reach it at {address}"))
    };
    if let Some((first, others)) = announced.split_first() {
        let others = others.iter().filter_map(|address| line("clients also", address));
        return line("clients", first).into_iter().chain(others).collect();
    }
    let best_of = |layer| {
        let is_of_layer = move |address: &&Multiaddr| {
            multiaddr::listen_address(address).is_some_and(|(_, its)| its == layer)
        };
        best(found.iter().filter(is_of_layer), outbound)
    };
    let websocket = best_of(Layer::WebSocket);
    let tcp = best_of(Layer::Tcp);
    let clients =
        tcp.or(websocket).and_then(|(address, range)| line(&format!("clients{range}"), address));
    let browsers = match (websocket, best_of(Layer::SecureWebSocket)) {
        (Some((address, range)), _) if tcp.is_some() => line(&format!("browsers{range}"), address),
        // Browsers dial the name in the certificate, which only the operator knows.
        (None, Some((address, _))) => multiaddr::listen_address(address).map(|(socket, _)| {
            format!(
                "browsers reach it at the name in its certificate; announce that: --announce \
                 /dns4/…/tcp/{}/tls/ws",
                socket.port()
            )
        }),
        _ => None,
    };
    clients.into_iter().chain(browsers).collect()
}

/// The best of these addresses, and where clients that can dial it are.
fn best<'a>(
    addresses: impl Iterator<Item = &'a Multiaddr>,
    outbound: Option<IpAddr>,
) -> Option<(&'a Multiaddr, &'static str)> {
    let range_of = |address: &Multiaddr| match address::ip(address) {
        _ if address::is_global(address) => "",
        Some(ip) if ip.is_loopback() => " on this machine",
        _ => " in the same network",
    };
    addresses.map(|address| (address, range_of(address))).min_by_key(|(address, range)| {
        let ip = address::ip(address);
        let is_loopback = range.ends_with("machine");
        (is_loopback, !range.is_empty(), ip != outbound, ip.is_none_or(|ip| ip.is_ipv6()))
    })
}

/// A warning if no address is announced and clients on the internet can dial none of those found.
pub fn unreachable(announced: &[Multiaddr], found: &[Multiaddr]) -> Option<String> {
    let reachable = !announced.is_empty() || found.iter().any(address::is_global);
    (!reachable).then(|| {
        "no public address: no address of this machine can be dialed from the internet; \
         if a router or a load balancer has one, announce it: --announce /ip4/…/tcp/4001"
            .into()
    })
}

/// How many announced addresses a warning names.
const MAX_NAMED: usize = 5;

/// A warning if clients on the internet cannot use some of the announced addresses, or these do not fit into an answer.
fn unusable_announced(announced: &[Multiaddr], relay: PeerId) -> Option<String> {
    // A peer id in an address is the relay's, for which `relay` may be a placeholder.
    let announced: Vec<_> = announced.iter().map(multiaddr::without_peer).collect();
    let known = Known { announced: &announced, ..Known::default() };
    let sent = address::for_reservation(known, relay);
    let mut problems = Vec::new();
    for address in &announced {
        let is_sent = address.clone().with_p2p(relay).is_ok_and(|address| sent.contains(&address));
        let unsent = (!is_sent).then_some("does not fit into an answer with those before it");
        if let Some(problem) = multiaddr::unusable(address).or(unsent) {
            problems.push(format!("{address} ({problem})"));
        }
    }
    let others = problems.len().saturating_sub(MAX_NAMED);
    if others > 0 {
        problems.truncate(MAX_NAMED);
        problems.push(format!("{others} more"));
    }
    let line = format!("--announce: clients on the internet cannot use {}", problems.join(", "));
    (!problems.is_empty()).then_some(line)
}

/// A warning if an answer has no room for all addresses that were found.
pub fn too_many_addresses(announced: &[Multiaddr], found: &[Multiaddr]) -> Option<String> {
    (announced.is_empty() && found.len() > address::MAX_ADDRESSES).then(|| {
        format!(
            "too many addresses: this relay listens on {} and sends clients {} of them, global ones first; choose \
             some with --announce",
            found.len(),
            address::MAX_ADDRESSES
        )
    })
}

/// A warning for each environment variable that is no setting, and for each valid setting that is probably a mistake,
/// with the remedy.
pub fn questionable_settings(flags: &Flags, relay: PeerId) -> Vec<String> {
    let mut warnings = flags.warnings.clone();
    let proxies = ("--proxy-protocol-from", flags.proxies());
    for (flag, subnets) in [proxies, ("--trust-forwarded-from", flags.forwarders())] {
        if let Some(all) = subnets.iter().find(|subnet| subnet.prefix_len() == 0) {
            warnings.push(format!(
                "{flag} {all}: any client can claim any address; name only the subnets of your proxies"
            ));
        }
    }
    let ttl = flags.reservation_ttl.0;
    if *ttl < SHORT_TTL {
        warnings.push(format!(
            "--reservation-ttl {ttl}: go-libp2p checks once a minute whether to renew, and would lose its slot in \
             between; try 3m or more"
        ));
    }
    let [slots, connections] =
        [Limit::Reservations, Limit::Connections].map(|limit| flags.derived().get(limit));
    if slots > connections {
        warnings.push(format!(
            "--max-reservations {slots}: each slot takes a connection, of which there are {connections}; raise \
             --max-connections, and --memory if it is set"
        ));
    }
    if flags.dht && !(flags.allow_peer.is_empty() && flags.allow_subnet.is_empty()) {
        warnings.push(
            "--dht: other nodes of the DHT cannot connect unless --allow-peer and --allow-subnet allow them, and \
             clients find only relays to which other nodes can connect; leave out --dht or these lists"
                .into(),
        );
    }
    let layers: Vec<_> = flags.layers().collect();
    let in_tls = layers.contains(&Layer::SecureWebSocket);
    let over_websocket = layers.iter().any(|layer| *layer != Layer::Tcp);
    let certificate = flags.tls_cert.as_ref().map(|file| file.display());
    let forwarder = flags.trust_forwarded_from.first().map(|subnet| subnet.0);
    let protocol = Some(&flags.dht_protocol).filter(|own| **own != Flags::default().dht_protocol);
    let (with_tls, with_websocket) =
        ("--listen /ip4/0.0.0.0/tcp/4002/tls/ws", "--listen /ip4/127.0.0.1/tcp/4002/ws");
    warnings.extend(unused("--tls-cert", certificate, in_tls, with_tls));
    warnings.extend(unused("--trust-forwarded-from", forwarder, over_websocket, with_websocket));
    let (host, has_http) = (flags.http_host.first(), flags.http.is_some());
    warnings.extend(unused("--http-host", host, has_http, "--http 127.0.0.1:9180"));
    warnings.extend(unused("--dht-protocol", protocol, flags.dht, "--dht"));
    warnings.extend(unusable_announced(&flags.config().announce, relay));
    warnings
}

/// A warning if a setting has this value but no effect, because it needs another setting, which is `missing`.
fn unused(flag: &str, value: Option<impl Display>, is_used: bool, missing: &str) -> Option<String> {
    let value = value.filter(|_| !is_used)?;
    Some(format!("{flag} {value}: not in use; add {missing}"))
}

/// A warning if the memory estimate exceeds what is available; both are in bytes. `is_set`: the estimate is that of
/// `--memory`.
pub fn memory_exceeded(estimate: u64, available: u64, is_set: bool) -> Option<String> {
    let flags = if is_set { "--memory" } else { "--max-connections or --max-buffered" };
    let (memory, available_mib) = (memory(estimate), available / MIB);
    let line = format!("{memory}, more than the {available_mib} MiB available; lower {flags}");
    (estimate > available).then_some(line)
}

#[cfg(test)]
mod tests {
    use structopt::StructOpt;

    use super::*;

    /// The warnings about these flags.
    fn warnings(flags: &[&str]) -> Vec<String> {
        questionable_settings(&Flags::from_iter(flags), PeerId::random())
    }

    fn addresses(texts: &[&str]) -> Vec<Multiaddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn announced_addresses_that_clients_cannot_use_are_one_warning() {
        let relay = PeerId::random();
        let good = addresses(&["/dns4/relay.example.org/tcp/4001", "/ip4/8.8.8.8/tcp/4001"]);
        assert_eq!(unusable_announced(&good, relay), None);
        assert_eq!(unusable_announced(&[], relay), None);
        let mixed = [&good[..], &addresses(&["/ip4/10.0.0.1/tcp/1", "/ip4/8.8.8.8/udp/1/quic-v1"])]
            .concat();
        let warning = unusable_announced(&mixed, relay).unwrap();
        assert!(warning.contains("/ip4/10.0.0.1/tcp/1 (is not global)"), "{warning}");
        assert!(warning.contains("quic-v1 (this relay has no such transport)"), "{warning}");
        assert!(!warning.contains("relay.example.org"), "{warning}");
        let many: Vec<_> = (1..100).map(|port| format!("/ip4/8.8.8.8/tcp/{port}")).collect();
        let many = addresses(&many.iter().map(String::as_str).collect::<Vec<_>>());
        let warning = unusable_announced(&many, relay).unwrap();
        assert!(warning.contains("cannot use /ip4/8.8.8.8/tcp/11 (does not fit"), "{warning}");
        assert!(warning.ends_with(", 84 more"), "{warning}");
    }

    #[test]
    fn more_addresses_than_fit_into_an_answer_are_a_warning_unless_some_are_announced() {
        let found = addresses(&["/ip4/8.8.8.8/tcp/4001"; 11]);
        let warning = too_many_addresses(&[], &found).unwrap();
        assert!(warning.contains("listens on 11 and"), "{warning}");
        assert_eq!(too_many_addresses(&[], &found[..10]), None);
        assert_eq!(too_many_addresses(&found[..1], &found), None);
    }

    #[test]
    fn questionable_settings_are_warnings() {
        assert!(warnings(&["--proxy-protocol-from=10.0.0.0/8", "--reservation-ttl=3m"]).is_empty());
        assert!(warnings(&["--max-connections=1024"]).is_empty());
        for (flag, begins) in [
            ("--proxy-protocol-from=0.0.0.0/0", "--proxy-protocol-from 0.0.0.0/0: "),
            ("--proxy-protocol-from=::/0", "--proxy-protocol-from ::/0: "),
            ("--reservation-ttl=45s", "--reservation-ttl 45s: "),
            ("--max-connections=1023", "--max-reservations 1024: each slot takes a connection"),
        ] {
            let warnings = warnings(&[flag]);
            assert!(warnings.len() == 1 && warnings[0].starts_with(begins), "{warnings:?}");
        }
        let websocket = "--listen=/ip4/127.0.0.1/tcp/4002/ws";
        let any = warnings(&[websocket, "--trust-forwarded-from=0.0.0.0/0"]);
        assert!(any.len() == 1 && any[0].contains("any client can claim any address"), "{any:?}");
    }

    #[test]
    fn a_memory_estimate_above_what_is_available_is_a_warning() {
        assert_eq!(memory_exceeded(MIB, MIB, true), None);
        let [set, derived] = [true, false].map(|is_set| memory_exceeded(2 * MIB, MIB, is_set));
        assert!(set.unwrap().ends_with("lower --memory"));
        let derived = derived.unwrap();
        assert!(derived.starts_with("memory: at most 2 MiB under"), "{derived}");
        assert!(derived.ends_with("lower --max-connections or --max-buffered"), "{derived}");
    }

    #[test]
    fn a_setting_that_needs_another_one_is_a_warning_without_it() {
        let (tls, ws) = ("--listen=/ip4/0.0.0.0/tcp/1/tls/ws", "--listen=/ip4/0.0.0.0/tcp/1/ws");
        for (setting, needed) in [
            ("--tls-cert=cert.pem", &[tls][..]),
            ("--trust-forwarded-from=10.0.0.0/8", &[tls, ws]),
            ("--http-host=relay.example.org", &["--http=127.0.0.1:9180"]),
            ("--dht-protocol=/my/kad/1.0.0", &["--dht"]),
        ] {
            let alone = warnings(&[setting]);
            let expected = format!("{}: not in use; ", setting.replace('=', " "));
            assert!(alone.len() == 1 && alone[0].starts_with(&expected), "{alone:?}");
            for needed in needed {
                let none: [&str; 0] = [];
                assert_eq!(warnings(&[setting, needed]), none);
            }
        }
        assert_eq!(warnings(&["--dht-protocol=/ipfs/kad/1.0.0"]).len(), 0, "the default");
    }

    #[test]
    fn a_dht_whose_nodes_the_lists_do_not_allow_is_a_warning() {
        let peer = PeerId::random();
        let [allowed, source, denied] = ["allow-peer", "allow-connect-peer", "deny-peer"]
            .map(|list| format!("--{list}={peer}"));
        for list in [&allowed, "--allow-subnet=10.0.0.0/8"] {
            let warnings = warnings(&["--dht", list]);
            let begins = "--dht: other nodes of the DHT cannot connect";
            assert!(warnings.len() == 1 && warnings[0].starts_with(begins), "{warnings:?}");
        }
        let others = [&source, &denied, "--deny-subnet=10.0.0.0/8"];
        assert!(others.iter().all(|list| warnings(&["--dht", list]).is_empty()));
        assert!(warnings(&[&allowed]).is_empty());
    }

    #[test]
    fn the_capacity_is_one_line() {
        let relayed = capacity(&Config::default());
        let expected = "relays for anyone: 1024 slots, 1024 circuits at a time; a circuit may \
                        carry 128.0 KiB in each direction for 2m; --circuit-bytes 0 and \
                        --circuit-duration 0s remove the limits";
        assert_eq!(relayed, expected);
        let mut own =
            Config { circuit_bytes: 0, circuit_duration: Duration::ZERO, ..Config::default() };
        own.access.allow_peer.insert(PeerId::random());
        let relayed = capacity(&own);
        assert!(relayed.starts_with("relays for the peers that its lists allow: "), "{relayed}");
        assert!(relayed.ends_with("any number of bytes for any time"), "{relayed}");
    }

    #[test]
    fn the_address_to_paste_is_the_best_one_and_says_from_where_it_can_be_dialed() {
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
            assert_eq!(client_addresses(relay, &announced, &found, out), [expected]);
            let warned = unreachable(&announced, &found).is_some();
            assert_eq!(warned, clients != "clients");
        }
        assert!(client_addresses(relay, &[], &[], out).is_empty());
    }

    #[test]
    fn browsers_have_their_own_address_to_paste() {
        let relay = PeerId::random();
        let out = Some([192, 168, 1, 7].into());
        let itself = "/ip4/127.0.0.1/tcp/4002/ws";
        let home = "/ip4/192.168.1.7/tcp/4002/ws";
        let tcp = "/ip4/192.168.1.7/tcp/4001";
        let secure = "/ip4/192.168.1.7/tcp/4003/tls/ws";
        let line =
            |clients: &str, address: &str| format!("{clients} reach it at {address}/p2p/{relay}");
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
            assert_eq!(client_addresses(relay, &[], &found, out), expected);
            let announced = addresses(&[secure]);
            let announced_line = line("clients", secure);
            assert_eq!(client_addresses(relay, &announced, &found, out), [announced_line]);
        }
    }
}
