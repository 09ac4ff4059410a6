//! The relay as a library, running: a node that takes orders, and tells what happens.

use libp2p::{Multiaddr, identity::Keypair};
use relaylet::{Config, ConfigError, Event, Node, NodeEvent};
use tokio::sync::{mpsc, oneshot};

use super::{Client, Security, tcp_port, turn, within};

pub type Change = Box<dyn FnOnce(&mut Config) + Send>;
type Order = Box<dyn FnOnce(&mut Node) + Send>;

/// A node that runs, and takes orders.
pub struct Running {
    address: Multiaddr,
    events: mpsc::UnboundedReceiver<Event>,
    orders: mpsc::UnboundedSender<Order>,
}

impl Running {
    pub async fn start(config: Config) -> Self {
        turn::wait();
        let mut node = Node::new(Keypair::generate_ed25519(), config).expect("it makes sense");
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
        let (tell, events) = mpsc::unbounded_channel();
        let (orders, mut ordered) = mpsc::unbounded_channel::<Order>();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    event = node.next() => {
                        if let NodeEvent::Relay(event) = event {
                            let _ = tell.send(event);
                        }
                    }
                    Some(order) = ordered.recv() => order(&mut node),
                }
            }
        });
        Self { address, events, orders }
    }

    /// The TCP port that it listens on.
    pub fn port(&self) -> u16 {
        tcp_port(&self.address)
    }

    pub async fn connect(&self, keypair: Keypair) -> Client {
        Client::connect_as(keypair, &self.address, Security::Noise).await
    }

    pub async fn connect_somebody(&self) -> Client {
        self.connect(Keypair::generate_ed25519()).await
    }

    pub async fn order<T: Send + 'static>(
        &self,
        order: impl FnOnce(&mut Node) -> T + Send + 'static,
    ) -> T {
        let (done, result) = oneshot::channel();
        let order = Box::new(|node: &mut Node| _ = done.send(order(node)));
        assert!(self.orders.send(order).is_ok(), "the node runs");
        within(result).await.expect("the node runs")
    }

    /// Gives it a configuration that differs so from the one it has.
    pub async fn change(
        &self,
        change: impl FnOnce(&mut Config) + Send + 'static,
    ) -> Result<(), ConfigError> {
        self.order(|node| {
            let mut config = node.relay().config().clone();
            change(&mut config);
            let before = node.relay().config().clone();
            let changed = node.set_config(config);
            assert!(changed.is_ok() || *node.relay().config() == before);
            changed
        })
        .await
    }

    /// Waits for an event.
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
