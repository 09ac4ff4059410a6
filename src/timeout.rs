//! A time limit on a future, without a runtime.

use std::{io, time::Duration};

use futures_timer::Delay;
use libp2p::futures::future::{self, Either, Future};

/// What `future` yields, unless it takes longer than `limit`.
///
/// The clock runs only for what has to be waited for: each timer wakes a thread twice.
pub(crate) async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> io::Result<T> {
    let mut future = std::pin::pin!(future);
    if let Some(value) = future::poll_immediate(future.as_mut()).await {
        return Ok(value);
    }
    match future::select(future, Delay::new(limit)).await {
        Either::Left((value, _)) => Ok(value),
        Either::Right(((), _)) => Err(io::ErrorKind::TimedOut.into()),
    }
}
