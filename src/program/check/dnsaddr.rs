//! `/dnsaddr`: the addresses that a name lists in its TXT records.
//!
//! The system's resolver does not look up TXT records, and a resolver library would make the program a tenth larger.
//! So this queries the name servers of `/etc/resolv.conf`, over TCP: all of them support it (RFC 7766), and answers are
//! not truncated.

use std::{collections::BTreeMap, fs, io, net::SocketAddr};

use async_std::net::TcpStream;
use libp2p::futures::{AsyncReadExt, AsyncWriteExt, FutureExt, future::select_ok};
use libp2p::{Multiaddr, multiaddr::Protocol};
use simple_dns::{CLASS, Name, Packet, PacketFlag, Question, RCODE, TYPE, rdata::RData};

use super::{steps::list, target::Target};

/// How many names are looked up at most: a record may name another one.
const MAX_NAMES: usize = 10;

/// Looks up this address. Returns the first target that can be checked, and a text that lists all that can: IPv4 before
/// IPv6 and names.
pub async fn look_up(address: Multiaddr) -> io::Result<(Target, String)> {
    let conf = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    look_up_at(&name_servers(&conf), address).await
}

async fn look_up_at(servers: &[SocketAddr], address: Multiaddr) -> io::Result<(Target, String)> {
    let (mut pending, mut found) = (vec![address], BTreeMap::new());
    for _ in 0..MAX_NAMES {
        let Some(address) = pending.pop() else { break };
        let mut parts = address.iter();
        let Some(Protocol::Dnsaddr(name)) = parts.next() else { continue };
        let query = query(&format!("_dnsaddr.{name}")).map_err(io::Error::other)?;
        let (records, _) = select_ok(servers.iter().map(|it| ask(*it, &query).boxed())).await?;
        let rest = parts.collect(); // for example the peer id, which the records have, too
        for record in records {
            match Target::parse(&record).filter(|_| record.ends_with(&rest)) {
                Some(Target { dnsaddr: Some(other), .. }) => pending.push(other),
                Some(target) => drop(found.insert(record, target)),
                None => {}
            }
        }
    }
    let detail = list(found.keys()); // sorted by protocol code: /ip4 is the lowest
    Ok((found.into_values().next().ok_or(io::ErrorKind::NotFound)?, detail))
}

/// A query for the TXT records of `name`.
fn query(name: &str) -> simple_dns::Result<Vec<u8>> {
    let mut query = Packet::new_query(1);
    query.set_flags(PacketFlag::RECURSION_DESIRED);
    let question = Question::new(Name::new(name)?, TYPE::TXT.into(), CLASS::IN.into(), false);
    query.questions.push(question);
    query.build_bytes_vec()
}

/// The addresses in the records of an answer; fails if the server could not look them up.
fn parse_answer(answer: &[u8]) -> io::Result<Vec<Multiaddr>> {
    let answer = Packet::parse(answer).map_err(io::Error::other)?;
    let code = answer.rcode();
    if !matches!(code, RCODE::NoError | RCODE::NameError) {
        return Err(io::Error::other(format!("the name server answers with {code:?}")));
    }
    let addresses = answer.answers.into_iter().filter_map(|record| {
        let RData::TXT(text) = record.rdata else { return None };
        String::try_from(text).ok()?.strip_prefix("dnsaddr=")?.parse().ok()
    });
    Ok(addresses.collect())
}

/// Sends a query, and returns the addresses in the answer. Over TCP, each message is preceded by its length.
async fn ask(server: SocketAddr, query: &[u8]) -> io::Result<Vec<Multiaddr>> {
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&[&(query.len() as u16).to_be_bytes(), query].concat()).await?;
    let mut length = [0; 2];
    stream.read_exact(&mut length).await?;
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut answer).await?;
    parse_answer(&answer)
}

