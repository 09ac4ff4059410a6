//! The limit of open files: each connection is one.

use rlimit::Resource;

use super::limits::Limits;

/// Files that are open beside the connections: listeners, timers, standard streams, the runtime's,
/// whoever watches over HTTP, and whom AutoNAT dials.
const OTHERS: u64 = if cfg!(feature = "autonat") { 160 } else { 96 };

/// Raises the limit as far as the system lets us; a warning if that is not far enough.
///
/// Beside the connections that count are those in their handshakes; behind a proxy as many again are
/// open before even those count; and so many may be `dialed`, which do not count at all.
pub fn raise_limit(limits: &Limits, behind_proxy: bool, dialed: usize) -> Option<String> {
    // An unreadable limit is no reason not to start.
    let (_, hard) = Resource::NOFILE.get().ok()?;
    let limit = rlimit::increase_nofile_limit(hard).ok()?;
    let rounds = if behind_proxy { 2 } else { 1 };
    let uncounted = limits.max_handshakes.saturating_mul(rounds);
    let uncounted = uncounted.saturating_add(dialed);
    warning(limit, limits.max_connections, uncounted)
}

fn warning(limit: u64, max_connections: usize, uncounted: usize) -> Option<String> {
    let connections = max_connections.saturating_add(uncounted) as u64;
    let needed = connections.saturating_add(OTHERS);
    (limit < needed).then(|| {
        format!(
            "--max-connections {max_connections} needs {needed} open files and the system allows \
             {limit}: raise its hard limit (ulimit -Hn, LimitNOFILE) or lower --max-connections"
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
