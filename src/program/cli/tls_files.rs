//! The files of `--tls-cert` and `--tls-key`: read at the start, and again when they change or on
//! SIGHUP. What is wrong then is told, and the certificate that was there goes on serving.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use anyhow::{Error, Result, anyhow};
use futures_timer::Delay;
use libp2p::futures::FutureExt;
use zeroize::Zeroizing;

use super::flags::Flags;
use crate::program::{
    component::{CertificateFiles, Component},
    net::{
        multiaddr::{self, Layer},
        websocket::certificate::{Certificate, Unusable, Validity},
    },
    node::Node,
    secret_file,
};

/// How often to look whether the files have changed.
const LOOK: Duration = Duration::from_secs(3);

/// A chain of a dozen certificates has 30 KiB.
const MAX_FILE: usize = 1024 * 1024;

/// How often to warn about a certificate that expires soon, or clients refuse.
const WARN_AGAIN: Duration = Duration::from_secs(24 * 60 * 60);

/// The files, and which of their states was read.
pub struct Certificates {
    files: Option<(Files, Changes)>,
    next_look: Delay,
    validity: Option<Validity>,
    warned_at: SystemTime,
}

impl Certificates {
    /// Reads the files that the flags name, if they name some, for `node` to show.
    ///
    /// # Errors
    ///
    /// When what stands there is of no use, in one line with the flag, the file and the remedy.
    pub fn start(flags: &Flags, node: &mut Node) -> Result<Self> {
        let (next_look, warned_at) = (Delay::new(LOOK), SystemTime::UNIX_EPOCH);
        let mut certificates = Self { files: None, next_look, validity: None, warned_at };
        let cert = certificates.read(flags.certificate_files(), node)?;
        let in_tls = |address| {
            let layer = multiaddr::listen_address(address).map(|(_, layer)| layer);
            layer == Some(Layer::SecureWebSocket)
        };
        if let Some(cert) = cert
            && !flags.listen_addresses().0.iter().any(in_tls)
        {
            log::warn!(
                "--tls-cert {}: nobody gets to see it; listen in TLS, too: --listen \
                 /ip4/0.0.0.0/tcp/4002/tls/ws",
                cert.display()
            );
        }
        Ok(certificates)
    }

    fn read(&mut self, files: CertificateFiles<'_>, node: &mut Node) -> Result<Option<PathBuf>> {
        let Some(files) = Files::of(files) else {
            (self.files, self.validity) = (None, None);
            return Ok(None);
        };
        let stamp = files.stamp();
        let read = files.read();
        let cert = files.cert.clone();
        self.files = Some((files, Changes::since(stamp)));
        self.serve(read?, node);
        Ok(Some(cert))
    }

    fn serve(&mut self, certificate: Certificate, node: &mut Node) {
        self.validity = Some(certificate.validity().clone());
        node.set_certificate(certificate);
        self.warn(node, SystemTime::now());
    }

    /// Warns about the certificate if it has to be.
    fn warn(&mut self, node: &Node, now: SystemTime) {
        self.warned_at = now;
        if let (Some((files, _)), Some(validity)) = (&self.files, &self.validity) {
            for warning in validity.warnings(&node.relay().config().announce, now) {
                log::warn!("--tls-cert {}: {warning}", files.cert.display());
            }
        }
    }
}

