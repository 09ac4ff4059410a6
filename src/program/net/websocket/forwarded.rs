//! The client that a reverse proxy names in `Forwarded` (RFC 7239) or `X-Forwarded-For`.
//!
//! Sans-IO. Each proxy appends the address that it was reached from, so that only the end of the list is trustworthy.
//! The list is read from its end: nothing that the client wrote at its start changes what is read there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The values of both headers, one for each header line, in the order in which they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// Those of `Forwarded`.
    pub standard: Vec<Vec<u8>>,
    /// Those of `X-Forwarded-For`.
    pub de_facto: Vec<Vec<u8>>,
}

/// An address that a proxy was reached from, and its port if the proxy named one.
pub type Hop = (IpAddr, Option<u16>);

/// Why the headers name no client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForwardedError {
    /// The request has neither header.
    #[error("there is no Forwarded and no X-Forwarded-For header")]
    Absent,
    /// What a trusted proxy appended is no IP address.
    #[error("its Forwarded or X-Forwarded-For header names no IP address")]
    Malformed,
    /// Both headers are there, and do not name the same client. One of them may then be the client's own: a proxy that
    /// appends to one header passes the other on as it came.
    #[error("Forwarded and X-Forwarded-For name different clients")]
    Contradictory,
}

impl Forwarded {
    /// Returns the client: the last hop that is not trusted or, if all hops are, the first one.
    ///
    /// # Errors
    ///
    /// When the headers name no client.
    pub fn client(&self, is_trusted: impl Fn(IpAddr) -> bool) -> Result<Hop, ForwardedError> {
        let standard = last_untrusted(&self.standard, parse_element, &is_trusted);
        let de_facto = last_untrusted(&self.de_facto, parse_node, &is_trusted);
        match (standard, de_facto) {
            (None, None) => Err(ForwardedError::Absent),
            (Some(one), None) | (None, Some(one)) => one.ok_or(ForwardedError::Malformed),
            (Some(Some(one)), Some(Some(other))) if one.0 == other.0 => Ok(one),
            (Some(_), Some(_)) => Err(ForwardedError::Contradictory),
        }
    }
}

/// Returns the last hop of these lines that is not trusted or, if all are, the first one. `None`: the lines have no
/// element; `Some(None)`: behind that hop, or in its place, there is an element that names no address.
fn last_untrusted(
    lines: &[Vec<u8>],
    parse: fn(&[u8]) -> Option<Hop>,
    is_trusted: impl Fn(IpAddr) -> bool,
) -> Option<Option<Hop>> {
    let mut first_so_far = None;
    for element in lines.iter().rev().flat_map(|line| last_first(line, b',')) {
        match parse(element) {
            Some(hop) if is_trusted(hop.0) => first_so_far = Some(Some(hop)),
            other => return Some(other),
        }
    }
    first_so_far
}

/// Splits a list at the separators outside quoted strings; the last part comes first. Empty parts are left out: a list
/// may have them (RFC 9110, 5.6.1), and so may an element (RFC 7239, 4). It is scanned from its end, so that an
/// unclosed quote has no effect on the parts behind it.
fn last_first(list: &[u8], separator: u8) -> impl Iterator<Item = &[u8]> {
    // Backwards, a quote comes before the backslashes that may escape it. So it takes effect at the next byte that is
    // no backslash. Until then `quote` says whether the number of backslashes is even so far, which leaves it
    // unescaped.
    let (mut is_quoted, mut quote) = (false, None);
    let parts = list.rsplit(move |byte| {
        if *byte == b'\\' {
            quote = quote.map(|is_unescaped: bool| !is_unescaped);
        } else {
            is_quoted ^= quote == Some(true);
            quote = (*byte == b'"').then_some(true);
        }
        *byte == separator && !is_quoted
    });
    parts.filter(|part| !part.trim_ascii().is_empty())
}

