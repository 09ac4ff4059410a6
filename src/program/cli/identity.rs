//! The key file, which gives the relay the same peer id on each start.
//!
//! It is the protobuf encoding of a private key, as other libp2p programs write it.

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

/// The largest file that is read, in bytes. The largest key of libp2p, RSA with 8192 bits, takes about 5 KiB.
const MAX_FILE: usize = 16 * 1024;

/// How often to retry reading a key that another program is writing, and how long to wait before each.
const RETRIES: usize = 40;
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// The relay's key, and what to log about its file.
pub struct Identity {
    /// The key.
    pub keypair: Keypair,
    /// The path of its file, if that was just created.
    pub created: Option<PathBuf>,
    /// A problem with the file, with its remedy.
    pub warning: Option<String>,
}

/// Reads the key in `file`, or creates it if there is no such file. Of several programs that do so at once, one creates
/// the file and the others read it.
///
/// # Errors
///
/// When the file holds no key, or cannot be read or written. An existing file is never overwritten.
pub fn load_or_create(file: &Path) -> Result<Identity> {
    let shown = file.display();
    match fs::metadata(file) {
        Ok(metadata) if metadata.is_file() => load(file),
        // Reading a FIFO might block for ever.
        Ok(_) => bail!(
            "--identity {shown}: not a regular file; name one, or a path where there is no file yet"
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let created = create(file, persist, sync_folder);
            let exists = |error: &io::Error| error.kind() == io::ErrorKind::AlreadyExists;
            match created {
                Err(error) if error.downcast_ref().is_some_and(exists) => load_when_written(file),
                created => created,
            }
        }
        Err(error) => Err(error).with_context(|| unreadable(file)),
    }
}

fn unreadable(file: &Path) -> String {
    format!("--identity {}: cannot be read; make it readable or name another file", file.display())
}

/// Reads a file that another program has just created and may still be writing to: see [`persist`].
fn load_when_written(file: &Path) -> Result<Identity> {
    for _ in 0..RETRIES {
        if let Ok(identity) = load(file) {
            return Ok(identity);
        }
        thread::sleep(RETRY_INTERVAL);
    }
    load(file)
}

fn load(file: &Path) -> Result<Identity> {
    let read = File::open(file).and_then(|opened| secret_file::read(opened, MAX_FILE));
    let bytes = read.with_context(|| unreadable(file))?;
    let Ok(keypair) = Keypair::from_protobuf_encoding(&bytes) else {
        bail!("--identity {}: {}", file.display(), not_a_key(&bytes));
    };
    Ok(Identity { keypair, created: None, warning: permission_warning("--identity", file) })
}

/// What a file holds instead of a key in protobuf, and the remedy.
fn not_a_key(bytes: &[u8]) -> &'static str {
    /// The first characters of keys in base64: RSA, Ed25519, secp256k1, ECDSA.
    const BASE64: [&[u8]; 4] = [b"CAAS", b"CAES", b"CAIS", b"CAMS"];
    let text = bytes.trim_ascii_start();
    let has = |part: &[u8]| text.windows(part.len()).any(|window| window == part);
    if text.starts_with(b"-----BEGIN") {
        "holds a key in PEM, not in libp2p's protobuf; export it with kubo (ipfs key export), or name a path where \
         there is no file to start with a new identity"
    } else if text.starts_with(b"{") && has(b"PrivKey") {
        "holds kubo's configuration; decode the key in it: jq -r .Identity.PrivKey config | base64 -d > relaylet.key"
    } else if BASE64.iter().any(|prefix| text.starts_with(prefix)) {
        "holds a key in base64; decode it: base64 -d < FILE > relaylet.key"
    } else {
        "holds no libp2p private key; restore it from a backup, or move it away to start with a new identity"
    }
}

/// Writes a new key to a temporary file, which `persist` then renames, so that `file` is never seen incomplete.
///
/// `sync` is called with the folder before the key is used: a rename is on disk only once the folder is, and clients know
/// the relay by this key.
fn create(
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
        // Created with mode 0600.
        let mut temporary = NamedTempFile::new_in(folder)?;
        temporary.write_all(&bytes)?;
        temporary.as_file().sync_all()?;
        persist(temporary, file)?;
        // Some file systems cannot sync a folder. The key can be used all the same.
        let unsynced = sync(folder).err().map(|error| {
            format!(
                "--identity {shown}: syncing its folder failed, the key may be lost with a power failure: \
                 {error}; keep a copy"
            )
        });
        Ok((keypair, unsynced))
    };
    let (keypair, warning) = write().map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => error.into(),
        _ => Error::new(error).context(format!(
            "--identity {shown}: cannot be written; name a file in a writable folder"
        )),
    })?;
    Ok(Identity {
        keypair,
        created: Some(fs::canonicalize(file).unwrap_or_else(|_| file.to_owned())),
        warning,
    })
}

