//! Amplification: how many bytes the relay sends before the client has authenticated.

use libp2p::futures::{AsyncReadExt, AsyncWriteExt};

use super::{
    handshakes::{first_of_noise, first_of_tls},
    testbed::Testbed,
};
use crate::common::{
    by_hand::{line, proposal, tcp_from},
    raw_peers::address,
    within,
};

/// The most bytes that may be sent for each byte received.
const MOST: usize = 10;

#[tokio::test]
async fn an_unauthenticated_client_gets_few_bytes() {
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let header = line("/multistream/1.0.0");
    let openings = [
        ("nothing at all", vec![]),
        ("a byte", vec![19]),
        ("half of multistream's header", header[..10].to_vec()),
        ("multistream's header", header.clone()),
        ("a request for the list of protocols", proposal("ls")),
        ("a thousand short names of unknown protocols", [header, line("/").repeat(1000)].concat()),
        ("Noise", proposal("/noise")),
        ("TLS", proposal("/tls/1.0.0")),
        ("the first message of Noise", [proposal("/noise"), first_of_noise()].concat()),
        ("the first message of TLS", [proposal("/tls/1.0.0"), first_of_tls()].concat()),
        ("five bytes that are no TLS message", [proposal("/tls/1.0.0"), vec![0x16; 5]].concat()),
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
    ];
    let attack = async move {
        let mut received = Vec::new();
        for (what, opening) in openings {
            for closes in [true, false] {
                let sent = opening.len();
                let mut stream = tcp_from(address(0), port).await.expect("the relay listens");
                within(stream.write_all(&opening)).await.expect("the relay reads");
                if closes {
                    within(stream.close()).await.expect("the relay reads");
                }
                // Until the relay closes the connection: a handshake has ten seconds.
                received.push(tokio::spawn(async move {
                    let mut bytes = Vec::new();
                    let _ = within(stream.read_to_end(&mut bytes)).await;
                    (what, sent, bytes.len())
                }));
            }
        }
        let mut all = Vec::new();
        for received in received {
            all.push(received.await.expect("the relay closes it"));
        }
        all
    };
    let size = "12 openings, each closed or left open";
    let (received, _) = testbed.attack("amplification", size, attack).await;
    for (what, sent, received) in &received {
        println!("{what}: {received} bytes for {sent}");
        assert!(*received <= MOST * sent, "{what}: {received} bytes for {sent}");
    }
    // Both handshakes got as far as they can without authentication.
    let longest =
        |of| received.iter().filter(|(what, ..)| *what == of).map(|received| received.2).max();
    assert!(longest("the first message of Noise") > Some(100), "{received:?}");
    assert!(longest("the first message of TLS") > Some(500), "{received:?}");
    testbed.assert_restored().await;
}
