//! All interleavings of what two sides do with two streams, up to a number of steps: the state machine of FIN, RST and
//! ACK, with each frame delivered at any time.
//!
//! A breadth-first search over states: of the histories that lead to the same state of both sides and of the frames in
//! flight, only one is continued.

use std::{
    collections::HashSet,
    env,
    hash::{DefaultHasher, Hash, Hasher},
};

use super::*;

/// Environment variable for the number of steps per history; `.ci/long` sets 12.
const DEPTH: &str = "RELAYLET_TABLE_DEPTH";
const DEFAULT_DEPTH: usize = 8;

/// The number of streams, and of writes per side and stream.
const STREAMS: usize = 2;
const WRITES: usize = 2;

/// Bytes per write.
const BYTES: usize = 3;

/// The steps of either side; `side * 16 + index` is the number of a step.
const STEPS: [Step; 16] = [
    Step::Open,
    Step::Accept,
    Step::Send(QUANTUM),
    Step::Arrive(HEADER),
    Step::Write(0, BYTES),
    Step::Write(1, BYTES),
    Step::Flush(0),
    Step::Flush(1),
    Step::Close(0),
    Step::Close(1),
    Step::Drop(0),
    Step::Drop(1),
    Step::Reset(0),
    Step::Reset(1),
    Step::Read(0, QUANTUM),
    Step::Read(1, QUANTUM),
];

/// A sequence of steps, and how it may be continued.
#[derive(Clone, Copy, Default)]
struct History {
    steps: [u8; 16],
    /// The steps to try next, one bit each.
    next: u32,
    /// Whether no frame to the first side was in flight before the last step.
    was_idle: bool,
}

#[test]
fn both_sides_agree_how_streams_ended_in_every_history_of_two() {
    let depth =
        env::var(DEPTH).map_or(DEFAULT_DEPTH, |depth| depth.parse().expect("a number of steps"));
    let (mut seen, mut steps) = (HashSet::new(), 0_u64);
    let mut connection = Connection::new();
    seen.insert(fingerprint(&connection));
    let mut level = vec![History { next: enabled(&mut connection) & 1, ..History::default() }];
    for length in 0..depth {
        let mut next = Vec::new();
        for node in &level {
            for step in (0..32).filter(|step| node.next & (1 << step) != 0) {
                steps += 1;
                let mut history = *node;
                history.steps[length] = step;
                let history_so_far = &history.steps[..=length];
                let mut connection = replay(history_so_far);
                if !seen.insert(fingerprint(&connection)) {
                    continue;
                }
                let (last_side, last) = side_and_step(step);
                history.was_idle = match last {
                    Step::Send(_) if last_side == 1 => {
                        replay(&history.steps[..length]).wires[1].is_empty()
                    }
                    _ => false,
                };
                history.next = enabled(&mut connection) & !redundant_after(step, history.was_idle);
                assert_state(&connection);
                let description = history_so_far.iter().map(|step| side_and_step(*step));
                let description = format!("{:?}", description.collect::<Vec<_>>());
                assert_ends(connection, history_so_far, &description);
                next.push(history);
            }
        }
        println!("{} steps: {} states, {steps} steps taken", length + 1, seen.len());
        level = next;
    }
    assert!(seen.len() > 500 * depth, "{}", seen.len());
}

fn side_and_step(number: u8) -> (usize, Step) {
    let number = usize::from(number);
    (number / STEPS.len(), STEPS[number % STEPS.len()])
}

fn replay(steps: &[u8]) -> Connection {
    let mut connection = Connection::new();
    for step in steps {
        let (at, step) = side_and_step(*step);
        take(&mut connection, at, step);
    }
    connection
}

/// Takes a step; an arrival delivers one whole frame.
fn take(connection: &mut Connection, at: usize, step: Step) {
    let step = match step {
        Step::Arrive(_) => {
            let header = headers(&connection.wires[1 - at])[0];
            let body = if header.kind == Kind::Data { header.length as usize } else { 0 };
            if let Some(stream) = model_of(connection, at, header.stream).filter(|it| !it.dropped) {
                stream.arrived += body;
            }
            Step::Arrive(HEADER + body)
        }
        step => step,
    };
    connection.step(at, step);
}

fn model_of(connection: &mut Connection, at: usize, id: u32) -> Option<&mut StreamModel> {
    connection.streams[at].iter_mut().find(|stream| stream.id == id)
}

