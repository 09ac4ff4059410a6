//! Identify's message: encodes the relay's, and reads the few fields of a peer's that are used.
//!
//! The buffer for a peer's message grows as the message arrives, and is dropped once the few fields were read.
//! See [the specification](https://github.com/libp2p/specs/blob/master/identify/README.md).

use std::{io, time::Duration};

use async_std::io::timeout;
use libp2p::{
    Multiaddr,
    futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
};
use prost::{Message, bytes::Bytes};

use crate::{program::net::protobuf, wire};

/// How long each exchange may take.
pub const TIME_LIMIT: Duration = Duration::from_secs(10);

/// How many bytes and messages are read from one stream. go-libp2p sends a signed record as a second message if both
/// together exceed 2,048 bytes, and reads at most ten messages.
const MAX_STREAM: u64 = 16 * 1024;
const MAX_MESSAGES: usize = 10;

/// The longest address that is used, in bytes; a longer one is skipped.
const MAX_FIELD: usize = 256;

/// How many listening addresses of a peer are used.
const MAX_ADDRESSES: usize = 32;

const PROTOCOL_VERSION: &str = "ipfs/0.1.0";
const AGENT_VERSION: &str = concat!("relaylet/", env!("CARGO_PKG_VERSION"));

/// The message that is sent, and what the check reads of another relay's.
#[derive(Clone, PartialEq, Message)]
pub struct Identify {
    #[prost(bytes = "vec", optional, tag = "1")]
    pub public_key: Option<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub listen_addrs: Vec<Vec<u8>>,
    #[prost(string, repeated, tag = "3")]
    pub protocols: Vec<String>,
    #[prost(bytes = "vec", optional, tag = "4")]
    pub observed_addr: Option<Vec<u8>>,
    #[prost(string, optional, tag = "5")]
    pub protocol_version: Option<String>,
    #[prost(string, optional, tag = "6")]
    pub agent_version: Option<String>,
}

/// The fields of a peer's message that are used, as slices of it. As bytes: a protocol of no use to the relay
/// need not be UTF-8.
#[derive(Clone, PartialEq, Message)]
struct PeerIdentify {
    #[prost(bytes = "bytes", repeated, tag = "2")]
    listen_addrs: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "3")]
    protocols: Vec<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "4")]
    observed_addr: Option<Bytes>,
}

/// What a peer's messages say.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// The address at which the peer reached the relay.
    pub observed: Option<Multiaddr>,
    /// Where the peer listens; empty without a DHT.
    pub listening: Vec<Multiaddr>,
    /// Whether the peer supports the DHT's protocol; `None` if it names no protocols, and without a
    /// DHT.
    pub supports_dht: Option<bool>,
}

/// Encodes the relay's message with its length in front, and with as many of `addresses` as fit into
/// [`wire::MAX_MESSAGE`] bytes, the first ones first. Also returns how many are left out.
pub fn encode<'a>(
    public_key: &[u8],
    addresses: &[Multiaddr],
    protocols: impl Iterator<Item = &'a str>,
    observed: &Multiaddr,
) -> (Vec<u8>, usize) {
    let mut message = Identify {
        public_key: Some(public_key.to_vec()),
        listen_addrs: Vec::new(),
        protocols: protocols.map(str::to_owned).collect(),
        observed_addr: Some(observed.to_vec()),
        protocol_version: Some(PROTOCOL_VERSION.into()),
        agent_version: Some(AGENT_VERSION.into()),
    };
    let mut size = message.encoded_len();
    for address in addresses {
        let address = address.to_vec();
        // One byte for the field number, then the length.
        size += 1 + prost::length_delimiter_len(address.len()) + address.len();
        if size > wire::MAX_MESSAGE {
            break;
        }
        message.listen_addrs.push(address);
    }
    let left_out = addresses.len() - message.listen_addrs.len();
    (message.encode_length_delimited_to_vec(), left_out)
}

/// Sends an encoded message, and closes the stream.
///
/// # Errors
///
/// When the stream fails, or the peer does not read the message within [`TIME_LIMIT`].
pub async fn send(mut stream: impl AsyncWrite + Unpin, message: &[u8]) -> io::Result<()> {
    let send = async {
        stream.write_all(message).await?;
        stream.close().await
    };
    timeout(TIME_LIMIT, send).await
}

