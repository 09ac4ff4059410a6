//! The limit of open files: each connection is one.

use rlimit::Resource;

use super::connection_limits::Limits;

/// Files that are open beside the connections: listeners, timers, standard streams, the runtime's.
const OTHERS: u64 = 64;

/// Raises the limit as far as the system lets us; a warning if that is not far enough.
pub fn raise_limit(limits: &Limits) -> Option<String> {
    // An unreadable limit is no reason not to start.
    let (_, hard) = Resource::NOFILE.get().ok()?;
    let limit = rlimit::increase_nofile_limit(hard).ok()?;
    warning(limit, limits.max_connections)
}

fn warning(limit: u64, max_connections: usize) -> Option<String> {
    let needed = (max_connections as u64).saturating_add(OTHERS);
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
        assert_eq!(warning(5000, 4096), None);
        assert!(warning(5000, usize::MAX).is_some());
        let warning = warning(1024, 4096).unwrap();
        assert!(warning.contains("--max-connections 4096") && warning.contains("1024"));
    }
}
