//! One connection: which substreams are open on it, and what is asked of them.
//!
//! The exchanges themselves are in [`hop`], [`stop`] and [`ping`]; each runs as a task of its own, so that a stalled
//! one costs a substream and not the connection. The handler starts the tasks and bounds their number. A task
//! sends its events to the behaviour directly; one that is dropped with its connection sends its last from `Drop`.

use std::{
    convert::Infallible,
    fmt,
    future::Future,
    io,
    sync::Arc,
    task::{Context, Poll},
};

use libp2p::{
    Stream, StreamProtocol,
    core::upgrade::ReadyUpgrade,
    futures::{FutureExt, StreamExt, channel::mpsc, future::BoxFuture, stream::FuturesUnordered},
    swarm::{
        ConnectionHandler, ConnectionHandlerEvent, ConnectionId, StreamUpgradeError,
        SubstreamProtocol,
        handler::{
            ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound,
        },
    },
};

use super::{
    hop,
    inbound::Inbound,
    messages::{Events, HandlerCommand, HandlerEvent, Outbound},
    ping, stop,
    timer::{Timeouts, within},
};
use crate::{
    activity::Signs,
    config::Config,
    event::StopFailed,
    relay::circuits::End,
    wire::{HOP_PROTOCOL, STOP_PROTOCOL},
};

/// How many requests of one connection may be on their way, from the first byte to the last of
/// their answer, or as many as one peer may have circuits: a client may ask for all of them at
/// once. A stream beyond that is reset.
const LEAST_MAX_REQUESTS: usize = 128;

/// How many ping streams are served on one connection, as its specification asks.
const MAX_PINGS: usize = 2;

/// The relay's side of one connection.
pub struct Handler {
    end: End<ConnectionId>,
    answer_ping: bool,
    max_requests: usize,
    signs: Signs,
    commands: mpsc::UnboundedReceiver<HandlerCommand>,
    events: Events,
    timeouts: Timeouts,
    tasks: FuturesUnordered<BoxFuture<'static, ()>>,
    /// Counts hop streams whose request is being read or answered: each holds a clone.
    requests: Arc<()>,
    /// Counts ping streams in the same way.
    pings: Arc<()>,
    holds_reservation: bool,
}

impl Handler {
    /// The handler of a new connection. What is heard on it is counted in `signs`, what the behaviour asks of it
    /// comes over `commands`, and what its tasks have to tell goes over `events`.
    pub(crate) fn new(
        end: End<ConnectionId>,
        config: &Config,
        signs: Signs,
        commands: mpsc::UnboundedReceiver<HandlerCommand>,
        events: Events,
    ) -> Self {
        Self {
            end,
            answer_ping: config.answer_ping,
            max_requests: config.max_circuits_per_peer.max(LEAST_MAX_REQUESTS),
            signs,
            commands,
            events,
            timeouts: Timeouts::default(),
            tasks: FuturesUnordered::new(),
            requests: Arc::default(),
            pings: Arc::default(),
            holds_reservation: false,
        }
    }

    fn serve(&self, mut stream: Stream, protocol: &StreamProtocol) {
        let is_ping = *protocol == ping::PING_PROTOCOL;
        let (permits, most) = match is_ping {
            true => (&self.pings, MAX_PINGS),
            false => (&self.requests, self.max_requests),
        };
        if Arc::strong_count(permits) > most {
            return; // the handler holds one itself; dropping the stream resets it
        }
        let permit = Arc::clone(permits);
        if is_ping {
            stream.ignore_for_keep_alive();
            let stream = self.signs.listen_to(stream);
            self.run(ping::answer(stream).map(|_| drop(permit)));
        } else {
            let (stream, events) = (self.signs.listen_to(stream), self.events.clone());
            let served = hop::serve(stream, self.end, events, self.timeouts.clone(), permit);
            self.run(served.map(drop));
        }
    }

    fn use_outbound(&self, mut stream: Stream, outbound: Outbound) {
        match outbound {
            Outbound::Stop(request) => {
                let stream = self.signs.listen_to(stream);
                self.run(request.ask(stream, self.timeouts.clone()));
            }
            Outbound::Probe(patience) => {
                stream.ignore_for_keep_alive();
                let exchange = ping::ask(self.signs.listen_to(stream));
                self.run(within(self.timeouts.start(patience), exchange).map(drop));
            }
        }
    }

