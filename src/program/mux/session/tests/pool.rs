//! Two sessions that share a pool which is nearly full: after each step the charges equal the buffered bytes, and each
//! receiver's credit is what its sender may send.

use super::*;

/// The limit of the pool.
const LIMIT: usize = 1024 * KIB;

/// Two sessions, and another connection that holds a part of their pool.
struct Crowded {
    connection: Connection,
    pool: MemoryBudget,
    other: Arc<ConnectionBudget>,
}

#[derive(Clone, Copy, Debug)]
enum PoolStep {
    /// A step of one side.
    Side(usize, Step),
    /// The other connection holds this many sixteenths of the pool.
    Fill(usize),
}

impl Crowded {
    fn new() -> Self {
        let pool = MemoryBudget::new(LIMIT, LIMIT, MAX_GROWTH);
        let other = pool.open(None, Weak::<Shared>::new());
        let sides = [Endpoint::Dialer, Endpoint::Listener];
        let sides = sides.map(|role| Side::with(role, pool.clone())).into_iter().collect();
        Self { connection: Connection { sides, ..Connection::default() }, pool, other }
    }

    fn step(&mut self, step: PoolStep) {
        match step {
            PoolStep::Side(at, step) => self.connection.step(at, step),
            PoolStep::Fill(sixteenths) => {
                self.other.replace_charge(self.other.held(), LIMIT / 16 * sixteenths);
            }
        }
        self.pool.compute_shares(self.connection.sides[0].now);
        self.push_out();
        self.assert_consistent();
    }

    /// As [`MemoryBudget::enforce`], which works on locked sessions. Marks the streams that it resets in the models.
    fn push_out(&mut self) {
        if self.pool.buffered().bytes <= LIMIT {
            return;
        }
        let Connection { sides, streams, .. } = &mut self.connection;
        let state = |side: &Side, key: Key| {
            let stream = side.session.streams.get(&key)?;
            Some((stream.received & RST != 0, stream.unread))
        };
        let mut before = Vec::new();
        for (side, models) in sides.iter().zip(&*streams) {
            before.push(models.iter().map(|it| state(side, it.key)).collect::<Vec<_>>());
        }
        let mut has_more = [true; 2];
        while self.pool.buffered().bytes > LIMIT / 10 * 9 && has_more != [false; 2] {
            let held = |at: &usize| sides[*at].session.budget.held();
            let at = (0..2).filter(|at| has_more[*at]).max_by_key(held).expect("one is left");
            let side = &mut sides[at];
            has_more[at] = side.session.shed(side.now, Cut::Pool) > 0;
            std::mem::take(&mut side.session.effects).apply(&self.pool);
        }
        for ((side, models), before) in sides.iter().zip(streams).zip(before) {
            for (model, before) in models.iter_mut().zip(before) {
                model.reset |= state(side, model.key) != before;
            }
        }
    }

    fn assert_consistent(&self) {
        let mut charged = self.other.held();
        for side in &self.connection.sides {
            let Session { streams, budget, in_flight, control, new_flows, old_flows, .. } =
                &side.session;
            let session = &side.session;
            let all = || streams.values();
            let count = |is: fn(&Stream) -> bool| all().filter(|it| is(it)).count();
            let sum = |of: fn(&Stream) -> usize| all().map(|it| of(it)).sum::<usize>();
            assert_eq!(budget.held(), sum(Stream::charge) + in_flight);
            charged += budget.held();
            assert_eq!(session.unread, sum(|it| it.unread));
            assert_eq!(session.growth + sum(Stream::growth), MAX_GROWTH);
            assert_eq!(session.unacknowledged, count(Stream::is_unacknowledged));
            assert_eq!(session.inbound, count(|it| matches!(it.origin, Origin::Peer(_))));
            assert_eq!(session.outbound, count(|it| matches!(it.origin, Origin::Relay)));
            assert_eq!(session.refused, count(|it| matches!(it.origin, Origin::Refused)));
            for (key, stream) in streams {
                let is_in = |queue: &VecDeque<Key>| queue.contains(key);
                let has_control = stream.pending & (ACK | RST) != 0 && !stream.has_data();
                assert!(!has_control || is_in(control), "{stream:?}");
                assert!(!stream.has_data() || is_in(new_flows) || is_in(old_flows), "{stream:?}");
                assert_eq!(stream.in_turns, is_in(new_flows) || is_in(old_flows), "{stream:?}");
                assert_eq!(stream.in_control, is_in(control), "{stream:?}");
                assert!(!stream.is_gone(), "{stream:?}");
                // What is still arriving of the body of a frame is no longer credit, and not unread yet.
                let arrives = if session.incoming.0 == key.0 { side.room.body } else { 0 };
                let window = INITIAL_WINDOW + stream.growth();
                let held = stream.credit() + arrives + stream.unread;
                assert!(held <= window || !stream.is_read(), "{stream:?}");
            }
            for queue in [control, new_flows, old_flows] {
                assert!(queue.len() <= 2 * (streams.len() + 2), "{queue:?}");
            }
        }
        assert_eq!(self.pool.buffered().bytes, charged);
        (0..2).for_each(|at| self.assert_credit(at));
    }