/// The address that the parameter `for` of an element names (RFC 7239, 4); `None` without exactly one such parameter.
fn parse_element(element: &[u8]) -> Option<Hop> {
    let mut found = None;
    for parameter in last_first(element, b';') {
        let equals = parameter.iter().position(|byte| *byte == b'=')?;
        let (name, value) = parameter.split_at(equals);
        if name.trim_ascii().eq_ignore_ascii_case(b"for")
            && found.replace(value.get(1..).unwrap_or_default()).is_some()
        {
            return None;
        }
    }
    parse_node(found?)
}

/// The address of a node (RFC 7239, 6): IPv4, or IPv6 in brackets, with or without a port, quoted or not. In
/// `X-Forwarded-For` the brackets may be missing. `None` for `unknown` and for obfuscated names.
fn parse_node(node: &[u8]) -> Option<Hop> {
    let text = str::from_utf8(node).ok()?.trim();
    let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    let (ip, port) = if let Some(rest) = text.strip_prefix('[') {
        let (ip, behind) = rest.split_once(']')?;
        let port = if behind.is_empty() { None } else { Some(behind.strip_prefix(':')?) };
        (IpAddr::from(ip.parse::<Ipv6Addr>().ok()?), port)
    } else if let Ok(ip) = text.parse::<IpAddr>() {
        (ip, None)
    } else {
        let (ip, port) = text.split_once(':')?;
        (IpAddr::from(ip.parse::<Ipv4Addr>().ok()?), Some(port))
    };
    // A port may be obfuscated (`_port`), and is then unknown.
    let port = port.and_then(|port| port.parse().ok()).filter(|port| *port != 0);
    let ip = ip.to_canonical();
    (!ip.is_unspecified()).then_some((ip, port))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::select};

    use super::*;

    fn lines(lines: &[&str]) -> Vec<Vec<u8>> {
        lines.iter().map(|line| line.as_bytes().to_vec()).collect()
    }

    /// Trusts the proxies in 10.0.0.0/8.
    fn is_trusted(ip: IpAddr) -> bool {
        matches!(ip, IpAddr::V4(ip) if ip.octets()[0] == 10)
    }

    fn standard(values: &[&str]) -> Result<Hop, ForwardedError> {
        Forwarded { standard: lines(values), de_facto: Vec::new() }.client(is_trusted)
    }

    fn de_facto(values: &[&str]) -> Result<Hop, ForwardedError> {
        Forwarded { standard: Vec::new(), de_facto: lines(values) }.client(is_trusted)
    }

    fn hop(ip: &str, port: Option<u16>) -> Result<Hop, ForwardedError> {
        Ok((ip.parse().unwrap(), port))
    }

    #[test]
    fn the_last_hop_that_is_not_trusted_is_the_client() {
        for (values, client) in [
            (&["192.0.2.1"][..], hop("192.0.2.1", None)),
            (&["198.51.100.1, 192.0.2.1"], hop("192.0.2.1", None)),
            (&["198.51.100.1, 192.0.2.1,10.0.0.1 , 10.0.0.2"], hop("192.0.2.1", None)),
            (&["198.51.100.1", "192.0.2.1", "10.0.0.1"], hop("192.0.2.1", None)),
            (&["192.0.2.1:4711, "], hop("192.0.2.1", Some(4711))),
            (&["2001:db8::1"], hop("2001:db8::1", None)),
            (&["[2001:db8::1]:443"], hop("2001:db8::1", Some(443))),
            (&["::ffff:192.0.2.1"], hop("192.0.2.1", None)),
            (&["10.0.0.7, 10.0.0.1"], hop("10.0.0.7", None)),
            (&["192.0.2.1, unknown"], Err(ForwardedError::Malformed)),
            (&["192.0.2.1, 0.0.0.0"], Err(ForwardedError::Malformed)),
            (&["192.0.2.1, fe80::1%eth0"], Err(ForwardedError::Malformed)),
            (&["unknown, 10.0.0.1"], Err(ForwardedError::Malformed)),
            (&["", " , "], Err(ForwardedError::Absent)),
            (&[], Err(ForwardedError::Absent)),
        ] {
            assert_eq!(de_facto(values), client, "{values:?}");
        }
    }

    #[test]
    fn elements_as_in_rfc_7239_are_parsed() {
        for (values, client) in [
            (&["for=\"_gazonk\""][..], Err(ForwardedError::Malformed)),
            (&["For=\"[2001:db8:cafe::17]:4711\""], hop("2001:db8:cafe::17", Some(4711))),
            (&["for=192.0.2.60;proto=http;by=203.0.113.43"], hop("192.0.2.60", None)),
            (&["for=192.0.2.43, for=198.51.100.17"], hop("198.51.100.17", None)),
            (&["for=192.0.2.43, for=\"[2001:db8::1]:1234\""], hop("2001:db8::1", Some(1234))),
            (&["for=192.0.2.43", "for=198.51.100.17;by=\"a;b,c\""], hop("198.51.100.17", None)),
            (&["for=\"192.0.2.43:_port\""], hop("192.0.2.43", None)),
            (&["for=192.0.2.43;"], hop("192.0.2.43", None)),
            (&["proto=https; ;for=192.0.2.43"], hop("192.0.2.43", None)),
            (&["for=192.0.2.1, for=unknown"], Err(ForwardedError::Malformed)),
            (&["for=192.0.2.1;for=192.0.2.2"], Err(ForwardedError::Malformed)),
            (&["by=192.0.2.1"], Err(ForwardedError::Malformed)),
            (&["192.0.2.1"], Err(ForwardedError::Malformed)),
        ] {
            assert_eq!(standard(values), client, "{values:?}");
        }
    }

    #[test]
    fn a_quote_or_a_separator_within_a_quoted_string_ends_nothing() {
        for host in
            [r#"x\",for=6.6.6.6;by=\"y"#, r#"x\\"#, r#"\\\",for=6.6.6.6"#, ",for=6.6.6.6;by=y"]
        {
            for element in
                [format!("for=192.0.2.1;host=\"{host}\""), format!("host=\"{host}\";for=192.0.2.1")]
            {
                assert_eq!(standard(&[&element]), hop("192.0.2.1", None), "{element}");
            }
        }
    }

    #[test]
    fn two_headers_that_name_different_clients_are_an_error() {
        let both = |one: &str, other: &str| {
            Forwarded { standard: lines(&[one]), de_facto: lines(&[other]) }.client(is_trusted)
        };
        assert_eq!(both("for=192.0.2.1", "192.0.2.1, 10.0.0.1"), hop("192.0.2.1", None));
        assert_eq!(both("for=192.0.2.1", "192.0.2.2"), Err(ForwardedError::Contradictory));
        assert_eq!(both("for=unknown", "192.0.2.2"), Err(ForwardedError::Contradictory));
    }

    proptest! {
        #[test]
        fn client_supplied_values_do_not_affect_the_proxys_entry(
            before in vec(any::<u8>(), 0..200),
            quotes in "[\"\\\\,;= for]{0,20}",
            is_standard in any::<bool>(),
            (text, client) in select(vec![
                ("for=192.0.2.1", "192.0.2.1"),
                ("by=10.0.0.1;for=\"[2001:db8::1]:1234\"", "2001:db8::1"),
                ("for=192.0.2.1, for=10.0.0.1", "192.0.2.1"),
            ]),
        ) {
            let text = if is_standard { text.into() } else { text.replace("for=", "") };
            prop_assume!(is_standard || !text.contains(';'));
            let line = [&before, quotes.as_bytes(), b",", text.as_bytes()].concat();
            let mut forwarded = Forwarded::default();
            let lines = if is_standard { &mut forwarded.standard } else { &mut forwarded.de_facto };
            *lines = vec![before, line];
            prop_assert_eq!(forwarded.client(is_trusted).map(|hop| hop.0), Ok(client.parse().unwrap()));
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(lines in vec(vec(any::<u8>(), 0..100), 0..4), text in "[\\[\\]:.0-9a-f\";=,for ]{0,60}") {
            let both = [lines, vec![text.into_bytes()]].concat();
            let forwarded = Forwarded { standard: both.clone(), de_facto: both };
            let _ = forwarded.client(|_| true);
        }
    }
}
