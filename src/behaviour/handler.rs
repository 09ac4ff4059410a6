//! One connection: the streams that are open on it.
//!
//! [`hop`] and [`ping`] serve the streams, each in a task of its own, so that a stalled stream does not block the
//! connection. The handler starts the tasks and bounds their number. A task sends its events to the behaviour directly;
//! one that is dropped with its connection sends its last event from `Drop`.

use std::{
    convert::Infallible,
    io,
    sync::Arc,
    task::{Context, Poll},
};

use either::Either as Upgrade;
use libp2p::{
    StreamProtocol,
    core::upgrade::{DeniedUpgrade, ReadyUpgrade, SelectUpgrade},
    futures::{
        FutureExt, StreamExt,
        channel::mpsc,
        future::{BoxFuture, Either},
        stream::FuturesUnordered,
    },
    swarm::{
        ConnectionHandler, ConnectionHandlerEvent, ConnectionId, StreamUpgradeError,
        SubstreamProtocol,
        handler::{ConnectionEvent, DialUpgradeError},
    },
};

use super::{
    hop::{self, Events, HandlerCommand, HandlerEvent, TaskContext},
    ping,
    timer::{Timeouts, within},
};
use crate::{
    activity::ActivityCounter,
    config::Config,
    event::StopFailed,
    relay::connections::End,
    wire::{HOP_PROTOCOL, STOP_PROTOCOL},
};

/// How many requests of one connection may be unanswered. If a peer may have more circuits than that, as many as circuits:
/// a client may ask for all of them at once. A stream beyond that is reset.
const LEAST_MAX_REQUESTS: usize = 128;

/// How many ping streams are served on one connection, as the specification asks.
const MAX_PINGS: usize = 2;

/// Accepts hop streams while the relay serves, and ping streams unless that is switched off.
type Inbound = SelectUpgrade<Optional, Optional>;
type Optional = Upgrade<Ready, DeniedUpgrade>;
type Ready = ReadyUpgrade<StreamProtocol>;

/// The relay's side of one connection.
pub struct Handler {
    context: TaskContext,
    is_serving: bool,
    answer_ping: bool,
    max_requests: usize,
    activity: ActivityCounter,
    commands: mpsc::UnboundedReceiver<HandlerCommand>,
    tasks: FuturesUnordered<BoxFuture<'static, ()>>,
    /// Counts hop streams whose request is unanswered: each holds a clone.
    requests: Arc<()>,
    /// Counts ping streams in the same way.
    pings: Arc<()>,
    holds_reservation: bool,
}

impl Handler {
    /// The handler of a new connection. It counts in `activity` and polls `commands`, and its tasks send `events`.
    pub(crate) fn new(
        end: End<ConnectionId>,
        config: &Config,
        is_serving: bool,
        activity: ActivityCounter,
        commands: mpsc::UnboundedReceiver<HandlerCommand>,
        events: Events,
    ) -> Self {
        Self {
            context: TaskContext { end, events, timeouts: Timeouts::default() },
            is_serving,
            answer_ping: config.answer_ping,
            max_requests: config.max_circuits_per_peer.max(LEAST_MAX_REQUESTS),
            activity,
            commands,
            tasks: FuturesUnordered::new(),
            requests: Arc::default(),
            pings: Arc::default(),
            holds_reservation: false,
        }
    }
}

impl ConnectionHandler for Handler {
    /// Commands and events use channels of their own, not the swarm's: see [`super::hop`].
    type FromBehaviour = Infallible;
    type ToBehaviour = Infallible;
    type InboundProtocol = Inbound;
    type OutboundProtocol = Ready;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = HandlerCommand;

    fn listen_protocol(&self) -> SubstreamProtocol<Inbound> {
        let accept = |accepts, protocol| match accepts {
            true => Upgrade::Left(ReadyUpgrade::new(protocol)),
            false => Upgrade::Right(DeniedUpgrade),
        };
        let hop = accept(self.is_serving, HOP_PROTOCOL);
        let inbound = SelectUpgrade::new(hop, accept(self.answer_ping, ping::PING_PROTOCOL));
        SubstreamProtocol::new(inbound, ()).with_timeout(hop::REQUEST_TIMEOUT)
    }

    /// A circuit keeps the connection alive by its stream.
    fn connection_keep_alive(&self) -> bool {
        self.holds_reservation
    }

    fn on_behaviour_event(&mut self, never: Infallible) {
        match never {}
    }

