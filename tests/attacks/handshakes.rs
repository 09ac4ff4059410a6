//! Connections that are abandoned during their handshake.

use std::{io, net::Ipv4Addr};

use libp2p::{
    futures::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    identity::Keypair,
    tcp::tokio::TcpStream,
};

use super::testbed::Testbed;
use crate::common::{
    Security,
    by_hand::{mux, negotiate, read_until_closed, secure, tcp_from},
    raw_peers::{AT_A_TIME, address, expect_all, run_each, short_or_long},
    within,
};

/// How far a connection gets before it is abandoned.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// TCP, without a byte sent.
    Tcp,
    /// The protocol of the secure channel is negotiated.
    Negotiated,
    /// The first message of Noise is sent and answered.
    Noise,
    /// The first message of TLS is sent and answered.
    Tls,
    /// The channel is secure, and no muxer negotiated.
    Secured,
    /// yamux is negotiated, and no stream opened.
    Muxed,
}

use Step::{Muxed, Negotiated, Noise, Secured, Tcp, Tls};

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
async fn connections_abandoned_at_each_step() {
    // The first four occur twice: `Secured` and `Muxed` cost the attacker as much as the relay.
    let steps = [Tcp, Negotiated, Noise, Tls, Tcp, Negotiated, Noise, Tls, Secured, Muxed];
    const ADDRESSES: usize = 16;
    let count = short_or_long(5000, 100_000);
    let stay = 200; // below the limit on handshakes

    let mut testbed = Testbed::start(&["--idle-timeout=2s"]).await;
    let port = testbed.port;
    let attack = async move {
        let closing = run_each(count - stay, AT_A_TIME, move |number| async move {
            let from = address(number % ADDRESSES);
            abandon(port, from, steps[number % steps.len()], false).await
        });
        let denied = closing.await.iter().filter(|done| done.is_err()).count();
        let stay = run_each(stay, stay, move |number| async move {
            let from = address(number % ADDRESSES);
            abandon(port, from, steps[number % steps.len()], true).await
        });
        expect_all(stay.await);
        denied
    };
    let size =
        format!("{count}: after TCP and multistream, during Noise and TLS, before and after yamux");
    let what = "connections opened and abandoned";
    let (denied, _) = testbed.attack(what, &size, attack).await;
    // The relay must not protect itself by denying every client.
    assert!(denied < count / 10, "{denied} were denied");
    testbed.assert_restored().await;
}

/// Continues a handshake up to this step. Then closes the connection, or waits until the relay does.
async fn abandon(port: u16, from: Ipv4Addr, step: Step, waits: bool) -> io::Result<()> {
    let mut stream = tcp_from(from, port).await?;
    match step {
        Tcp => {}
        Negotiated => negotiate(&mut stream, "/noise").await?,
        Noise => {
            negotiate(&mut stream, "/noise").await?;
            send_and_read_byte(&mut stream, &first_of_noise()).await?;
        }
        Tls => {
            negotiate(&mut stream, "/tls/1.0.0").await?;
            send_and_read_byte(&mut stream, &first_of_tls()).await?;
        }
        Secured | Muxed => {
            let keypair = Keypair::generate_ed25519();
            let mut channel = secure(stream, &keypair, Security::Noise).await?;
            if let Muxed = step {
                channel = mux(channel).await?;
            }
            close_or_wait(channel, waits).await;
            return Ok(());
        }
    }
    close_or_wait(stream, waits).await;
    Ok(())
}

async fn close_or_wait(stream: impl AsyncRead + Unpin, waits: bool) {
    if waits {
        read_until_closed(stream).await;
    }
}

async fn send_and_read_byte(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    within(async {
        stream.write_all(bytes).await?;
        stream.flush().await?;
        stream.read_exact(&mut [0]).await
    })
    .await
}

/// An ephemeral key, for which any 32 bytes will do.
pub fn first_of_noise() -> Vec<u8> {
    [&[0, 32][..], &[7; 32]].concat()
}

/// The shortest ClientHello that a TLS 1.3 server accepts.
pub fn first_of_tls() -> Vec<u8> {
    let extensions = [
        &[0x00, 0x2b, 0x00, 0x03, 0x02, 0x03, 0x04][..], // TLS 1.3
        &[0x00, 0x0a, 0x00, 0x04, 0x00, 0x02, 0x00, 0x1d], // X25519
        &[0x00, 0x0d, 0x00, 0x04, 0x00, 0x02, 0x04, 0x03], // ECDSA, P-256, SHA-256
        &[0x00, 0x33, 0x00, 0x26, 0x00, 0x24, 0x00, 0x1d, 0x00, 0x20], // the key of X25519
        &[7; 32],
    ]
    .concat();
    let hello = [
        &[0x03, 0x03][..],         // legacy version: TLS 1.2
        &[9; 32],                  // random
        &[0],                      // no session
        &[0x00, 0x02, 0x13, 0x01], // AES-128-GCM, SHA-256
        &[1, 0],                   // no compression
        &(extensions.len() as u16).to_be_bytes(),
        &extensions,
    ]
    .concat();
    let message = [&[1, 0][..], &(hello.len() as u16).to_be_bytes(), &hello].concat();
    let length = (message.len() as u16).to_be_bytes();
    [&[0x16, 0x03, 0x01][..], &length, &message].concat()
}
