//! A virtual network: network namespaces on one switch, whose cables can be unplugged and lose packets.

use std::{
    ffi::OsString,
    fs::File,
    net::Ipv4Addr,
    os::fd::AsFd,
    process::{self, Command},
    sync::atomic::{AtomicUsize, Ordering},
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{Relay, command};

/// How many networks this process has created.
static CREATED: AtomicUsize = AtomicUsize::new(0);

/// A switch with its hosts; deleted when dropped.
pub struct Network {
    name: String,
    hosts: Vec<String>,
    addresses: Addresses,
}

/// Which addresses the hosts of a network have.
#[derive(Clone, Copy)]
enum Addresses {
    /// Private ones: 10.0.0.1 and so on.
    Private,
    /// Global ones, each in a /24 of its own: 45.0.1.1, 45.0.2.1.
    Global,
}

/// A host on a network, in a namespace of its own.
#[derive(Clone)]
pub struct Host {
    namespace: String,
    switch: String,
    /// The switch's end of its cable.
    port: String,
    pub address: Ipv4Addr,
}

impl Network {
    /// Creates a network with private addresses.
    ///
    /// # Panics
    ///
    /// Without root or without the tools.
    pub fn new() -> Self {
        Self::with(Addresses::Private)
    }

    /// As [`Network::new`], with global addresses.
    pub fn of_global_addresses() -> Self {
        Self::with(Addresses::Global)
    }

    fn with(addresses: Addresses) -> Self {
        let number = CREATED.fetch_add(1, Ordering::Relaxed);
        let name = format!("relaylet-{}-{number}", process::id());
        let network = Self { name, hosts: Vec::new(), addresses };
        ip(&["netns", "add", &network.name]);
        ip(&["-n", &network.name, "link", "add", "switch", "type", "bridge"]);
        ip(&["-n", &network.name, "link", "set", "switch", "up"]);
        network
    }

    /// Adds a host.
    pub fn host(&mut self) -> Host {
        let number = self.hosts.len() + 1;
        let (address, prefix) = match self.addresses {
            Addresses::Private => (Ipv4Addr::new(10, 0, 0, number as u8), 24),
            Addresses::Global => (Ipv4Addr::new(45, 0, number as u8, 1), 8),
        };
        let host = Host {
            namespace: format!("{}-{number}", self.name),
            switch: self.name.clone(),
            port: format!("port{number}"),
            address,
        };
        let (namespace, port) = (&host.namespace, &host.port);
        self.hosts.push(namespace.clone());
        ip(&["netns", "add", namespace]);
        ip(&[
            "-n", &self.name, "link", "add", port, "type", "veth", "peer", "cable", "netns",
            namespace,
        ]);
        ip(&["-n", &self.name, "link", "set", port, "master", "switch", "up"]);
        let address = format!("{}/{prefix}", host.address);
        ip(&["-n", namespace, "address", "add", &address, "dev", "cable"]);
        ip(&["-n", namespace, "link", "set", "cable", "up"]);
        ip(&["-n", namespace, "link", "set", "lo", "up"]);
        host
    }
}

impl Network {
    /// A host at 192.168.1.2 behind `router`, which translates the addresses of what goes out.
    pub fn host_behind(&mut self, router: &Host) -> Host {
        let host = Host {
            namespace: format!("{}-{}", self.name, self.hosts.len() + 1),
            switch: router.namespace.clone(),
            port: "lan".into(),
            address: Ipv4Addr::new(192, 168, 1, 2),
        };
        let (outside, inside) = (&*router.namespace, &*host.namespace);
        self.hosts.push(inside.into());
        ip(&["netns", "add", inside]);
        let cable = ["link", "add", "lan", "type", "veth", "peer", "cable", "netns", inside];
        ip(&[&["-n", outside], &cable[..]].concat());
        for (namespace, device, address) in
            [(outside, "lan", "192.168.1.1/24"), (inside, "cable", "192.168.1.2/24")]
        {
            ip(&["-n", namespace, "address", "add", address, "dev", device]);
            ip(&["-n", namespace, "link", "set", device, "up"]);
        }
        ip(&["-n", inside, "link", "set", "lo", "up"]);
        ip(&["-n", inside, "route", "add", "default", "via", "192.168.1.1"]);
        ip(&["netns", "exec", outside, "sysctl", "-qw", "net.ipv4.ip_forward=1"]);
        let rules = "add table ip nat; \
             add chain ip nat out { type nat hook postrouting priority srcnat; }; \
             add rule ip nat out oifname cable masquerade";
        ip(&["netns", "exec", outside, "nft", rules]);
        host
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in self.hosts.iter().chain([&self.name]) {
            let _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
    }
}

impl Host {
    /// Starts the relay on it.
    pub fn relay(&self, flags: &[&str]) -> Relay {
        self.relay_at(self.address, flags)
    }

    /// Starts a relay behind this host, at 10.9.9.9, as behind a router that forwards port 4001 to it.
    pub fn relay_behind(&self, flags: &[&str]) -> Relay {
        let behind = Ipv4Addr::new(10, 9, 9, 9);
        let namespace = &self.namespace;
        let address = format!("{behind}/32");
        ip(&["-n", namespace, "address", "add", &address, "dev", "lo"]);
        let rules = format!(
            "add table ip router; \
             add chain ip router in {{ type nat hook prerouting priority dstnat; }}; \
             add rule ip router in tcp dport 4001 dnat to {behind}"
        );
        ip(&["netns", "exec", namespace, "nft", &rules]);
        self.relay_at(behind, flags)
    }

    /// Drops inbound connections to this port from now on.
    pub fn close(&self, port: u16) {
        let rules = format!(
            "add table ip wall; \
             add chain ip wall in {{ type filter hook input priority 0; }}; \
             add rule ip wall in tcp dport {port} tcp flags syn / syn,ack drop"
        );
        ip(&["netns", "exec", &self.namespace, "nft", &rules]);
    }

    /// Gives it so many more addresses: 2a00:1450::1 and so on.
    pub fn add_addresses(&self, count: u16) {
        for number in 1..=count {
            let address = format!("2a00:1450::{number:x}/64");
            ip(&["-n", &self.namespace, "address", "add", &address, "dev", "cable", "nodad"]);
        }
    }

    /// Starts the relay at all of its addresses.
    pub fn relay_everywhere(&self, flags: &[&str]) -> Relay {
        let mut relay = self.relay_listening("/ip4/0.0.0.0/tcp/4001,/ip6/::/tcp/4001", flags);
        let address = format!("/ip4/{}/tcp/4001/p2p/{}", self.address, relay.peer);
        relay.address = address.parse().expect("a multiaddr");
        relay
    }

    fn relay_at(&self, address: Ipv4Addr, flags: &[&str]) -> Relay {
        self.relay_listening(&format!("/ip4/{address}/tcp/4001"), flags)
    }

    fn relay_listening(&self, listen: &str, flags: &[&str]) -> Relay {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let program = command(&folder).get_program().to_owned();
        let mut command = Command::new("ip");
        command
            .current_dir(folder.path())
            .args(&self.command_prefix()[1..])
            .arg(program)
            .arg(format!("--listen={listen}"))
            .args(flags);
        Relay::run(command, folder)
    }

    /// The command that runs another command on this host.
    pub fn command_prefix(&self) -> Vec<OsString> {
        let prefix = ["ip", "netns", "exec", &self.namespace];
        prefix.map(OsString::from).into()
    }

    /// Moves this thread onto it: sockets that it creates are the host's.
    pub fn enter(&self) {
        let namespace = File::open(format!("/run/netns/{}", self.namespace)).expect("it exists");
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .expect("this thread may enter it");
    }

    /// Plugs its cable in or unplugs it.
    pub fn set_cable(&self, plugged: bool) {
        let state = if plugged { "up" } else { "down" };
        ip(&["-n", &self.switch, "link", "set", &self.port, state]);
    }

    /// Limits its cable to this many bytes per second towards the host.
    pub fn slow_down(&self, bytes: usize) {
        let rate = format!("{}bit", bytes * 8);
        let qdisc = ["qdisc", "replace", "dev", &self.port, "root", "tbf", "rate", &rate];
        let qdisc = [&qdisc[..], &["burst", "10kb", "latency", "400ms"]].concat();
        run("tc", &[&["-n", &self.switch], &qdisc[..]].concat());
    }

    /// Drops this percentage of the packets on its cable, in both directions.
    ///
    /// Each end drops inbound packets: a sender whose own firewall drops a packet does not see it as lost.
    pub fn lose(&self, percent: u8) {
        let which = match percent {
            100 => String::new(), // all
            percent => format!("numgen random mod 100 < {percent}"),
        };
        for (namespace, device) in [(&*self.namespace, "cable"), (&self.switch, &self.port)] {
            let rules = format!(
                "add table netdev {device}; delete table netdev {device}; \
                 add table netdev {device}; \
                 add chain netdev {device} loss \
                 {{ type filter hook ingress device {device} priority 0; }}; \
                 add rule netdev {device} loss {which} drop"
            );
            ip(&["netns", "exec", namespace, "nft", &rules]);
        }
    }
}

fn ip(arguments: &[&str]) {
    run("ip", arguments);
}

fn run(tool: &str, arguments: &[&str]) {
    let status = Command::new(tool).args(arguments).status();
    let done = status.is_ok_and(|status| status.success());
    let line = arguments.join(" ");
    assert!(done, "{tool} {line}: failed; these tests need root, iproute2 and nftables");
}