    fn on_connection_event(&mut self, event: ConnectionEvent<Inbound, Ready, (), HandlerCommand>) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(inbound) => {
                self.activity.add(1);
                // The handler holds one of each permit itself. Dropping a stream resets it.
                let allows = |permits, most| Arc::strong_count(permits) <= most;
                match inbound.protocol {
                    Either::Left(Either::Left(hop))
                        if allows(&self.requests, self.max_requests) =>
                    {
                        let hop = self.activity.track(hop, ());
                        let task = hop::serve(hop, self.context.clone(), self.requests.clone());
                        self.tasks.push(task.map(drop).boxed());
                    }
                    Either::Right(Either::Left(mut ping)) if allows(&self.pings, MAX_PINGS) => {
                        ping.ignore_for_keep_alive();
                        let task = ping::answer(self.activity.track(ping, self.pings.clone()));
                        self.tasks.push(task.map(drop).boxed());
                    }
                    _ => {}
                }
            }
            ConnectionEvent::FullyNegotiatedOutbound(mut outbound) => match outbound.info {
                HandlerCommand::Stop(parameters) => {
                    let stream = self.activity.track(outbound.protocol, ());
                    self.tasks.push(hop::ask(stream, self.context.clone(), parameters).boxed());
                }
                HandlerCommand::Probe(timeout) => {
                    outbound.protocol.ignore_for_keep_alive();
                    let probe = ping::probe(self.activity.track(outbound.protocol, ()));
                    let task = within(self.context.timeouts.start(timeout), probe);
                    self.tasks.push(task.map(drop).boxed());
                }
                HandlerCommand::Hold(_) | HandlerCommand::Serve(_) => {} // open no stream
            },
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error }) => {
                // A refusal is an answer.
                self.activity.add(u64::from(!matches!(error, StreamUpgradeError::Timeout)));
                let failed = match error {
                    StreamUpgradeError::Timeout => StopFailed::Io(io::ErrorKind::TimedOut),
                    StreamUpgradeError::NegotiationFailed => StopFailed::Unsupported,
                    StreamUpgradeError::Io(error) => error.into(),
                    StreamUpgradeError::Apply(never) => match never {},
                };
                if let HandlerCommand::Stop(circuit) = info {
                    let (over, answer) = (self.context.end.connection, Err(failed));
                    let event = HandlerEvent::TargetAnswered(circuit.id, over, answer);
                    let _ = self.context.events.unbounded_send(event); // fails without a swarm
                }
            }
            _ => {}
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Ready, HandlerCommand, Infallible>> {
        // 1. Carry out commands.
        while let Poll::Ready(Some(command)) = self.commands.poll_next_unpin(cx) {
            let (protocol, timeout) = match command {
                HandlerCommand::Stop(ref circuit) => (STOP_PROTOCOL, hop::time_left(circuit)),
                HandlerCommand::Probe(timeout) => (ping::PING_PROTOCOL, timeout),
                HandlerCommand::Hold(holds) => {
                    self.holds_reservation = holds;
                    continue;
                }
                // The swarm asks for the protocols after each poll, and identify pushes a change.
                HandlerCommand::Serve(serves) => {
                    self.is_serving = serves;
                    continue;
                }
            };
            let upgrade = ReadyUpgrade::new(protocol);
            let protocol = SubstreamProtocol::new(upgrade, command).with_timeout(timeout);
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
        }
        // 2. Run the tasks; then the timer, which they may have set.
        while let Poll::Ready(Some(())) = self.tasks.poll_next_unpin(cx) {}
        self.context.timeouts.poll(cx);
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::future;

    use libp2p::PeerId;

    use super::{super::hop::Report, *};
    use crate::event::CircuitId;

    /// Every connection has a handler. If a new field makes this fail, box what is rarely used; raise the limit only
    /// deliberately, because each byte is paid once per connection.
    #[test]
    fn a_handler_fits_its_size_limit() {
        assert!(size_of::<Handler>() <= 184, "{}", size_of::<Handler>());
        // Even an empty channel allocates room for one command.
        assert!(size_of::<HandlerCommand>() <= 16);
    }

    #[test]
    fn a_closing_connection_reports_all_its_pending_work() {
        let (_behaviour, commands) = mpsc::unbounded();
        let (events, mut reported) = mpsc::unbounded();
        let end = End { peer: PeerId::random(), connection: ConnectionId::new_unchecked(1) };
        let activity = ActivityCounter::default();
        let handler =
            Handler::new(end, &Config::default(), true, activity, commands, events.clone());
        for id in 0..3 {
            let (id, gone) = (CircuitId(id), Err(StopFailed::Gone));
            let event = Some(HandlerEvent::TargetAnswered(id, end.connection, gone));
            let report = Report { event, events: events.clone() };
            let never = future::pending::<()>();
            handler.tasks.push(never.map(|()| drop(report)).boxed());
        }
        assert!(reported.try_recv().is_err(), "nothing yet");
        drop(handler);
        for _ in 0..3 {
            let event = reported.try_recv().unwrap();
            assert!(matches!(event, HandlerEvent::TargetAnswered(_, _, Err(StopFailed::Gone))));
        }
    }
}
