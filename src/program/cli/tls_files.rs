//! The files of `--tls-cert` and `--tls-key`: read at the start, and reloaded when they change or on SIGHUP. If
//! reloading fails, the previous certificate stays in use.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use anyhow::{Result, anyhow};
use futures_timer::Delay;
use libp2p::futures::FutureExt;
use zeroize::Zeroizing;

use crate::program::{
    component::{CertificateFiles, Component},
    net::websocket::certificate::{Certificate, Unusable, Validity},
    node::Node,
    secret_file,
};

/// How often the files are checked for changes.
const CHECK_INTERVAL: Duration = Duration::from_secs(3);

/// The largest file that is accepted, in bytes. A chain of a dozen certificates takes 30 KiB.
const MAX_FILE: u64 = 1024 * 1024;

/// How often to warn about a certificate that expires soon or that clients reject.
const WARN_INTERVAL: Duration = Duration::from_secs(24 * 60 * 60);

/// Keeps the node's certificate up to date with the files.
pub struct TlsFiles {
    files: Option<(Files, ChangeDetector)>,
    next_check: Delay,
    /// The certificate in use: the path of its file, and its validity. After a failed reload `files` has another path.
    served: Option<(PathBuf, Validity)>,
    warned_at: SystemTime,
}

impl TlsFiles {
    /// Reads these files, if any, and sets the node's certificate.
    ///
    /// # Errors
    ///
    /// When a file cannot be used; one line with the flag, the file and the remedy.
    pub fn start(files: CertificateFiles<'_>, node: &mut Node) -> Result<Self> {
        let (next_check, warned_at) = (Delay::new(CHECK_INTERVAL), SystemTime::UNIX_EPOCH);
        let mut tls_files = Self { files: None, next_check, served: None, warned_at };
        tls_files.read(files, node)?;
        Ok(tls_files)
    }

    fn read(&mut self, files: CertificateFiles<'_>, node: &mut Node) -> Result<()> {
        let Some(files) = Files::of(files) else {
            (self.files, self.served) = (None, None);
            return Ok(());
        };
        // The stamp first: a change during the read is found at the next check.
        let (stamp, read) = (files.stamp(), files.read());
        self.files = Some((files, ChangeDetector::new(stamp)));
        self.serve(read?, node);
        Ok(())
    }

    fn serve(&mut self, certificate: Certificate, node: &mut Node) {
        let cert = self.files.as_ref().map(|(files, _)| files.cert.clone());
        self.served = cert.zip(Some(certificate.validity.clone()));
        node.set_certificate(certificate);
        self.warn(node, SystemTime::now());
    }

    /// Logs the warnings about the certificate.
    fn warn(&mut self, node: &Node, now: SystemTime) {
        self.warned_at = now;
        self.warnings(node, now).iter().for_each(|warning| log::warn!("{warning}"));
    }

    /// The warnings about the certificate, each with its file.
    fn warnings(&self, node: &Node, now: SystemTime) -> Vec<String> {
        let Some((cert, validity)) = &self.served else { return Vec::new() };
        let warnings = validity.warnings(&node.relay().config().announce, now).into_iter();
        warnings.map(|warning| format!("--tls-cert {}: {warning}", cert.display())).collect()
    }
}

impl Component for TlsFiles {
    fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.files {
            Some(_) => self.next_check.poll_unpin(cx),
            None => Poll::Pending,
        }
    }

    /// Reloads the files if they have changed.
    fn on_due(&mut self, node: &mut Node) {
        self.next_check.reset(CHECK_INTERVAL);
        let now = SystemTime::now();
        // Also after the clock was set back.
        if !now.duration_since(self.warned_at).is_ok_and(|ago| ago < WARN_INTERVAL) {
            self.warn(node, now);
        }
        let Some((files, changes)) = &mut self.files else { return };
        if !changes.check(files.stamp()) {
            return;
        }
        let cert = files.cert.display().to_string();
        match files.read() {
            Ok(certificate) => {
                self.serve(certificate, node);
                log::info!("--tls-cert {cert}: changed, reloaded for new connections");
            }
            Err(error) => log::error!("keeping the previous certificate: {error:#}"),
        }
    }

    /// Reloads these files, changed or not.
    fn on_reload(&mut self, files: CertificateFiles<'_>, node: &mut Node) {
        match (self.read(files, node), files.0) {
            (Ok(()), Some(cert)) => log::info!("SIGHUP: --tls-cert {}: reloaded", cert.display()),
            (Ok(()), None) => {}
            (Err(error), _) => {
                log::error!("SIGHUP: keeping the previous certificate: {error:#}");
            }
        }
    }
}

struct Files {
    cert: PathBuf,
    key: PathBuf,
}

impl Files {
    fn of((cert, key): CertificateFiles<'_>) -> Option<Self> {
        Some(Self { cert: cert?.into(), key: key?.into() })
    }

    fn read(&self) -> Result<Certificate> {
        let (cert, key) = (self.cert.display(), self.key.display());
        let (chain, secret) =
            (contents("--tls-cert", &self.cert)?, contents("--tls-key", &self.key)?);
        Certificate::from_pem(&chain, &secret).map_err(|unusable| match unusable {
            Unusable::Certificate(problem) => anyhow!("--tls-cert {cert}: {problem}"),
            Unusable::Key(problem) => anyhow!("--tls-key {key}: {problem}"),
            Unusable::Mismatch => anyhow!(
                "--tls-key {key}: not the key of --tls-cert {cert}; name the one that it was \
                 created with"
            ),
        })
    }

