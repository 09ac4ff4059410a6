//! The header of the [PROXY protocol][spec], with which a proxy names the client of a connection.
//!
//! Sans-IO. Not a library, because the maintained parsers accept malformed headers (`PROXYxTCP4`, the port `+1`) and
//! reject a LOCAL with addresses, which the specification says to ignore; and because they are thirty times as long, for
//! extensions that the relay does not read. The tests compare this parser with the headers that one of them writes.
//!
//! [spec]: https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt

use std::net::{IpAddr, SocketAddr};

/// The longest header that is read, in bytes: what a TCP segment carries on any network, so that it arrives in one.
pub const MAX_LENGTH: usize = 536;

/// The longest header of version 1, in bytes, by the specification.
const MAX_LENGTH_V1: usize = 107;

/// The first bytes of a header of version 1, and of version 2.
pub const SIGNATURE_V1: &[u8] = b"PROXY ";
pub const SIGNATURE_V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// Length of version 2's fixed part: signature, version and command, family and protocol, length.
const FIXED_V2: usize = 16;

/// A parsed header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The client; an IPv4-mapped address as IPv4. `None`: the connection is the proxy's own (a health check), or the
    /// client has no IP address.
    pub client: Option<SocketAddr>,
    /// The length of the header, in bytes.
    pub length: usize,
}

/// Why there is no valid header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The first bytes are not a header's.
    #[error("the first bytes are not a header")]
    NotAHeader,
    /// It exceeds the maximum length.
    #[error("longer than 536 bytes, or 107 in version 1")]
    TooLong,
    /// It begins like a header and does not follow the specification.
    #[error("malformed")]
    Malformed,
    /// The connection ended before the end of the header.
    #[error("truncated")]
    Truncated,
    /// It did not arrive in time.
    #[error("timed out")]
    TimedOut,
}

/// Parses the header at the start of these bytes. `None`: it is incomplete, and all bytes belong to it.
///
/// # Errors
///
/// When the bytes begin with no header, or with one that is too long or malformed.
pub fn parse(bytes: &[u8]) -> Result<Option<Header>, HeaderError> {
    if may_begin_with(bytes, SIGNATURE_V1) {
        parse_v1(bytes)
    } else if may_begin_with(bytes, SIGNATURE_V2) {
        parse_v2(bytes)
    } else {
        Err(HeaderError::NotAHeader)
    }
}

/// Whether the bytes begin with the signature, or are the beginning of it.
fn may_begin_with(bytes: &[u8], signature: &[u8]) -> bool {
    bytes.iter().zip(signature).all(|(a, b)| a == b)
}

/// Section 2.1: `PROXY TCP4 192.0.2.1 192.0.2.2 56324 443`, CR and LF.
fn parse_v1(bytes: &[u8]) -> Result<Option<Header>, HeaderError> {
    let within = bytes.get(..MAX_LENGTH_V1).unwrap_or(bytes);
    let Some(end) = within.windows(2).position(|two| two == b"\r\n") else {
        return if within.len() < MAX_LENGTH_V1 { Ok(None) } else { Err(HeaderError::TooLong) };
    };
    let line = String::from_utf8_lossy(within.get(..end).unwrap_or_default());
    let client = match line.split(' ').collect::<Vec<_>>()[..] {
        ["PROXY", "UNKNOWN", ..] => None, // the rest of the line is to be ignored
        ["PROXY", family @ ("TCP4" | "TCP6"), from, to, from_port, to_port] => {
            text_address(family, to, to_port)?;
            Some(text_address(family, from, from_port)?)
        }
        _ => return Err(HeaderError::Malformed),
    };
    let length = end + 2;
    Ok(Some(Header { client, length }))
}

/// Section 2.2: 16 bytes, the last two of which are the length of what follows.
fn parse_v2(bytes: &[u8]) -> Result<Option<Header>, HeaderError> {
    let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED_V2>() else {
        return Ok(None);
    };
    let [.., command, family, l0, l1] = *fixed;
    let rest_length = usize::from(u16::from_be_bytes([l0, l1]));
    let length = FIXED_V2 + rest_length;
    if length > MAX_LENGTH {
        return Err(HeaderError::TooLong);
    }
    let Some(rest) = rest.get(..rest_length) else {
        return Ok(None);
    };
    // Extensions may follow the addresses; they are ignored.
    let client = match (command, family) {
        (0x20, _) => None,           // LOCAL: the rest is to be ignored
        (0x21, 0x00 | 0x31) => None, // PROXY: for an unknown client, or over a Unix socket
        (0x21, 0x11) => Some(binary_address::<4>(rest).ok_or(HeaderError::Malformed)?),
        (0x21, 0x21) => Some(binary_address::<16>(rest).ok_or(HeaderError::Malformed)?),
        _ => return Err(HeaderError::Malformed),
    };
    Ok(Some(Header { client, length }))
}

