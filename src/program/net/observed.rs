//! What its peers say the relay's address is, and what of that is believed.
//!
//! Pure. Through identify each peer says at which address it reached the relay, and may say
//! anything; what is believed is told to every client, and clients dial it. So
//!
//! - only a global IP address counts, with a port that the relay listens on: whoever lies can make
//!   clients knock at another machine, but at no service of his choice there. A name does not
//!   count, because its owner may let it lead elsewhere afterwards; an operator can announce one;
//! - a peer has a voice only for addresses of the IP version that it connects over. A liar gets many
//!   IPv6 subnets for little, and could decide an IPv4 address with them;
//! - a subnet has one voice, be it an IPv4 /24 or an IPv6 /48, and so has a peer: a host with a
//!   thousand identities has one, and an identity on a thousand hosts has one;
//! - [`ENOUGH`] have to agree, and more than half of all: a liar with a few subnets is outvoted as
//!   soon as others have come;
//! - the last word of a voice is the one that counts, while its connection is up and
//!   [`REMEMBERED`] beyond: when the relay's address changes, its clients come back and say so.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

use crate::{
    address::{self, ClientPrefix, Subnet},
    relay::connections::Origin,
};

/// How many have to agree: as many as for go-libp2p.
const ENOUGH: usize = 4;

/// How long a voice counts after its connection has closed: longer than most clients stay away, so
/// that what is told does not depend on who happens to be there.
const REMEMBERED: Duration = Duration::from_secs(60 * 60);

/// How many voices are kept for each port and IP version. One more takes the place of the one that
/// spoke first.
const MOST_VOICES: usize = 256;

/// How long what is believed stands before it may change: each change is told to everyone.
const STANDS: Duration = Duration::from_secs(5 * 60);

/// How often to look for voices that count no longer.
const LOOK: Duration = Duration::from_secs(60);

/// What peers say, and what is believed. `C` names a connection.
#[derive(Debug)]
pub struct Observed<C> {
    voices: HashMap<Service, HashMap<Subnet, Voice<C>>>,
    believed: Vec<Multiaddr>,
    stands_until: Instant,
    look_at: Instant,
}

/// What is reached: IPv4 or IPv6, and all that stands behind the IP address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Service {
    ipv4: bool,
    behind: Multiaddr,
}

/// What was last said from a subnet.
#[derive(Debug)]
struct Voice<C> {
    peer: PeerId,
    connection: C,
    reached: IpAddr,
    said: Instant,
    closed: Option<Instant>,
}

impl<C> Voice<C> {
    fn counts(&self, now: Instant) -> bool {
        self.closed.is_none_or(|closed| now.saturating_duration_since(closed) < REMEMBERED)
    }
}

impl<C: Copy + Eq> Observed<C> {
    /// Nobody has said anything yet.
    pub fn new(now: Instant) -> Self {
        Self {
            voices: HashMap::new(),
            believed: Vec::new(),
            stands_until: now,
            look_at: now + LOOK,
        }
    }

    /// The addresses that are believed: one at most for each port and IP version.
    pub fn believed(&self) -> &[Multiaddr] {
        &self.believed
    }

