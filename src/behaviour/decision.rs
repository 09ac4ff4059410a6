//! Access checks whose answers come later: [`Permission::Later`].

use std::{future::pending, pin::pin};

use futures_timer::Delay;
use libp2p::{
    futures::future::{Either, select},
    swarm::ConnectionId,
};

use super::hop::Reply;
use crate::{access::Permission, relay::AccessCheck};

/// An access check and its answer, which comes at once.
pub(super) type Decided = (AccessCheck<ConnectionId, Reply>, Permission);

/// Awaits the answer to a check until the deadline; then it is [`Permission::Deny`]. `None`: the client is gone.
pub(super) async fn decide(
    mut check: AccessCheck<ConnectionId, Reply>,
    mut permission: Permission,
    deadline: Delay,
) -> Option<Decided> {
    let answer = async {
        while let Permission::Later(answer) = permission {
            permission = answer.await;
        }
        permission
    };
    let gone = async {
        match &mut check {
            AccessCheck::Request(request, _) => request.reply.0.cancellation().await,
            _ => pending().await,
        }
    };
    let permission = match select(pin!(gone), select(pin!(answer), deadline)).await {
        Either::Left(_) => return None,
        Either::Right((Either::Left((permission, _)), _)) => permission,
        Either::Right((Either::Right(_), _)) => {
            log::debug!("access denied: no answer within the time limit");
            Permission::Deny
        }
    };
    Some((check, permission))
}