/// Parses an address of this family and a port as text.
fn text_address(family: &str, ip: &str, port: &str) -> Result<SocketAddr, HeaderError> {
    let is_numeric = port.bytes().all(|byte| byte.is_ascii_digit()); // `parse` accepts a +, too
    match (ip.parse::<IpAddr>(), port.parse()) {
        (Ok(ip), Ok(port)) if is_numeric && ip.is_ipv4() == (family == "TCP4") => {
            Ok(canonical(ip, port))
        }
        _ => Err(HeaderError::Malformed),
    }
}

/// Parses the first of two addresses of `N` bytes, and the first of the two ports that follow them.
fn binary_address<const N: usize>(bytes: &[u8]) -> Option<SocketAddr>
where
    IpAddr: From<[u8; N]>,
{
    let (from, bytes) = bytes.split_first_chunk::<N>()?;
    let (_to, bytes) = bytes.split_first_chunk::<N>()?;
    let (ports, _) = bytes.split_first_chunk::<4>()?;
    let [from_port @ .., _, _] = *ports;
    Some(canonical((*from).into(), u16::from_be_bytes(from_port)))
}

fn canonical(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip.to_canonical(), port)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::{collection::vec, prelude::*, sample::select};
    use proxy_header::{ProxiedAddress, ProxyHeader, Tlv};

    use super::*;

    fn read(bytes: &[u8]) -> Result<Option<SocketAddr>, HeaderError> {
        let header = parse(bytes)?.expect("a complete header");
        assert_eq!(header.length, bytes.len());
        Ok(header.client)
    }

    fn of_v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [SIGNATURE_V2, &[command, family], &length, rest].concat()
    }

    #[test]
    fn the_examples_of_the_specification_are_parsed() {
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
    fn local_and_unknown_headers_name_no_client() {
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
    fn invalid_headers_are_rejected() {
        for (bytes, why) in [
            (&b"\x13/multistream/1.0.0\n"[..], HeaderError::NotAHeader),
            (b"proxy TCP4 192.0.2.1", HeaderError::NotAHeader),
            (b"PROXYxTCP4 192.0.2.1", HeaderError::NotAHeader),
            (b"\r\n\r\n\0\r\nQUIT\r", HeaderError::NotAHeader),
            (&[&b"PROXY UNKNOWN "[..], &[b'1'; 93]].concat(), HeaderError::TooLong),
            (&[SIGNATURE_V2, &[0x21, 0x11, 2, 9]].concat(), HeaderError::TooLong),
            (b"PROXY \r\n", HeaderError::Malformed),
            (b"PROXY UNKNOWNS\r\n", HeaderError::Malformed),
            (b"PROXY TCP4\r\n", HeaderError::Malformed),
            (b"PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n", HeaderError::Malformed),
            (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n", HeaderError::Malformed),
            (b"PROXY TCP4 192.0.2.1 192.0.2.2 +1 2\r\n", HeaderError::Malformed),
            (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 65536\r\n", HeaderError::Malformed),
            (b"PROXY TCP4 192.0.2.1  192.0.2.2 1 2\r\n", HeaderError::Malformed),
            (b"PROXY TCP4 192.0.2.256 192.0.2.2 1 2\r\n", HeaderError::Malformed),
            (b"PROXY TCP4 ::1 ::2 1 2\r\n", HeaderError::Malformed),
            (b"PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n", HeaderError::Malformed),
            (b"PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n", HeaderError::Malformed),
            (b"PROXY TCP4 192.0.2.1\n192.0.2.2 1 2\r\n", HeaderError::Malformed),
            (&of_v2(0x21, 0x11, &[0; 11]), HeaderError::Malformed),
            (&of_v2(0x21, 0x21, &[0; 35]), HeaderError::Malformed),
            (&of_v2(0x21, 0x12, &[0; 12]), HeaderError::Malformed), // UDP
            (&of_v2(0x21, 0x41, &[0; 36]), HeaderError::Malformed),
            (&of_v2(0x22, 0x11, &[0; 12]), HeaderError::Malformed),
            (&of_v2(0x11, 0x11, &[0; 12]), HeaderError::Malformed), // version 1
        ] {
            assert_eq!(parse(bytes), Err(why), "{}", bytes.escape_ascii());
        }
    }

    /// A header of either version, and its client.
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
        fn headers_written_by_another_library_are_parsed(
            (bytes, client) in headers(),
            after in vec(any::<u8>(), 0..64),
        ) {
            let length = bytes.len();
            let header = Header { client, length };
            prop_assert_eq!(parse(&[&bytes[..], &after].concat()), Ok(Some(header)));
            for part in 0..length {
                prop_assert_eq!(parse(&bytes[..part]), Ok(None), "{} bytes of it", part);
            }
        }

        #[test]
        fn arbitrary_bytes_are_parsed_or_rejected(
            signature in select(vec![&b""[..], SIGNATURE_V1, b"PROXY TCP4 ", SIGNATURE_V2]),
            bytes in vec(any::<u8>(), 0..700),
        ) {
            let bytes = [signature, &bytes].concat();
            match parse(&bytes) {
                Ok(Some(header)) => prop_assert!(header.length <= MAX_LENGTH.min(bytes.len())),
                Ok(None) => prop_assert!(bytes.len() < MAX_LENGTH),
                Err(_) => {}
            }
        }
    }
}
