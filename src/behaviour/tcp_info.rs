//! What the kernel knows of a TCP connection, read over netlink: sock_diag(7).
//!
//! The alternatives, the socket option TCP_INFO and the ioctl SIOCOUTQ, need unsafe code. A query is one look-up in the
//! kernel's table, however many sockets there are.

use std::net::{IpAddr, SocketAddr};

use libp2p::{Multiaddr, core::ConnectedPoint, multiaddr::Protocol};
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketType, netlink, recv, send};

use crate::{activity::ActivityCounter, address::ip};

/// From linux/sock_diag.h, linux/netlink.h and linux/inet_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_NOCOOKIE: [u8; 8] = [0xff; 8];
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;

/// The sizes of `nlmsghdr`, `inet_diag_req_v2` and `inet_diag_msg`, in bytes.
const HEADER: usize = 16;
const REQUEST: usize = 56;
const MESSAGE: usize = 72;
/// The size of the header of an attribute, `nlattr`.
const ATTRIBUTE: usize = 4;

/// A connection is lossy if it loses more than one in this many segments with data.
const SEGMENTS_PER_LOSS: u32 = 16;

/// A silent peer behind a link that loses packets may be alive if its kernel sent something within this time. It is
/// shorter than the program's interval of keep-alive probes, a minute, which the kernel answers even if the peer's
/// process is frozen.
const RECENT_MILLIS: u32 = 45_000;

/// Such a peer may also be alive if fewer retransmissions in a row than this are unanswered: with exponential back-off
/// there are no more in a minute. At 30 % loss in both directions, six are all unanswered in one of 57 cases.
const MANY_UNANSWERED: u8 = 6;

/// If the peer dialed over TCP, has `activity` report whether the connection loses packets and the peer may be alive.
pub fn report_losses(endpoint: &ConnectedPoint, activity: &ActivityCounter) {
    if let ConnectedPoint::Listener { local_addr, send_back_addr } = endpoint
        && let (Some(local), Some(remote)) = (socket(local_addr), socket(send_back_addr))
    {
        let is_lossy = move || TcpInfo::of(local, remote)?.is_lossy();
        activity.set_lossy(move || is_lossy() == Some(true));
    }
}

/// The TCP socket at the beginning of a multiaddr.
fn socket(address: &Multiaddr) -> Option<SocketAddr> {
    match address.iter().nth(1)? {
        Protocol::Tcp(port) => Some(SocketAddr::new(ip(address)?, port)),
        _ => None,
    }
}

/// A `tcp_info`, as the kernel writes it: linux/tcp.h. A later kernel's is longer.
pub struct TcpInfo(Vec<u8>);

impl TcpInfo {
    /// Asks the kernel about the connection between `local` and `remote`; `None` if it does not tell.
    pub fn of(local: SocketAddr, remote: SocketAddr) -> Option<Self> {
        let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
        let kernel = net::socket(family, kind, Some(netlink::SOCK_DIAG)).ok()?;
        send(&kernel, &request(local, remote), SendFlags::empty()).ok()?;
        let mut answer = [0; 2048];
        let (bytes, _) = recv(&kernel, &mut answer[..], RecvFlags::DONTWAIT).ok()?;
        tcp_info(answer.get(..bytes)?)
    }

    /// How many bytes the other end has acknowledged so far: `tcpi_bytes_acked`.
    #[cfg(any(test, feature = "program"))]
    pub fn acknowledged(&self) -> Option<u64> {
        Some(u64::from_ne_bytes(*self.0.get(120..)?.first_chunk()?))
    }

    /// Whether the connection loses many of its segments with data (`tcpi_data_segs_out`), and its other end may be
    /// alive: it sent data or an acknowledgement recently (`tcpi_last_data_recv`, `tcpi_last_ack_recv`), or had few
    /// chances to.
    ///
    /// Segments that arrived out of order (`tcpi_rcv_ooopack`) count as lost, and so do those that were retransmitted
    /// (`tcpi_total_retrans`). Two kinds of retransmissions do not: those without an acknowledgement since
    /// (`tcpi_retransmits`), because the peer may be gone; and superfluous ones (`tcpi_dsack_dups`), because the peer
    /// slept and answered late.
    pub fn is_lossy(&self) -> Option<bool> {
        let silent_for = self.number(52)?.min(self.number(56)?); // tcpi_last_data_recv, tcpi_last_ack_recv
        let unanswered = *self.0.get(2)?; // tcpi_retransmits
        let retransmitted = self.number(100)?.saturating_sub(unanswered.into()); // tcpi_total_retrans
        let helped = retransmitted.saturating_sub(self.number(216)?); // tcpi_dsack_dups
        let lost = helped.saturating_add(self.number(224)?); // tcpi_rcv_ooopack
        // tcpi_data_segs_out
        let loses_often = lost > 1 && lost.saturating_mul(SEGMENTS_PER_LOSS) > self.number(156)?;
        Some(loses_often && (silent_for < RECENT_MILLIS || unanswered < MANY_UNANSWERED))
    }

    fn number(&self, at: usize) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.0.get(at..)?.first_chunk()?))
    }
}

