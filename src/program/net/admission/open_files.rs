//! The process's limit on open files: each connection takes one.

use rlimit::Resource;

use super::limits::Limits;

/// Files besides those of inbound connections and of the DHT: listeners, timers, standard streams, the runtime's, HTTP
/// clients, and AutoNAT's dials.
const OTHER_FILES: u64 = if cfg!(feature = "autonat") { 160 } else { 96 };

/// Raises the limit as far as the system allows. Returns a warning if that is not enough.
///
/// Connections in their handshakes are not among `limits.max_connections`. Behind a proxy as many more wait for their
/// PROXY protocol headers, and `dialed` are open for the DHT.
pub fn raise_limit(limits: &Limits, behind_proxy: bool, dialed: usize) -> Option<String> {
    // The relay starts without a warning if the limit cannot be read.
    let (_, hard) = Resource::NOFILE.get().ok()?;
    let limit = rlimit::increase_nofile_limit(hard).ok()?;
    let rounds = if behind_proxy { 2 } else { 1 };
    let others = limits.max_handshakes.saturating_mul(rounds).saturating_add(dialed);
    warning(limit, limits.max_connections, others)
}

fn warning(limit: u64, max_connections: usize, others: usize) -> Option<String> {
    let needed = (max_connections.saturating_add(others) as u64).saturating_add(OTHER_FILES);
    (limit < needed).then(|| {
        format!(
            "too few open files: --max-connections {max_connections} needs {needed} and the system allows \
             {limit}; raise its hard limit (ulimit -Hn, LimitNOFILE) or lower --max-connections"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_files_are_a_warning_that_names_the_flag() {
        assert_eq!(warning(5000, 4096, 256), None);
        assert!(warning(5000, 4096, 1000).is_some());
        assert!(warning(5000, usize::MAX, usize::MAX).is_some());
        let warning = warning(1024, 4096, 0).unwrap();
        assert!(warning.contains("--max-connections 4096") && warning.contains("1024"));
    }
}
