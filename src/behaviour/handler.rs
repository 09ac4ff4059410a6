//! One connection: which substreams are open on it, and what is asked of them.
//!
//! The exchanges themselves are in [`hop`], [`stop`], [`ping`] and [`circuit`]; each runs as a task
//! of its own, so that a stalled one costs a substream and not the connection. The handler starts
//! them, bounds their number, and carries what they yield to the behaviour and back.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    fmt, io, mem,
    pin::pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use libp2p::{
    PeerId, Stream, StreamProtocol,
    core::upgrade::ReadyUpgrade,
    futures::{
        FutureExt, StreamExt,
        channel::{mpsc, oneshot},
        future::{self, BoxFuture, Either},
        stream::FuturesUnordered,
    },
    swarm::{
        ConnectionHandler, ConnectionHandlerEvent, StreamUpgradeError, SubstreamProtocol,
        handler::{
            ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound,
        },
    },
};

use super::{
    circuit::Circuit,
    hop,
    inbound::{Inbound, REQUEST_TIMEOUT},
    ping, stop,
    timer::{Timeouts, within},
};
use crate::{
    activity::{Heard, Signs},
    config::Config,
    event::{Carried, CircuitEnd, CircuitId, StopFailed},
    relay::{Command, Quota, RequestId, reservations::Receipt},
    wire::{self, BadRequest, HOP_PROTOCOL, Limit, Request, STOP_PROTOCOL},
};

/// How many requests of one connection may be on their way, from the first byte to the last of
/// their answer, or as many as one peer may have circuits: a client may ask for all of them at
/// once. A stream beyond that is reset.
const LEAST_MAX_REQUESTS: usize = 128;

/// How many ping streams are served on one connection, as its specification asks.
const MAX_PINGS: usize = 2;

/// What a connection tells the behaviour.
#[derive(Debug)]
pub enum Told {
    /// The peer asks for something.
    Requested(RequestId, Request),
    /// The peer asked for something that was not understood; it has been told.
    NotUnderstood(BadRequest),
    /// Whether the answer of this receipt arrived.
    Answered(Receipt, Result<(), io::ErrorKind>),
    /// What the target said.
    TargetAnswered(CircuitId, Result<Box<Substream>, StopFailed>),
    /// A circuit whose source this is has ended.
    CircuitEnded(CircuitId, CircuitEnd, Carried),
}

/// A stream on which everything that comes in is a sign of life.
pub type Substream = Heard<Stream>;

/// What the behaviour orders. It goes to the handler directly: the swarm would look for the
/// connection among those of all peers, one by one. Boxed, because an empty queue has room for one.
pub type Ordered = Box<Command<Box<Substream>>>;

/// What a task yields when it is done.
enum Done {
    Read(Substream, Result<Request, BadRequest>),
    Answered(Option<(Receipt, io::Result<()>)>),
    Target(CircuitId, Result<Substream, StopFailed>),
    Circuit(CircuitId, CircuitEnd, Carried),
    /// The stream failed before there was a request.
    Lost,
    Ping,
    Sign,
}

/// The relay's side of one connection.
pub struct Handler {
    peer: PeerId,
    answer_ping: bool,
    max_requests: usize,
    signs: Signs,
    commands: mpsc::UnboundedReceiver<Ordered>,
    timeouts: Timeouts,
    tasks: FuturesUnordered<BoxFuture<'static, Done>>,
    /// Requests that the behaviour has yet to decide. Boxed, because a table keeps its room when it
    /// is empty again, and every peer with a slot has asked for it once.
    undecided: HashMap<RequestId, Box<Substream>>,
    /// Requests that are being read or answered.
    in_progress: usize,
    pings: usize,
    /// The streams wanted, and what for.
    wanted: VecDeque<Wanted>,
    /// Circuits whose target this peer is to be, and that it has yet to agree to. Dropping one of
    /// these gives it up.
    asked: HashMap<CircuitId, oneshot::Sender<()>>,
    /// Dropping one of these ends its circuit.
    circuits: HashMap<CircuitId, oneshot::Sender<()>>,
    /// What is yet to be told of them, once the connection is closing.
    last_words: Vec<Told>,
    holds_reservation: bool,
    last_request: u64,
}

/// What a stream is wanted for.
#[derive(Debug)]
pub enum Wanted {
    /// To ask the peer whether it takes a circuit.
    Stop(Box<Asking>),
    /// To ask it for a sign of life, within this time.
    Sign(Duration),
}

