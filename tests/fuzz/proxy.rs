//! Headers of the PROXY protocol.

use proptest::{collection::vec, prelude::*, sample::select};
use proxy_header::{ProxiedAddress, ProxyHeader};
use relaylet::program::net::admission::proxy_header::{HeaderError, MAX_LENGTH, parse};

/// Parses each prefix of `bytes`: once there are enough of them, the result must not change.
pub fn check(bytes: &[u8]) {
    let mut result = Ok(None);
    for length in 0..=bytes.len().min(MAX_LENGTH + 8) {
        let now = parse(&bytes[..length]);
        match result {
            Ok(None) => result = now,
            decided => assert_eq!(now, decided, "after {length} bytes"),
        }
        assert!(result != Ok(None) || length < MAX_LENGTH, "it never decides");
    }
    assert_eq!(parse(bytes), result);
    let Ok(Some(header)) = result else {
        let too_early = [HeaderError::Truncated, HeaderError::TimedOut].map(Err);
        assert!(!too_early.contains(&result), "a parser has neither an end nor a time limit");
        return;
    };
    assert!(header.length <= MAX_LENGTH.min(bytes.len()));
    let Some(client) = header.client else {
        return;
    };
    assert_eq!(client.ip(), client.ip().to_canonical());
    for version in [1, 2] {
        let mut again = Vec::new();
        let ends = ProxiedAddress::stream(client, client);
        let written = ProxyHeader::with_address(ends);
        let written = match version {
            1 => written.encode_v1(&mut again),
            _ => written.encode_v2(&mut again),
        };
        written.expect("a Vec grows");
        let read = parse(&again).expect("a header").expect("a whole header");
        assert_eq!((read.client, read.length), (Some(client), again.len()));
    }
}

/// Headers, valid and nearly valid ones.
pub fn headers() -> impl Strategy<Value = Vec<u8>> {
    let word = select(vec![
        "PROXY",
        "TCP4",
        "TCP6",
        "UNKNOWN",
        "UDP4",
        "192.0.2.1",
        "::1",
        "::ffff:192.0.2.1",
        "1",
        "65535",
        "65536",
        "+1",
        "01",
        "",
        "\r",
        "\n",
        "255.255.255.255",
        "\u{e9}",
        "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    ]);
    let end = select(vec!["\r\n", "\n", "\r", "", " \r\n"]);
    let proper = select(vec![
        "PROXY TCP4 192.0.2.1 192.0.2.2 56324 443",
        "PROXY TCP6 ::1 2001:db8::1 1 65535",
        "PROXY TCP6 ::ffff:192.0.2.1 ::1 1 65535",
        "PROXY UNKNOWN",
        "PROXY UNKNOWN and whatever",
    ]);
    let line = prop_oneof![
        proper.prop_map(str::to_owned),
        vec(word, 0..10).prop_map(|words| format!("PROXY {}", words.join(" "))),
    ];
    let v1 = (line, end).prop_map(|(line, end)| format!("{line}{end}").into_bytes());
    let fixed = (
        select(vec![0x20u8, 0x21, 0x22, 0x11, 0xff]),
        select(vec![0u8, 0x11, 0x12, 0x21, 0x22, 0x31, 0xff]),
        prop_oneof![
            4 => Just(None),
            1 => select(vec![0u16, 11, 12, 35, 36, 216, 520, 521, u16::MAX]).prop_map(Some),
        ],
    );
    let after = prop_oneof![vec(any::<u8>(), 0..60), vec(any::<u8>(), 500..560)];
    let v2 = (fixed, after).prop_map(|((command, family, length), after)| {
        let length = length.unwrap_or(after.len() as u16).to_be_bytes();
        [&b"\r\n\r\n\0\r\nQUIT\n"[..], &[command, family], &length, &after].concat()
    });
    let flip = prop_oneof![
        5 => Just(None),
        1 => (any::<prop::sample::Index>(), 0..8u32).prop_map(Some),
    ];
    (prop_oneof![v1, v2], flip, vec(any::<u8>(), 0..20)).prop_map(|(mut header, flip, after)| {
        if let Some((at, bit)) = flip {
            let at = at.index(header.len());
            header[at] ^= 1 << bit;
        }
        header.extend(after);
        header
    })
}
