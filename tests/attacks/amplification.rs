//! What comes back before the relay knows who is there.

use libp2p::futures::{AsyncReadExt, AsyncWriteExt};

use super::{
    ground::Ground,
    handshakes::{first_of_noise, first_of_tls},
};
use crate::common::{
    by_hand::{line, proposal, tcp_from},
    strangers::address,
    within,
};

/// So many bytes for each that came in.
const MOST: usize = 10;

#[tokio::test]
async fn little_is_said_to_whoever_has_not_said_who_it_is() {
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let header = line("/multistream/1.0.0");
    let openings = [
        ("nothing at all", vec![]),
        ("a byte", vec![19]),
        ("half of multistream's header", header[..10].to_vec()),
        ("multistream's header", header.clone()),
        ("what protocols there are", proposal("ls")),
        ("a thousand short names of no protocol", [header, line("/").repeat(1000)].concat()),
        ("Noise", proposal("/noise")),
        ("TLS", proposal("/tls/1.0.0")),
        ("the first message of Noise", [proposal("/noise"), first_of_noise()].concat()),
        ("the first message of TLS", [proposal("/tls/1.0.0"), first_of_tls()].concat()),
        ("no message of TLS", [proposal("/tls/1.0.0"), vec![0x16; 5]].concat()),
        ("HTTP", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
    ];
    let attack = async move {
        let mut heard = Vec::new();
        for (what, opening) in openings {
            for hangs_up in [true, false] {
                let said = opening.len();
                let mut stream = tcp_from(address(0), port).await.expect("it listens");
                within(stream.write_all(&opening)).await.expect("it reads");
                if hangs_up {
                    within(stream.close()).await.expect("it reads");
                }
                // Until the relay hangs up: its patience with a handshake is ten seconds.
                heard.push(tokio::spawn(async move {
                    let mut bytes = Vec::new();
                    let _ = within(stream.read_to_end(&mut bytes)).await;
                    (what, said, bytes.len())
                }));
            }
        }
        let mut all = Vec::new();
        for heard in heard {
            all.push(heard.await.expect("it hangs up"));
        }
        all
    };
    let what = "amplification: bytes for a byte, before the handshake ends";
    let (heard, _) = ground.suffer(what, "12 openings", attack).await;
    for (what, said, heard) in &heard {
        println!("{what}: {heard} bytes for {said}");
        assert!(*heard <= MOST * said, "{what}: {heard} bytes for {said}");
    }
    // Both secure channels went on as far as they do.
    let longest = |of| heard.iter().filter(|(what, ..)| *what == of).map(|heard| heard.2).max();
    assert!(longest("the first message of Noise") > Some(100), "{heard:?}");
    assert!(longest("the first message of TLS") > Some(500), "{heard:?}");
    ground.ends_as_it_began().await;
}