impl Component for Certificates {
    fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.files {
            Some(_) => self.next_look.poll_unpin(cx),
            None => Poll::Pending,
        }
    }

    /// Reads the files if they have changed.
    fn on_due(&mut self, node: &mut Node) {
        self.next_look.reset(LOOK);
        let now = SystemTime::now();
        if now.duration_since(self.warned_at).is_ok_and(|ago| ago >= WARN_AGAIN) {
            self.warn(node, now);
        }
        let Some((files, changes)) = &mut self.files else {
            return;
        };
        if !changes.settled(files.stamp()) {
            return;
        }
        let cert = files.cert.display().to_string();
        match files.read() {
            Ok(certificate) => {
                self.serve(certificate, node);
                log::info!(
                    "--tls-cert {cert}: it has changed, and new connections see the new one"
                );
            }
            Err(error) => log::error!("the certificate from before goes on serving: {error:#}"),
        }
    }

    /// Reads these files, whether or not they have changed.
    fn on_reload(&mut self, files: CertificateFiles<'_>, node: &mut Node) {
        match self.read(files, node) {
            Ok(Some(cert)) => log::info!("SIGHUP: --tls-cert {} was read again", cert.display()),
            Ok(None) => {}
            Err(error) => {
                log::error!("SIGHUP: the certificate from before goes on serving: {error:#}");
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
        let chain =
            contents(&self.cert).map_err(|error| unreadable("--tls-cert", &self.cert, &error))?;
        let secret =
            contents(&self.key).map_err(|error| unreadable("--tls-key", &self.key, &error))?;
        Certificate::from_pem(&chain, &secret).map_err(|unusable| match unusable {
            Unusable::Certificate(problem) => anyhow!("--tls-cert {cert}: {problem}"),
            Unusable::Key(problem) => anyhow!("--tls-key {key}: {problem}"),
            Unusable::Mismatch => anyhow!(
                "--tls-key {key}: is not the key of --tls-cert {cert}; name the one that it was \
                 made with"
            ),
        })
    }

    /// Followed through symbolic links, which is what those who renew certificates replace.
    fn stamp(&self) -> Stamp {
        [&self.cert, &self.key].map(|file| {
            let metadata = fs::metadata(file).ok()?;
            Some((metadata.modified().ok()?, metadata.len(), inode(&metadata)))
        })
    }
}

/// Both files are read as secrets: the key may stand in the certificate's.
fn contents(file: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    let metadata = fs::metadata(file)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file")); // which might never end
    }
    let length = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
    secret_file::read(File::open(file)?, length.min(MAX_FILE))
}

fn unreadable(flag: &str, file: &Path, error: &io::Error) -> Error {
    anyhow!("{flag} {}: {error}; name a file that can be read", file.display())
}

#[cfg(unix)]
fn inode(metadata: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

#[cfg(not(unix))]
fn inode(_: &fs::Metadata) -> u64 {
    0
}

/// By what a change of the files can be seen: when each was written, its length, and which it is.
type Stamp = [Option<(SystemTime, u64, u64)>; 2];

/// Which state of the files was read last, and which was seen last.
struct Changes {
    read: Stamp,
    seen: Stamp,
}

impl Changes {
    fn since(read: Stamp) -> Self {
        Self { read, seen: read }
    }

    /// Whether it is time to read the files: they have changed, and are the same as at the last
    /// look. Whoever replaces both replaces one of them first.
    fn settled(&mut self, now: Stamp) -> bool {
        let rests = now == std::mem::replace(&mut self.seen, now);
        let changed = rests && now != self.read;
        if changed {
            self.read = now;
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(cert: u64, key: u64) -> Stamp {
        [cert, key].map(|length| Some((SystemTime::UNIX_EPOCH, length, 0)))
    }

    #[test]
    fn files_are_read_once_they_rest_and_once_for_each_change() {
        let mut changes = Changes::since(stamp(1, 1));
        assert!(!changes.settled(stamp(1, 1)));
        assert!(!changes.settled(stamp(2, 1)), "the key may follow");
        assert!(!changes.settled(stamp(2, 2)));
        assert!(changes.settled(stamp(2, 2)));
        assert!(!changes.settled(stamp(2, 2)));
        assert!(!changes.settled([None, None]));
        assert!(changes.settled([None, None]));
        assert!(!changes.settled([None, None]));
        assert!(!changes.settled(stamp(3, 3)));
        assert!(!changes.settled(stamp(2, 2)));
        assert!(changes.settled(stamp(2, 2)));
    }
}
