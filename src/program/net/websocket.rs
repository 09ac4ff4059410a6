//! WebSocket over our TCP, by itself and in TLS: what browsers speak.
//!
//! libp2p's own, and what it needs to face strangers: a bound on what they may send at once, a
//! certificate that can be replaced while it runs, and an end that can be read twice.
//!
//! Its upgrade runs where the handshake does, so it is timed and limited together with that.

pub mod certificate;

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use libp2p::{
    Multiaddr, Transport,
    core::transport::{DialOpts, ListenerId, TransportError, TransportEvent},
    futures::{AsyncRead, AsyncWrite},
};
use libp2p_websocket::Config;

use self::certificate::Certificate;
use crate::delegate::delegate_write;

/// The longest message that is read, in bytes.
///
/// It takes that much memory as soon as it is announced, which anyone may do. The longest that
/// clients send is rust-libp2p's, 192 KiB: all that its Noise has gathered before it writes. go- and
/// js-libp2p send each message of Noise, or each record of TLS, by itself: 64 KiB.
pub const LONGEST_MESSAGE: usize = 256 * 1024;

/// The certificate that new connections get to see. Clones share it.
#[derive(Clone, Default)]
pub struct Presented(Arc<Mutex<Option<Certificate>>>);

impl Presented {
    /// From now on it is this one.
    pub fn set(&self, certificate: Certificate) {
        *self.next() = Some(certificate);
    }

    fn next(&self) -> MutexGuard<'_, Option<Certificate>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// WebSocket over `T`: to listen only, for nobody is dialed.
pub struct WebSocket<T>
where
    T: Transport,
    T::Output: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    inner: Config<T>,
    presented: Presented,
}

impl<T> WebSocket<T>
where
    T: Transport + Send + Unpin + 'static,
    T::Error: Send + 'static,
    T::Dial: Send + 'static,
    T::ListenerUpgrade: Send + 'static,
    T::Output: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    /// For the connections of `tcp`; in TLS with the certificate that is presented.
    pub fn over(tcp: T, presented: Presented) -> Self {
        let mut inner = Config::new(tcp);
        inner.set_max_data_size(LONGEST_MESSAGE);
        Self { inner, presented }
    }

    /// Takes up a new certificate, for all connections that come from now on.
    fn present(&mut self) {
        if let Some(certificate) = self.presented.next().take() {
            self.inner.set_tls_config(certificate.into());
        }
    }
}

impl<T> Transport for WebSocket<T>
where
    T: Transport + Send + Unpin + 'static,
    T::Error: Send + 'static,
    T::Dial: Send + 'static,
    T::ListenerUpgrade: Send + 'static,
    T::Output: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = <Config<T> as Transport>::Output;
    type Error = <Config<T> as Transport>::Error;
    type ListenerUpgrade = <Config<T> as Transport>::ListenerUpgrade;
    type Dial = <Config<T> as Transport>::Dial;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<Self::Error>> {
        self.present();
        self.inner.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.inner.remove_listener(id)
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        _: DialOpts,
    ) -> Result<Self::Dial, TransportError<Self::Error>> {
        Err(TransportError::MultiaddrNotSupported(address))
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, Self::Error>> {
        self.present();
        Pin::new(&mut self.inner).poll(cx)
    }
}

/// A stream that has ended once it says so, or fails: libp2p's panics when it is read again behind
/// its end, and goes on in the middle of what it could not read.
#[derive(Debug)]
pub struct UntilEnd<S> {
    stream: S,
    ended: bool,
}

impl<S> UntilEnd<S> {
    /// Nothing was read from `stream` yet.
    pub fn new(stream: S) -> Self {
        Self { stream, ended: false }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for UntilEnd<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if self.ended || into.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, into));
        self.ended = !matches!(read, Ok(1..));
        Poll::Ready(read)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for UntilEnd<S> {
    delegate_write!(stream: poll_write, poll_flush, poll_close);
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, io::ErrorKind};

    use libp2p::futures::AsyncReadExt;

    use super::*;

    /// As libp2p's stream: it must not be read behind its end.
    struct Pieces(VecDeque<io::Result<&'static [u8]>>);

    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            into: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            let piece = self.0.pop_front().expect("nothing comes behind the end")?;
            into[..piece.len()].copy_from_slice(piece);
            Poll::Ready(Ok(piece.len()))
        }
    }

    #[test]
    fn an_end_can_be_read_twice_and_so_can_a_failure() {
        async_std::task::block_on(async {
            for end in [Ok(&b""[..]), Err(ErrorKind::InvalidData.into())] {
                let fails = end.is_err();
                let mut stream = UntilEnd::new(Pieces([Ok(&b"one"[..]), end].into()));
                let mut bytes = [0; 3];
                assert_eq!(stream.read(&mut []).await.unwrap(), 0);
                assert_eq!(stream.read(&mut bytes).await.unwrap(), 3);
                assert_eq!(stream.read(&mut bytes).await.is_err(), fails);
                assert_eq!(stream.read(&mut bytes).await.unwrap(), 0);
            }
        });
    }
}