/// Reads a peer's messages until it closes the stream. `dht` is the protocol of the DHT that the relay
/// is in.
///
/// # Errors
///
/// When the first message is malformed, too long, or not complete within [`TIME_LIMIT`]. A later message with
/// such a problem ends reading without an error.
pub async fn read(stream: impl AsyncRead + Unpin, dht: Option<&str>) -> io::Result<Info> {
    let mut stream = stream.take(MAX_STREAM);
    let (mut info, mut messages) = (Info::default(), 0);
    let all = async {
        while messages < MAX_MESSAGES {
            info.update(protobuf::read(&mut stream).await?, dht);
            messages += 1;
        }
        Ok(())
    };
    match timeout(TIME_LIMIT, all).await {
        Err(error) if messages == 0 => Err(error),
        _ => Ok(info),
    }
}

impl Info {
    /// Adds what a message says. Ignores fields that are too long, and malformed addresses.
    fn update(&mut self, message: PeerIdentify, dht: Option<&str>) {
        let parse = |bytes: Bytes| {
            let is_used = (1..=MAX_FIELD).contains(&bytes.len());
            is_used.then(|| Multiaddr::try_from(bytes.to_vec()).ok()).flatten()
        };
        self.observed = message.observed_addr.and_then(parse).or(self.observed.take());
        let Some(dht) = dht else { return };
        let left = MAX_ADDRESSES - self.listening.len();
        self.listening.extend(message.listen_addrs.into_iter().filter_map(parse).take(left));
        if !message.protocols.is_empty() {
            let is_named = message.protocols.iter().any(|protocol| protocol == dht);
            self.supports_dht = Some(is_named || self.supports_dht == Some(true));
        }
    }
}

#[cfg(test)]
mod tests {
    use async_std::task::block_on;
    use libp2p::{PeerId, futures::io::Cursor, identity::Keypair};
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const KAD: &str = "/ipfs/kad/1.0.0";

    /// The message as other implementations send it.
    #[derive(Clone, PartialEq, Message)]
    struct PeerMessage {
        #[prost(bytes = "vec", optional, tag = "1")]
        public_key: Option<Vec<u8>>,
        #[prost(bytes = "vec", repeated, tag = "2")]
        listen_addrs: Vec<Vec<u8>>,
        #[prost(string, repeated, tag = "3")]
        protocols: Vec<String>,
        #[prost(bytes = "vec", optional, tag = "4")]
        observed_addr: Option<Vec<u8>>,
        #[prost(string, optional, tag = "5")]
        protocol_version: Option<String>,
        #[prost(string, optional, tag = "6")]
        agent_version: Option<String>,
        #[prost(bytes = "vec", optional, tag = "8")]
        signed_peer_record: Option<Vec<u8>>,
    }

    fn address(text: &str) -> Multiaddr {
        text.parse().expect("a multiaddr")
    }

    fn peer_message(addresses: u16, protocols: &[&str]) -> PeerMessage {
        let listening = |n| address(&format!("/ip6/2a00:1450::{n:x}/tcp/4001")).to_vec();
        PeerMessage {
            public_key: Some(Keypair::generate_ed25519().public().encode_protobuf()),
            listen_addrs: (0..addresses).map(listening).collect(),
            protocols: protocols.iter().copied().map(str::to_owned).collect(),
            observed_addr: Some(address("/ip4/5.5.5.5/tcp/4001").to_vec()),
            protocol_version: Some("ipfs/0.1.0".into()),
            agent_version: Some("someone/1.0.0".into()),
            signed_peer_record: None,
        }
    }

    fn read_all(bytes: &[u8], dht: Option<&str>) -> io::Result<Info> {
        block_on(read(Cursor::new(bytes), dht))
    }

    fn read_one(message: &PeerMessage, dht: Option<&str>) -> io::Result<Info> {
        read_all(&message.encode_length_delimited_to_vec(), dht)
    }

    fn observed() -> Option<Multiaddr> {
        Some(address("/ip4/5.5.5.5/tcp/4001"))
    }

    #[test]
    fn without_a_dht_only_the_observed_address_is_read() {
        let info = read_one(&peer_message(3, &[KAD]), None).unwrap();
        assert_eq!(info, Info { observed: observed(), ..Info::default() });
    }

    #[test]
    fn with_a_dht_the_addresses_are_read_too_and_whether_the_peer_supports_it() {
        for (protocols, supports_dht) in [
            (&["/ipfs/id/1.0.0", KAD, "/ipfs/ping/1.0.0"][..], Some(true)),
            (&["/ipfs/id/1.0.0", "/ipfs/kad/1.0.00"], Some(false)),
            (&[], None),
        ] {
            let info = read_one(&peer_message(3, protocols), Some(KAD)).unwrap();
            assert_eq!((info.supports_dht, info.listening.len()), (supports_dht, 3));
            assert_eq!(info.observed, observed());
        }
    }

