//! The interface of optional parts that run in the main loop besides the node.

use std::{
    path::Path,
    task::{Context, Poll},
};

use super::node::{Node, NodeEvent};

/// The files of the certificate and of its key, if they are set.
pub type CertificateFiles<'a> = (Option<&'a Path>, Option<&'a Path>);

/// A component of the program that the main loop polls.
pub trait Component: Send {
    /// Ready when [`on_due`](Self::on_due) is to be called. Wakes the task as a future does.
    fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// Runs what is due and schedules the next time.
    fn on_due(&mut self, node: &mut Node);

    /// Handles an event of the node.
    fn on_event(&mut self, _event: &NodeEvent) {}

    /// Handles a reload of the settings on SIGHUP, which name these files.
    fn on_reload(&mut self, _files: CertificateFiles<'_>, _node: &mut Node) {}
}

/// Ready with the index of the first component that is due.
pub fn poll_due(components: &mut [Box<dyn Component>], cx: &mut Context<'_>) -> Poll<usize> {
    let due = components.iter_mut().position(|component| component.poll_due(cx).is_ready());
    due.map_or(Poll::Pending, Poll::Ready)
}