/// A question to a target, while there is no stream for it yet.
#[derive(Debug)]
pub struct Asking {
    circuit: CircuitId,
    source: PeerId,
    limit: Limit,
    since: Instant,
    given_up: oneshot::Receiver<()>,
}

impl Handler {
    /// The handler of a new connection to `peer`; what is heard from it is counted in `signs`, and
    /// what the behaviour orders comes over `commands`.
    pub(crate) fn new(
        peer: PeerId,
        config: &Config,
        signs: Signs,
        commands: mpsc::UnboundedReceiver<Ordered>,
    ) -> Self {
        Self {
            peer,
            answer_ping: config.answer_ping,
            max_requests: config.max_circuits_per_peer.max(LEAST_MAX_REQUESTS),
            signs,
            commands,
            timeouts: Timeouts::default(),
            tasks: FuturesUnordered::new(),
            undecided: HashMap::new(),
            in_progress: 0,
            pings: 0,
            wanted: VecDeque::new(),
            asked: HashMap::new(),
            circuits: HashMap::new(),
            last_words: Vec::new(),
            holds_reservation: false,
            last_request: 0,
        }
    }

    fn inbound(&mut self, mut stream: Stream, protocol: &StreamProtocol) {
        if *protocol == ping::PING_PROTOCOL {
            if self.pings == MAX_PINGS {
                return;
            }
            self.pings += 1;
            stream.ignore_for_keep_alive();
            let stream = self.signs.listen_to(stream);
            self.run(ping::answer(stream).map(|_| Done::Ping));
            return;
        }
        if self.in_progress + self.undecided.len() >= self.max_requests {
            return;
        }
        self.in_progress += 1;
        let peer = self.peer;
        let mut stream = self.signs.listen_to(stream);
        let limit = self.timeouts.start(REQUEST_TIMEOUT, Instant::now());
        self.run(async move {
            match hop::read_request(&mut stream, peer, limit).await {
                Ok(request) => Done::Read(stream, request),
                Err(_) => Done::Lost,
            }
        });
    }

    fn answer(&mut self, stream: Substream, message: Vec<u8>, receipt: Option<Receipt>) {
        self.in_progress += 1;
        let limit = self.timeouts.start(hop::ANSWER_TIMEOUT, Instant::now());
        self.run(async move {
            let delivered = hop::answer(stream, message, limit).await;
            Done::Answered(receipt.map(|receipt| (receipt, delivered)))
        });
    }

    fn ask(&mut self, mut stream: Substream, asking: Asking) {
        let left = stop::STOP_TIMEOUT.saturating_sub(asking.since.elapsed());
        let limit = self.timeouts.start(left, Instant::now());
        self.run(async move {
            let question = wire::stop_connect(asking.source, asking.limit);
            let exchange = async {
                let answer = stop::ask(&mut stream, question, limit).await;
                answer.map(|()| stream)
            };
            let answer = match future::select(asking.given_up, pin!(exchange)).await {
                Either::Left(_) => Err(StopFailed::Gone),
                Either::Right((answer, _)) => answer,
            };
            Done::Target(asking.circuit, answer)
        });
    }

    /// Whatever comes back is counted on the stream itself, a refusal of the protocol by the caller.
    fn ask_for_sign(&mut self, mut stream: Stream, patience: Duration) {
        stream.ignore_for_keep_alive();
        let exchange = ping::ask(self.signs.listen_to(stream));
        let limit = self.timeouts.start(patience, Instant::now());
        self.run(within(limit, exchange).map(|_| Done::Sign));
    }

    fn open(&mut self, source: Substream, circuit: CircuitId, target: Substream, quota: Quota) {
        let (end, ended) = oneshot::channel();
        self.circuits.insert(circuit, end);
        let now = Instant::now();
        let limit = self.timeouts.start(hop::ANSWER_TIMEOUT, now);
        // Its time begins when it is opened, not when the answer has been sent.
        let deadline = quota.limit.duration;
        let deadline = deadline.map(|duration| self.timeouts.start(duration, now));
        self.run(async move {
            let message = wire::connect_ok(quota.limit);
            let answer = pin!(hop::open_circuit(source, message, limit));
            let failed = |end| Done::Circuit(circuit, end, Carried::default());
            let (source, ended) = match future::select(answer, ended).await {
                Either::Left((Ok(source), ended)) => (source, ended),
                Either::Left((Err(error), _)) => return failed(CircuitEnd::Reset(error.kind())),
                Either::Right(_) => return failed(CircuitEnd::Ended),
            };
            let (end, carried) = Circuit::new(source, target, quota, deadline, ended).await;
            Done::Circuit(circuit, end, carried)
        });
    }