    /// go-libp2p, where both together are long; with a further message of a later version.
    #[test]
    fn a_signed_record_may_follow_in_a_message_of_its_own() {
        let record =
            PeerMessage { signed_peer_record: Some(vec![7; 3000]), ..PeerMessage::default() };
        let later = PeerMessage { protocols: vec!["/new".into()], ..PeerMessage::default() };
        let messages = [peer_message(40, &[KAD]), record, later];
        let bytes: Vec<_> =
            messages.iter().flat_map(Message::encode_length_delimited_to_vec).collect();
        let whole = read_all(&bytes, Some(KAD)).unwrap();
        assert_eq!(whole.observed, observed());
        assert_eq!((whole.supports_dht, whole.listening.len()), (Some(true), MAX_ADDRESSES));
        // The first message counts even if a later one is truncated.
        let first = messages[0].encode_length_delimited_to_vec().len();
        for end in first..bytes.len() {
            assert_eq!(read_all(&bytes[..end], Some(KAD)).unwrap().observed, observed());
        }
    }

    #[test]
    fn a_truncated_message_is_an_error() {
        let bytes = peer_message(5, &[KAD]).encode_length_delimited_to_vec();
        for end in 0..bytes.len() {
            assert!(read_all(&bytes[..end], Some(KAD)).is_err(), "{end}");
        }
    }

    #[test]
    fn only_the_used_fields_of_a_large_message_are_kept() {
        let empty = PeerMessage { listen_addrs: vec![Vec::new(); 2010], ..peer_message(0, &[]) };
        assert_eq!(
            read_one(&empty, Some(KAD)).unwrap(),
            Info { observed: observed(), ..Info::default() }
        );
        let many = PeerMessage { protocols: vec!["/a".into(); 844], ..peer_message(100, &[]) };
        let info = read_one(&many, Some(KAD)).unwrap();
        assert_eq!((info.supports_dht, info.listening.len()), (Some(false), MAX_ADDRESSES));
        let too_long =
            PeerMessage { listen_addrs: vec![Vec::new(); 10_000], ..peer_message(0, &[]) };
        assert_eq!(read_one(&too_long, None).unwrap_err().kind(), io::ErrorKind::InvalidData);
        // A field that is too long is skipped, and so is a malformed address.
        let long = address(&format!("/dns4/{}/tcp/1", "x".repeat(300))).to_vec();
        for bytes in [long, vec![255; 8]] {
            let message =
                PeerMessage { observed_addr: Some(bytes.clone()), ..PeerMessage::default() };
            assert_eq!(read_one(&message, None).unwrap(), Info::default());
            let message = PeerMessage { listen_addrs: vec![bytes], ..PeerMessage::default() };
            assert_eq!(read_one(&message, Some(KAD)).unwrap(), Info::default());
        }
    }

    #[test]
    fn no_more_than_16_kib_of_a_stream_are_read() {
        let long =
            PeerMessage { signed_peer_record: Some(vec![7; 8000]), ..PeerMessage::default() };
        let last = peer_message(0, &[KAD]);
        let read_behind = |count| {
            let messages = std::iter::repeat_n(&long, count).chain([&last]);
            let bytes: Vec<_> =
                messages.flat_map(Message::encode_length_delimited_to_vec).collect();
            read_all(&bytes, None).unwrap()
        };
        assert_eq!(read_behind(2).observed, observed());
        assert_eq!(read_behind(3).observed, None);
        let short = vec![0; MAX_MESSAGES];
        let bytes = [short, last.encode_length_delimited_to_vec()].concat();
        assert_eq!(read_all(&bytes[1..], None).unwrap().observed, observed());
        assert_eq!(read_all(&bytes, None).unwrap().observed, None);
    }

