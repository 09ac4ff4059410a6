//! The number of bytes of a TCP connection that the other end has acknowledged, read over netlink: sock_diag(7).
//!
//! The alternatives, the socket option TCP_INFO and the ioctl SIOCOUTQ, need unsafe code. A query is one look-up in the
//! kernel's table, however many sockets there are.

use std::net::{IpAddr, SocketAddr};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, netlink, recv, send, socket};

/// linux/sock_diag.h, linux/netlink.h, linux/inet_diag.h.
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
/// The size of the header of an attribute, `nlattr`, and where `tcpi_bytes_acked` is in `tcp_info`.
const ATTRIBUTE: usize = 4;
const BYTES_ACKED: usize = 120;

/// How many bytes of the connection between `local` and `remote` were acknowledged so far; `None` if the kernel does
/// not provide that.
pub fn acknowledged(local: SocketAddr, remote: SocketAddr) -> Option<u64> {
    let kernel = socket(AddressFamily::NETLINK, SocketType::RAW, Some(netlink::SOCK_DIAG)).ok()?;
    send(&kernel, &request(local, remote), SendFlags::empty()).ok()?;
    let mut answer = [0; 2048];
    let (bytes, _) = recv(&kernel, &mut answer[..], RecvFlags::DONTWAIT).ok()?;
    bytes_acked(answer.get(..bytes)?)
}

fn request(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
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
        &[0; 4], // on any interface
        &INET_DIAG_NOCOOKIE,
    ]
    .concat()
}

fn bytes_acked(answer: &[u8]) -> Option<u64> {
    if u16_at(answer, 4)? != SOCK_DIAG_BY_FAMILY {
        return None; // no such socket, or not supported
    }
    let mut attributes = answer.get(HEADER + MESSAGE..)?;
    loop {
        let length = usize::from(u16_at(attributes, 0)?).max(ATTRIBUTE);
        if u16_at(attributes, 2)? == INET_DIAG_INFO {
            let (bytes, _) =
                attributes.get(ATTRIBUTE + BYTES_ACKED..length)?.split_first_chunk()?;
            return Some(u64::from_ne_bytes(*bytes));
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
        net::{TcpListener, TcpStream},
    };

    use super::*;

    #[test]
    fn acknowledged_bytes_are_read_from_the_kernel() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut server, remote) = listener.accept().unwrap();
            let local = server.local_addr().unwrap();
            let before = acknowledged(local, remote).expect("an established connection");
            server.write_all(&[7; 1000]).unwrap();
            client.read_exact(&mut [0; 1000]).unwrap();
            // The client's next segment carries the acknowledgement.
            client.write_all(&[7]).unwrap();
            server.read_exact(&mut [0]).unwrap();
            assert_eq!(acknowledged(local, remote), Some(before + 1000));
            assert_eq!(
                acknowledged(remote, SocketAddr::new(local.ip(), 1)),
                None,
                "no such socket"
            );
        }
    }

    #[test]
    fn a_malformed_tcp_info_is_ignored() {
        let mut answer = vec![0; HEADER + MESSAGE];
        answer[4] = 20;
        let cut = [&answer[..], &[8, 0, 2, 0, 0, 0, 0, 0]].concat();
        let without_end = [&answer[..], &[0, 0, 1, 0, 0, 0]].concat();
        for answer in [&[][..], &[0; 200], &answer, &cut, &without_end] {
            assert_eq!(bytes_acked(answer), None);
        }
    }
}
