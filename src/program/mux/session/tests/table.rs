//! FIN, RST and ACK in every order of what two sides do with two streams, with each frame delivered at any time.
//!
//! Breadth first, over states: of the histories that lead to the same state of both sides and of what is on its way
//! only one is continued.

use std::{
    collections::HashSet,
    env,
    hash::{DefaultHasher, Hash, Hasher},
};

use super::*;

/// How many steps a history has, unless this variable says otherwise. `.ci/long` has 12.
const DEPTH: &str = "RELAYLET_TABLE_DEPTH";
const SHORT: usize = 8;

/// How many streams there are, and how often each side writes to each.
const STREAMS: usize = 2;
const WRITES: usize = 2;

/// How many bytes are written at once.
const BYTES: usize = 3;

/// The steps of either side, by number.
const STEPS: [Step; 16] = [
    Step::Open,
    Step::Accept,
    Step::Send,
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

/// A history that leads to a state.
#[derive(Clone, Copy, Default)]
struct Node {
    steps: [u8; 16],
    /// The steps that can follow, a bit each.
    next: u32,
    /// Whether nothing was on its way to the first side before the last step.
    was_silent: bool,
}

#[test]
fn in_every_history_of_two_streams_both_sides_agree_on_their_end() {
    let depth = env::var(DEPTH).map_or(SHORT, |depth| depth.parse().expect("a number of steps"));
    let (mut seen, mut steps) = (HashSet::new(), 0_u64);
    let mut world = World::new();
    seen.insert(fingerprint(&world));
    let mut level = vec![Node { next: enabled(&mut world) & 1, ..Node::default() }];
    for length in 0..depth {
        let mut next = Vec::new();
        for node in &level {
            for step in (0..32).filter(|step| node.next & (1 << step) != 0) {
                steps += 1;
                let mut history = *node;
                history.steps[length] = step;
                let history_so_far = &history.steps[..=length];
                let mut world = replay(history_so_far);
                if !seen.insert(fingerprint(&world)) {
                    continue;
                }
                let (last_side, last) = side_and_step(step);
                history.was_silent = match last {
                    Step::Send if last_side == 1 => {
                        replay(&history.steps[..length]).wires[1].is_empty()
                    }
                    _ => false,
                };
                history.next = enabled(&mut world) & !later(step, history.was_silent);
                assert_state(&world);
                let told = history_so_far.iter().map(|step| side_and_step(*step));
                let told = format!("{:?}", told.collect::<Vec<_>>());
                assert_ends(world, history_so_far, &told);
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

fn replay(steps: &[u8]) -> World {
    let mut world = World::new();
    for step in steps {
        let (at, step) = side_and_step(*step);
        take(&mut world, at, step);
    }
    world
}

/// Takes a step; of arrivals, a whole frame.
fn take(world: &mut World, at: usize, step: Step) {
    let step = match step {
        Step::Arrive(_) => {
            let header = headers(&world.wires[1 - at])[0];
            let body = if header.kind == Kind::Data { header.length as usize } else { 0 };
            if let Some(stream) = known(world, at, header.stream).filter(|it| !it.dropped) {
                stream.arrived += body;
            }
            Step::Arrive(HEADER + body)
        }
        step => step,
    };
    world.step(at, step);
}

fn known(world: &mut World, at: usize, id: u32) -> Option<&mut Known> {
    world.streams[at].iter_mut().find(|stream| stream.id == id)
}

/// The steps that change something.
fn enabled(world: &mut World) -> u32 {
    let opened = world.sides.iter().map(|side| side.session.next_id as usize / 2).sum::<usize>();
    let opened = opened - 1; // the first number of the second side is 2
    let mut all = 0;
    for at in 0..2 {
        for (number, step) in STEPS.iter().enumerate() {
            let stream = |number: usize| world.streams[at].get(number).filter(|it| !it.dropped);
            let session = &world.sides[at].session;
            let is_enabled = match step {
                Step::Open => opened < STREAMS,
                Step::Accept => !session.accepted.is_empty(),
                Step::Send => true,
                Step::Arrive(_) => !world.wires[1 - at].is_empty(),
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

/// The steps that need not follow this one, because the other order leads to the same: the first side's goes first.
fn later(last: u8, was_silent: bool) -> u32 {
    const FIRST_SIDE: u32 = (1 << STEPS.len()) - 1;
    const ARRIVES: u32 = 1 << 3;
    match side_and_step(last) {
        (1, Step::Send) if was_silent => FIRST_SIDE & !ARRIVES,
        (1, _) => FIRST_SIDE,
        _ => 0,
    }
}

/// All that decides what can follow, as a hash: of ten million states two are taken for one in one run of 400,000.
fn fingerprint(world: &World) -> u64 {
    let mut hash = DefaultHasher::new();
    for at in 0..2 {
        let session = &world.sides[at].session;
        for (key, stream) in &session.streams {
            let ends = (stream.received, stream.sent, stream.pending);
            let queued = (stream.in_control, stream.in_turns, stream.deficit, stream.unsent());
            let held = (stream.has_handle, stream.is_unacknowledged);
            (key, ends, queued, held, std::mem::discriminant(&stream.origin)).hash(&mut hash);
        }
        (session.next_id, session.inbound, session.outbound).hash(&mut hash);
        (session.unacknowledged, session.refused).hash(&mut hash);
        (&session.half_closed, &session.accepted, &session.control).hash(&mut hash);
        (&session.new_flows, &session.old_flows).hash(&mut hash);
        world.wires[at].hash(&mut hash);
        for it in &world.streams[at] {
            (it.key, it.written, it.flushed, it.read, it.arrived).hash(&mut hash);
            (it.closed, it.dropped, it.reset, it.ended, it.was_reset).hash(&mut hash);
        }
    }
    hash.finish()
}

/// Nothing is held beside the streams that have a handle or something to send.
fn assert_state(world: &World) {
    for side in &world.sides {
        let session = &side.session;
        for (key, stream) in &session.streams {
            let is_last =
                session.streams.range(key..).nth(1).is_none_or(|(next, _)| next.0 > key.0);
            assert!(stream.is_finished() || is_last, "{session:#?}");
            assert!(!stream.is_gone(), "{session:#?}");
            let is_half_closed = session.half_closed.contains(&stream.id);
            assert!(stream.is_finished() || !is_half_closed, "{session:#?}");
        }
        assert!(session.streams.len() + session.half_closed.len() <= STREAMS, "{session:#?}");
        assert!(session.unacknowledged <= session.streams.len(), "{session:#?}");
    }
}

/// From here on both sides agree on what becomes of each stream, whether all are closed or dropped.
fn assert_ends(mut world: World, history: &[u8], told: &str) {
    let _trace = Trace(told);
    world.settle();
    world.check();
    // Twice, for the other side may hear of a stream with its end only.
    for at in [0, 1, 0, 1] {
        for number in 0..world.streams[at].len() {
            world.step(at, Step::Close(number));
        }
        world.settle();
    }
    world.check();
    for stream in world.streams.iter().flatten() {
        assert!(stream.dropped || stream.ended, "{stream:?}");
    }
    world.end();
    replay(history).end();
}

/// Says which history it was that failed.
struct Trace<'a>(&'a str);

impl Drop for Trace<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("after {}", self.0);
        }
    }
}
