//! One request, from its stream to the answer: read it, dial the client, report the result.
//!
//! A refusal does not mean that the client is unreachable: when the relay may not or cannot dial, it refuses, and the client
//! asks another server. Only an address that was dialed is reported as unreachable.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_std::io::timeout;
use libp2p::{
    PeerId,
    futures::{AsyncRead, AsyncWrite},
};

use super::{
    dial::{DialedConnection, Dialer},
    dial_limits::DialLimits,
    messages::{self, v1, v2},
    target::{self, Client},
};
use crate::{
    address::ClientPrefix,
    program::net::{multiaddr::multiaddr, protobuf},
};

/// How long a client may take to send its request, and to read the answer.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// What all exchanges share.
pub struct Server {
    limits: Mutex<DialLimits>,
    dialer: Dialer,
    private: bool,
}

/// A permit for one dial, released when it is dropped.
struct DialPermit<'a> {
    server: &'a Server,
    prefix: ClientPrefix,
}

impl Drop for DialPermit<'_> {
    fn drop(&mut self) {
        self.server.limits().release(self.prefix);
    }
}

impl Server {
    /// `private`: whether addresses that are not global are dialed, too.
    pub fn new(private: bool) -> anyhow::Result<Self> {
        let limits = Mutex::new(DialLimits::new());
        Ok(Self { limits, dialer: Dialer::new()?, private })
    }

    fn limits(&self) -> MutexGuard<'_, DialLimits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Acquires the permit to dial a client. The error is a few words.
    fn acquire(&self, client: Client) -> Result<DialPermit<'_>, String> {
        let prefix = client.ip.into();
        if let Err(exceeded) = self.limits().acquire(client.peer, prefix, Instant::now()) {
            log::debug!("autonat: not dialing peer {}: {exceeded}", client.peer);
            return Err(exceeded.to_string());
        }
        Ok(DialPermit { server: self, prefix })
    }

    /// Dials a client; `None` if it cannot be reached.
    async fn dial(&self, client: Client, to: SocketAddr) -> Option<DialedConnection> {
        let dialed = self.dialer.dial(client.peer, to).await;
        match &dialed {
            Ok(_) => log::debug!("autonat: peer {} reached at {to}", client.peer),
            Err(error) => {
                log::debug!("autonat: peer {} cannot be reached at {to}: {error}", client.peer);
            }
        }
        dialed.ok()
    }

    async fn answer_v2(&self, client: Client, request: v2::DialRequest) -> v2::DialResponse {
        let refused = |status| v2::DialResponse { status, ..v2::DialResponse::default() };
        let target = target::of_version_2(&request.addrs, client, self.private);
        let Some((index, to)) = target else {
            return refused(v2::E_DIAL_REFUSED);
        };
        let Ok(_permit) = self.acquire(client) else {
            return refused(v2::E_REQUEST_REJECTED);
        };
        let dial_status = match self.dial(client, to).await {
            None => v2::E_DIAL_ERROR,
            Some(mut dialed) => {
                let result = dialed.dial_back(request.nonce).await;
                dialed.close().await;
                result.map_or(v2::E_DIAL_BACK_ERROR, |()| v2::OK)
            }
        };
        v2::DialResponse { status: v2::OK, addr_idx: index as u32, dial_status }
    }

    async fn answer_v1(&self, client: Client, request: v1::Message) -> v1::DialResponse {
        let failed = |status, text: &str| v1::DialResponse {
            status: Some(status),
            status_text: Some(text.into()),
            addr: None,
        };
        let dial = request.dial.filter(|_| request.r#type == Some(v1::DIAL));
        let Some(peer) = dial.and_then(|dial| dial.peer) else {
            return failed(v1::E_BAD_REQUEST, "not a dial request");
        };
        let named = peer.id.and_then(|id| PeerId::from_bytes(&id).ok());
        if named != Some(client.peer) {
            return failed(v1::E_BAD_REQUEST, "not the peer that asks");
        }
        let targets = target::of_version_1(&peer.addrs, client, self.private);
        let mut response = failed(v1::E_DIAL_REFUSED, "no address that this relay dials");
        for to in targets {
            let _permit = match self.acquire(client) {
                Ok(permit) => permit,
                Err(exceeded) => return failed(v1::E_DIAL_REFUSED, &exceeded),
            };
            if let Some(dialed) = self.dial(client, to).await {
                dialed.close().await;
                let addr = Some(multiaddr(to).to_vec());
                return v1::DialResponse { status: Some(v1::OK), status_text: None, addr };
            }
            response = failed(v1::E_DIAL_ERROR, "no answer");
        }
        response
    }
}

/// Serves one stream of version 2 or 1 to its end. If an error occurs, drops it, which resets it.
pub async fn serve(
    server: Arc<Server>,
    client: Client,
    is_version_2: bool,
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
) {
    let served = async {
        if is_version_2 {
            let request: v2::Message = timeout(READ_TIMEOUT, protobuf::read(&mut stream)).await?;
            let request = request.dial_request.ok_or(io::ErrorKind::InvalidData)?;
            let dial_response = Some(server.answer_v2(client, request).await);
            let answer = v2::Message { dial_request: None, dial_response };
            timeout(ANSWER_TIMEOUT, messages::write_and_close(&mut stream, &answer)).await
        } else {
            let request: v1::Message = timeout(READ_TIMEOUT, protobuf::read(&mut stream)).await?;
            let dial_response = Some(server.answer_v1(client, request).await);
            let answer = v1::Message { r#type: Some(v1::DIAL_RESPONSE), dial: None, dial_response };
            timeout(ANSWER_TIMEOUT, messages::write_and_close(&mut stream, &answer)).await
        }
    };
    if let Err(error) = served.await {
        log::debug!("autonat: stream of peer {} failed: {error}", client.peer);
    }
}