    /// The peer at the other end of `connection` says that it reached the relay, which is `relay`
    /// and listens on these, at `address`.
    pub fn say<'a>(
        &mut self,
        connection: C,
        from: &Origin,
        address: &Multiaddr,
        relay: PeerId,
        mut listening: impl Iterator<Item = &'a Multiaddr>,
        now: Instant,
    ) {
        let Some(subnet) = from.prefix.map(ClientPrefix::subnet) else {
            return;
        };
        let Some((reached, service)) = parse(address, relay) else {
            return;
        };
        let is_ours = |own| parse(own, relay).is_some_and(|(_, own)| own == service);
        let is_same_version =
            address::ip(&from.address).is_some_and(|ip| ip.is_ipv4() == service.ipv4);
        let counts = is_same_version && !from.relayed && address::is_global(address);
        if !counts || !listening.any(is_ours) {
            return;
        }
        let voices = self.voices.entry(service).or_default();
        voices.retain(|other, voice| *other == subnet || voice.peer != from.peer);
        if voices.len() >= MOST_VOICES && !voices.contains_key(&subnet) {
            let first = voices.iter().min_by_key(|(_, voice)| voice.said);
            let first = first.map(|(subnet, _)| *subnet);
            first.map(|first| voices.remove(&first));
        }
        let voice = Voice { peer: from.peer, connection, reached, said: now, closed: None };
        voices.insert(subnet, voice);
        self.look_at = self.stands_until.max(now);
    }

    /// This connection, which came `from` there, is gone.
    pub fn closed(&mut self, connection: C, from: &Multiaddr, now: Instant) {
        let Some(subnet) = ClientPrefix::of(from).map(ClientPrefix::subnet) else {
            return;
        };
        for voices in self.voices.values_mut() {
            if let Some(voice) = voices.get_mut(&subnet)
                && voice.connection == connection
            {
                voice.closed = Some(now);
            }
        }
    }

    /// Whether something else is believed from now on. Costs next to nothing while it need not look.
    pub fn look(&mut self, now: Instant) -> bool {
        if now < self.look_at {
            return false;
        }
        self.look_at = now + LOOK;
        self.voices.retain(|_, voices| {
            voices.retain(|_, voice| voice.counts(now));
            !voices.is_empty()
        });
        if now < self.stands_until {
            return false;
        }
        let believed = self.voices.iter().filter_map(|(service, voices)| {
            let reached = agreed(voices.values().map(|voice| voice.reached))?;
            let address = Multiaddr::from(reached);
            Some(service.behind.iter().fold(address, Multiaddr::with))
        });
        let mut believed: Vec<_> = believed.collect();
        believed.sort_unstable();
        let news = believed != self.believed;
        if news {
            self.believed = believed;
            self.stands_until = now + STANDS;
        }
        news
    }
}

/// What enough of them say, and more than half.
fn agreed(said: impl Iterator<Item = IpAddr>) -> Option<IpAddr> {
    let (mut votes, mut all) = (HashMap::<_, usize>::new(), 0);
    for ip in said {
        *votes.entry(ip).or_default() += 1;
        all += 1;
    }
    let won = |(ip, count): (IpAddr, usize)| (count >= ENOUGH && 2 * count > all).then_some(ip);
    votes.into_iter().find_map(won)
}

