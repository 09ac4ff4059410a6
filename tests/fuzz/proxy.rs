//! Headers of the PROXY protocol.

use proptest::{collection::vec, prelude::*, sample::select};
use proxy_header::{ProxiedAddress, ProxyHeader};
use relaylet::program::net::admission::proxy_header::{HeaderError, MAX_LENGTH, parse};

/// Takes `bytes` for what comes first on a connection: what it is taken for once there is enough of
/// it stays so, however it was cut.
pub fn check(bytes: &[u8]) {
    let mut said = Ok(None);
    for there in 0..=bytes.len().min(MAX_LENGTH + 8) {
        let now = parse(&bytes[..there]);
        match said {
            Ok(None) => said = now,
            decided => assert_eq!(now, decided, "after {there} bytes"),
        }
        assert!(said != Ok(None) || there < MAX_LENGTH, "it waits for ever");
    }
    assert_eq!(parse(bytes), said);
    let Ok(Some(header)) = said else {
        let too_early = [HeaderError::Truncated, HeaderError::TimedOut].map(Err);
        assert!(!too_early.contains(&said), "a parser has neither an end nor a time limit");
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
        written.expect("room for it");
        let read = parse(&again).expect("a header").expect("all of it");
        assert_eq!((read.client, read.length), (Some(client), again.len()));
    }
}

/// Headers and what nearly is one.
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
    let behind = prop_oneof![vec(any::<u8>(), 0..60), vec(any::<u8>(), 500..560)];
    let v2 = (fixed, behind).prop_map(|((command, family, length), behind)| {
        let length = length.unwrap_or(behind.len() as u16).to_be_bytes();
        [&b"\r\n\r\n\0\r\nQUIT\n"[..], &[command, family], &length, &behind].concat()
    });
    let flip = prop_oneof![
        5 => Just(None),
        1 => (any::<prop::sample::Index>(), 0..8u32).prop_map(Some),
    ];
    (prop_oneof![v1, v2], flip, vec(any::<u8>(), 0..20)).prop_map(|(mut header, flip, behind)| {
        if let Some((at, bit)) = flip {
            let at = at.index(header.len());
            header[at] ^= 1 << bit;
        }
        header.extend(behind);
        header
    })
}
