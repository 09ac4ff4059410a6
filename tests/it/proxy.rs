//! The PROXY protocol: which connections may name a client's address, and what that address counts for.
//!
//! The proxy is a forwarder at 127.0.0.3 that sends a header first; the clients are rust-libp2p's.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use crate::common::{
    Client, Relay,
    by_hand::{self, proposal, tcp_from},
    command,
    messages::{OK, RESERVATION_REFUSED, RESOURCE_LIMIT_EXCEEDED, reserve},
    within,
};
use libp2p::{Multiaddr, futures::future, multiaddr::Protocol};
use proxy_header::{ProxiedAddress, ProxyHeader, Tlv};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::sleep,
};

/// The address of the proxy.
pub const PROXY: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
/// The flag that trusts the headers of the proxy.
const FROM_PROXY: &str = "--proxy-protocol-from=127.0.0.3/32";

// ---- The client address

#[tokio::test]
async fn headers_of_both_versions_name_the_client_address() {
    let relay = Relay::start(&[FROM_PROXY]);
    for (client, logged) in [
        ("192.0.2.7:1234", "/ip4/192.0.2.7/tcp/1234"),
        ("[2001:db8::7]:1234", "/ip6/2001:db8::7/tcp/1234"),
        ("[::ffff:192.0.2.8]:1234", "/ip4/192.0.2.8/tcp/1234"),
    ] {
        for header in [v1(client), v2(client)] {
            let address = proxy(&relay, header, Pace::AtOnce).await;
            let mut client = Client::connect_to(&address).await;
            client.reserve().await;
            let opened = format!("opened: peer {} at {logged}", client.peer);
            relay.wait_for_log(&opened).await;
        }
    }
}

/// A proxy names no client with LOCAL in version 2, and UNKNOWN in version 1.
#[tokio::test]
async fn a_connection_whose_header_names_no_client_is_the_proxys_own() {
    let relay = Relay::start(&[FROM_PROXY]);
    let mut local = Vec::new();
    ProxyHeader::with_local().encode_v2(&mut local).unwrap();
    for header in [local, b"PROXY UNKNOWN\r\n".to_vec()] {
        let address = proxy(&relay, header, Pace::AtOnce).await;
        let mut client = Client::connect_to(&address).await;
        client.reserve().await;
        let opened = format!("opened: peer {} at /ip4/{PROXY}/tcp/", client.peer);
        relay.wait_for_log(&opened).await;
    }
}

#[tokio::test]
async fn a_header_may_be_split_or_followed_by_data() {
    let relay = Relay::start(&[FROM_PROXY]);
    for header in [v1("192.0.2.7:1"), v2("192.0.2.7:1"), v2("[2001:db8::7]:1")] {
        for pace in [Pace::ByteByByte, Pace::WithTheFirstBytes] {
            let address = proxy(&relay, header.clone(), pace).await;
            Client::connect_to(&address).await.reserve().await;
        }
    }
}

#[tokio::test]
async fn tlvs_of_a_header_are_skipped() {
    let relay = Relay::start(&[FROM_PROXY]);
    let mut header = header_of("192.0.2.7:1");
    header.append_tlv(Tlv::UniqueId(vec![7; 500].into()));
    let mut bytes = Vec::new();
    header.encode_v2(&mut bytes).unwrap();
    let address = proxy(&relay, bytes, Pace::WithTheFirstBytes).await;
    Client::connect_to(&address).await.reserve().await;
}

#[tokio::test]
async fn clients_that_are_no_proxy_connect_without_a_header() {
    let folder = TempDir::new().unwrap();
    let mut command = command(&folder);
    command
        .args(["--listen", "/ip4/127.0.0.1/tcp/0"])
        .env("RELAYLET_PROXY_PROTOCOL_FROM", "127.0.0.3/32,2001:db8::/32");
    let relay = Relay::run(command, folder);
    let mut client = Client::connect(&relay).await;
    client.reserve().await;
    let opened = format!("opened: peer {} at /ip4/127.0.0.1/tcp/", client.peer);
    relay.wait_for_log(&opened).await;
    let address = proxy(&relay, v2("192.0.2.7:1"), Pace::AtOnce).await;
    Client::connect_to(&address).await.reserve().await;
}

#[tokio::test]
async fn two_connections_may_have_the_same_client_address() {
    // A client may connect to two ports of a proxy from one port of its own.
    let relay = Relay::start(&[FROM_PROXY]);
    let address = proxy(&relay, v2("192.0.2.7:1"), Pace::AtOnce).await;
    let mut in_handshake = connect_from_proxy(&relay, &v2("192.0.2.7:1")).await;
    let hello = proposal("/noise");
    in_handshake.write_all(&hello).await.unwrap();
    let mut answer = vec![0; hello.len()];
    within(in_handshake.read_exact(&mut answer)).await.unwrap();

    let clients = future::join_all((0..8).map(|_| async {
        let mut client = Client::connect_to(&address).await;
        client.reserve().await;
        client
    }));
    for mut client in clients.await {
        client.reserve().await;
    }
    drop(in_handshake);
    Client::connect_to(&address).await.reserve().await;
}

