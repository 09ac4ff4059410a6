//! The proxies in front of the relay that are believed when they say whose connection they bring.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_std::{future::timeout, io::ReadExt, net::TcpStream};
use ipnet::IpNet;

use super::{
    limits::Denied,
    proxy_header::{self, NoHeader},
};

/// How long a header may take. A proxy has it in its first packet; this leaves time to send that
/// again.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// The subnets that proxies are in, and how many of their connections wait for a header. Clones
/// share both.
#[derive(Clone, Debug)]
pub struct Proxies {
    subnets: Arc<RwLock<Vec<IpNet>>>,
    introductions: Arc<AtomicUsize>,
    most_introductions: usize,
}

/// A connection's place among those that wait for a header, given back when it is dropped.
#[derive(Debug)]
pub struct Introduction(Arc<AtomicUsize>);

impl Drop for Introduction {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Proxies {
    /// No proxies yet; when there are, so many of their connections may wait for a header.
    pub fn new(most_introductions: usize) -> Self {
        Self { subnets: Arc::default(), introductions: Arc::default(), most_introductions }
    }

    /// A place to wait for a header.
    ///
    /// # Errors
    ///
    /// When as many wait as may.
    pub fn introduce(&self) -> Result<Introduction, Denied> {
        let one_more = |waiting: usize| (waiting < self.most_introductions).then_some(waiting + 1);
        self.introductions
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .map(|_| Introduction(Arc::clone(&self.introductions)))
            .map_err(|_| Denied::Handshakes)
    }

    /// From now on the proxies are in these.
    pub fn set(&self, subnets: Vec<IpNet>) {
        *self.subnets.write().unwrap_or_else(PoisonError::into_inner) = subnets;
    }

    /// Whether a connection from here has a header in front.
    pub fn include(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        let subnets = self.subnets.read().unwrap_or_else(PoisonError::into_inner);
        subnets.iter().any(|subnet| subnet.contains(&ip))
    }
}

/// Whose connection a proxy brings, `None` for its own. What follows the header is left unread.
///
/// # Errors
///
/// When there is no header ([`Denied::NoHeader`]), or not even the first byte of one.
pub async fn client_of(mut stream: &TcpStream) -> io::Result<Option<SocketAddr>> {
    let header = timeout(HEADER_TIMEOUT, read_header(&mut stream)).await;
    header.unwrap_or_else(|_| Err(denied(NoHeader::Late)))
}

#[expect(
    clippy::indexing_slicing,
    reason = "nothing is read beyond the buffer, and a header is no longer than what it was found in"
)]
async fn read_header(stream: &mut &TcpStream) -> io::Result<Option<SocketAddr>> {
    let mut bytes = [0; proxy_header::LONGEST];
    let mut read = 0;
    loop {
        // Looked at first: only what belongs to the header is taken out of the stream.
        let there = stream.peek(&mut bytes[read..]).await?;
        if there == 0 {
            return Err(match read {
                0 => io::ErrorKind::UnexpectedEof.into(), // whether we are there, asks a health check
                _ => denied(NoHeader::Ended),
            });
        }
        let header = proxy_header::parse(&bytes[..read + there]).map_err(denied)?;
        let until = header.map_or(read + there, |header| header.length);
        stream.read_exact(&mut bytes[read..until]).await?;
        read = until;
        if let Some(header) = header {
            return Ok(header.client);
        }
    }
}

fn denied(why: NoHeader) -> io::Error {
    Denied::NoHeader(why).into()
}
