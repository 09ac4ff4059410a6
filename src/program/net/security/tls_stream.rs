//! A TLS connection as a stream, over rustls' unbuffered API: an idle one holds no buffers.
//!
//! rustls' buffered connection never gives back the 4 KiB that it reads into, a fifth of what an idle peer takes. Here
//! bytes are read into a [`Buffer`] and decrypted in place. Between two calls, received bytes take only the memory that
//! they need. Unsent records take at most four times that while the connection accepts nothing more.

use std::{
    cell::Cell,
    io::{self, Cursor, ErrorKind, Read},
    mem,
    ops::Range,
    pin::Pin,
    task::{Context, Poll, ready},
};

use either::{Either, for_both};
use futures_rustls::rustls::{
    self,
    client::UnbufferedClientConnection,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, UnbufferedStatus},
};
use libp2p::futures::{AsyncRead, AsyncWrite, future::poll_fn};

use crate::behaviour::circuit::Buffer;

/// The most bytes of data in a record.
const MAX_DATA: usize = 16 * 1024;

/// How many more bytes a record has: header, content type, tag, and the content of an alert or a KeyUpdate.
const OVERHEAD: usize = 5 + 1 + 16 + 5;

/// How many KeyUpdate records rustls may put before data.
const MAX_UPDATES: usize = 2;

/// The most bytes that are encrypted at once, and the most that wait for a flush.
const MAX_UNSENT: usize = 4 * MAX_DATA;