/// The IP address in front, and what is reached there; without the relay's own name at the end.
fn parse(address: &Multiaddr, relay: PeerId) -> Option<(IpAddr, Service)> {
    let ip = address::ip(address)?;
    let behind = address.iter().skip(1);
    let behind = behind.filter(|part| *part != Protocol::P2p(relay)).collect();
    let service = Service { ipv4: ip.is_ipv4(), behind };
    Some((ip, service))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = REMEMBERED;
    const TRUE: &str = "/ip4/5.5.5.5/tcp/4001";
    const TRUE6: &str = "/ip6/2a00::5/tcp/4001";
    const LIE: &str = "/ip4/6.6.6.6/tcp/4001";

    /// A relay that listens on port 4001, and those who say where they reached it.
    struct Scene {
        observed: Observed<u32>,
        relay: PeerId,
        now: Instant,
        connections: u32,
    }

    impl Scene {
        fn new() -> Self {
            let now = Instant::now();
            Self { observed: Observed::new(now), relay: PeerId::random(), now, connections: 0 }
        }

        /// A new peer at `from` says that it reached the relay there.
        fn say(&mut self, from: &str, reached: &str) -> u32 {
            self.say_as(PeerId::random(), from, reached)
        }

        fn say_as(&mut self, peer: PeerId, from: &str, reached: &str) -> u32 {
            self.connections += 1;
            let origin = Origin::new(peer, address(from), from.contains("p2p-circuit"));
            let listening = ["/ip4/10.0.0.2/tcp/4001", "/ip6/fd00::2/tcp/4001"].map(address);
            self.observed.say(
                self.connections,
                &origin,
                &address(reached),
                self.relay,
                listening.iter(),
                self.now,
            );
            self.connections
        }

        /// So many new peers, each in a subnet of its own, the first of which is `10.<first>.0.0`.
        fn crowd(&mut self, first: u8, count: u16, reached: &str) -> Vec<u32> {
            let from = |n: u16| format!("/ip4/10.{first}.{n}.1/tcp/1");
            (0..count).map(|n| self.say(&from(n), reached)).collect()
        }

        /// The same over IPv6, the first in `2001:<first>::/48`.
        fn crowd6(&mut self, first: u8, count: u16, reached: &str) -> Vec<u32> {
            let from = |n: u16| format!("/ip6/2001:{first:x}:{n:x}::1/tcp/1");
            (0..count).map(|n| self.say(&from(n), reached)).collect()
        }

        fn close(&mut self, connection: u32, from: &str) {
            self.observed.closed(connection, &address(from), self.now);
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
        }

        fn believed(&mut self) -> Vec<String> {
            self.observed.look(self.now);
            let believed = self.observed.believed().iter();
            believed.map(Multiaddr::to_string).collect()
        }
    }

    fn address(text: &str) -> Multiaddr {
        text.parse().expect("a multiaddr")
    }

    #[test]
    fn what_enough_peers_of_distinct_subnets_say_is_believed_at_once() {
        let mut scene = Scene::new();
        scene.crowd(1, 3, TRUE);
        assert!(scene.believed().is_empty());
        scene.say("/ip4/10.2.0.1/tcp/1", TRUE);
        assert_eq!(scene.believed(), [TRUE]);
        assert!(!scene.observed.look(scene.now), "it is no news");
    }

    #[test]
    fn a_host_with_many_identities_has_one_voice() {
        let mut scene = Scene::new();
        for host in 0..200 {
            scene.say(&format!("/ip4/192.0.2.{host}/tcp/1"), LIE);
            scene.say(&format!("/ip6/2001:db8:1:{host:x}::1/tcp/1"), TRUE6);
        }
        assert!(scene.believed().is_empty());
    }

    #[test]
    fn an_identity_on_many_hosts_has_one_voice() {
        let mut scene = Scene::new();
        let peer = PeerId::random();
        for host in 0..200 {
            scene.say_as(peer, &format!("/ip4/10.1.{host}.1/tcp/1"), LIE);
        }
        assert!(scene.believed().is_empty());
        assert_eq!(scene.observed.voices.values().next().unwrap().len(), 1);
    }

    #[test]
    fn liars_who_came_first_are_outvoted() {
        let mut scene = Scene::new();
        scene.crowd(1, 4, LIE);
        assert_eq!(scene.believed(), [LIE]);
        scene.crowd(2, 4, TRUE);
        scene.pass(STANDS);
        assert!(scene.believed().is_empty(), "half are no majority");
        scene.say("/ip4/10.3.0.1/tcp/1", TRUE);
        scene.pass(STANDS);
        assert_eq!(scene.believed(), [TRUE]);
    }

    #[test]
    fn what_is_believed_stands_for_a_while() {
        let mut scene = Scene::new();
        scene.crowd(1, 4, LIE);
        assert_eq!(scene.believed(), [LIE]);
        scene.crowd(2, 9, TRUE);
        scene.pass(STANDS - Duration::from_millis(1));
        assert_eq!(scene.believed(), [LIE]);
        scene.pass(Duration::from_millis(1));
        assert_eq!(scene.believed(), [TRUE]);
    }

    #[test]
    fn clients_that_come_back_to_a_new_address_say_so() {
        let mut scene = Scene::new();
        scene.crowd(1, 10, TRUE);
        assert_eq!(scene.believed(), [TRUE]);
        scene.pass(STANDS);
        scene.crowd(1, 10, LIE);
        assert_eq!(scene.believed(), [LIE]);
    }

    #[test]
    fn only_a_global_address_with_a_port_that_the_relay_listens_on_counts() {
        for reached in [
            "/ip4/5.5.5.5/tcp/25",
            "/ip4/5.5.5.5/udp/4001",
            "/ip4/5.5.5.5/tcp/4001/ws",
            "/ip4/5.5.5.5",
            "/ip4/127.0.0.1/tcp/4001",
            "/ip4/192.168.1.1/tcp/4001",
            "/ip6/fe80::1/tcp/4001",
            "/dns4/relay.example.org/tcp/4001",
            "/ip4/5.5.5.5/tcp/4001/p2p/12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g",
            "/ip4/5.5.5.5/tcp/4001/p2p-circuit",
            "",
        ] {
            let mut scene = Scene::new();
            scene.crowd(1, 9, reached);
            scene.crowd6(1, 9, reached);
            assert!(scene.believed().is_empty(), "{reached}");
            assert!(scene.observed.voices.is_empty(), "{reached}");
        }
    }

    #[test]
    fn a_peer_behind_another_relay_has_no_voice() {
        let mut scene = Scene::new();
        for n in 0..9 {
            scene.say(&format!("/ip4/10.1.{n}.1/tcp/1/p2p-circuit"), TRUE);
        }
        assert!(scene.believed().is_empty());
    }

    #[test]
    fn with_the_relays_name_behind_it_or_not_it_is_the_same() {
        let mut scene = Scene::new();
        scene.crowd(1, 3, TRUE);
        let named = format!("{TRUE}/p2p/{}", scene.relay);
        scene.say("/ip4/10.2.0.1/tcp/1", &named);
        assert_eq!(scene.believed(), [TRUE]);
        // Nor is it another when a peer writes IPv4 as IPv6.
        let mut scene = Scene::new();
        scene.crowd(1, 4, "/ip6/::ffff:5.5.5.5/tcp/4001");
        assert_eq!(scene.believed(), [TRUE]);
    }

    #[test]
    fn both_ip_versions_are_believed_by_themselves() {
        let mut scene = Scene::new();
        scene.crowd(1, 5, TRUE);
        scene.crowd6(2, 4, TRUE6);
        assert_eq!(scene.believed(), [TRUE, TRUE6]);
    }

    #[test]
    fn peers_of_one_ip_version_have_no_voice_for_an_address_of_the_other() {
        let mut scene = Scene::new();
        scene.crowd6(1, 9, TRUE);
        scene.crowd(1, 9, TRUE6);
        assert!(scene.believed().is_empty());
        // Nor do they count among those of whom more than half have to agree.
        scene.crowd(2, 4, TRUE);
        scene.crowd6(2, 4, TRUE6);
        scene.crowd6(3, 9, LIE);
        assert_eq!(scene.believed(), [TRUE, TRUE6]);
    }

    #[test]
    fn a_peer_over_ipv4_that_is_written_as_ipv6_has_a_voice_for_ipv4() {
        let mut scene = Scene::new();
        for n in 0..4 {
            scene.say(&format!("/ip6/::ffff:10.1.{n}.1/tcp/1"), TRUE);
        }
        assert_eq!(scene.believed(), [TRUE]);
    }

    #[test]
    fn a_voice_counts_while_it_is_connected_and_an_hour_beyond() {
        let mut scene = Scene::new();
        let connections = scene.crowd(1, 4, TRUE);
        assert_eq!(scene.believed(), [TRUE]);
        scene.pass(24 * HOUR);
        assert_eq!(scene.believed(), [TRUE]);
        scene.close(connections[0], "/ip4/10.1.0.1/tcp/1");
        scene.pass(HOUR - Duration::from_secs(1));
        assert_eq!(scene.believed(), [TRUE]);
        scene.pass(LOOK);
        assert!(scene.believed().is_empty());
    }

    #[test]
    fn the_end_of_an_old_connection_does_not_silence_the_new_one() {
        let mut scene = Scene::new();
        let old = scene.crowd(1, 4, TRUE);
        scene.crowd(1, 4, TRUE);
        for (n, connection) in old.into_iter().enumerate() {
            scene.close(connection, &format!("/ip4/10.1.{n}.1/tcp/1"));
        }
        scene.pass(2 * HOUR);
        assert_eq!(scene.believed(), [TRUE]);
    }

    #[test]
    fn nobody_is_remembered_for_ever_and_never_too_many() {
        let mut scene = Scene::new();
        for first in 0..4 {
            let said = scene.crowd(first, 256, TRUE);
            for (n, connection) in said.into_iter().enumerate() {
                scene.close(connection, &format!("/ip4/10.{first}.{n}.1/tcp/1"));
            }
            let kept = scene.observed.voices.values().next().unwrap().len();
            assert_eq!(kept, MOST_VOICES);
        }
        scene.pass(HOUR);
        scene.believed();
        assert!(scene.observed.voices.is_empty());
    }
}
