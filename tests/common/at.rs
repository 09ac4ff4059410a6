//! TCP from an address of one's own, of which a machine has as many as there are in 127.0.0.0/8:
//! libp2p's own chooses 127.0.0.1.

use std::{
    io,
    net::Ipv4Addr,
    pin::Pin,
    task::{Context, Poll},
};

use libp2p::{
    Multiaddr, Transport, TransportError,
    core::transport::{DialOpts, ListenerId, TransportEvent},
    futures::future::{self, BoxFuture, FutureExt},
    multiaddr::Protocol,
    tcp::tokio::TcpStream,
};

use super::by_hand::tcp_from;

/// Dials from this address.
pub struct At(pub Ipv4Addr);

impl Transport for At {
    type Output = TcpStream;
    type Error = io::Error;
    type ListenerUpgrade = future::Pending<io::Result<TcpStream>>;
    type Dial = BoxFuture<'static, io::Result<TcpStream>>;

    fn dial(
        &mut self,
        to: Multiaddr,
        _: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        let parts: Vec<_> = to.iter().take(2).collect();
        match parts[..] {
            [Protocol::Ip4(Ipv4Addr::LOCALHOST), Protocol::Tcp(port)] => {
                Ok(tcp_from(self.0, port).boxed())
            }
            _ => Err(TransportError::MultiaddrNotSupported(to)),
        }
    }

    fn listen_on(&mut self, _: ListenerId, at: Multiaddr) -> Result<(), TransportError<io::Error>> {
        Err(TransportError::MultiaddrNotSupported(at))
    }

    fn remove_listener(&mut self, _: ListenerId) -> bool {
        false
    }

    fn poll(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        Poll::Pending
    }
}
