//! Connections that never come to anything.

use std::{io, net::Ipv4Addr};

use libp2p::{
    futures::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    identity::Keypair,
    tcp::tokio::TcpStream,
};

use super::ground::Ground;
use crate::common::{
    Security,
    by_hand::{agree, mux, secure, tcp_from, until_closed},
    strangers::{AT_A_TIME, address, all, each, quick_or_long},
    within,
};

/// How far a connection gets before it is abandoned.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// TCP, and not a byte.
    Tcp,
    /// The protocol of the secure channel is agreed on.
    Negotiated,
    /// The first message of Noise is sent, and answered.
    Noise,
    /// The same of TLS.
    Tls,
    /// The channel is secure, and nothing is on it.
    Secured,
    /// So is yamux, and no stream.
    Muxed,
}

use Step::{Muxed, Negotiated, Noise, Secured, Tcp, Tls};

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
async fn connections_abandoned_at_each_step() {
    // Those at the end are the dear ones, for who does it as well.
    let steps = [Tcp, Negotiated, Noise, Tls, Tcp, Negotiated, Noise, Tls, Secured, Muxed];
    const ADDRESSES: usize = 16;
    let count = quick_or_long(5000, 100_000);
    let stay = 200; // within what may be in its handshake at a time

    let mut ground = Ground::prepare(&["--idle-timeout=2s"]).await;
    let port = ground.port;
    let attack = async move {
        let hang_up = each(count - stay, AT_A_TIME, move |number| async move {
            let from = address(number % ADDRESSES);
            abandon(port, from, steps[number % steps.len()], false).await
        });
        let turned_away = hang_up.await.iter().filter(|done| done.is_err()).count();
        let stay = each(stay, stay, move |number| async move {
            let from = address(number % ADDRESSES);
            abandon(port, from, steps[number % steps.len()], true).await
        });
        all(stay.await);
        turned_away
    };
    let how_hard = format!(
        "{count}: after TCP, multistream, in the midst of Noise and TLS, before and after yamux"
    );
    let what = "connections opened and abandoned at each step";
    let (turned_away, _) = ground.suffer(what, &how_hard, attack).await;
    // The relay is not to save itself by turning everybody away.
    assert!(turned_away < count / 10, "{turned_away} were turned away");
    ground.ends_as_it_began().await;
}

/// Comes as far as this step. Then it hangs up, or stays until the relay does.
async fn abandon(port: u16, from: Ipv4Addr, step: Step, stays: bool) -> io::Result<()> {
    let mut stream = tcp_from(from, port).await?;
    match step {
        Tcp => {}
        Negotiated => agree(&mut stream, "/noise").await?,
        Noise => {
            agree(&mut stream, "/noise").await?;
            hear_answer(&mut stream, &first_of_noise()).await?;
        }
        Tls => {
            agree(&mut stream, "/tls/1.0.0").await?;
            hear_answer(&mut stream, &first_of_tls()).await?;
        }
        Secured | Muxed => {
            let keypair = Keypair::generate_ed25519();
            let mut channel = secure(stream, &keypair, Security::Noise).await?;
            if let Muxed = step {
                channel = mux(channel).await?;
            }
            leave_or_stay(channel, stays).await;
            return Ok(());
        }
    }
    leave_or_stay(stream, stays).await;
    Ok(())
}

async fn leave_or_stay(stream: impl AsyncRead + Unpin, stays: bool) {
    if stays {
        until_closed(stream).await;
    }
}

async fn hear_answer(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    within(async {
        stream.write_all(bytes).await?;
        stream.flush().await?;
        stream.read_exact(&mut [0]).await
    })
    .await
}

/// A key, of which any 32 bytes are one.
pub fn first_of_noise() -> Vec<u8> {
    [&[0, 32][..], &[7; 32]].concat()
}

/// The shortest ClientHello that TLS 1.3 goes on from.
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
        &[0x03, 0x03][..],         // as 1.2 says that it is
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
