//! A time limit on a future, without a runtime.

use std::{io, time::Duration};

use futures_timer::Delay;
use libp2p::futures::future::{self, Either, Future};

/// What `future` yields, unless it takes longer than `limit`.
pub(crate) async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> io::Result<T> {
    let future = std::pin::pin!(future);
    match future::select(future, Delay::new(limit)).await {
        Either::Left((value, _)) => Ok(value),
        Either::Right(((), _)) => Err(io::ErrorKind::TimedOut.into()),
    }
}