thread_local! {
    /// A buffer for records that no connection uses now: a new one would have to be zeroed.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// The session of a listener or a dialer.
pub type Session = Either<UnbufferedServerConnection, UnbufferedClientConnection>;

/// A TLS connection whose handshake is done.
pub struct TlsStream<C> {
    connection: C,
    /// It has the peer's certificates.
    pub session: Session,
    state: State,
    /// The beginning of a record or of a handshake message. The rest of it was not received yet.
    incomplete: Vec<u8>,
}

/// What came out of a session.
#[derive(Default)]
struct State {
    /// Decrypted bytes that were not read yet.
    unread: Cursor<Vec<u8>>,
    /// Records, of which this range was not sent yet.
    records: Vec<u8>,
    unsent: Range<usize>,
    /// Why nothing more is received: the peer's close_notify, the end of the connection, or an error.
    end: Option<Result<(), rustls::Error>>,
}

/// What to encrypt once the session has nothing else to do.
#[derive(Clone, Copy)]
enum Write<'a> {
    Nothing,
    Data(&'a [u8]),
    CloseNotify,
}

impl State {
    /// Handles the next state of a session that has received `size` bytes. Returns how many of them it has used, and
    /// whether another state follows.
    fn handle<D>(
        &mut self,
        status: UnbufferedStatus<'_, '_, D>,
        size: usize,
        write: Write<'_>,
    ) -> (usize, bool) {
        use ConnectionState::*;

        match status.state {
            Ok(ReadTraffic(mut records)) => {
                self.unread.get_mut().reserve(size); // for the records that follow, too
                while let Some(Ok(record)) = records.next_record() {
                    self.unread.get_mut().extend_from_slice(record.payload);
                }
            }
            Ok(EncodeTlsData(mut record)) => self.append(MAX_DATA, |to| record.encode(to)),
            Ok(TransmitTlsData(records)) => records.done(), // poll_send sends them
            Ok(PeerClosed) => self.end = Some(Ok(())),
            Ok(WriteTraffic(mut traffic)) => {
                match write {
                    Write::Nothing => {}
                    Write::Data(data) => self.append(data.len(), |to| traffic.encrypt(data, to)),
                    Write::CloseNotify => self.append(0, |to| traffic.queue_close_notify(to)),
                }
                return (status.discard, false);
            }
            Ok(_) => return (status.discard, false),
            Err(error) => self.end = Some(Err(error)),
        }
        (status.discard, true)
    }

    /// Appends unsent records with this many bytes of data, and the KeyUpdates before them.
    fn append<E>(&mut self, data: usize, encode: impl FnOnce(&mut [u8]) -> Result<usize, E>) {
        if self.records.is_empty() {
            self.records = SPARE.take();
        }
        let start = self.unsent.end;
        let end = start + data + (data.div_ceil(MAX_DATA) + MAX_UPDATES) * OVERHEAD;
        if self.records.len() < end {
            self.records.resize(end, 0);
        }
        let room = self.records.get_mut(start..end).unwrap_or_default();
        self.unsent.end += encode(room).unwrap_or(0);
    }

    /// Leaves the memory of the records to other connections, if most or all of them were sent.
    fn shrink(&mut self) {
        if self.records.len() >= 4 * self.unsent.len() {
            let unsent = self.records.get(self.unsent.clone()).unwrap_or_default().to_vec();
            self.unsent = 0..unsent.len();
            let (records, spare) = (mem::replace(&mut self.records, unsent), SPARE.take());
            SPARE.set(if spare.len() > records.len() { spare } else { records });
        }
    }

    /// The error that has ended the session, if there is one.
    fn check(&self) -> io::Result<()> {
        match &self.end {
            Some(Err(error)) => Err(io::Error::new(ErrorKind::InvalidData, error.clone())),
            _ => Ok(()),
        }
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> TlsStream<C> {
    /// Performs the handshake of a new session.
    ///
    /// # Errors
    ///
    /// When it fails, or the connection ends.
    pub async fn handshake(session: Session, connection: C) -> io::Result<Self> {
        let state = State::default();
        let mut this = Self { connection, session, state, incomplete: Vec::new() };
        this.process(&mut [], Write::Nothing); // a dialer's first message
        poll_fn(|cx| {
            loop {
                let flushed = Pin::new(&mut this).poll_flush(cx);
                this.state.check()?; // its alert is flushed, if there is room for it
                ready!(flushed)?;
                if !for_both!(&this.session, session => session.is_handshaking()) {
                    return Poll::Ready(io::Result::Ok(()));
                }
                ready!(this.poll_receive(cx))?;
            }
        })
        .await?;
        Ok(this)
    }

    /// Reads the connection once, and decrypts all records that are complete.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // 1. Append to what is incomplete. A handshake message that fills the buffer counts as the connection's end.
        let mut buffer = Buffer::borrow();
        let (before, room) = buffer.0.split_at_mut(self.incomplete.len());
        before.copy_from_slice(&self.incomplete);
        let read = ready!(Pin::new(&mut self.connection).poll_read(cx, room))?;
        if read == 0 {
            self.state.end = Some(Ok(()));
            let problem = "the connection ended without TLS's close_notify";
            return Poll::Ready(Err(io::Error::new(ErrorKind::UnexpectedEof, problem)));
        }
        // 2. Decrypt. What follows the end is discarded.
        let received = buffer.0.get_mut(..self.incomplete.len() + read).unwrap_or_default();
        let used = self.process(received, Write::Nothing);
        let rest = received.get(used..).filter(|_| self.state.end.is_none());
        self.incomplete = rest.unwrap_or_default().to_vec();
        Poll::Ready(Ok(()))
    }

    /// Encrypts, for `poll_send`.
    ///
    /// # Errors
    ///
    /// When an error has ended the session.
    fn encrypt(&mut self, write: Write<'_>) -> io::Result<()> {
        self.state.check()?;
        let mut incomplete = mem::take(&mut self.incomplete); // the session refers to positions in it
        self.process(&mut incomplete, write);
        self.incomplete = incomplete;
        self.state.check()
    }

    /// Processes these received bytes until the session needs more, and encrypts. Returns how many bytes were used.
    fn process(&mut self, received: &mut [u8], write: Write<'_>) -> usize {
        let (mut used, mut is_more) = (0, true);
        while is_more {
            let rest = received.get_mut(used..).unwrap_or_default();
            let (size, state) = (rest.len(), &mut self.state);
            let (discarded, more) = for_both!(&mut self.session, session => {
                state.handle(session.process_tls_records(rest), size, write)
            });
            used += discarded;
            // After an error only the alert is encoded: the session must not parse the received bytes again.
            let has_failed = matches!(self.state.end, Some(Err(_)));
            is_more = more && (!has_failed || for_both!(&self.session, it => it.wants_write()));
        }
        used
    }

    /// Sends all unsent records.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let state = &mut self.state;
        while !state.unsent.is_empty() {
            let unsent = state.records.get(state.unsent.clone()).unwrap_or_default();
            let Poll::Ready(sent) = Pin::new(&mut self.connection).poll_write(cx, unsent) else {
                state.shrink();
                return Poll::Pending;
            };
            match sent? {
                0 => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
                sent => state.unsent.start += sent,
            }
        }
        state.shrink();
        Poll::Ready(Ok(()))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        loop {
            let unread = &mut this.state.unread;
            if !unread.get_ref().is_empty() {
                let read = unread.read(into)?;
                if unread.position() == unread.get_ref().len() as u64 {
                    *unread = Cursor::default();
                }
                return Poll::Ready(Ok(read));
            }
            if this.state.end.is_some() {
                let _ = Pin::new(&mut *this).poll_flush(cx); // an alert
                return Poll::Ready(this.state.check().map(|()| 0));
            }
            ready!(this.poll_receive(cx))?;
        }
    }
}

/// Written bytes are encrypted at once. They are sent by a flush, or when `MAX_UNSENT` would be exceeded.
impl<C: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let bytes = bytes.get(..MAX_UNSENT).unwrap_or(bytes);
        if self.state.unsent.len() + bytes.len() > MAX_UNSENT {
            ready!(self.poll_send(cx))?;
        }
        let before = self.state.unsent.len();
        self.encrypt(Write::Data(bytes))?;
        if self.state.unsent.len() == before && !bytes.is_empty() {
            return Poll::Ready(Err(ErrorKind::BrokenPipe.into())); // closed by both sides
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let _ = self.encrypt(Write::CloseNotify); // after an error the alert has closed it
        ready!(self.poll_send(cx))?;
        match ready!(Pin::new(&mut self.connection).poll_close(cx)) {
            Err(error) if error.kind() != ErrorKind::NotConnected => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        net::Ipv4Addr,
        sync::{Arc, Mutex},
        task::Waker,
    };

    use futures_rustls::{
        TlsAcceptor, TlsConnector,
        rustls::{AlertDescription, HandshakeKind, pki_types::ServerName},
    };
    use libp2p::{
        PeerId,
        futures::{
            AsyncReadExt, AsyncWriteExt,
            executor::{LocalPool, block_on},
            future::{BoxFuture, FutureExt, join, join_all},
            task::LocalSpawnExt,
        },
        identity::Keypair,
        tls::{make_client_config, make_server_config},
    };

    use super::*;
    use crate::program::net::security::tls::Tls;

    /// One direction of a connection in memory.
    #[derive(Default)]
    struct Wire {
        bytes: VecDeque<u8>,
        is_closed: bool,
        wakers: Vec<Waker>,
        /// How many bytes were ever written.
        written: usize,
        /// The position of a byte to corrupt.
        corrupted: Option<usize>,
    }

    /// One end of a connection in memory, which reads and writes pieces of pseudorandom sizes.
    struct Pipe {
        from: Arc<Mutex<Wire>>,
        to: Arc<Mutex<Wire>>,
        largest_piece: usize,
        calls: usize,
    }

    /// How many bytes a pipe holds.
    const CAPACITY: usize = 100_000;

    fn pipes(largest_piece: usize) -> (Pipe, Pipe) {
        let [there, back] = [(); 2].map(|()| Arc::new(Mutex::new(Wire::default())));
        let [from, to] = [&back, &there].map(Arc::clone);
        let one = Pipe { from, to, largest_piece, calls: 0 };
        (one, Pipe { from: there, to: back, largest_piece, calls: 0 })
    }

    impl Pipe {
        fn piece(&mut self, most: usize) -> usize {
            self.calls += 1;
            (1 + self.calls * 7919 % self.largest_piece).min(most)
        }
    }

    impl AsyncRead for Pipe {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            into: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            let most = self.piece(into.len());
            let mut wire = self.from.lock().unwrap();
            if wire.bytes.is_empty() && !wire.is_closed {
                wire.wakers.push(cx.waker().clone());
                return Poll::Pending;
            }
            wire.wakers.drain(..).for_each(Waker::wake);
            Poll::Ready(wire.bytes.read(&mut into[..most]))
        }
    }

    impl AsyncWrite for Pipe {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let most = self.piece(bytes.len());
            let mut wire = self.to.lock().unwrap();
            let most = most.min(CAPACITY - wire.bytes.len());
            if wire.is_closed {
                return Poll::Ready(Err(ErrorKind::BrokenPipe.into()));
            }
            if most == 0 {
                wire.wakers.push(cx.waker().clone());
                return Poll::Pending;
            }
            for &byte in &bytes[..most] {
                let is_corrupted = wire.corrupted == Some(wire.written);
                wire.bytes.push_back(if is_corrupted { byte ^ 0x55 } else { byte });
                wire.written += 1;
            }
            wire.wakers.drain(..).for_each(Waker::wake);
            Poll::Ready(Ok(most))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            let mut wire = self.to.lock().unwrap();
            wire.is_closed = true;
            wire.wakers.drain(..).for_each(Waker::wake);
            Poll::Ready(Ok(()))
        }
    }

    impl Drop for Pipe {
        fn drop(&mut self) {
            for wire in [&self.from, &self.to] {
                let mut wire = wire.lock().unwrap();
                wire.is_closed = true;
                wire.wakers.drain(..).for_each(Waker::wake);
            }
        }
    }

    trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
    impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

    type Ours = io::Result<(PeerId, Box<TlsStream<Pipe>>)>;
    type Handshake = BoxFuture<'static, Box<dyn Stream>>;

    fn no_name() -> ServerName<'static> {
        ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into())
    }

    async fn our_server(pipe: Pipe) -> Ours {
        Tls::new(&Keypair::generate_ed25519()).unwrap().accept(pipe).await
    }

    async fn our_client(pipe: Pipe) -> Ours {
        Tls::new(&Keypair::generate_ed25519()).unwrap().connect(pipe).await
    }

    /// rustls' buffered server, whose messages are split into small records.
    async fn buffered_server(pipe: Pipe) -> io::Result<futures_rustls::server::TlsStream<Pipe>> {
        let mut config = make_server_config(&Keypair::generate_ed25519()).unwrap();
        config.max_fragment_size = Some(100);
        TlsAcceptor::from(Arc::new(config)).accept(pipe).await
    }

    async fn buffered_client(pipe: Pipe) -> io::Result<futures_rustls::client::TlsStream<Pipe>> {
        let config = make_client_config(&Keypair::generate_ed25519(), None).unwrap();
        TlsConnector::from(Arc::new(config)).connect(no_name(), pipe).await
    }

    fn boxed<S: Stream + 'static>(stream: S) -> Box<dyn Stream> {
        Box::new(stream)
    }

    /// Sends `size` bytes, and meanwhile reads to the end; returns what was read.
    async fn exchange(handshake: Handshake, size: usize, largest_piece: usize) -> Vec<u8> {
        let (mut reader, mut writer) = handshake.await.split();
        let send = async {
            for (number, piece) in payload(size).chunks(largest_piece).enumerate() {
                writer.write_all(piece).await.unwrap();
                if number % 3 == 0 {
                    writer.flush().await.unwrap();
                }
            }
            writer.close().await.unwrap();
        };
        let mut received = Vec::new();
        let receive = async { reader.read_to_end(&mut received).await.unwrap() };
        join(send, receive).await;
        received
    }

    fn payload(size: usize) -> Vec<u8> {
        (0..size).map(|at| (at * at / 251) as u8).collect()
    }

    #[test]
    fn all_bytes_arrive_in_both_directions_in_pieces_of_any_size() {
        type Connect = fn(Pipe) -> Handshake;
        let ours: [Connect; 2] = [
            |pipe| our_server(pipe).map(|it| boxed(it.unwrap().1)).boxed(),
            |pipe| our_client(pipe).map(|it| boxed(it.unwrap().1)).boxed(),
        ];
        let buffered: [Connect; 2] = [
            |pipe| buffered_server(pipe).map(|it| boxed(it.unwrap())).boxed(),
            |pipe| buffered_client(pipe).map(|it| boxed(it.unwrap())).boxed(),
        ];
        for [server, client] in [[ours[0], buffered[1]], [buffered[0], ours[1]], ours] {
            for (largest_piece, size) in [(1, 20_000), (100, 300_000), (100_000, 3_000_000)] {
                let (one, other) = pipes(largest_piece);
                let ends = [server(one), client(other)]
                    .map(|handshake| exchange(handshake, size, largest_piece * 3));
                let received = block_on(join_all(ends));
                assert!(received.iter().all(|bytes| *bytes == payload(size)), "{largest_piece}");
            }
        }
    }

    async fn connected() -> (TlsStream<Pipe>, futures_rustls::client::TlsStream<Pipe>) {
        let (one, other) = pipes(100_000);
        let (server, client) = join(our_server(one), buffered_client(other)).await;
        (*server.unwrap().1, client.unwrap())
    }

    fn memory(stream: &TlsStream<Pipe>) -> [usize; 3] {
        let State { unread, records, .. } = &stream.state;
        [stream.incomplete.capacity(), unread.get_ref().capacity(), records.capacity()]
    }

    #[test]
    fn an_idle_stream_holds_no_buffers_and_an_incomplete_record_only_its_bytes() {
        block_on(async {
            let (mut server, mut client) = connected().await;
            let mut bytes = vec![0; 50_000];
            assert_eq!(memory(&server), [0; 3]);
            client.write_all(&bytes).await.unwrap();
            client.flush().await.unwrap();
            server.read_exact(&mut bytes).await.unwrap();
            server.write_all(&bytes).await.unwrap();
            server.flush().await.unwrap();
            client.read_exact(&mut bytes).await.unwrap();
            assert!(server.read(&mut bytes).now_or_never().is_none());
            assert_eq!(memory(&server), [0; 3]);

            client.write_all(b"a record").await.unwrap();
            client.flush().await.unwrap();
            let wire = Arc::clone(&server.connection.from);
            let rest = wire.lock().unwrap().bytes.split_off(9);
            for _ in 0..2 {
                assert!(server.read(&mut bytes).now_or_never().is_none());
                assert_eq!(memory(&server), [9, 0, 0]);
            }
            server.write_all(b"!").await.unwrap();
            server.flush().await.unwrap();
            wire.lock().unwrap().bytes.extend(rest);
            assert_eq!(server.read(&mut bytes).await.unwrap(), 8);
            assert!(bytes.starts_with(b"a record"));
            assert_eq!(memory(&server), [0; 3]);
        });
    }

    #[test]
    fn a_stalled_stream_keeps_little_more_memory_than_is_unsent() {
        block_on(async {
            let (mut bulk, mut client) = connected().await;
            for _ in 0..2 {
                bulk.write_all(&[7; MAX_UNSENT]).await.unwrap();
                bulk.flush().await.unwrap();
                client.read_exact(&mut [0; MAX_UNSENT]).await.unwrap();
            }
            let (mut stalled, mut reader) = connected().await;
            stalled.write_all(&[7; CAPACITY - 200]).await.unwrap();
            stalled.flush().now_or_never();
            stalled.write_all(&[7; 100]).await.unwrap();
            assert!(stalled.flush().now_or_never().is_none());
            let [.., kept] = memory(&stalled);
            let unsent = stalled.state.unsent.len();
            assert!(kept <= 2 * unsent, "{kept} for {unsent} unsent");
            let (mut received, flush) = ([0; CAPACITY - 100], stalled.flush());
            let (read, flushed) = join(reader.read_exact(&mut received), flush).await;
            assert!(read.is_ok() && flushed.is_ok() && received.ends_with(&[7]));
            assert_eq!(memory(&stalled), [0; 3]);
        });
    }

    #[test]
    fn writes_are_sent_together_when_they_are_flushed_or_are_too_many() {
        block_on(async {
            let (mut server, mut client) = connected().await;
            let written = |server: &TlsStream<Pipe>| server.connection.to.lock().unwrap().written;
            let before = written(&server);
            for _ in 0..3 {
                server.write_all(b"12345").await.unwrap();
            }
            assert_eq!(written(&server), before);
            server.flush().await.unwrap();
            assert_eq!(written(&server), before + 3 * (5 + 22));
            client.read_exact(&mut [0; 15]).await.unwrap();

            let mut large = vec![7; MAX_UNSENT + 1];
            let length = server.write(&large).await.unwrap();
            assert_eq!(length, MAX_UNSENT);
            assert_eq!(written(&server), before + 3 * (5 + 22));
            assert_eq!(server.write(b"!").await.unwrap(), 1);
            assert_eq!(written(&server), before + 3 * (5 + 22) + MAX_UNSENT + 4 * 22);
            server.flush().await.unwrap();
            client.read_exact(&mut large).await.unwrap();
            assert!(large.ends_with(&[7, b'!']));
        });
    }

    #[test]
    fn a_dialer_does_not_resume_sessions() {
        block_on(async {
            let dialer = Tls::new(&Keypair::generate_ed25519()).unwrap();
            let issues_tickets =
                Arc::new(make_server_config(&Keypair::generate_ed25519()).unwrap());
            for _ in 0..2 {
                let (one, other) = pipes(100_000);
                let accept = TlsAcceptor::from(Arc::clone(&issues_tickets)).accept(one);
                let (server, client) = join(accept, dialer.clone().connect(other)).await;
                let (mut server, mut client) = (server.unwrap(), client.unwrap().1);
                server.write_all(b"after the tickets").await.unwrap();
                server.flush().await.unwrap();
                client.read_exact(&mut [0; 17]).await.unwrap();
                assert_eq!(server.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
            }
        });
    }

    #[test]
    fn key_updates_of_the_peer_are_followed() {
        block_on(async {
            let (mut server, mut client) = connected().await;
            let mut bytes = [0; 5];
            for round in 0..100_u8 {
                client.get_mut().1.refresh_traffic_keys().unwrap();
                client.write_all(&[round; 5]).await.unwrap();
                client.flush().await.unwrap();
                server.read_exact(&mut bytes).await.unwrap();
                server.write_all(&bytes).await.unwrap();
                server.flush().await.unwrap();
                client.read_exact(&mut bytes).await.unwrap();
                assert_eq!(bytes, [round; 5]);
            }
            assert_eq!(memory(&server), [0; 3]);
            // KeyUpdates without data are treated as an attack.
            for _ in 0..33 {
                client.get_mut().1.refresh_traffic_keys().unwrap();
                client.flush().await.unwrap();
            }
            let error = server.read(&mut bytes).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidData);
        });
    }

    #[test]
    fn each_direction_closes_on_its_own_and_a_cut_connection_is_an_error() {
        block_on(async {
            let (mut server, mut client) = connected().await;
            let mut bytes = Vec::new();
            client.write_all(b"last").await.unwrap();
            client.close().await.unwrap();
            server.read_to_end(&mut bytes).await.unwrap();
            assert_eq!(bytes, b"last");
            assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
            server.write_all(b"answer").await.unwrap();
            for _ in 0..2 {
                server.close().await.unwrap();
            }
            client.read_to_end(&mut bytes).await.unwrap();
            assert_eq!(bytes, b"lastanswer");
            let error = server.write(b"late").await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BrokenPipe);

            let (mut server, mut client) = connected().await;
            client.write_all(b"last").await.unwrap();
            client.flush().await.unwrap();
            drop(client);
            let error = server.read_to_end(&mut bytes).await.unwrap_err();
            assert_eq!(bytes, b"lastanswerlast");
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
            assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
        });
    }

    fn rustls_error(error: &io::Error) -> &rustls::Error {
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        error.get_ref().unwrap().downcast_ref().unwrap()
    }

    #[test]
    fn a_record_that_cannot_be_decrypted_is_an_error_and_is_answered_with_an_alert() {
        block_on(async {
            let (mut server, client) = connected().await;
            let (mut pipe, mut client) = client.into_inner();
            pipe.write_all(b"\x17\x03\x03\0\x14twenty bytes of data").await.unwrap();
            for _ in 0..2 {
                let error = server.read(&mut [0; 99]).await.unwrap_err();
                assert_eq!(rustls_error(&error), &rustls::Error::DecryptError);
            }
            let error = server.write(b"!").await.unwrap_err();
            assert_eq!(rustls_error(&error), &rustls::Error::DecryptError);
            server.close().await.unwrap();
            let mut answer = Vec::new();
            pipe.read_to_end(&mut answer).await.unwrap();
            assert_eq!(answer.len(), 2 + 22);
            client.read_tls(&mut &answer[..]).unwrap();
            let alert = rustls::Error::AlertReceived(AlertDescription::BadRecordMac);
            assert_eq!(client.process_new_packets().unwrap_err(), alert);
        });
    }

    #[test]
    fn a_client_that_does_not_speak_tls_is_an_error_and_is_answered_with_an_alert() {
        block_on(async {
            let (one, mut other) = pipes(1);
            other.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
            let config = make_server_config(&Keypair::generate_ed25519()).unwrap();
            let session = UnbufferedServerConnection::new(Arc::new(config)).unwrap();
            let result = TlsStream::handshake(Either::Left(session), one).await;
            let error = result.map(drop).unwrap_err();
            assert!(matches!(rustls_error(&error), rustls::Error::InvalidMessage(_)), "{error:?}");
            let mut answer = Vec::new();
            let _ = other.read_to_end(&mut answer).await;
            assert_eq!(answer.first(), Some(&0x15));
        });
    }

    #[test]
    fn a_corrupted_byte_causes_no_panic_and_changes_nothing_that_is_read() {
        for corrupted in (0..4000).step_by(13) {
            let (one, other) = pipes(1000);
            for (pipe, at) in [(&one, corrupted), (&other, corrupted + 6)] {
                pipe.to.lock().unwrap().corrupted = Some(at);
            }
            let mut pool = LocalPool::new();
            let ends: [BoxFuture<'static, Ours>; 2] =
                [our_server(one).boxed(), our_client(other).boxed()];
            for end in ends {
                let task = async move {
                    let Ok((_, mut stream)) = end.await else { return };
                    let _ = stream.write_all(&payload(2000)).await;
                    let _ = stream.flush().await;
                    let mut received = Vec::new();
                    let _ = (&mut stream).take(2000).read_to_end(&mut received).await;
                    let _ = stream.close().await;
                    assert!(payload(2000).starts_with(&received));
                };
                pool.spawner().spawn_local(task).unwrap();
            }
            pool.run_until_stalled();
        }
    }
}
