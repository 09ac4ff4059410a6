//! The host names under which the page and the status are served.
//!
//! A web page elsewhere can have its own DNS name point to this machine (DNS rebinding). If the host name of a request
//! were not checked, its scripts could read what is served here.

use std::net::IpAddr;

use hyper::{Request, header, http::uri::Authority};

/// The DNS names of `--http-host`.
#[derive(Clone, Debug, Default)]
pub struct Hosts(pub Vec<String>);

impl Hosts {
    /// Returns whether a request names `localhost`, an IP address, or one of these hosts.
    pub fn contains_host_of<B>(&self, request: &Request<B>) -> bool {
        let header = || request.headers().get(header::HOST)?.to_str().ok()?.parse().ok();
        let authority: Option<Authority> = request.uri().authority().cloned().or_else(header);
        authority.is_some_and(|authority| self.contains(authority.host()))
    }

    fn contains(&self, host: &str) -> bool {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let is_named = |name: &str| {
            let [name, host] = [name, host].map(|name| name.strip_suffix('.').unwrap_or(name));
            name.eq_ignore_ascii_case(host)
        };
        bare.parse::<IpAddr>().is_ok()
            || is_named("localhost")
            || self.0.iter().any(|own| is_named(own))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn localhost_ip_addresses_and_the_hosts_of_the_flag_are_served_and_no_other() {
        let hosts = Hosts(vec!["Relay.example.org".into()]);
        let serves = |host: &str| {
            let request = Request::get("/").header(header::HOST, host).body(()).unwrap();
            hosts.contains_host_of(&request)
        };
        for host in [
            "localhost",
            "LOCALHOST:9180",
            "127.0.0.1",
            "192.0.2.1:9180",
            "[::1]:9180",
            "[2001:db8::1]",
            "relay.example.org",
            "relay.example.org.:80",
        ] {
            assert!(serves(host), "{host}");
        }
        for host in [
            "",
            "example.org",
            "localhost.example.org",
            "127.0.0.1.example.org",
            "relay.example.org.evil.example",
            "a.relay.example.org",
            "[localhost]",
            "host name",
        ] {
            assert!(!serves(host), "{host}");
        }
        assert!(!hosts.contains_host_of(&Request::get("/").body(()).unwrap()), "no header");
        let absolute = Request::get("http://example.org/").header(header::HOST, "localhost");
        assert!(!hosts.contains_host_of(&absolute.body(()).unwrap()));
    }
}
