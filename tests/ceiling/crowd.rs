//! Strangers who take all that each of them may have.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use libp2p::{
    futures::{AsyncWriteExt, future},
    tcp::tokio::TcpStream,
};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    common::{
        by_hand::{RST, SYN, agree, data, tcp_from},
        http::{get, samples},
        messages::{connect, reserve},
        within,
    },
    ground::quick_or_long,
    strangers::{AT_A_TIME, Stranger, address, all, each, opening},
};

/// How many come from one address.
const OF_ONE_ADDRESS: usize = 8;

/// How many frames of one byte a source sends, to a target that does not answer.
const SMALL_FRAMES: usize = 2500;

/// What it sends else, of a window that is 256 KiB wide.
const PIECES: usize = 3;
const PIECE: usize = 60 * 1024;

/// How many streams each opens, on which it never says what it wants.
const MUTE: usize = 8;

/// How often to look at what the relay counts.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// For how long whoever is in its handshake is left alone.
const IN_HANDSHAKE: Duration = Duration::from_secs(5);

/// The limits.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub connections: usize,
    handshakes: usize,
    slots: usize,
    pub circuits: usize,
    streams: usize,
    buffered: usize,
}

impl Default for Size {
    /// The relay's own.
    fn default() -> Self {
        Self {
            connections: 2048,
            handshakes: 256,
            slots: 1024,
            circuits: 1024,
            streams: 4096,
            buffered: 80 * 1024 * 1024,
        }
    }
}

impl Size {
    pub fn divided_by(self, by: usize) -> Self {
        Self {
            connections: self.connections / by,
            handshakes: self.handshakes / by,
            slots: self.slots / by,
            circuits: self.circuits / by,
            streams: self.streams / by,
            buffered: self.buffered / by,
        }
    }

    pub fn flags(self) -> Vec<String> {
        vec![
            format!("--max-connections={}", self.connections),
            format!("--max-handshakes={}", self.handshakes),
            format!("--max-reservations={}", self.slots),
            format!("--max-circuits={}", self.circuits),
            format!("--max-streams={}", self.streams),
            format!("--max-buffered={}", self.buffered),
        ]
    }
}

/// What they came to.
#[derive(Debug)]
pub struct Reached {
    /// How many circuits there were at once, or asked for.
    pub circuits: usize,
    /// How many streams of theirs were reset.
    pub reset: usize,
    /// How many connections were closed.
    pub closed: usize,
}

/// All that there is room for beside the two who look on.
pub struct Crowd {
    port: u16,
    watched_at: u16,
    size: Size,
    /// A target that holds a slot, and who wants to reach it.
    pairs: Vec<(Stranger, Stranger)>,
}

impl Crowd {
    pub async fn gather(port: u16, watched_at: u16, size: Size) -> Self {
        // Two look on, who have a slot and a circuit.
        let pairs = each(size.slots - 1, AT_A_TIME, move |number| async move {
            let from = address(2 * number / OF_ONE_ADDRESS);
            let mut target = Stranger::connect(port, from).await?;
            let mut source = Stranger::connect(port, from).await?;
            assert_eq!(target.ask_once(&reserve()).await?.1, Some(100));
            for stranger in [&mut target, &mut source] {
                fill_what_stays(stranger).await?;
            }
            io::Result::Ok((target, source))
        });
        Self {
            port,
            watched_at,
            size,
            pairs: all(pairs.await),
        }
    }

    /// Waits until it counts so many.
    async fn until(&self, name: &str, wanted: usize) {
        within(async {
            while self.count(name).await != wanted {
                sleep(LOOK_AGAIN).await;
            }
        })
        .await;
    }

    async fn count(&self, name: &str) -> usize {
        samples(&get(self.watched_at, "/metrics").await)[name] as usize
    }