    fn run(&mut self, task: impl Future<Output = Done> + Send + 'static) {
        self.tasks.push(task.boxed());
    }

    /// Does what was ordered by now.
    fn obey(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(Some(command)) = self.commands.poll_next_unpin(cx) {
            self.carry_out(*command);
        }
    }

    fn carry_out(&mut self, command: Command<Box<Substream>>) {
        match command {
            Command::Granted(request, receipt, message) => {
                if let Some(stream) = self.undecided.remove(&request) {
                    self.answer(*stream, message, Some(receipt));
                }
            }
            Command::Refuse(request, status) => {
                if let Some(stream) = self.undecided.remove(&request) {
                    self.answer(*stream, wire::refusal(status), None);
                }
            }
            Command::Drop(request) => _ = self.undecided.remove(&request),
            Command::AskTarget(circuit, source, limit) => {
                let (give_up, given_up) = oneshot::channel();
                self.asked.insert(circuit, give_up);
                self.wanted.push_back(Wanted::Stop(Box::new(Asking {
                    circuit,
                    source,
                    limit,
                    since: Instant::now(),
                    given_up,
                })));
            }
            Command::AskForSign(patience) => self.wanted.push_back(Wanted::Sign(patience)),
            // What waits for a stream or its negotiation is noticed when there is one.
            Command::GiveUpAsking(circuit) => {
                self.asked.remove(&circuit);
            }
            Command::OpenCircuit(request, circuit, target, quota) => {
                if let Some(source) = self.undecided.remove(&request) {
                    self.open(*source, circuit, *target, quota);
                    return;
                }
                let end = CircuitEnd::Ended;
                self.run(async move { Done::Circuit(circuit, end, Carried::default()) });
            }
            Command::EndCircuit(circuit) => {
                self.circuits.remove(&circuit);
            }
            Command::Hold(holds) => self.holds_reservation = holds,
        }
    }

    /// What there is to tell once a task is done, if anything.
    fn done(&mut self, done: Done) -> Option<Told> {
        match done {
            Done::Read(stream, request) => {
                self.in_progress -= 1;
                match request {
                    Ok(request) => {
                        self.last_request += 1;
                        let id = RequestId(self.last_request);
                        self.undecided.insert(id, Box::new(stream));
                        Some(Told::Requested(id, request))
                    }
                    Err(bad) => {
                        self.answer(stream, wire::refusal(bad.status()), None);
                        Some(Told::NotUnderstood(bad))
                    }
                }
            }
            Done::Answered(answered) => {
                self.in_progress -= 1;
                answered.map(|(receipt, delivered)| {
                    Told::Answered(receipt, delivered.map_err(|error| error.kind()))
                })
            }
            Done::Target(circuit, answer) => {
                self.asked.remove(&circuit);
                Some(Told::TargetAnswered(circuit, answer.map(Box::new)))
            }
            Done::Circuit(circuit, end, carried) => {
                self.circuits.remove(&circuit);
                Some(Told::CircuitEnded(circuit, end, carried))
            }
            Done::Lost => {
                self.in_progress -= 1;
                None
            }
            Done::Ping => {
                self.pings -= 1;
                None
            }
            Done::Sign => None,
        }
    }
}

impl ConnectionHandler for Handler {
    /// The swarm carries none: see [`Ordered`].
    type FromBehaviour = Infallible;
    type ToBehaviour = Told;
    type InboundProtocol = Inbound;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Wanted;

    fn listen_protocol(&self) -> SubstreamProtocol<Inbound> {
        let ping = self.answer_ping.then_some(ping::PING_PROTOCOL);
        Inbound(HOP_PROTOCOL, ping).listen()
    }

    fn connection_keep_alive(&self) -> bool {
        self.holds_reservation || !self.circuits.is_empty()
    }