    /// Follows symbolic links, which tools that renew certificates replace.
    fn stamp(&self) -> Stamp {
        [&self.cert, &self.key].map(|file| {
            let metadata = fs::metadata(file).ok()?;
            Some((metadata.ctime(), metadata.ctime_nsec(), metadata.len(), metadata.ino()))
        })
    }
}

/// Reads the file that `flag` names, as a secret: the certificate's file may contain the key, too.
fn contents(flag: &str, file: &Path) -> Result<Zeroizing<Vec<u8>>> {
    let read = || {
        let metadata = fs::metadata(file)?;
        match metadata.len() {
            // Reading it might block for ever.
            _ if !metadata.is_file() => Err(io::Error::other("not a regular file")),
            length if length > MAX_FILE => Err(io::Error::other("larger than 1 MiB")),
            length => secret_file::read(File::open(file)?, length as usize),
        }
    };
    let unreadable =
        |error| anyhow!("{flag} {}: {error}; name a file that can be read", file.display());
    read().map_err(unreadable)
}

/// The ctime, length and inode of each file, which show a change. The ctime changes with the owner and the permissions,
/// too, which may make a file readable.
type Stamp = [Option<(i64, i64, u64, u64)>; 2];

/// Detects that the files have changed and are complete.
struct ChangeDetector {
    /// The files when they were last read.
    read: Stamp,
    /// The files at the last check.
    checked: Stamp,
}

impl ChangeDetector {
    fn new(read: Stamp) -> Self {
        Self { read, checked: read }
    }

    /// Returns whether to read the files: they have changed since they were read, but not since the last check. The two
    /// files are not replaced in the same instant.
    fn check(&mut self, now: Stamp) -> bool {
        let is_stable = now == std::mem::replace(&mut self.checked, now);
        let is_due = is_stable && now != self.read;
        if is_due {
            self.read = now;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(cert: u64, key: u64) -> Stamp {
        [cert, key].map(|length| Some((0, 0, length, 0)))
    }

    #[test]
    fn warnings_are_repeated_each_day_and_after_the_clock_was_set_back() {
        let keypair = libp2p::identity::Keypair::generate_ed25519();
        let mut node = Node::new(keypair, crate::config::Config::default()).unwrap();
        let mut files = TlsFiles::start((None, None), &mut node).unwrap();
        let now = SystemTime::now();
        for (warned_at, repeats) in [
            (now - WARN_INTERVAL, true),
            (now + WARN_INTERVAL, true),
            (now - WARN_INTERVAL / 2, false),
        ] {
            files.warned_at = warned_at;
            files.on_due(&mut node);
            assert_eq!(files.warned_at != warned_at, repeats);
        }
    }

    #[test]
    fn after_a_failed_reload_warnings_name_the_certificate_that_stays_in_use() {
        let certified = rcgen::generate_simple_self_signed(["relay.example.org".to_owned()]);
        let certified = certified.unwrap();
        let [cert, key] = [certified.cert.pem(), certified.key_pair.serialize_pem()].map(|pem| {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), pem).unwrap();
            file
        });
        let keypair = libp2p::identity::Keypair::generate_ed25519();
        let mut node = Node::new(keypair, crate::config::Config::default()).unwrap();
        let files = (Some(cert.path()), Some(key.path()));
        let mut files = TlsFiles::start(files, &mut node).unwrap();
        let none = Some(Path::new("none.pem"));
        files.on_reload((none, none), &mut node);
        let expired = node.certificate_not_after().unwrap() + WARN_INTERVAL;
        let warnings = files.warnings(&node, expired);
        let expected = format!("--tls-cert {}: expired at ", cert.path().display());
        assert!(warnings[0].starts_with(&expected), "{warnings:?}");
    }

    #[test]
    fn a_file_above_1_mib_is_an_error_and_not_cut() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(MAX_FILE).unwrap();
        assert_eq!(contents("--tls-cert", file.path()).unwrap().len() as u64, MAX_FILE);
        file.as_file().set_len(MAX_FILE + 1).unwrap();
        let error = contents("--tls-cert", file.path()).unwrap_err().to_string();
        assert!(error.contains("larger than 1 MiB"), "{error}");
    }

    /// An operator changes them after an error about reading the files.
    #[test]
    fn a_change_of_permissions_is_a_change_of_the_files() {
        use std::os::unix::fs::PermissionsExt;

        let file = tempfile::NamedTempFile::new().unwrap();
        let files = Files { cert: file.path().into(), key: file.path().into() };
        let before = files.stamp();
        // The file system's clock is coarse.
        let changes_stamp = |mode| {
            fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
            files.stamp() != before
        };
        assert!([0o600, 0o644].into_iter().cycle().take(100_000).any(changes_stamp));
    }

    #[test]
    fn tls_files_are_reloaded_once_per_change_after_they_settle() {
        let mut changes = ChangeDetector::new(stamp(1, 1));
        assert!(!changes.check(stamp(1, 1)));
        assert!(!changes.check(stamp(2, 1)), "the new key may not be written yet");
        assert!(!changes.check(stamp(2, 2)));
        assert!(changes.check(stamp(2, 2)));
        assert!(!changes.check(stamp(2, 2)));
        assert!(!changes.check([None, None]));
        assert!(changes.check([None, None]));
        assert!(!changes.check([None, None]));
        assert!(!changes.check(stamp(3, 3)));
        assert!(!changes.check(stamp(2, 2)));
        assert!(changes.check(stamp(2, 2)));
    }
}