    fn run(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(task.boxed());
    }
}

impl ConnectionHandler for Handler {
    /// The swarm carries nothing, in either direction: see [`super::messages`].
    type FromBehaviour = Infallible;
    type ToBehaviour = Infallible;
    type InboundProtocol = Inbound;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Outbound;

    fn listen_protocol(&self) -> SubstreamProtocol<Inbound> {
        let ping = self.answer_ping.then_some(ping::PING_PROTOCOL);
        Inbound(HOP_PROTOCOL, ping).listen()
    }

    /// Circuits keep it by their streams.
    fn connection_keep_alive(&self) -> bool {
        self.holds_reservation
    }

    fn on_behaviour_event(&mut self, never: Infallible) {
        match never {}
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<Inbound, ReadyUpgrade<StreamProtocol>, (), Outbound>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound {
                protocol: (stream, protocol),
                ..
            }) => {
                self.signs.heard(1);
                self.serve(stream, &protocol);
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound {
                protocol: stream,
                info,
            }) => self.use_outbound(stream, info),
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error }) => {
                if !matches!(error, StreamUpgradeError::Timeout) {
                    self.signs.heard(1); // a refusal is an answer
                }
                let Outbound::Stop(request) = info else {
                    return;
                };
                let failed = match error {
                    StreamUpgradeError::Timeout => StopFailed::Io(io::ErrorKind::TimedOut),
                    StreamUpgradeError::NegotiationFailed => StopFailed::Unsupported,
                    StreamUpgradeError::Io(error) => error.into(),
                    StreamUpgradeError::Apply(never) => match never {},
                };
                let answer = HandlerEvent::TargetAnswered(request.circuit, Err(failed));
                request.report.send(answer);
            }
            _ => {}
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<ReadyUpgrade<StreamProtocol>, Outbound, Infallible>> {
        while let Poll::Ready(Some(command)) = self.commands.poll_next_unpin(cx) {
            let outbound = match command {
                HandlerCommand::Hold(holds) => {
                    self.holds_reservation = holds;
                    continue;
                }
                HandlerCommand::Open(outbound) => outbound,
            };
            let (protocol, timeout) = match &outbound {
                Outbound::Stop(_) => (STOP_PROTOCOL, stop::STOP_TIMEOUT),
                Outbound::Probe(patience) => (ping::PING_PROTOCOL, *patience),
            };
            let upgrade = ReadyUpgrade::new(protocol);
            let protocol = SubstreamProtocol::new(upgrade, outbound).with_timeout(timeout);
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
        }
        while let Poll::Ready(Some(())) = self.tasks.poll_next_unpin(cx) {}
        self.timeouts.poll(cx);
        Poll::Pending
    }
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handler")
            .field("peer", &self.end.peer)
            .field("tasks", &self.tasks.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use libp2p::PeerId;

    use super::{super::messages::Report, *};
    use crate::relay::circuits::Circuits;

    /// Every connection has one. Where this fails for a reason, box what is rare, or change the
    /// figure knowingly: it is multiplied by the number of peers.
    #[test]
    fn a_handler_is_small() {
        assert!(size_of::<Handler>() <= 184, "{}", size_of::<Handler>());
        // An empty queue has room for one.
        assert!(size_of::<HandlerCommand>() <= 16);
    }

    #[test]
    fn a_connection_that_closes_reports_all_that_goes_on_on_it() {
        let (_behaviour, commands) = mpsc::unbounded();
        let (events, mut told) = mpsc::unbounded();
        let end = End { peer: PeerId::random(), connection: ConnectionId::new_unchecked(1) };
        let signs = Signs::default();
        let handler = Handler::new(end, &Config::default(), signs, commands, events.clone());
        let mut ids = Circuits::new(&Config::default());
        for _ in 0..3 {
            let (id, ended) = ids.add(end, end, None, (), std::time::Instant::now());
            let event = HandlerEvent::TargetAnswered(id, Err(StopFailed::Gone));
            let report = Report::new(event, events.clone());
            handler.run(async move {
                let _ = ended.await;
                drop(report);
            });
        }
        assert!(told.try_recv().is_err(), "nothing yet");
        drop(handler);
        for _ in 0..3 {
            let event = told.try_recv().unwrap();
            assert!(matches!(event, HandlerEvent::TargetAnswered(_, Err(StopFailed::Gone))));
        }
    }
}
