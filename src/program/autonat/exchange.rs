//! One conversation: the client's question read, the client dialed, the answer.
//!
//! Refused is not unreachable. Where the relay may not or cannot dial, it says so, and the client
//! asks somebody else; "cannot be reached" is said only of an address that was dialed.

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
    dial::{Dialed, Dialer},
    gate::{Gate, Refused},
    messages::{self, v1, v2},
    target::{self, Client},
};
use crate::{address::ClientPrefix, program::net::multiaddr::multiaddr};

/// How long a client may take to ask, and to read the answer.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// What all conversations share.
pub struct Server {
    gate: Mutex<Gate>,
    dialer: Dialer,
    private: bool,
}

/// A dial that was let begin.
struct Permit<'a> {
    server: &'a Server,
    at: ClientPrefix,
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.server.gate().ended(self.at);
    }
}

impl Server {
    /// `private`: whether addresses that are not global are dialed, too.
    pub fn new(private: bool) -> anyhow::Result<Self> {
        Ok(Self { gate: Mutex::new(Gate::new(Instant::now())), dialer: Dialer::new()?, private })
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, client: Client) -> Result<Permit<'_>, Refused> {
        let at = client.ip.into();
        self.gate().begin(client.peer, at, Instant::now())?;
        Ok(Permit { server: self, at })
    }

    /// A connection to the client, or none.
    async fn dial(&self, client: Client, to: SocketAddr) -> Option<Dialed> {
        let dialed = self.dialer.dial(client.peer, to).await;
        match &dialed {
            Ok(_) => log::debug!("autonat: peer {} can be reached at {to}", client.peer),
            Err(error) => {
                log::debug!("autonat: peer {} cannot be reached at {to}: {error}", client.peer);
            }
        }
        dialed.ok()
    }

    async fn answer_2(&self, client: Client, asked: v2::DialRequest) -> v2::DialResponse {
        let refused = |status| v2::DialResponse { status, ..v2::DialResponse::default() };
        let target = target::of_version_2(&asked.addrs, client, self.private);
        let Some((index, to)) = target else {
            return refused(v2::E_DIAL_REFUSED);
        };
        let _permit = match self.begin(client) {
            Ok(permit) => permit,
            Err(why) => {
                log::debug!("autonat: peer {} is not dialed: {why}", client.peer);
                return refused(v2::E_REQUEST_REJECTED);
            }
        };
        let dial_status = match self.dial(client, to).await {
            None => v2::E_DIAL_ERROR,
            Some(mut dialed) => {
                let proved = dialed.prove(asked.nonce).await;
                dialed.close().await;
                proved.map_or(v2::E_DIAL_BACK_ERROR, |()| v2::OK)
            }
        };
        v2::DialResponse {
            status: v2::OK,
            addr_idx: index as u32, // one of fifty
            dial_status,
        }
    }

    async fn answer_1(&self, client: Client, asked: v1::Message) -> v1::DialResponse {
        let failed = |status, text: &str| v1::DialResponse {
            status: Some(status),
            status_text: Some(text.into()),
            addr: None,
        };
        let dial = asked.dial.filter(|_| asked.r#type == Some(v1::DIAL));
        let Some(peer) = dial.and_then(|dial| dial.peer) else {
            return failed(v1::E_BAD_REQUEST, "no request to dial");
        };
        let named = peer.id.and_then(|id| PeerId::from_bytes(&id).ok());
        if named != Some(client.peer) {
            return failed(v1::E_BAD_REQUEST, "not the peer that asks");
        }
        let targets = target::of_version_1(&peer.addrs, client, self.private);
        let mut response = failed(v1::E_DIAL_REFUSED, "no address that this relay dials");
        for to in targets {
            let _permit = match self.begin(client) {
                Ok(permit) => permit,
                Err(why) => {
                    log::debug!("autonat: peer {} is not dialed: {why}", client.peer);
                    return failed(v1::E_DIAL_REFUSED, &why.to_string());
                }
            };
            if let Some(dialed) = self.dial(client, to).await {
                dialed.close().await;
                return v1::DialResponse {
                    status: Some(v1::OK),
                    status_text: None,
                    addr: Some(multiaddr(to).to_vec()),
                };
            }
            response = failed(v1::E_DIAL_ERROR, "nobody answers");
        }
        response
    }
}

/// Holds it, in version 2 or 1, to its end. A stream that fails is dropped, which resets it.
pub async fn hold(
    server: Arc<Server>,
    client: Client,
    version_2: bool,
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
) {
    let held = match version_2 {
        true => version_two(&server, client, &mut stream).await,
        false => version_one(&server, client, &mut stream).await,
    };
    if let Err(error) = held {
        log::debug!("autonat: peer {}: {error}", client.peer);
    }
}

async fn version_two(
    server: &Server,
    client: Client,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> io::Result<()> {
    let asked: v2::Message = timeout(READ_TIMEOUT, messages::read(stream)).await?;
    let asked = asked.dial_request.ok_or(io::ErrorKind::InvalidData)?;
    let answer = v2::Message {
        dial_request: None,
        dial_response: Some(server.answer_2(client, asked).await),
    };
    timeout(ANSWER_TIMEOUT, messages::write_and_close(stream, &answer)).await
}

async fn version_one(
    server: &Server,
    client: Client,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> io::Result<()> {
    let asked: v1::Message = timeout(READ_TIMEOUT, messages::read(stream)).await?;
    let answer = v1::Message {
        r#type: Some(v1::DIAL_RESPONSE),
        dial: None,
        dial_response: Some(server.answer_1(client, asked).await),
    };
    timeout(ANSWER_TIMEOUT, messages::write_and_close(stream, &answer)).await
}