    #[test]
    fn unknown_fields_are_skipped_and_malformed_ones_are_errors() {
        let framed = |message: &[u8]| [&[message.len() as u8], message].concat();
        for skipped in [
            &[0x78, 0x80, 0x00][..], // a varint that is not minimal
            &[0x79, 1, 2, 3, 4, 5, 6, 7, 8],
            &[0x7d, 1, 2, 3, 4],
            &[0x7a, 2, 0x7a, 200], // nested: not parsed
            &[0x78, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1], // 2^64 - 1
            &[0x22, 0],            // an observed address that is empty
        ] {
            assert_eq!(read_all(&framed(skipped), None).unwrap(), Info::default(), "{skipped:?}");
        }
        for malformed in [
            &[0x7b][..], // a group
            &[0x7c],
            &[0x7f],
            &[0x78, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2], // 2^64 and more
            &[0x78, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255],
            &[0x78, 0x80],
            &[0x7a, 255, 255, 255, 255, 255, 255, 255, 255, 127], // 2^63 - 1 bytes
            &[0x22, 255, 255, 255, 255, 255, 255, 255, 255, 127],
            &[0x7a, 3, 1, 2],
            &[0x7d, 1, 2, 3],
        ] {
            assert!(read_all(&framed(malformed), None).is_err(), "{malformed:?}");
        }
        assert!(read_all(&[0x80, 0x80, 0x80, 0x01], None).is_err(), "a length of 4 bytes");
    }

    fn decoded(bytes: &[u8]) -> PeerMessage {
        PeerMessage::decode_length_delimited(bytes).expect("a message")
    }

    #[test]
    fn a_sent_message_is_read_back_unchanged() {
        let key = Keypair::generate_ed25519().public().encode_protobuf();
        let addresses = [address("/ip4/1.2.3.4/tcp/1"), address("/dns4/example.org/tcp/1")];
        let observed = address("/ip4/5.6.7.8/tcp/9");
        let (bytes, left_out) = encode(&key, &addresses, ["/a/1", KAD].into_iter(), &observed);
        assert_eq!(left_out, 0);
        let expected = PeerMessage {
            public_key: Some(key),
            listen_addrs: addresses.iter().map(Multiaddr::to_vec).collect(),
            protocols: vec!["/a/1".into(), KAD.into()],
            observed_addr: Some(observed.to_vec()),
            protocol_version: Some("ipfs/0.1.0".into()),
            agent_version: Some(AGENT_VERSION.into()),
            signed_peer_record: None,
        };
        assert_eq!(decoded(&bytes), expected);
        let info = Info {
            observed: Some(observed),
            listening: addresses.into(),
            supports_dht: Some(true),
        };
        assert_eq!(read_all(&bytes, Some(KAD)).unwrap(), info);
    }

    /// Machines with this many IPv6 addresses exist.
    #[test]
    fn only_the_addresses_that_fit_are_sent() {
        let many: Vec<_> =
            (0..190u16).map(|n| address(&format!("/ip6/2a00:1450::{n:x}/tcp/4001"))).collect();
        let observed = address("/ip4/5.6.7.8/tcp/9");
        let (bytes, left_out) = encode(&[7; 36], &many, [KAD].into_iter(), &observed);
        let sent = decoded(&bytes).listen_addrs;
        assert_eq!(sent.len() + left_out, 190);
        assert!((150..190).contains(&sent.len()), "{}", sent.len());
        assert!(sent.iter().zip(&many).all(|(sent, one)| *sent == one.to_vec()), "the first ones");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_stay_within_the_bounds(bytes: Vec<u8>, length in 0..200usize) {
            let framed = [&[length as u8 & 0x7f], &bytes[..]].concat();
            for bytes in [bytes, framed] {
                for dht in [None, Some(KAD)] {
                    if let Ok(info) = read_all(&bytes, dht) {
                        prop_assert!(info.listening.len() <= MAX_ADDRESSES);
                        let mut all = info.listening.iter().chain(&info.observed);
                        prop_assert!(all.all(|address| address.len() <= MAX_FIELD));
                    }
                }
            }
        }

        #[test]
        fn a_sent_message_is_at_most_4096_bytes_and_can_be_read(
            hosts in vec("[a-z]{1,200}", 0..100),
            key in vec(any::<u8>(), 0..1000),
        ) {
            let named = |host: &String| {
                let named = address(&format!("/dns4/{host}/tcp/4001"));
                named.with_p2p(PeerId::random()).expect("it named none")
            };
            let addresses: Vec<_> = hosts.iter().map(named).collect();
            let (bytes, left_out) =
                encode(&key, &addresses, [KAD].into_iter(), &address("/ip4/5.6.7.8/tcp/9"));
            let message = decoded(&bytes);
            prop_assert!(message.encoded_len() <= 4096);
            let sent = message.listen_addrs.len();
            prop_assert_eq!(sent + left_out, addresses.len());
            if let Some(next) = addresses.get(sent) {
                prop_assert!(message.encoded_len() + next.len() + 3 > 4096);
            }
            let info = read_all(&bytes, Some(KAD)).unwrap();
            prop_assert_eq!(&info.listening[..], &addresses[..sent.min(MAX_ADDRESSES)]);
        }
    }
}