/// The name servers in a `resolv.conf`; if it has none, the one on this machine, as in the C library.
fn name_servers(conf: &str) -> Vec<SocketAddr> {
    let ips = conf.lines().filter_map(|line| {
        line.strip_prefix("nameserver")?.split_whitespace().next()?.parse().ok()
    });
    let servers: Vec<_> = ips.map(|ip| SocketAddr::new(ip, 53)).collect();
    if servers.is_empty() { vec![([127, 0, 0, 1], 53).into()] } else { servers }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use async_std::{net::TcpListener, task};
    use simple_dns::{ResourceRecord, rdata::TXT};

    use super::*;

    const ONE: &str = "12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g";
    const TWO: &str = "12D3KooWRm1vvvZ8GfAUWTcU2Df5nMuCZPT8xW6PzvSTTYaYABXX";

    /// A name server that has these texts under each name; `None`: it fails.
    async fn name_server(records: Option<Vec<(&'static str, Vec<String>)>>) -> SocketAddr {
        let is_failing = records.is_none();
        let records = records.unwrap_or_default();
        let records: HashMap<_, _> = records.into_iter().collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        task::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut length = [0; 2];
                stream.read_exact(&mut length).await.unwrap();
                let mut query = vec![0; u16::from_be_bytes(length).into()];
                stream.read_exact(&mut query).await.unwrap();
                let query = Packet::parse(&query).unwrap();
                let name = &query.questions[0].qname;
                let mut reply = Packet::new_reply(query.id());
                if is_failing {
                    *reply.rcode_mut() = RCODE::ServerFailure;
                }
                for text in records.get(&*name.to_string()).into_iter().flatten() {
                    let text = RData::TXT(TXT::try_from(&**text).unwrap());
                    reply.answers.push(ResourceRecord::new(name.clone(), CLASS::IN, 60, text));
                }
                let reply = reply.build_bytes_vec().unwrap();
                let length = (reply.len() as u16).to_be_bytes();
                stream.write_all(&[&length, &*reply].concat()).await.unwrap();
            }
        });
        address
    }

    fn records() -> Vec<(&'static str, Vec<String>)> {
        let text = |address: &str| format!("dnsaddr={address}");
        vec![
            (
                "_dnsaddr.example.org",
                vec![
                    text(&format!("/dnsaddr/one.example.org/p2p/{ONE}")),
                    text(&format!("/dnsaddr/two.example.org/p2p/{TWO}")),
                    text("no address"),
                    "v=spf1 -all".into(),
                ],
            ),
            (
                "_dnsaddr.one.example.org",
                vec![
                    text(&format!("/ip6/2001:db8::1/tcp/4001/p2p/{ONE}")),
                    text(&format!("/ip4/192.0.2.1/udp/4001/quic-v1/p2p/{ONE}")),
                    text(&format!("/dns4/one.example.org/tcp/443/wss/p2p/{ONE}")),
                ],
            ),
            ("_dnsaddr.two.example.org", vec![text(&format!("/ip4/192.0.2.2/tcp/1/p2p/{TWO}"))]),
            ("_dnsaddr.loop.example.org", vec![text("/dnsaddr/loop.example.org")]),
        ]
    }

    #[test]
    fn all_addresses_of_a_name_and_of_those_that_it_names_are_found() {
        task::block_on(async {
            let server = name_server(Some(records())).await;
            let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
            let found = async |address: &str| {
                let found = look_up_at(&[closed, server], address.parse().unwrap()).await;
                found.map(|(target, list)| (target.host, list)).map_err(|error| error.kind())
            };
            let list_of_one = format!(
                "/ip6/2001:db8::1/tcp/4001/p2p/{ONE} /dns4/one.example.org/tcp/443/wss/p2p/{ONE}"
            );
            let two = format!("/ip4/192.0.2.2/tcp/1/p2p/{TWO}");
            let all = format!("{two} {list_of_one}");
            assert_eq!(found("/dnsaddr/example.org").await, Ok(("192.0.2.2".into(), all)));
            // Those of one peer alone.
            let one = format!("/dnsaddr/example.org/p2p/{ONE}");
            assert_eq!(found(&one).await, Ok(("2001:db8::1".into(), list_of_one)));
            for none in ["loop.example.org", "three.example.org"] {
                let none = found(&format!("/dnsaddr/{none}")).await;
                assert_eq!(none, Err(io::ErrorKind::NotFound));
            }
        });
    }

    #[test]
    fn an_unreachable_name_server_is_a_connection_error() {
        task::block_on(async {
            let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
            let found = look_up_at(&[closed], "/dnsaddr/example.org".parse().unwrap()).await;
            assert_eq!(found.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        });
    }

    #[test]
    fn a_failure_of_the_server_is_an_error_and_not_an_empty_list() {
        task::block_on(async {
            let failing = name_server(None).await;
            let address = || "/dnsaddr/example.org".parse().unwrap();
            let error = look_up_at(&[failing], address()).await.unwrap_err().to_string();
            assert_eq!(error, "the name server answers with ServerFailure");
            let works = name_server(Some(records())).await;
            assert!(look_up_at(&[failing, works], address()).await.is_ok());
        });
    }

    #[test]
    fn the_name_servers_of_resolv_conf_are_parsed() {
        let conf = "# a comment\nsearch example.org\nnameserver 192.0.2.53  # another\n\
                    nameserver\t2001:db8::53\n";
        let servers = name_servers(conf);
        assert_eq!(
            servers,
            ["192.0.2.53:53".parse().unwrap(), "[2001:db8::53]:53".parse().unwrap()]
        );
        assert_eq!(name_servers("options edns0\n"), ["127.0.0.1:53".parse().unwrap()]);
    }
}