/// The steps that would change the state.
fn enabled(connection: &mut Connection) -> u32 {
    let opened =
        connection.sides.iter().map(|side| side.session.next_id as usize / 2).sum::<usize>();
    let opened = opened - 1; // the first number of the second side is 2
    let mut all = 0;
    for at in 0..2 {
        for (number, step) in STEPS.iter().enumerate() {
            let stream =
                |number: usize| connection.streams[at].get(number).filter(|it| !it.dropped);
            let session = &connection.sides[at].session;
            let is_enabled = match step {
                Step::Open => opened < STREAMS,
                Step::Accept => !session.accepted.is_empty(),
                Step::Send(_) => true,
                Step::Arrive(_) => !connection.wires[1 - at].is_empty(),
                Step::Write(number, _) => stream(*number)
                    .is_some_and(|it| !it.closed && !it.reset && it.written < WRITES * BYTES),
                Step::Flush(number) => {
                    stream(*number).is_some_and(|it| !it.reset && it.flushed < it.written)
                }
                Step::Close(number) => stream(*number).is_some_and(|it| !it.closed && !it.reset),
                Step::Drop(number) => stream(*number).is_some(),
                Step::Reset(number) => stream(*number).is_some_and(|it| !it.reset),
                Step::Read(number, _) => stream(*number).is_some_and(|it| {
                    let inbound = session.streams.get(&it.key).map(|it| it.received);
                    !it.ended
                        && (it.arrived > it.read
                            || inbound.is_none_or(|flags| flags & (FIN | RST) != 0))
                }),
                Step::Pass(_) => false,
            };
            all |= u32::from(is_enabled) << (at * STEPS.len() + number);
        }
    }
    all
}

/// The steps that commute with `last` and therefore need not follow it: the first side's step is taken first.
fn redundant_after(last: u8, was_idle: bool) -> u32 {
    const FIRST_SIDE: u32 = (1 << STEPS.len()) - 1;
    const ARRIVES: u32 = 1 << 3;
    match side_and_step(last) {
        (1, Step::Send(_)) if was_idle => FIRST_SIDE & !ARRIVES,
        (1, _) => FIRST_SIDE,
        _ => 0,
    }
}

/// Hashes all state that affects later steps. With ten million states, one run in 400,000 has a collision.
fn fingerprint(connection: &Connection) -> u64 {
    let mut hash = DefaultHasher::new();
    for at in 0..2 {
        let session = &connection.sides[at].session;
        for (key, stream) in &session.streams {
            let ends = (stream.received, stream.sent, stream.pending);
            let queued = (stream.in_control, stream.in_turns, stream.deficit, stream.unsent());
            let held = (stream.has_handle, stream.is_unacknowledged());
            (key, ends, queued, held, std::mem::discriminant(&stream.origin)).hash(&mut hash);
        }
        (session.next_id, session.inbound, session.outbound).hash(&mut hash);
        (session.unacknowledged, session.refused).hash(&mut hash);
        (&session.half_closed, &session.accepted, &session.control).hash(&mut hash);
        (&session.new_flows, &session.old_flows).hash(&mut hash);
        connection.wires[at].hash(&mut hash);
        for it in &connection.streams[at] {
            (it.key, it.written, it.flushed, it.read, it.arrived).hash(&mut hash);
            (it.closed, it.dropped, it.reset, it.ended, it.was_reset).hash(&mut hash);
        }
    }
    hash.finish()
}

/// Asserts that only streams with a handle or with something to send are kept.
fn assert_state(connection: &Connection) {
    for side in &connection.sides {
        let session = &side.session;
        for (key, stream) in &session.streams {
            let is_last =
                session.streams.range(key..).nth(1).is_none_or(|(next, _)| next.0 > key.0);
            assert!(stream.is_finished() || is_last, "{session:#?}");
            assert!(!stream.is_gone(), "{session:#?}");
            let is_half_closed = session.half_closed.contains(&key.0);
            assert!(stream.is_finished() || !is_half_closed, "{session:#?}");
        }
        assert!(session.streams.len() + session.half_closed.len() <= STREAMS, "{session:#?}");
        assert!(session.unacknowledged <= session.streams.len(), "{session:#?}");
    }
}

/// Asserts that both sides agree on how each stream ends, whether all streams are closed or dropped from here on.
fn assert_ends(mut connection: Connection, history: &[u8], description: &str) {
    let _on_panic = PrintOnPanic(description);
    connection.settle();
    connection.check();
    // Twice: the first round may open streams on the other side, along with their end.
    for at in [0, 1, 0, 1] {
        for number in 0..connection.streams[at].len() {
            connection.step(at, Step::Close(number));
        }
        connection.settle();
    }
    connection.check();
    for stream in connection.streams.iter().flatten() {
        assert!(stream.dropped || stream.ended, "{stream:?}");
    }
    connection.end();
    replay(history).end();
}

/// Prints the history when a test panics.
struct PrintOnPanic<'a>(&'a str);

impl Drop for PrintOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("after {}", self.0);
        }
    }
}
