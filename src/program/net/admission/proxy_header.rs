//! The header of the [PROXY protocol][spec]: whose connection it is that a proxy brings.
//!
//! Pure. Written here because the parsers that are kept take for headers what are none (`PROXYxTCP4`,
//! the port `+1`), refuse a LOCAL whose addresses the specification says to ignore, and are thirty
//! times as long, for extensions that nobody here reads. One of them writes the headers of the tests.
//!
//! [spec]: https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// How long a header may be: what a TCP segment carries on any network, so that it comes in one.
pub const LONGEST: usize = 536;

/// How long one of version 1 may be, by the specification.
const LONGEST_V1: usize = 107;

const V1: &[u8] = b"PROXY ";
const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// Signature, version and command, family and protocol, length.
const FIXED_V2: usize = 16;

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whose connection it is; an IPv4-mapped address as IPv4. `None`: the proxy's own, a health
    /// check for example, or of somebody without an IP address.
    pub client: Option<SocketAddr>,
    /// How many bytes the header has.
    pub length: usize,
}

/// Why there is no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoHeader {
    /// It begins like none.
    SomethingElse,
    /// It is longer than may be.
    TooLong,
    /// What it begins with is a header's, and what follows is not.
    Malformed,
    /// The connection ended in the middle of it.
    Ended,
    /// It was not there in time.
    Late,
}

impl fmt::Display for NoHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SomethingElse => "something else came first",
            Self::TooLong => "longer than 536 bytes, or 107 in version 1",
            Self::Malformed => "malformed",
            Self::Ended => "ended in the middle",
            Self::Late => "not there in time",
        })
    }
}

/// The header that these bytes begin with. `None`: it is not all there, and all of them belong to it.
///
/// # Errors
///
/// When they begin like no header, or it is too long, or malformed now that it is all there.
pub fn parse(bytes: &[u8]) -> Result<Option<Header>, NoHeader> {
    if starts_alike(bytes, V1) {
        v1(bytes)
    } else if starts_alike(bytes, V2) {
        v2(bytes)
    } else {
        Err(NoHeader::SomethingElse)
    }
}

/// Whether one begins with the other.
fn starts_alike(bytes: &[u8], signature: &[u8]) -> bool {
    bytes.iter().zip(signature).all(|(a, b)| a == b)
}

/// Section 2.1: `PROXY TCP4 192.0.2.1 192.0.2.2 56324 443`, CR and LF.
fn v1(bytes: &[u8]) -> Result<Option<Header>, NoHeader> {
    let within = bytes.get(..LONGEST_V1).unwrap_or(bytes);
    let Some(end) = within.windows(2).position(|two| two == b"\r\n") else {
        return match within.len() {
            LONGEST_V1 => Err(NoHeader::TooLong),
            _ => Ok(None),
        };
    };
    let line = String::from_utf8_lossy(within.get(..end).unwrap_or_default());
    let client = match line.split(' ').collect::<Vec<_>>()[..] {
        ["PROXY", "UNKNOWN", ..] => None, // what follows is to be ignored
        ["PROXY", "TCP4", from, to, from_port, to_port] => {
            written::<Ipv4Addr>(to, to_port)?;
            Some(written::<Ipv4Addr>(from, from_port)?)
        }
        ["PROXY", "TCP6", from, to, from_port, to_port] => {
            written::<Ipv6Addr>(to, to_port)?;
            Some(written::<Ipv6Addr>(from, from_port)?)
        }
        _ => return Err(NoHeader::Malformed),
    };
    let length = end + 2;
    Ok(Some(Header { client, length }))
}

/// Section 2.2: 16 bytes, the last two of which say how many follow.
fn v2(bytes: &[u8]) -> Result<Option<Header>, NoHeader> {
    let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED_V2>() else {
        return Ok(None);
    };
    let [.., command, family, l0, l1] = *fixed;
    let follow = usize::from(u16::from_be_bytes([l0, l1]));
    let length = FIXED_V2 + follow;
    if length > LONGEST {
        return Err(NoHeader::TooLong);
    }
    let Some(rest) = rest.get(..follow) else {
        return Ok(None);
    };
    // Behind the addresses may be extensions; nothing here is told by them.
    let client = match (command, family) {
        (0x20, _) => None,           // LOCAL: the rest is to be ignored
        (0x21, 0x00 | 0x31) => None, // PROXY: for somebody unknown, or on a Unix socket
        (0x21, 0x11) => Some(packed::<4, Ipv4Addr>(rest).ok_or(NoHeader::Malformed)?),
        (0x21, 0x21) => Some(packed::<16, Ipv6Addr>(rest).ok_or(NoHeader::Malformed)?),
        _ => return Err(NoHeader::Malformed),
    };
    Ok(Some(Header { client, length }))
}