    /// All of it at once, more than once.
    pub async fn presses(mut self) -> Reached {
        let reset = Arc::new(AtomicUsize::new(0));
        // It counts once a second.
        self.until("relaylet_connections", self.size.connections)
            .await;
        self.until(r#"relaylet_slots{state="live"}"#, self.size.slots)
            .await;
        let mut circuits = 0;
        for round in 0..quick_or_long(3, 8) {
            // A target that does not answer is asked for a while, and counts. Two look on.
            self.until("relaylet_circuits", 1).await;
            let handshakes = in_handshake(self.port, self.size.handshakes);
            let mut pressing = JoinSet::new();
            for (target, source) in std::mem::take(&mut self.pairs) {
                let reset = Arc::clone(&reset);
                pressing.spawn(async move {
                    match round % 2 {
                        0 => stalls_unanswered(target, source, &reset).await,
                        _ => stalls_in_a_circuit(target, source, &reset).await,
                    }
                });
            }
            let (pressed, ()) = future::join(pressing.join_all(), handshakes).await;
            circuits = circuits.max(self.count("relaylet_circuits").await);
            self.pairs = pressed.into_iter().flatten().collect();
        }
        Reached {
            circuits,
            reset: reset.load(Ordering::Relaxed),
            closed: 2 * (self.size.slots - 1 - self.pairs.len()),
        }
    }
}

/// What the relay keeps for a connection once it has had to read a message as long as there can be.
async fn fill_what_stays(stranger: &mut Stranger) -> io::Result<()> {
    let stream = stranger.next_stream();
    stranger.say(&data(SYN, stream, &vec![7; 64_000])).await?;
    stranger.say(&data(RST, stream, &[])).await
}

/// Streams on which the relay cannot yet be asked anything; those beyond its limits are reset.
async fn stay_mute(stranger: &mut Stranger) -> io::Result<()> {
    for _ in 0..MUTE {
        let stream = stranger.next_stream();
        let begun = data(SYN, stream, b"\x13/multistream/1.0.0\n");
        stranger.say(&begun).await?;
    }
    Ok(())
}

/// A circuit is asked for, and the target says nothing: so the relay reads nothing of what its source
/// sends behind the request, in the smallest of frames.
async fn stalls_unanswered(
    mut target: Stranger,
    mut source: Stranger,
    reset: &AtomicUsize,
) -> Option<(Stranger, Stranger)> {
    let stream = source.next_stream();
    let request = data(SYN, stream, &opening(&connect(target.peer)));
    let small = data(0, stream, &[7]).repeat(SMALL_FRAMES);
    let pressed = async {
        source.say(&request).await?;
        stay_mute(&mut source).await?;
        stay_mute(&mut target).await?;
        source.say(&small).await?;
        let is_reset = source.is_reset(stream, IN_HANDSHAKE).await?;
        reset.fetch_add(is_reset.into(), Ordering::Relaxed);
        source.say(&data(RST, stream, &[])).await?;
        target.hears_out().await
    };
    pressed.await.ok()?;
    Some((target, source))
}

/// A circuit is open, and the target reads nothing.
async fn stalls_in_a_circuit(
    mut target: Stranger,
    mut source: Stranger,
    reset: &AtomicUsize,
) -> Option<(Stranger, Stranger)> {
    let stream = source.next_stream();
    let request = data(SYN, stream, &opening(&connect(target.peer)));
    let pressed = async {
        source.say(&request).await?;
        let asked = timeout(IN_HANDSHAKE, target.agree_to(1)).await;
        let circuit = asked.map_err(io::Error::other)??[0];
        for _ in 0..PIECES {
            source.say(&data(0, stream, &vec![7; PIECE])).await?;
            target.say(&data(0, circuit, &vec![7; PIECE])).await?;
        }
        let is_reset = source.is_reset(stream, IN_HANDSHAKE).await?;
        reset.fetch_add(is_reset.into(), Ordering::Relaxed);
        source.say(&data(RST, stream, &[])).await?;
        target.hears_out().await
    };
    pressed.await.ok()?;
    Some((target, source))
}

/// So many come, and stop in the midst of a message of Noise as long as there can be.
async fn in_handshake(port: u16, count: usize) {
    let mut coming = JoinSet::new();
    for number in 0..count {
        // As many of an address as may be in their handshakes.
        let from = address(1000 + number / 8);
        coming.spawn(async move {
            let mut stream: TcpStream = tcp_from(from, port).await?;
            agree(&mut stream, "/noise").await?;
            let mut message = u16::MAX.to_be_bytes().to_vec();
            message.resize(60 * 1024, 7);
            stream.write_all(&message).await?;
            stream.flush().await?;
            tokio::time::sleep(IN_HANDSHAKE).await;
            io::Result::Ok(())
        });
    }
    // The relay may have turned some away.
    let _ = coming.join_all().await;
}