// ---- Limits by client address

#[tokio::test]
async fn caps_and_rules_apply_to_the_client_address() {
    let relay = Relay::start(&[
        FROM_PROXY,
        "--max-reservations-per-ip=1",
        "--max-connections-per-ip=2",
        "--deny-subnet=198.51.100.0/24",
    ]);
    let address = async |client| proxy(&relay, v2(client), Pace::AtOnce).await;
    let (one, other) = (address("192.0.2.7:1").await, address("192.0.2.8:1").await);
    let mut first = Client::connect_to(&one).await;
    let mut second = Client::connect_to(&one).await;
    let mut at_other = Client::connect_to(&other).await;
    first.reserve().await;
    at_other.reserve().await;
    assert_eq!(second.request(&reserve()).await.status, RESERVATION_REFUSED);

    let third = connect_from_proxy(&relay, &v2("192.0.2.7:2")).await;
    assert!(!is_served(third).await);
    let denied = "denied: /ip4/192.0.2.7/tcp/2: too many connections of 192.0.2.7";
    relay.wait_for_log(denied).await;

    let from_denied = connect_from_proxy(&relay, &v2("198.51.100.7:1")).await;
    assert!(!is_served(from_denied).await);
    relay.wait_for_log("denied: /ip4/198.51.100.7/tcp/1: the rules do not allow it").await;
}

#[tokio::test]
async fn request_rates_apply_to_the_client_address() {
    // One RESERVE a minute for a peer, and ten a minute for an address.
    let relay = Relay::start(&[FROM_PROXY, "--reserve-rate=1"]);
    let one = proxy(&relay, v1("192.0.2.7:1"), Pace::AtOnce).await;
    let other = proxy(&relay, v1("192.0.2.8:1"), Pace::AtOnce).await;
    let refused = async {
        loop {
            let answer = Client::connect_to(&one).await.request(&reserve()).await;
            if answer.status != OK {
                return answer.status;
            }
        }
    };
    assert_eq!(within(refused).await, RESOURCE_LIMIT_EXCEEDED);
    Client::connect_to(&other).await.reserve().await;
}

// ---- Connections that are closed

#[tokio::test]
async fn an_invalid_header_closes_the_connection_and_is_logged_once() {
    let relay = Relay::start(&[FROM_PROXY]);
    let noise = proposal("/noise");
    for bytes in [
        &noise[..],
        b"GET / HTTP/1.1\r\n\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 1\r\n",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 1 2 3\r\n",
        &[&b"PROXY UNKNOWN "[..], &[b' '; 200]].concat(),
        b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\x0c\x01\x02\x03\x04\x05\x06\x07\x08\x01\x02\x03\x04",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x04\x01\x02\x03\x04",
        b"PROXY TCP4 192.0.2.7 192.0", // then nothing: it times out
    ] {
        let connection = connect_from_proxy(&relay, bytes).await;
        assert!(read_until_closed(connection).await.is_empty());
    }
    let truncated = connect_from_proxy(&relay, b"PROXY TCP4 192.0.2.7 192.0").await;
    drop(truncated);
    relay.wait_for_log("no PROXY protocol header: truncated").await;
    let log = relay.log();
    let warnings: Vec<_> = log.iter().filter(|line| line.contains(REMEDY)).collect();
    let [warning] = warnings[..] else {
        panic!("{warnings:#?}");
    };
    assert!(warning.contains(" WARN ") && warning.contains(&PROXY.to_string()), "{warning}");
    let address = proxy(&relay, v1("192.0.2.7:1"), Pace::AtOnce).await;
    Client::connect_to(&address).await.reserve().await;
}

/// The end of the warning about a missing header.
const REMEDY: &str = "or remove its address from --proxy-protocol-from";

#[tokio::test]
async fn a_missing_header_is_the_logged_reason_even_if_the_rules_do_not_allow_the_proxy() {
    let relay = Relay::start(&[FROM_PROXY, "--allow-subnet=192.0.2.0/24"]);
    let connection = connect_from_proxy(&relay, &proposal("/noise")).await;
    assert!(read_until_closed(connection).await.is_empty());
    relay.wait_for_log("no PROXY protocol header").await;
    relay.wait_for_log(REMEDY).await;
    drop(connect_from_proxy(&relay, b"").await);
    relay.wait_for_log(&format!("connection failed: /ip4/{PROXY}/tcp/")).await;
    assert_eq!(relay.count_in_log("the rules do not allow it"), 0);
    let address = proxy(&relay, v2("192.0.2.7:1"), Pace::AtOnce).await;
    Client::connect_to(&address).await.reserve().await;
}

#[tokio::test]
async fn a_header_from_an_untrusted_address_closes_the_connection() {
    let relay = Relay::start(&[FROM_PROXY]);
    for header in [v1("192.0.2.7:1"), v2("192.0.2.7:1"), v2("[2001:db8::7]:1")] {
        let stranger = TcpStream::connect(("127.0.0.1", relay.port()));
        let mut stranger = stranger.await.unwrap();
        let with_data = [header, proposal("/noise"), proposal("/noise")].concat();
        stranger.write_all(&with_data).await.unwrap();
        assert!(read_until_closed(stranger).await.is_empty());
    }
    relay.wait_for_log("Received an invalid message").await;
    assert_eq!(relay.count_in_log("192.0.2.7"), 0);
}

