//! A running [`Node`] of the library: closures are run on it, and its events are received.

use libp2p::{Multiaddr, identity::Keypair};
use relaylet::{Config, ConfigError, Event, Node, NodeEvent};
use tokio::sync::{mpsc, oneshot};

use super::{Client, Security, permits, source_and_target_at, tcp_port, within};

pub type Change = Box<dyn FnOnce(&mut Config) + Send>;
type Closure = Box<dyn FnOnce(&mut Node) + Send>;

/// A node that runs in a task.
pub struct RunningNode {
    address: Multiaddr,
    events: mpsc::UnboundedReceiver<Event>,
    closures: mpsc::UnboundedSender<Closure>,
}

impl RunningNode {
    pub async fn start(config: Config) -> Self {
        permits::acquire();
        let mut node =
            Node::new(Keypair::generate_ed25519(), config).expect("a valid configuration");
        let listen = "/ip4/127.0.0.1/tcp/0".parse().unwrap();
        node.listen_on(listen).expect("a port is free");
        let address = within(async {
            loop {
                if let NodeEvent::Listening(address) = node.next().await {
                    return address;
                }
            }
        })
        .await;
        let address = address.with_p2p(node.peer_id()).unwrap();
        let (sender, events) = mpsc::unbounded_channel();
        let (closures, mut received) = mpsc::unbounded_channel::<Closure>();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    event = node.next() => {
                        if let NodeEvent::Relay(event) = event {
                            let _ = sender.send(event);
                        }
                    }
                    Some(closure) = received.recv() => closure(&mut node),
                }
            }
        });
        Self { address, events, closures }
    }

    /// The TCP port that it listens on.
    pub fn port(&self) -> u16 {
        tcp_port(&self.address)
    }

    pub async fn connect(&self, keypair: Keypair) -> Client {
        Client::connect_as(keypair, &self.address, Security::Noise).await
    }

    pub async fn connect_new(&self) -> Client {
        Client::connect_to(&self.address).await
    }

    /// Two clients, the second of which holds a slot.
    pub async fn source_and_target(&self) -> (Client, Client) {
        source_and_target_at(&self.address).await
    }

    pub async fn with_node<T: Send + 'static>(
        &self,
        closure: impl FnOnce(&mut Node) -> T + Send + 'static,
    ) -> T {
        let (sender, result) = oneshot::channel();
        let closure = Box::new(|node: &mut Node| _ = sender.send(closure(node)));
        assert!(self.closures.send(closure).is_ok(), "the node runs");
        within(result).await.expect("the node runs")
    }

    /// Applies this change to its configuration.
    pub async fn change(
        &self,
        change: impl FnOnce(&mut Config) + Send + 'static,
    ) -> Result<(), ConfigError> {
        self.with_node(|node| {
            let mut config = node.relay().config().clone();
            change(&mut config);
            let before = node.relay().config().clone();
            let changed = node.set_config(config);
            assert!(changed.is_ok() || *node.relay().config() == before);
            changed
        })
        .await
    }

    /// Waits for an event from which `wanted` returns something.
    pub async fn until<T>(&mut self, mut wanted: impl FnMut(Event) -> Option<T>) -> T {
        within(async {
            loop {
                let event = self.events.recv().await.expect("the node runs");
                if let Some(found) = wanted(event) {
                    return found;
                }
            }
        })
        .await
    }
}