/// An address and a port as text.
fn written<I: FromStr + Into<IpAddr>>(ip: &str, port: &str) -> Result<SocketAddr, NoHeader> {
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    match (ip.parse::<I>(), port.parse()) {
        (Ok(ip), Ok(port)) if digits => Ok(canonical(ip, port)),
        _ => Err(NoHeader::Malformed),
    }
}

/// The first of two addresses in `N` bytes each, and the first of the two ports behind them.
fn packed<const N: usize, I: From<[u8; N]> + Into<IpAddr>>(bytes: &[u8]) -> Option<SocketAddr> {
    let (from, bytes) = bytes.split_first_chunk::<N>()?;
    let (_to, bytes) = bytes.split_first_chunk::<N>()?;
    let (ports, _) = bytes.split_first_chunk::<4>()?;
    let [from_port @ .., _, _] = *ports;
    Some(canonical(I::from(*from), u16::from_be_bytes(from_port)))
}

fn canonical(ip: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into().to_canonical(), port)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::select};
    use proxy_header::{ProxiedAddress, ProxyHeader, Tlv};

    use super::*;

    fn read(bytes: &[u8]) -> Result<Option<SocketAddr>, NoHeader> {
        let header = parse(bytes)?.expect("a header that is all there");
        assert_eq!(header.length, bytes.len());
        Ok(header.client)
    }

    fn of_v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [V2, &[command, family], &length, rest].concat()
    }

    #[test]
    fn the_specifications_examples_are_understood() {
        let client = |text: &str| Ok(Some(text.parse().unwrap()));
        let v1 = read(b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n");
        assert_eq!(v1, client("192.168.0.1:56324"));
        let all = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        let longest_v6 = format!("PROXY TCP6 {all} {all} 65535 65535\r\n");
        assert_eq!(read(longest_v6.as_bytes()), client(&format!("[{all}]:65535")));
        let longest = format!("PROXY UNKNOWN {all} {all} 65535 65535\r\n");
        assert_eq!((longest.len(), read(longest.as_bytes())), (107, Ok(None)));
        assert_eq!(read(b"PROXY UNKNOWN\r\n"), Ok(None));
        let v2 = of_v2(0x21, 0x11, &[192, 0, 2, 1, 192, 0, 2, 2, 0xdc, 4, 1, 187]);
        assert_eq!(read(&v2), client("192.0.2.1:56324"));
    }

    #[test]
    fn an_ipv4_mapped_client_is_an_ipv4_client() {
        let client = Ok(Some("192.0.2.1:7".parse().unwrap()));
        let v1 = read(b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:192.0.2.2 7 8\r\n");
        assert_eq!(v1, client);
        let mapped = Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped().octets();
        let v2 = of_v2(0x21, 0x21, &[&mapped, &mapped, &[0, 7, 0, 8][..]].concat());
        assert_eq!(read(&v2), client);
    }

    #[test]
    fn local_and_unknown_are_the_proxys_own_whatever_they_carry() {
        for (command, family) in [(0x20, 0x00), (0x20, 0x11), (0x20, 0xff), (0x21, 0)] {
            for rest in [&[][..], &[0xff; 7], &[0; 520]] {
                assert_eq!(read(&of_v2(command, family, rest)), Ok(None));
            }
        }
        let unix = of_v2(0x21, 0x31, &[b'/'; 216]);
        assert_eq!(read(&unix), Ok(None));
        assert_eq!(read(b"PROXY UNKNOWN \xff and so on\r\n"), Ok(None));
    }

    #[test]
    fn what_is_no_header_is_refused() {
        for (bytes, why) in [
            (&b"\x13/multistream/1.0.0\n"[..], NoHeader::SomethingElse),
            (b"proxy TCP4 192.0.2.1", NoHeader::SomethingElse),
            (b"PROXYxTCP4 192.0.2.1", NoHeader::SomethingElse),
            (b"\r\n\r\n\0\r\nQUIT\r", NoHeader::SomethingElse),
            (&[&b"PROXY UNKNOWN "[..], &[b'1'; 93]].concat(), NoHeader::TooLong),
            (&[V2, &[0x21, 0x11, 2, 9]].concat(), NoHeader::TooLong),
            (b"PROXY \r\n", NoHeader::Malformed),
            (b"PROXY UNKNOWNS\r\n", NoHeader::Malformed),
            (b"PROXY TCP4\r\n", NoHeader::Malformed),
            (b"PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n", NoHeader::Malformed),
            (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n", NoHeader::Malformed),
            (b"PROXY TCP4 192.0.2.1 192.0.2.2 +1 2\r\n", NoHeader::Malformed),
            (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 65536\r\n", NoHeader::Malformed),
            (b"PROXY TCP4 192.0.2.1  192.0.2.2 1 2\r\n", NoHeader::Malformed),
            (b"PROXY TCP4 192.0.2.256 192.0.2.2 1 2\r\n", NoHeader::Malformed),
            (b"PROXY TCP4 ::1 ::2 1 2\r\n", NoHeader::Malformed),
            (b"PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n", NoHeader::Malformed),
            (b"PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n", NoHeader::Malformed),
            (b"PROXY TCP4 192.0.2.1\n192.0.2.2 1 2\r\n", NoHeader::Malformed),
            (&of_v2(0x21, 0x11, &[0; 11]), NoHeader::Malformed),
            (&of_v2(0x21, 0x21, &[0; 35]), NoHeader::Malformed),
            (&of_v2(0x21, 0x12, &[0; 12]), NoHeader::Malformed), // UDP
            (&of_v2(0x21, 0x41, &[0; 36]), NoHeader::Malformed),
            (&of_v2(0x22, 0x11, &[0; 12]), NoHeader::Malformed),
            (&of_v2(0x11, 0x11, &[0; 12]), NoHeader::Malformed), // version 1
        ] {
            assert_eq!(parse(bytes), Err(why), "{}", bytes.escape_ascii());
        }
    }

    /// A header of either version, and whose it is.
    fn headers() -> impl Strategy<Value = (Vec<u8>, Option<SocketAddr>)> {
        let v4 = || (any::<[u8; 4]>(), any::<u16>()).prop_map(SocketAddr::from);
        let v6 = || (any::<[u8; 16]>(), any::<u16>()).prop_map(SocketAddr::from);
        let ends =
            prop_oneof![(v4(), v4()).prop_map(Some), (v6(), v6()).prop_map(Some), Just(None),];
        let extension = prop_oneof![Just(None), vec(any::<u8>(), 0..400).prop_map(Some)];
        (ends, extension, any::<bool>()).prop_map(|(ends, extension, v1)| {
            let mut header = match ends {
                Some((from, to)) => ProxyHeader::with_address(ProxiedAddress::stream(from, to)),
                None => ProxyHeader::with_local(),
            };
            let mut bytes = Vec::new();
            let written = if v1 {
                header.encode_v1(&mut bytes)
            } else {
                if let Some(extension) = extension {
                    header.append_tlv(Tlv::UniqueId(extension.into()));
                }
                header.encode_v2(&mut bytes)
            };
            written.expect("room for it");
            let client = ends.map(|(from, _)| canonical(from.ip(), from.port()));
            (bytes, client)
        })
    }

    proptest! {
        #[test]
        fn what_another_program_writes_is_understood(
            (bytes, client) in headers(),
            behind in vec(any::<u8>(), 0..64),
        ) {
            let length = bytes.len();
            let header = Header { client, length };
            prop_assert_eq!(parse(&[&bytes[..], &behind].concat()), Ok(Some(header)));
            for part in 0..length {
                prop_assert_eq!(parse(&bytes[..part]), Ok(None), "{} bytes of it", part);
            }
        }

        #[test]
        fn no_bytes_are_too_much(
            signature in select(vec![&b""[..], V1, b"PROXY TCP4 ", V2]),
            bytes in vec(any::<u8>(), 0..700),
        ) {
            let bytes = [signature, &bytes].concat();
            match parse(&bytes) {
                Ok(Some(header)) => prop_assert!(header.length <= LONGEST.min(bytes.len())),
                Ok(None) => prop_assert!(bytes.len() < LONGEST),
                Err(_) => {}
            }
        }
    }
}
