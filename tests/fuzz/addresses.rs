//! Multiaddrs and peer ids from peers, identify and operators, and the answers that contain them.

use libp2p::{Multiaddr, PeerId, futures::FutureExt, multiaddr::Protocol};
use proptest::{collection::vec, prelude::*, sample::select};
use relaylet::{
    Config,
    address::{self, ClientPrefix, Known},
    wire::{self, Limit, MAX_MESSAGE, Status},
};

use super::{
    protobuf::{self, HOP, STOP},
    wire::alice,
};

/// Longer than a voucher with any key: the largest, RSA of 4096 bits, has a signature and a public key of half a
/// kilobyte each.
const VOUCHER: usize = 1400;

/// Reads `bytes` as a list of peer ids and addresses, each with its length in front.
pub fn check(bytes: &[u8]) {
    let mut addresses = Vec::new();
    let mut rest = bytes;
    while let Some((&length, after)) = rest.split_first() {
        let (one, after) = after.split_at(after.len().min(usize::from(length)));
        rest = after;
        peer_id(one);
        addresses.extend(Multiaddr::try_from(one.to_vec()));
        addresses.extend(as_text(one));
    }
    addresses.iter().for_each(one_address);
    let half = addresses.len() / 2;
    let (some, others) = addresses.split_at(half);
    for known in [
        Known { announced: &addresses, ..Known::default() },
        Known {
            confirmed: some,
            listening: others,
            reported: addresses.first(),
            ..Known::default()
        },
    ] {
        answer(known);
    }
}

/// Parses an address as text; printing it must give the same address. Addresses in bytes may have names that text
/// cannot express.
fn as_text(bytes: &[u8]) -> Option<Multiaddr> {
    let text = std::str::from_utf8(bytes).ok()?;
    let address: Multiaddr = text.parse().ok()?;
    assert_eq!(address.to_string().parse().ok().as_ref(), Some(&address));
    Some(address)
}

fn peer_id(bytes: &[u8]) {
    let Ok(peer) = PeerId::from_bytes(bytes) else {
        return;
    };
    assert_eq!(PeerId::from_bytes(&peer.to_bytes()).ok(), Some(peer));
    assert_eq!(peer.to_base58().parse().ok(), Some(peer));
    let limit = Limit { bytes: Some(bytes.len() as u64), duration: None };
    let request = unframed(&wire::stop_connect(peer, limit));
    let read = protobuf::read(&request, STOP).expect("not too deep");
    let read = read.expect("protobuf");
    assert_eq!(protobuf::number(&read, &[1]), Some(0));
    assert_eq!(protobuf::bytes(&read, &[2, 1]), Some(&*peer.to_bytes()));
    assert_eq!(protobuf::number(&read, &[3, 2]), limit.bytes);
}

fn one_address(address: &Multiaddr) {
    assert_eq!(Multiaddr::try_from(address.to_vec()).ok().as_ref(), Some(address));
    assert_eq!(
        ClientPrefix::of(address).map(|to| to.ip()),
        address::ip(address).map(|ip| ClientPrefix::from(ip).ip()),
    );
    let _ = (address::is_global(address), address::is_unspecified(address));
    let mut config = Config::default();
    config.announce = vec![address.clone()];
    if let Err(error) = config.validate() {
        assert_eq!(error.setting(), "announce");
        assert_eq!(error.to_string().lines().count(), 1, "{error}");
    }
}

/// Encodes these addresses in an answer: it must fit, and each address must end in the relay's peer id.
fn answer(known: Known<'_>) {
    let relay = alice();
    let addresses = address::for_reservation(known, relay);
    for address in &addresses {
        assert_eq!(address.iter().last(), Some(Protocol::P2p(relay)));
        assert!(address.iter().all(|part| part != Protocol::P2pCircuit));
    }
    let frame = wire::reserve_ok(7, &addresses, vec![1; VOUCHER], Limit::default());
    let message = unframed(&frame);
    let read = protobuf::read(&message, HOP).expect("not too deep").expect("protobuf");
    let sent: Vec<_> = protobuf::all_bytes(&read, &[3, 2]).collect();
    let expected: Vec<_> = addresses.iter().map(Multiaddr::to_vec).collect();
    assert_eq!(sent, expected);
    assert_eq!(protobuf::number(&read, &[5]), Some(Status::Ok as u64));
}

/// The message in one of our frames, read by our own reader.
fn unframed(mut frame: &[u8]) -> Vec<u8> {
    let read = wire::read_frame(&mut frame).now_or_never();
    let message = read.expect("all bytes are there").expect("a frame").expect("a message");
    assert!(message.len() <= MAX_MESSAGE && frame.is_empty());
    message
}

/// Addresses of all kinds, some too long or truncated, and bytes that are no address.
pub fn lists() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        any::<[u8; 4]>().prop_map(|ip| Protocol::Ip4(ip.into())),
        any::<[u8; 16]>().prop_map(|ip| Protocol::Ip6(ip.into())),
        any::<u16>().prop_map(Protocol::Tcp),
        any::<u16>().prop_map(Protocol::Udp),
        "[a-z.-]{0,60}".prop_map(|name| Protocol::Dns4(name.into())),
        "[a-zäß/%]{0,20}".prop_map(|name| Protocol::Dnsaddr(name.into())),
        "[a-z/%?]{0,40}".prop_map(|path| Protocol::Unix(path.into())),
        "[a-z]{0,9}".prop_map(|zone| Protocol::Ip6zone(zone.into())),
        "/[a-z/%]{0,40}".prop_map(|path| Protocol::Ws(path.into())),
        any::<u64>().prop_map(Protocol::Memory),
        any::<[u8; 32]>().prop_map(|key| {
            let id = [&[0, 32][..], &key].concat();
            Protocol::P2p(PeerId::from_bytes(&id).expect("a peer id"))
        }),
        Just(Protocol::P2p(alice())),
        Just(Protocol::P2pCircuit),
        Just(Protocol::QuicV1),
        Just(Protocol::WebTransport),
    ];
    let address =
        vec(part, 0..6).prop_map(|parts| parts.into_iter().collect::<Multiaddr>().to_vec());
    let text = select(vec![
        "/ip4/1.2.3.4/tcp/4001",
        "/ip6/::ffff:1.2.3.4/tcp/1",
        "/ip6zone/eth0/ip6/fe80::1/tcp/1",
        "/dnsaddr/example.org/p2p/12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g",
        "/ip4/1.2.3.4/tcp/65536",
        "//",
    ]);
    let one = prop_oneof![
        6 => address,
        1 => text.prop_map(|text| text.as_bytes().to_vec()),
        1 => vec(any::<u8>(), 0..60),
        1 => (select(vec![0u8, 0x12]), vec(any::<u8>(), 0..66))
            .prop_map(|(code, digest)| [&[code, digest.len() as u8][..], &digest].concat()),
    ];
    vec((one, prop_oneof![6 => Just(0i8), 1 => -3..4i8]), 0..24).prop_map(|list| {
        let mut bytes = Vec::new();
        for (one, offset) in list {
            bytes.push((one.len().min(255) as u8).wrapping_add_signed(offset));
            bytes.extend(one.iter().take(255));
        }
        bytes
    })
}
