//! The trusted proxies in front of the relay, and reading the client's address from their PROXY protocol headers.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use async_lock::{Semaphore, SemaphoreGuardArc};
use async_std::future::timeout;
use ipnet::IpNet;
use libp2p::futures::AsyncReadExt;

use super::{
    limits::Denied,
    proxy_header::{self, HeaderError},
};
use crate::program::net::socket::Socket;

/// How long a header may take. A proxy sends it in its first packet; this allows for retransmissions.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// The subnets of proxies, and a semaphore for connections that wait for a header. Clones share both.
#[derive(Clone, Debug)]
pub struct Proxies {
    subnets: Arc<RwLock<Vec<IpNet>>>,
    waiting: Arc<Semaphore>,
}

impl Proxies {
    /// No proxies; at most `max_waiting` of their connections may wait for a header at a time.
    pub fn new(max_waiting: usize) -> Self {
        Self { subnets: Arc::default(), waiting: Arc::new(Semaphore::new(max_waiting)) }
    }

    /// Acquires a permit to wait for a header, released when it is dropped.
    ///
    /// # Errors
    ///
    /// When `max_waiting` connections wait already.
    pub fn acquire(&self) -> Result<SemaphoreGuardArc, Denied> {
        self.waiting.try_acquire_arc().ok_or(Denied::Handshakes)
    }

    /// Replaces the subnets of proxies.
    pub fn set(&self, subnets: Vec<IpNet>) {
        *self.subnets.write().unwrap_or_else(PoisonError::into_inner) = subnets;
    }

    /// Whether a proxy has this address: its connections begin with a header.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        let subnets = self.subnets.read().unwrap_or_else(PoisonError::into_inner);
        subnets.iter().any(|subnet| subnet.contains(&ip))
    }
}

/// Reads the header of a proxy's connection and returns the client's address; `None` if the connection is the proxy's
/// own. Leaves what follows the header unread.
///
/// # Errors
///
/// [`Denied::ProxyHeader`] when there is no valid header; `UnexpectedEof` when the connection ends without a byte.
pub async fn read_client(stream: &mut Socket) -> io::Result<Option<SocketAddr>> {
    let header = timeout(HEADER_TIMEOUT, read_header(stream)).await;
    header.unwrap_or_else(|_| Err(denied(HeaderError::TimedOut)))
}

async fn read_header(stream: &mut Socket) -> io::Result<Option<SocketAddr>> {
    let mut bytes = [0; proxy_header::MAX_LENGTH];
    let mut read = 0;
    loop {
        // 1. Peek, so that only bytes of the header are taken out of the stream.
        let peeked = stream.peek(bytes.get_mut(read..).unwrap_or_default()).await?;
        if peeked == 0 {
            return Err(match read {
                0 => io::ErrorKind::UnexpectedEof.into(), // a proxy's health check
                _ => denied(HeaderError::Truncated),
            });
        }
        // 2. Parse, and take what belongs to the header.
        let arrived = bytes.get(..read + peeked).unwrap_or_default();
        let header = proxy_header::parse(arrived).map_err(denied)?;
        let end = header.map_or(arrived.len(), |header| header.length);
        stream.read_exact(bytes.get_mut(read..end).unwrap_or_default()).await?;
        read = end;
        if let Some(header) = header {
            return Ok(header.client);
        }
    }
}

fn denied(error: HeaderError) -> io::Error {
    Denied::ProxyHeader(error).into()
}