fn request(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
    let interface = if let SocketAddr::V6(local) = local { local.scope_id() } else { 0 };
    let address = |socket: SocketAddr| match socket.ip() {
        IpAddr::V4(ip) => [&ip.octets()[..], &[0; 12]].concat(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    [
        &((HEADER + REQUEST) as u32).to_ne_bytes()[..],
        &SOCK_DIAG_BY_FAMILY.to_ne_bytes(),
        &NLM_F_REQUEST.to_ne_bytes(),
        &[0; 8], // sequence number and sender
        &[family, IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0],
        &u32::MAX.to_ne_bytes(), // in any state
        &local.port().to_be_bytes(),
        &remote.port().to_be_bytes(),
        &address(local),
        &address(remote),
        &interface.to_ne_bytes(), // 0: any; a link-local connection is found only by its own
        &INET_DIAG_NOCOOKIE,
    ]
    .concat()
}

fn tcp_info(answer: &[u8]) -> Option<TcpInfo> {
    if u16_at(answer, 4)? != SOCK_DIAG_BY_FAMILY {
        return None; // no such socket, or not supported
    }
    let mut attributes = answer.get(HEADER + MESSAGE..)?;
    loop {
        let length = usize::from(u16_at(attributes, 0)?).max(ATTRIBUTE);
        if u16_at(attributes, 2)? == INET_DIAG_INFO {
            return Some(TcpInfo(attributes.get(ATTRIBUTE..length)?.to_vec()));
        }
        attributes = attributes.get(length.next_multiple_of(ATTRIBUTE)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{Ipv6Addr, SocketAddrV6, TcpListener, TcpStream},
    };

    use super::*;

    /// An address of each interface that has a link-local one.
    fn link_local() -> Vec<SocketAddr> {
        let all = std::fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
        let address = |line: &str| {
            let mut columns = line.split_whitespace();
            let ip = Ipv6Addr::from_bits(u128::from_str_radix(columns.next()?, 16).ok()?);
            let interface = u32::from_str_radix(columns.next()?, 16).ok()?;
            let address = SocketAddrV6::new(ip, 0, 0, interface);
            ip.is_unicast_link_local().then_some(address.into())
        };
        all.lines().filter_map(address).collect()
    }

    #[test]
    fn acknowledged_bytes_are_read_from_the_kernel() {
        let loopback = ["127.0.0.1:0", "[::1]:0"].map(|text| text.parse().unwrap());
        for address in loopback.into_iter().chain(link_local()) {
            let listener = TcpListener::bind(address).unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut server, remote) = listener.accept().unwrap();
            let local = server.local_addr().unwrap();
            let acknowledged = || TcpInfo::of(local, remote)?.acknowledged();
            let before = acknowledged().expect("an established connection");
            server.write_all(&[7; 1000]).unwrap();
            client.read_exact(&mut [0; 1000]).unwrap();
            // The client's next segment carries the acknowledgement.
            client.write_all(&[7]).unwrap();
            server.read_exact(&mut [0]).unwrap();
            assert_eq!(acknowledged(), Some(before + 1000));
            let info = TcpInfo::of(local, remote).unwrap();
            assert_eq!(info.is_lossy(), Some(false));
            let none = TcpInfo::of(remote, SocketAddr::new(local.ip(), 1));
            assert!(none.is_none(), "no such socket");
        }
    }

    #[test]
    fn a_malformed_tcp_info_is_ignored() {
        let mut answer = vec![0; HEADER + MESSAGE];
        answer[4] = 20;
        let too_short = [&answer[..], &[8, 0, 2, 0, 0, 0, 0, 0]].concat();
        let without_end = [&answer[..], &[0, 0, 1, 0, 0, 0]].concat();
        for answer in [&[][..], &[0; 200], &answer, &too_short, &without_end] {
            let info = tcp_info(answer);
            assert_eq!(info.and_then(|info| info.acknowledged()), None);
        }
    }

    #[test]
    fn retransmissions_that_helped_and_gaps_are_losses() {
        let info = |numbers: &[(usize, u32)]| {
            let mut info = TcpInfo(vec![0; 232]);
            for (at, number) in numbers {
                info.0[*at..at + 4].copy_from_slice(&number.to_ne_bytes());
            }
            info
        };
        // The numbers of segments with data, of retransmissions, of those that are unanswered and of superfluous ones,
        // and of gaps in what arrived.
        let is_lossy = |sent: u32, again: u32, unanswered: u8, superfluous: u32, gaps: u32| {
            let mut info = info(&[(100, again), (156, sent), (216, superfluous), (224, gaps)]);
            info.0[2] = unanswered;
            info.is_lossy().unwrap()
        };
        assert!(!is_lossy(30, 0, 0, 0, 0));
        assert!(is_lossy(31, 2, 0, 0, 0));
        assert!(is_lossy(31, 1, 0, 0, 1));
        assert!(!is_lossy(32, 2, 0, 0, 0), "one in sixteen");
        assert!(!is_lossy(5, 1, 0, 0, 0), "once is no rule");
        assert!(!is_lossy(30, 9, 8, 0, 0), "it is gone");
        assert!(!is_lossy(30, 8, 0, 8, 0), "it slept");
        let is_alive = |acknowledged_before: u32, unanswered: u8| {
            let mut info = info(&[(52, 50_000), (56, acknowledged_before), (100, 20), (156, 20)]);
            info.0[2] = unanswered;
            info.is_lossy().unwrap()
        };
        assert!(is_alive(44_999, 6), "it acknowledged something recently");
        assert!(is_alive(45_000, 5), "it had few chances");
        assert!(!is_alive(45_000, 6));
    }
}
