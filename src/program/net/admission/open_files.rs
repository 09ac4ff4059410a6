//! The process's limit on open files: each connection takes one.

use rlimit::Resource;

use super::limits::Limits;

/// Files besides those of inbound connections and of the DHT: listeners, timers, standard streams, the runtime's, HTTP
/// clients, and AutoNAT's dials.
const OTHER_FILES: usize = if cfg!(feature = "autonat") { 160 } else { 96 };

/// How many times [`Limits::max_handshakes`] connections there may be that are not established: those in their
/// handshakes, those that wait for a PROXY protocol header, those of reverse proxies that wait for a request, and those
/// that the rate limits delay, over TCP, over WebSocket and behind reverse proxies.
const NOT_ESTABLISHED: usize = 6;

/// Raises the limit as far as the system allows. Returns a warning if that is not enough for inbound connections and
/// `dialed` of the DHT.
pub fn raise_limit(limits: &Limits, dialed: usize) -> Option<String> {
    // The relay starts without a warning if the limit cannot be read.
    let (_, hard) = Resource::NOFILE.get().ok()?;
    let limit = rlimit::increase_nofile_limit(hard).ok()?;
    warning(limit, limits, dialed)
}

fn warning(limit: u64, limits: &Limits, dialed: usize) -> Option<String> {
    let max_connections = limits.max_connections;
    let not_established = limits.max_handshakes.saturating_mul(NOT_ESTABLISHED);
    let others = not_established.saturating_add(dialed).saturating_add(OTHER_FILES);
    let needed = max_connections.saturating_add(others) as u64;
    (limit < needed).then(|| {
        format!(
            "too few open files: --max-connections {max_connections} needs {needed} and the system allows \
             {limit}; raise its hard limit (ulimit -Hn, LimitNOFILE), or lower --max-connections or --max-handshakes"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_files_are_a_warning_that_names_the_flags() {
        let limits = Limits { max_connections: 4096, max_handshakes: 100, ..Limits::default() };
        assert_eq!(warning(5100, &limits, 200), None);
        assert!(warning(5100, &limits, 1000).is_some());
        let most = Limits { max_connections: usize::MAX, max_handshakes: usize::MAX, ..limits };
        assert!(warning(5100, &most, usize::MAX).is_some());
        let warning = warning(1024, &limits, 0).unwrap();
        assert!(warning.contains("--max-connections 4096") && warning.contains("1024"));
        assert!(warning.ends_with("or --max-handshakes"), "{warning}");
    }

    #[test]
    fn connections_that_wait_count_besides_those_that_are_established() {
        let limits = Limits { max_connections: 1000, max_handshakes: 100, ..Limits::default() };
        let all = 1000 + 6 * 100 + 30 + OTHER_FILES as u64;
        assert_eq!(warning(all, &limits, 30), None);
        assert!(warning(all - 1, &limits, 30).is_some());
    }
}
