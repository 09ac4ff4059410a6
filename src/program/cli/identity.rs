//! The key file: who the relay is, from one start to the next.
//!
//! The protobuf encoding of a private key, as other libp2p programs write it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Error, Result, bail};
use libp2p::identity::Keypair;
use tempfile::NamedTempFile;
use zeroize::Zeroizing;

use crate::program::secret_file;

/// No key that libp2p knows takes more: RSA with 8192 bits has about 5 KiB.
const MAX_FILE: usize = 16 * 1024;

/// How often, and after which time each, to look again for a key that another program is writing.
const WRITTEN_AFTER_TRIES: usize = 40;
const TRY_AGAIN: Duration = Duration::from_millis(50);

/// The relay's key, and what an operator should know about its file.
pub struct Identity {
    /// The key.
    pub keypair: Keypair,
    /// Where it was written, if it was made just now.
    pub new: Option<PathBuf>,
    /// What is not as it should be.
    pub warning: Option<String>,
}

/// Reads the key in `file`, or makes one if there is no such file. Of several programs that do so at once,
/// one makes it, and the others read that.
///
/// # Errors
///
/// When there is a file and no key in it, or it cannot be read or written. What is there is never
/// overwritten.
pub fn load_or_make(file: &Path) -> Result<Identity> {
    let shown = file.display();
    match fs::metadata(file) {
        Ok(metadata) if metadata.is_file() => load(file),
        // A FIFO might never be written to.
        Ok(_) => bail!(
            "--identity {shown}: is no regular file; name one, or a path where there is none yet"
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let made = make(file, persist, sync_folder);
            let is_there = |error: &io::Error| error.kind() == io::ErrorKind::AlreadyExists;
            match made {
                Err(error) if error.downcast_ref().is_some_and(is_there) => load_when_written(file),
                made => made,
            }
        }
        Err(error) => Err(error).with_context(|| unreadable(file)),
    }
}

fn unreadable(file: &Path) -> String {
    format!("--identity {}: cannot be read; make it readable or name another file", file.display())
}

/// Another program has just made the file, and may still be writing to it: see [`persist`].
fn load_when_written(file: &Path) -> Result<Identity> {
    for _ in 0..WRITTEN_AFTER_TRIES {
        if let Ok(identity) = load(file) {
            return Ok(identity);
        }
        thread::sleep(TRY_AGAIN);
    }
    load(file)
}

fn load(file: &Path) -> Result<Identity> {
    let read = File::open(file).and_then(|opened| secret_file::read(opened, MAX_FILE));
    let bytes = read.with_context(|| unreadable(file))?;
    let Ok(keypair) = Keypair::from_protobuf_encoding(&bytes) else {
        bail!("--identity {}: {}", file.display(), what_else(&bytes));
    };
    Ok(Identity { keypair, new: None, warning: open_to_others("--identity", file) })
}

/// What a file holds that holds no key as it should be, and the remedy.
fn what_else(bytes: &[u8]) -> &'static str {
    /// How keys begin that are in protobuf, in base64: RSA, Ed25519, secp256k1, ECDSA.
    const BASE64: [&[u8]; 4] = [b"CAAS", b"CAES", b"CAIS", b"CAMS"];
    let text = bytes.trim_ascii_start();
    let has = |part: &[u8]| text.windows(part.len()).any(|window| window == part);
    if text.starts_with(b"-----BEGIN") {
        "is a key in PEM, and has to be one in libp2p's protobuf; have kubo export it so (ipfs key export), or \
         name a path where there is no file to start under a new identity"
    } else if text.starts_with(b"{") && has(b"PrivKey") {
        "is kubo's configuration; decode the key in it: jq -r .Identity.PrivKey config | base64 -d > relaylet.key"
    } else if BASE64.iter().any(|prefix| text.starts_with(prefix)) {
        "is a key in base64; decode it: base64 -d < FILE > relaylet.key"
    } else {
        "holds no libp2p private key; restore it from a backup, or move it away to start under a new identity"
    }
}

/// Writes a new key to a file of its own first, and has `persist` put that in its place: `file` is there whole
/// or not at all.
///
/// A rename is on the disk only once the folder is, and clients know the relay by this key: `sync` is
/// called with the folder before the key is used.
fn make(
    file: &Path,
    persist: impl FnOnce(NamedTempFile, &Path) -> io::Result<()>,
    sync: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<Identity> {
    let shown = file.display();
    let write = || -> io::Result<(Keypair, Option<String>)> {
        let keypair = Keypair::generate_ed25519();
        let bytes = keypair.to_protobuf_encoding().map_err(io::Error::other)?;
        let bytes = Zeroizing::new(bytes);
        let folder = match file.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        // Made with mode 0600, and never put in the place of a file that is there.
        let mut temporary = NamedTempFile::new_in(folder)?;
        temporary.write_all(&bytes)?;
        temporary.as_file().sync_all()?;
        persist(temporary, file)?;
        // Some file systems cannot sync a folder. The key is good all the same.
        let unsynced = sync(folder).err().map(|error| {
            format!(
                "--identity {shown}: may be lost if power fails now, for its folder cannot be synced: \
                 {error}; keep a copy"
            )
        });
        Ok((keypair, unsynced))
    };
    let (keypair, warning) = write().map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => error.into(),
        _ => Error::new(error).context(format!(
            "--identity {shown}: cannot be written; name a file in a folder that can be"
        )),
    })?;
    Ok(Identity {
        keypair,
        new: Some(fs::canonicalize(file).unwrap_or_else(|_| file.to_owned())),
        warning,
    })
}