    fn on_behaviour_event(&mut self, never: Infallible) {
        match never {}
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<Inbound, ReadyUpgrade<StreamProtocol>, (), Wanted>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound {
                protocol: (stream, protocol),
                ..
            }) => {
                self.signs.heard(1);
                self.inbound(stream, &protocol);
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound {
                protocol: stream,
                info,
            }) => match info {
                Wanted::Stop(asking) => self.ask(self.signs.listen_to(stream), *asking),
                Wanted::Sign(patience) => self.ask_for_sign(stream, patience),
            },
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error }) => {
                if !matches!(error, StreamUpgradeError::Timeout) {
                    self.signs.heard(1); // a refusal is an answer
                }
                let Wanted::Stop(asking) = info else {
                    return;
                };
                let failed = match error {
                    StreamUpgradeError::Timeout => StopFailed::Io(io::ErrorKind::TimedOut),
                    StreamUpgradeError::NegotiationFailed => StopFailed::Unsupported,
                    StreamUpgradeError::Io(error) => error.into(),
                    StreamUpgradeError::Apply(never) => match never {},
                };
                self.run(async move { Done::Target(asking.circuit, Err(failed)) });
            }
            _ => {}
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<ReadyUpgrade<StreamProtocol>, Wanted, Told>> {
        self.obey(cx);
        if let Some(wanted) = self.wanted.pop_front() {
            let (protocol, timeout) = match &wanted {
                Wanted::Stop(_) => (STOP_PROTOCOL, stop::STOP_TIMEOUT),
                Wanted::Sign(patience) => (ping::PING_PROTOCOL, *patience),
            };
            let upgrade = ReadyUpgrade::new(protocol);
            let protocol = SubstreamProtocol::new(upgrade, wanted).with_timeout(timeout);
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
        }
        self.timeouts.poll(cx);
        while let Poll::Ready(Some(done)) = self.tasks.poll_next_unpin(cx) {
            if let Some(told) = self.done(done) {
                return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(told));
            }
        }
        Poll::Pending
    }

    /// Closing is not closed: the muxer first flushes, which a frozen peer delays for as long as
    /// TCP is patient. So the circuits end, and are accounted for, here.
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Option<Told>> {
        self.obey(cx); // what was ordered before it
        if let Some(&circuit) = self.asked.keys().next() {
            self.asked.remove(&circuit);
            return Poll::Ready(Some(Told::TargetAnswered(circuit, Err(StopFailed::Gone))));
        }
        self.circuits.clear();
        self.undecided.clear();
        // One by one: as a set they would put some off while others keep waking up, and what those
        // carried would be lost.
        for mut task in mem::take(&mut self.tasks) {
            if let Poll::Ready(Done::Circuit(circuit, end, carried)) = task.poll_unpin(cx) {
                self.last_words.push(Told::CircuitEnded(circuit, end, carried));
            }
        }
        Poll::Ready(self.last_words.pop())
    }
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handler")
            .field("peer", &self.peer)
            .field("tasks", &self.tasks.len())
            .field("circuits", &self.circuits.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use libp2p::futures::task::noop_waker_ref;

    use super::*;
    use crate::relay::circuits::{Circuits, End};

    /// Every connection has one. Where this fails for a reason, box what is rare, or change the
    /// figure knowingly: it is multiplied by the number of peers.
    #[test]
    fn a_handler_is_small() {
        assert!(size_of::<Handler>() <= 416);
        // Of these, an idle handler keeps room for a few: each peer asks, and is asked.
        assert!(size_of::<(RequestId, Box<Substream>)>() <= 16);
        assert!(size_of::<Wanted>() <= 16);
    }

    #[test]
    fn a_connection_that_closes_says_what_each_circuit_carried_whatever_else_goes_on() {
        let config = Config::default();
        let (_behaviour, commands) = mpsc::unbounded();
        let mut handler = Handler::new(PeerId::random(), &config, Signs::default(), commands);
        let mut ids = Circuits::new((&config).into());
        let mut closed = Vec::new();
        for carried in 1..4 {
            // Streams on which more keeps coming in.
            for _ in 0..2 {
                handler.run(future::poll_fn(|cx| {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }));
            }
            let [source, target] =
                [0, 1].map(|connection| End { peer: PeerId::random(), connection });
            let id = ids.admit(source, target, None, Instant::now()).unwrap();
            let carried = Carried { to_target: carried, to_source: 0 };
            let (end, ended) = oneshot::channel();
            handler.circuits.insert(id, end);
            handler.run(ended.map(move |_| Done::Circuit(id, CircuitEnd::Ended, carried)));
            closed.push((id, carried));
        }
        let mut told = Vec::new();
        let cx = &mut Context::from_waker(noop_waker_ref());
        while let Poll::Ready(Some(word)) = handler.poll_close(cx) {
            let Told::CircuitEnded(id, CircuitEnd::Ended, carried) = word else {
                panic!("{word:?}");
            };
            told.push((id, carried));
        }
        told.sort_by_key(|(id, _)| *id);
        assert_eq!(told, closed);
    }
}
