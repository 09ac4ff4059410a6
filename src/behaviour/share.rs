//! A circuit's share of the link, as the circuit meets it: how much it may carry now, and the wait
//! for its next turn. What is decided is decided in [`crate::relay::bandwidth`].

use std::{
    task::{Context, Poll, ready},
    time::Instant,
};

use futures_timer::Delay;
use libp2p::futures::FutureExt;

use crate::relay::bandwidth::{Ends, Link};

/// One circuit's share of it, for both of its directions.
#[derive(Debug)]
pub(crate) struct Share {
    link: Link,
    ends: Ends,
    /// Until its next turn.
    wait: Option<Delay>,
    odd_turn: bool,
}

impl Share {
    /// The share of a circuit between these two.
    pub(crate) fn new(link: Link, ends: Ends) -> Self {
        Self { link, ends, wait: None, odd_turn: false }
    }

    /// Whether it is the target's turn to send first: they take turns, too.
    pub(crate) fn target_first(&self) -> bool {
        self.odd_turn
    }

    /// How many bytes may be carried now; `None`: as many as there are.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<usize>> {
        if let Some(wait) = &mut self.wait {
            ready!(wait.poll_unpin(cx));
            self.turn_comes();
        }
        Poll::Ready(self.link.bandwidth().piece(self.ends))
    }

    /// So many bytes were carried, under a cap.
    pub(crate) fn carried(&mut self, bytes: usize) {
        let now = Instant::now();
        let next = self.link.bandwidth().carried(self.ends, bytes, now);
        if let Some(next) = next {
            self.wait = Some(Delay::new(next.saturating_duration_since(now)));
            self.odd_turn = !self.odd_turn;
        }
    }

    fn turn_comes(&mut self) {
        if self.wait.take().is_some() {
            self.link.bandwidth().waited(self.ends);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.turn_comes();
    }
}