/// Puts the file in its place, where there is none.
///
/// Some file systems (of networks, in FUSE) can neither link nor rename so: there it is copied, and may be
/// seen while it is not whole.
fn persist(temporary: NamedTempFile, file: &Path) -> io::Result<()> {
    match temporary.persist_noclobber(file) {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Err(error.error),
        Err(error) => copy(error.file.path(), file),
    }
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let bytes = secret_file::read(File::open(from)?, MAX_FILE)?;
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(to)?;
    let written = file.write_all(&bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(to); // ours, and not whole
    }
    written
}

#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Elsewhere a folder cannot be opened as a file.
#[cfg(not(unix))]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

/// That others can read the key in `file`, which a flag named, if they can.
pub(super) fn open_to_others(flag: &str, file: &Path) -> Option<String> {
    readable_by_others(file).then(|| {
        let shown = file.display();
        let remedy = match is_read_only(file) {
            true => "have it mounted for its owner alone (in Kubernetes: defaultMode: 0400)".into(),
            false => format!("protect it: chmod 600 {shown}"),
        };
        format!("{flag} {shown}: others can read this key; {remedy}")
    })
}

/// Whether its file system cannot be written to.
#[cfg(unix)]
fn is_read_only(file: &Path) -> bool {
    use rustix::fs::{StatVfsMountFlags, statvfs};
    statvfs(file).is_ok_and(|system| system.f_flag.contains(StatVfsMountFlags::RDONLY))
}

#[cfg(not(unix))]
fn is_read_only(_: &Path) -> bool {
    false
}

#[cfg(unix)]
fn readable_by_others(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(file).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0)
}

#[cfg(not(unix))]
fn readable_by_others(_: &Path) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_was_made_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        let made = load_or_make(&file).unwrap();
        assert!(made.new.unwrap().is_absolute());
        let found = load_or_make(&file).unwrap();
        assert_eq!(found.new, None);
        assert_eq!(found.warning, None);
        assert_eq!(found.keypair.public(), made.keypair.public());
    }

    #[test]
    fn the_folder_of_a_new_key_is_synced_once_the_key_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        let mut synced = Vec::new();
        let made = make(&file, persist, |folder| {
            synced.push((folder.to_owned(), file.exists()));
            sync_folder(folder)
        });
        assert_eq!(made.unwrap().warning, None);
        assert_eq!(synced, [(folder.path().to_owned(), true)]);
        fs::remove_file(&file).unwrap();
        let made = make(&file, persist, |_| Err(io::ErrorKind::Unsupported.into())).unwrap();
        let warning = made.warning.unwrap();
        assert!(warning.contains("relay.key") && warning.contains("keep a copy"), "{warning}");
    }

    #[test]
    fn a_file_system_that_cannot_rename_gets_a_copy_of_the_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        let copied = |temporary: NamedTempFile, file: &Path| copy(temporary.path(), file);
        let made = make(&file, copied, sync_folder).unwrap();
        let found = load_or_make(&file).unwrap();
        assert_eq!(found.keypair.public(), made.keypair.public());
        assert_eq!(found.warning, None, "it is the owner's alone");
        let again = make(&file, copied, sync_folder).err().unwrap();
        let kind = again.downcast_ref::<io::Error>().map(io::Error::kind);
        assert_eq!(kind, Some(io::ErrorKind::AlreadyExists));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn those_that_start_at_once_on_one_volume_have_one_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        let start = std::sync::Barrier::new(6);
        let keys: Vec<_> = thread::scope(|scope| {
            let starts = [(); 6].map(|()| {
                scope.spawn(|| {
                    start.wait();
                    load_or_make(&file).unwrap().keypair.public()
                })
            });
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_file_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        for file in [&fifo, folder.path()] {
            let error = load_or_make(file).err().unwrap().to_string();
            assert!(error.contains("is no regular file"), "{error}");
        }
    }

    #[test]
    fn a_key_in_another_form_is_told_with_what_makes_one_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        for (content, told) in [
            ("-----BEGIN PRIVATE KEY-----\n", "is a key in PEM"),
            ("-----BEGIN ENCRYPTED PRIVATE KEY-----\n", "is a key in PEM"),
            ("{ \"Identity\": { \"PrivKey\": \"CAESQ\" } }", "is kubo's configuration"),
            ("CAESQFwP\n", "is a key in base64"),
        ] {
            fs::write(&file, content).unwrap();
            let error = load_or_make(&file).err().unwrap().to_string();
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn a_file_without_a_key_is_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        for content in [&b""[..], b"no key", &[0xff; 100]] {
            fs::write(&file, content).unwrap();
            let error = load_or_make(&file).err().unwrap().to_string();
            assert!(error.contains("relay.key") && error.contains("backup"), "{error}");
            assert_eq!(fs::read(&file).unwrap(), content);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_key_that_others_can_read_is_a_warning() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        load_or_make(&file).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(load_or_make(&file).unwrap().warning.unwrap().contains("chmod 600"));
    }
}
