//! TCP on async-std as a libp2p transport: it dials, and accepts connections.
//!
//! WebSocket runs over a second instance of it (`websocket.rs`); which of the two listens follows from the layers of
//! the address (`multiaddr.rs`).
//!
//! An inbound connection passes two steps before the swarm sees it: the PROXY protocol header of a proxy's connection
//! is read, because the limits count a connection under its client's address; and the rate limits delay or deny it.
//!
//! Not libp2p's own TCP, because that has supported only tokio since 0.56.

use std::{
    io, mem,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_timer::Delay;
use libp2p::{
    Multiaddr, Transport,
    core::transport::{DialOpts, ListenerId, TransportError},
    futures::{
        FutureExt, StreamExt,
        future::BoxFuture,
        stream::{FuturesUnordered, SelectAll},
    },
};

use super::{
    admission::{
        connection_rates::ConnectionRates,
        limits::Denied,
        proxies::{self, Proxies},
    },
    byte_counters::{ByteCounters, Counted},
    listener::{Accepted, Event, Listener, Output, Upgrade},
    multiaddr::{Layer, dialable, listen_address},
    socket::{Socket, with_remedy},
};

/// TCP, over IPv4 and IPv6.
pub struct Tcp {
    listeners: SelectAll<Listener>,
    counters: ByteCounters,
    proxies: Proxies,
    rates: ConnectionRates,
    /// The trusted reverse proxies, if WebSocket runs over this instance; `None`: libp2p runs over it directly.
    forwarders: Option<Proxies>,
    /// Connections of proxies whose headers are being read.
    reading_headers: FuturesUnordered<BoxFuture<'static, (Accepted, io::Result<SocketAddr>)>>,
    /// Connections that are delayed by the rate limits.
    delayed: FuturesUnordered<BoxFuture<'static, (Accepted, SocketAddr)>>,
    /// Whether a connection was accepted in the current turn.
    has_accepted: bool,
}

impl Tcp {
    /// A transport that counts received bytes in `counters`, trusts the PROXY protocol headers of `proxies`, and
    /// accepts connections at `rates`. With `forwarders` WebSocket runs over it, behind those proxies; without, libp2p
    /// directly.
    pub fn new(
        counters: ByteCounters,
        proxies: Proxies,
        rates: ConnectionRates,
        forwarders: Option<Proxies>,
    ) -> Self {
        Self {
            listeners: SelectAll::new(),
            counters,
            proxies,
            rates,
            forwarders,
            reading_headers: FuturesUnordered::new(),
            delayed: FuturesUnordered::new(),
            has_accepted: false,
        }
    }

    /// Reports an accepted connection of this client to the swarm, if its listener is open.
    fn report(&self, accepted: Accepted, client: io::Result<SocketAddr>) -> Option<Event> {
        let is_listening = self.is_listening(accepted.listener);
        is_listening.then(|| accepted.into_event(&self.counters, client))
    }

    /// Whether this listener is open.
    pub(super) fn is_listening(&self, id: ListenerId) -> bool {
        self.listeners.iter().any(|listener| listener.id == id && !listener.is_closed)
    }

    /// Step 1: determines the client of an accepted connection: on a proxy's connection the header names it.
    fn on_accepted(&mut self, mut accepted: Accepted) -> Option<Event> {
        let remote = accepted.remote;
        if !self.proxies.contains(remote.ip()) {
            return self.on_client(accepted, remote);
        }
        let permit = match self.proxies.acquire() {
            Ok(permit) => permit,
            Err(full) => return self.report(accepted, Err(full.into())),
        };
        let read_header = async move {
            let client = proxies::read_client(&mut accepted.stream).await;
            drop(permit);
            (accepted, client.map(|client| client.unwrap_or(remote)))
        };
        self.reading_headers.push(read_header.boxed());
        None
    }

    /// Step 2: applies the rate limits to a connection of this client; not to a forwarder's, whose clients are yet to
    /// be named.
    fn on_client(&mut self, accepted: Accepted, client: SocketAddr) -> Option<Event> {
        let is_forwarder = self.forwarders.as_ref().is_some_and(|it| it.contains(client.ip()));
        let delay_by_rate = || self.rates.delay(client.ip(), self.delayed.len(), Instant::now());
        let delay = if is_forwarder { Some(Duration::ZERO) } else { delay_by_rate() };
        match delay {
            Some(Duration::ZERO) => self.report(accepted, Ok(client)),
            Some(delay) => {
                let delayed = Delay::new(delay).map(move |()| (accepted, client));
                self.delayed.push(delayed.boxed());
                None
            }
            None => self.report(accepted, Err(Denied::Rate.into())),
        }
    }
}

impl Transport for Tcp {
    type Output = Counted<Socket>;
    type Error = io::Error;
    type ListenerUpgrade = Upgrade;
    type Dial = BoxFuture<'static, io::Result<Self::Output>>;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        let to = match listen_address(&address) {
            Some((to, layer)) if (layer == Layer::Tcp) == self.forwarders.is_none() => to,
            _ => return Err(TransportError::MultiaddrNotSupported(address)),
        };
        let listener = Listener::bind(id, address, to)
            .map_err(|error| TransportError::Other(with_remedy(&error)))?;
        self.listeners.push(listener);
        Ok(())
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        let listener = self.listeners.iter_mut().find(|listener| listener.id == id);
        listener.map(Listener::close).is_some()
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        _: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        let Some(remote) = dialable(&address) else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let counters = self.counters.clone();
        Ok(async move {
            let stream = Socket::connect(remote).await?;
            Ok(counters.count(stream, None, remote, None))
        }
        .boxed())
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Event> {
        let this = &mut *self;
        loop {
            // 1. Headers that were read.
            let event = if let Poll::Ready(Some((accepted, client))) =
                this.reading_headers.poll_next_unpin(cx)
            {
                match client {
                    Ok(client) => this.on_client(accepted, client),
                    Err(error) => this.report(accepted, Err(error)),
                }
            // 2. Connections whose delay is over.
            } else if let Poll::Ready(Some((accepted, client))) = this.delayed.poll_next_unpin(cx) {
                this.report(accepted, Ok(client))
            // 3. New connections, last and one in each turn: a flood of them must hold up neither the others nor the
            //    transport that libp2p polls after this one.
            } else if mem::take(&mut this.has_accepted) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            } else {
                match this.listeners.poll_next_unpin(cx) {
                    Poll::Ready(Some(Output::Accepted(accepted))) => {
                        this.has_accepted = true;
                        this.on_accepted(accepted)
                    }
                    Poll::Ready(Some(Output::Event(event))) => Some(event),
                    Poll::Ready(None) | Poll::Pending => return Poll::Pending,
                }
            };
            if let Some(event) = event {
                return Poll::Ready(event);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, net};

    use async_std::task::block_on;
    use libp2p::core::transport::TransportEvent;

    use super::*;

    #[test]
    fn between_two_new_connections_another_transport_has_a_turn() {
        let (counters, rates) = (ByteCounters::default(), ConnectionRates::default());
        let mut tcp = Tcp::new(counters, Proxies::new(9), rates, None);
        tcp.listen_on(ListenerId::next(), "/ip4/127.0.0.1/tcp/0".parse().unwrap()).unwrap();
        // The next event, and in how many turns it comes.
        let mut next = || {
            let mut turns = 0;
            let event = block_on(poll_fn(|cx| {
                turns += 1;
                Pin::new(&mut tcp).poll(cx)
            }));
            (event, turns)
        };
        let (TransportEvent::NewAddress { listen_addr, .. }, _) = next() else {
            panic!("no address");
        };
        let (address, _) = listen_address(&listen_addr).unwrap();
        let _clients = [(); 3].map(|()| net::TcpStream::connect(address).unwrap());
        let [_, second, third] = [(); 3].map(|()| {
            let (event, turns) = next();
            assert!(event.is_upgrade(), "{event:?}");
            turns
        });
        assert!(second > 1 && third > 1, "{second}, {third}");
    }
}
