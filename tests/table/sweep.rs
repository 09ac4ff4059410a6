//! What a sweep costs, at three sizes, with everybody reserved, idle, and answering when asked.

use std::time::{Duration, Instant};

use libp2p::{Multiaddr, multiaddr::Protocol};
use relaylet::{
    Config, Event,
    circuits::End,
    connections::Connection,
    relay::{Command, Order, Relay, RequestId},
    signs::Signs,
    wire::Request,
};

use super::{
    clock::{Caches, Samples, cpu_time},
    peer::Peer,
};

const SIZES: [usize; 3] = [1_000, 10_000, 100_000];

/// The program's.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// After so many seconds the first questions have been asked and answered.
const SETTLED: usize = 30;
const ROUNDS: usize = 30;

/// A relay whose peers answer when they are asked.
struct Full {
    relay: Relay<usize, ()>,
    signs: Vec<Signs>,
    now: Instant,
}

impl Full {
    fn of(size: usize) -> Self {
        let now = Instant::now();
        let mut config = Config::default();
        config.max_reservations = size;
        config.idle_timeout = IDLE_TIMEOUT;
        let mut full = Self {
            relay: Relay::new(config, now).expect("it makes sense"),
            signs: Vec::new(),
            now,
        };
        (0..size).for_each(|number| full.admit(&Peer::number(number)));
        full.carry_out();
        full
    }

    fn admit(&mut self, peer: &Peer) {
        let (id, now) = (peer.connection, self.now);
        let address = Multiaddr::from(peer.address).with(Protocol::Tcp(4001));
        let connection = Connection::new(peer.id, address, false, id as u8, now);
        self.relay.connected(id, connection);
        // The handler's, and the transport's.
        let heard = [Signs::default(), Signs::default()];
        for signs in &heard {
            self.relay.listen_to(id, signs.clone());
        }
        self.signs.extend(heard.into_iter().last());
        let from = End {
            peer: peer.id,
            connection: id,
        };
        self.relay
            .requested(from, RequestId(1), Request::Reserve, now);
    }

    /// One second, one sweep; what it took, in milliseconds.
    fn second(&mut self) -> f64 {
        self.now += Duration::from_secs(1);
        let time = cpu_time(|| self.relay.sweep(self.now));
        self.carry_out();
        time.as_secs_f64() * 1e3
    }

    fn carry_out(&mut self) {
        while let Some(order) = self.relay.next_order() {
            match order {
                Order::Grant(grant) => {
                    let peer = grant.to.peer;
                    self.relay.answered(peer, grant.receipt, Ok(()), self.now);
                }
                Order::Command(to, Command::AskForSign(_)) => self.signs[to.connection].heard(1),
                Order::Command(..) | Order::Tell(Event::ReservationAccepted { .. }) => {}
                other => panic!("nobody leaves: {other:?}"),
            }
        }
    }
}

pub fn measure() {
    let mut caches = Caches::new();
    let mut relays = SIZES.map(Full::of);
    let mut times: [Samples; SIZES.len()] = Default::default();
    for round in 0..SETTLED + ROUNDS {
        for (relay, times) in relays.iter_mut().zip(&mut times) {
            caches.evict();
            let time = relay.second();
            if round >= SETTLED {
                times.push(time);
            }
        }
    }
    println!("\nOne sweep: ms of CPU, the median (and the middle half).");
    println!("\n| 1k slots | 10k | 100k | ns a slot at 100k |");
    println!("| --- | --- | --- | --- |");
    let [small, middle, large] = times;
    let each = large.median() * 1e6 / SIZES[2] as f64;
    println!("| {small} | {middle} | {large} | {each:.0} |");
}