    /// Asserts that the other side's credit is what side `at` may still send, plus what is unsent or on the wire.
    fn assert_credit(&self, at: usize) {
        let Connection { sides, wires, .. } = &self.connection;
        let [from, to] = [&sides[at], &sides[1 - at]];
        let [data, updates] = [(at, to), (1 - at, from)].map(|(sender, receiver)| {
            let Room { header, read, body, .. } = &receiver.room;
            let wire = &wires[sender];
            let wire = &wire[wire.len().min(*body)..];
            if *read == 0 { headers(wire) } else { headers(&[&header[..*read], wire].concat()) }
        });
        let sum = |headers: &[Header], kind: Kind, id: u32| -> usize {
            let headers = headers.iter().filter(|it| (it.kind, it.stream) == (kind, id));
            headers.map(|it| it.length as usize).sum()
        };
        for (key, sender) in &from.session.streams {
            let receiver = to.session.streams.range((key.0, 0)..=(key.0, u64::MAX)).next_back();
            let Some((_, receiver)) = receiver else { continue };
            let flags = |it: &Stream| it.received | it.sent | it.pending;
            if (flags(sender) | flags(receiver)) & RST | receiver.received & FIN == 0 {
                let granted =
                    sender.send_window as usize + sum(&updates, Kind::WindowUpdate, key.0);
                let sent = sender.unsent() + sum(&data, Kind::Data, key.0);
                assert_eq!(granted + sent, receiver.credit(), "{sender:?} {receiver:?}");
            }
        }
    }

    /// Writes, sends and reads on every stream that both sides have open, until each has moved this many bytes.
    fn assert_progress(&mut self, bytes: usize) {
        for at in 0..2 {
            for number in 0..self.connection.streams[at].len() {
                let mut moved = 0;
                while moved < bytes {
                    let model = &self.connection.streams[at][number];
                    let is_open = |model: &StreamModel| {
                        !model.closed && !model.dropped && !model.reset && !model.was_reset
                    };
                    let other = self.connection.streams[1 - at].iter().find(|it| it.id == model.id);
                    let reads = other.is_some_and(|it| !it.dropped && !it.reset && !it.was_reset);
                    if !is_open(model) || !reads {
                        break;
                    }
                    let before = model.written;
                    self.step(PoolStep::Side(at, Step::Write(number, 100_000)));
                    let written = self.connection.streams[at][number].written - before;
                    self.settle();
                    let model = &self.connection.streams[at][number];
                    assert!(written > 0 || !is_open(model), "the stream is stuck: no credit comes");
                    moved += written;
                }
            }
        }
    }

    /// As [`Connection::settle`], with push-out after each step.
    fn settle(&mut self) {
        // Until a round of both sides moves nothing: no bytes, no new stream, no read.
        loop {
            let mut moved = false;
            for at in 0..2 {
                loop {
                    let before = self.connection.wires[at].len();
                    self.step(PoolStep::Side(at, Step::Send(QUANTUM)));
                    let has_sent = self.connection.wires[at].len() > before;
                    let has_some = !self.connection.wires[at].is_empty();
                    if has_some {
                        self.step(PoolStep::Side(1 - at, Step::Arrive(usize::MAX)));
                    }
                    moved |= has_sent || has_some;
                    if !has_sent {
                        break;
                    }
                }
                moved |= !self.connection.sides[at].session.accepted.is_empty();
                self.step(PoolStep::Side(at, Step::Accept));
                for number in 0..self.connection.streams[at].len() {
                    loop {
                        let state = |it: &Self| {
                            let model = &it.connection.streams[at][number];
                            (model.read, model.ended)
                        };
                        let before = state(self);
                        self.step(PoolStep::Side(at, Step::Read(number, 1 << 20)));
                        if state(self) == before {
                            break;
                        }
                        moved = true;
                    }
                }
            }
            if !moved {
                return;
            }
        }
    }

    /// Drops every stream and asserts that no state is left.
    fn end(mut self) {
        self.step(PoolStep::Fill(0));
        self.connection.end();
        self.assert_consistent();
    }
}

fn pool_steps() -> impl Strategy<Value = PoolStep> {
    prop_oneof![
        12 => (0..2_usize, steps()).prop_map(|(at, step)| PoolStep::Side(at, step)),
        1 => prop_oneof![Just(0), 8..16_usize, 13..16_usize].prop_map(PoolStep::Fill),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sessions_of_a_full_pool_charge_what_they_hold_and_keep_their_credit(
        steps in vec(pool_steps(), 0..120),
        then in 0..16_usize,
    ) {
        let mut crowded = Crowded::new();
        for step in steps {
            crowded.step(step);
        }
        crowded.step(PoolStep::Fill(then));
        crowded.settle();
        crowded.connection.check();
        crowded.assert_progress(300_000);
        crowded.end();
    }
}