/// Renames the temporary file to `file` unless that exists.
///
/// Some file systems (network ones, FUSE) support neither of the system calls for that. There it copies the file, which
/// others may see incomplete.
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
        let _ = fs::remove_file(to); // created above, and incomplete
    }
    written
}

#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Other systems cannot open a folder as a file.
#[cfg(not(unix))]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

/// A warning if other users can read the key in `file`, which `flag` names.
pub(super) fn permission_warning(flag: &str, file: &Path) -> Option<String> {
    is_readable_by_others(file).then(|| {
        let shown = file.display();
        let remedy = match is_read_only(file) {
            true => "mount it readable by its owner only (in Kubernetes: defaultMode: 0400)".into(),
            false => format!("protect it: chmod 600 {shown}"),
        };
        format!("{flag} {shown}: other users can read this key; {remedy}")
    })
}

/// Whether its file system is mounted read-only.
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
fn is_readable_by_others(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(file).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0)
}

#[cfg(not(unix))]
fn is_readable_by_others(_: &Path) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_created_key_is_loaded_on_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        let made = load_or_create(&file).unwrap();
        assert!(made.created.unwrap().is_absolute());
        let found = load_or_create(&file).unwrap();
        assert_eq!(found.created, None);
        assert_eq!(found.warning, None);
        assert_eq!(found.keypair.public(), made.keypair.public());
    }

    #[test]
    fn the_folder_of_a_new_key_is_synced_once_the_key_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        let mut synced = Vec::new();
        let created = create(&file, persist, |folder| {
            synced.push((folder.to_owned(), file.exists()));
            sync_folder(folder)
        });
        assert_eq!(created.unwrap().warning, None);
        assert_eq!(synced, [(folder.path().to_owned(), true)]);
        fs::remove_file(&file).unwrap();
        let created = create(&file, persist, |_| Err(io::ErrorKind::Unsupported.into())).unwrap();
        let warning = created.warning.unwrap();
        assert!(warning.contains("relay.key") && warning.contains("keep a copy"), "{warning}");
    }

    #[test]
    fn a_file_system_that_cannot_rename_gets_a_copy_of_the_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        let copied = |temporary: NamedTempFile, file: &Path| copy(temporary.path(), file);
        let created = create(&file, copied, sync_folder).unwrap();
        let found = load_or_create(&file).unwrap();
        assert_eq!(found.keypair.public(), created.keypair.public());
        assert_eq!(found.warning, None, "only its owner can read it");
        let again = create(&file, copied, sync_folder).err().unwrap();
        let kind = again.downcast_ref::<io::Error>().map(io::Error::kind);
        assert_eq!(kind, Some(io::ErrorKind::AlreadyExists));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn concurrent_starts_on_one_volume_share_one_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        let start = std::sync::Barrier::new(6);
        let keys: Vec<_> = thread::scope(|scope| {
            let starts = [(); 6].map(|()| {
                scope.spawn(|| {
                    start.wait();
                    load_or_create(&file).unwrap().keypair.public()
                })
            });
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
    }

    #[cfg(unix)]
    #[test]
    fn a_fifo_or_a_folder_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        for file in [&fifo, folder.path()] {
            let error = load_or_create(file).err().unwrap().to_string();
            assert!(error.contains("not a regular file"), "{error}");
        }
    }

    #[test]
    fn a_key_in_another_encoding_is_an_error_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        for (content, told) in [
            ("-----BEGIN PRIVATE KEY-----\n", "holds a key in PEM"),
            ("-----BEGIN ENCRYPTED PRIVATE KEY-----\n", "holds a key in PEM"),
            ("{ \"Identity\": { \"PrivKey\": \"CAESQ\" } }", "holds kubo's configuration"),
            ("CAESQFwP\n", "holds a key in base64"),
        ] {
            fs::write(&file, content).unwrap();
            let error = load_or_create(&file).err().unwrap().to_string();
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn an_invalid_key_file_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        for content in [&b""[..], b"no key", &[0xff; 100]] {
            fs::write(&file, content).unwrap();
            let error = load_or_create(&file).err().unwrap().to_string();
            assert!(error.contains("relay.key") && error.contains("backup"), "{error}");
            assert_eq!(fs::read(&file).unwrap(), content);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_key_that_other_users_can_read_is_a_warning() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        load_or_create(&file).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(load_or_create(&file).unwrap().warning.unwrap().contains("chmod 600"));
    }
}
