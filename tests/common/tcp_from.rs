//! TCP from a chosen source address, so that clients are in many prefixes, as on the internet.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
};

use libp2p::{
    Multiaddr, Transport,
    core::transport::{DialOpts, ListenerId, TransportError, TransportEvent},
    futures::{FutureExt, future::BoxFuture},
    multiaddr::Protocol,
    tcp::tokio::TcpStream,
};
use tokio::net::TcpSocket;

/// Dials from this address of 127.0.0.0/8, and does not listen.
pub struct TcpFrom(pub Ipv4Addr);

impl Transport for TcpFrom {
    type Output = TcpStream;
    type Error = io::Error;
    type ListenerUpgrade = BoxFuture<'static, io::Result<TcpStream>>;
    type Dial = BoxFuture<'static, io::Result<TcpStream>>;

    fn listen_on(
        &mut self,
        _: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        Err(TransportError::MultiaddrNotSupported(address))
    }

    fn remove_listener(&mut self, _: ListenerId) -> bool {
        false
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        _: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        let parts: Vec<_> = address.iter().take(2).collect();
        let [Protocol::Ip4(ip), Protocol::Tcp(port)] = parts[..] else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let from = SocketAddr::from((self.0, 0));
        Ok(async move {
            let socket = TcpSocket::new_v4()?;
            socket.bind(from)?;
            let stream = socket.connect(SocketAddr::from((ip, port))).await?;
            stream.set_nodelay(true)?;
            Ok(TcpStream(stream))
        }
        .boxed())
    }

    fn poll(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        Poll::Pending
    }
}

/// Address `number` of those that are each in a /24 of their own.
pub fn address_of(number: usize) -> Ipv4Addr {
    let first = Ipv4Addr::new(127, 100, 0, 1).to_bits();
    Ipv4Addr::from_bits(first + (number as u32 % 20_000) * 256)
}