#[tokio::test]
async fn a_health_check_that_disconnects_is_no_warning() {
    let relay = Relay::start(&[FROM_PROXY]);
    drop(connect_from_proxy(&relay, b"").await);
    relay.wait_for_log(&format!("connection failed: /ip4/{PROXY}/tcp/")).await;
    assert_eq!(relay.count_in_log(REMEDY), 0);
}

#[tokio::test]
async fn a_slow_header_times_out() {
    let relay = Relay::start(&[FROM_PROXY]);
    let (mut reader, mut writer) = connect_from_proxy(&relay, b"").await.into_split();
    let write_slowly = async {
        for byte in v2("[2001:db8::7]:1") {
            if writer.write_all(&[byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_secs(1)).await;
        }
        future::pending::<()>().await
    };
    let mut received = Vec::new();
    tokio::select! {
        _ = within(reader.read_to_end(&mut received)) => {}
        () = write_slowly => {}
    }
    assert!(received.is_empty());
    relay.wait_for_log("no PROXY protocol header: timed out").await;
}

#[tokio::test]
async fn silent_proxy_connections_are_bounded_and_leave_room_for_clients() {
    let relay = Relay::start(&[FROM_PROXY, "--max-handshakes=4"]);
    let mut silent = Vec::new();
    while relay.count_in_log("too many handshakes") == 0 {
        assert!(silent.len() < 1000, "their number is not limited");
        silent.push(connect_from_proxy(&relay, b"").await);
        sleep(Duration::from_millis(10)).await;
    }
    Client::connect(&relay).await.reserve().await;
    for connection in silent {
        assert!(read_until_closed(connection).await.is_empty());
    }
    let address = proxy(&relay, v2("192.0.2.7:1"), Pace::AtOnce).await;
    Client::connect_to(&address).await.reserve().await;
}

// ---- Helpers

/// How a proxy writes its header: all of it, byte by byte, or in one write with the client's first bytes.
#[derive(Clone, Copy)]
enum Pace {
    AtOnce,
    ByteByByte,
    WithTheFirstBytes,
}

/// Starts a proxy in front of the relay that sends this header first; returns the address that clients dial.
async fn proxy(relay: &Relay, header: Vec<u8>, pace: Pace) -> Multiaddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let relay_port = relay.port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(forward(client, relay_port, header.clone(), pace));
        }
    });
    let address = Multiaddr::from(Ipv4Addr::LOCALHOST).with(Protocol::Tcp(port));
    address.with(Protocol::P2p(relay.peer))
}

/// Forwards one client to the relay at this port, the header first.
async fn forward(
    mut client: TcpStream,
    relay: u16,
    header: Vec<u8>,
    pace: Pace,
) -> std::io::Result<()> {
    let mut to_relay = from_proxy(relay).await;
    to_relay.set_nodelay(true)?;
    match pace {
        Pace::AtOnce => to_relay.write_all(&header).await?,
        Pace::ByteByByte => {
            for byte in header {
                to_relay.write_all(&[byte]).await?;
            }
        }
        Pace::WithTheFirstBytes => {
            let mut first = [0; 1024];
            let read = client.read(&mut first).await?;
            to_relay.write_all(&[&header, &first[..read]].concat()).await?;
        }
    }
    tokio::io::copy_bidirectional(&mut client, &mut to_relay).await?;
    Ok(())
}

/// A connection from the proxy's address to the relay at this port.
pub async fn from_proxy(relay: u16) -> TcpStream {
    tcp_from(PROXY, relay).await.expect("the relay listens").0
}

/// As [`from_proxy`], with these bytes sent first.
async fn connect_from_proxy(relay: &Relay, bytes: &[u8]) -> TcpStream {
    let mut connection = from_proxy(relay.port()).await;
    connection.write_all(bytes).await.unwrap();
    connection
}

/// Reads until the relay closes the connection.
pub async fn read_until_closed(connection: TcpStream) -> Vec<u8> {
    by_hand::read_until_closed(libp2p::tcp::tokio::TcpStream(connection)).await
}

/// Whether the relay answers on this connection.
async fn is_served(connection: TcpStream) -> bool {
    crate::program::is_served(libp2p::tcp::tokio::TcpStream(connection)).await
}

/// A header that names this client.
fn header_of(client: &str) -> ProxyHeader<'static> {
    let client: SocketAddr = client.parse().unwrap();
    let relay = match client {
        SocketAddr::V4(_) => "203.0.113.1:4001",
        SocketAddr::V6(_) => "[2001:db8::1]:4001",
    };
    ProxyHeader::with_address(ProxiedAddress::stream(client, relay.parse().unwrap()))
}

/// A header of version 1 that names this client.
fn v1(client: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    header_of(client).encode_v1(&mut bytes).unwrap();
    bytes
}

/// A header of version 2 that names this client.
pub fn v2(client: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    header_of(client).encode_v2(&mut bytes).unwrap();
    bytes
}
