//! The key file, which gives the relay the same peer id on each start.
//!
//! It is the protobuf encoding of a private key, as other libp2p programs write it. A container without a volume has
//! the key in the environment instead.

mod decode;

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use libp2p::identity::Keypair;
use tempfile::NamedTempFile;
use zeroize::Zeroizing;

use self::decode::{decode, explain, parse_protobuf};
use crate::program::secret_file;

/// The largest file that is read, in bytes. The largest key of libp2p, RSA with 8192 bits, takes about 5 KiB.
const MAX_FILE: usize = 16 * 1024;

/// The largest file that a key is imported from, in bytes: kubo's configuration is larger than a key.
const MAX_IMPORTED: usize = 256 * 1024;

/// The variable that holds the key, in protobuf and base64. It wins over the file.
pub const VARIABLE: &str = "RELAYLET_IDENTITY_KEY";

/// How many times to try to read a key that another program is writing, and how long to wait after each.
const RETRIES: usize = 40;
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// A key in protobuf.
type Secret = Zeroizing<Vec<u8>>;

/// The relay's key, and what to log about the file that holds it.
pub struct Identity {
    /// The key.
    pub keypair: Keypair,
    /// The path of its file, if that was just created.
    pub created: Option<PathBuf>,
    /// A problem with the file, with its remedy.
    pub warning: Option<String>,
}

/// Reads the key that [`VARIABLE`] holds. If that is unset or empty, reads or creates the one in `file`, as
/// `load_or_create_file` does.
///
/// # Errors
///
/// When the variable holds no key, and as `load_or_create_file`.
pub fn load_or_create(file: &Path) -> Result<Identity> {
    let Some(key) = env::var_os(VARIABLE).filter(|key| !key.is_empty()) else {
        return load_or_create_file(file, generate);
    };
    let key = Zeroizing::new(key.into_encoded_bytes());
    let keypair = decode(&key).ok().and_then(|key| parse_protobuf(&key)).with_context(|| {
        format!(
            "{VARIABLE}: holds no key; set it to the key file in base64: base64 -w 0 relaylet.key"
        )
    })?;
    Ok(Identity { keypair, created: None, warning: None })
}

/// A new key.
fn generate() -> io::Result<Secret> {
    Keypair::generate_ed25519().to_protobuf_encoding().map(Zeroizing::new).map_err(io::Error::other)
}

/// Reads the key in `from` in any encoding, and writes it to `file` as `load_or_create_file` does.
///
/// # Errors
///
/// When `from` holds no key, or `file` holds another one or cannot be written.
pub fn import(from: &Path, file: &Path) -> Result<Identity> {
    let shown = from.display();
    let read = File::open(from).and_then(|opened| secret_file::read(opened, MAX_IMPORTED));
    let bytes =
        read.with_context(|| format!("--import {shown}: cannot be read; make it readable"))?;
    let key = decode(&bytes).map_err(|problem| anyhow!("--import {shown}: {problem}"))?;
    let public = parse_protobuf(&key).map(|keypair| keypair.public());
    let identity = load_or_create_file(file, || Ok(key))?;
    if Some(identity.keypair.public()) != public {
        let shown = file.display();
        bail!("--identity {shown}: holds another key; name a file that does not exist");
    }
    Ok(identity)
}

/// Reads the key in `file`, or writes a `new` one if there is no such file. Of several programs that do so at once, one
/// creates the file and the others read it.
///
/// # Errors
///
/// When the file holds no key, or cannot be read or written. An existing file is never overwritten.
fn load_or_create_file(file: &Path, new: impl FnOnce() -> io::Result<Secret>) -> Result<Identity> {
    let shown = file.display();
    match fs::metadata(file) {
        // Reading a FIFO might block for ever.
        Ok(metadata) if !metadata.is_file() => bail!(
            "--identity {shown}: not a regular file; name one, or a path where there is no file yet"
        ),
        // Another program may have just created it.
        Ok(metadata) if metadata.len() == 0 => load_when_written(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let created = create(new, file, persist, sync_folder);
            let is_there = |error: &io::Error| error.kind() == io::ErrorKind::AlreadyExists;
            match created {
                Err(error) if error.downcast_ref().is_some_and(is_there) => load_when_written(file),
                created => created,
            }
        }
        _ => load(file),
    }
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
    let shown = file.display();
    let read = File::open(file).and_then(|opened| secret_file::read(opened, MAX_FILE));
    let bytes = read.with_context(|| {
        format!("--identity {shown}: cannot be read; make it readable or name another file")
    })?;
    let keypair = parse_protobuf(&bytes);
    let keypair = keypair.with_context(|| format!("--identity {shown}: {}", explain(&bytes)))?;
    Ok(Identity { keypair, created: None, warning: permission_warning("--identity", file) })
}

/// Writes a `new` key to a temporary file, which `persist` then renames, so that `file` is never seen incomplete.
///
/// Calls `sync` with the folder before the key is used: a rename is on disk only once the folder is, and clients know
/// the relay by this key.
fn create(
    new: impl FnOnce() -> io::Result<Secret>,
    file: &Path,
    persist: impl FnOnce(NamedTempFile, &Path) -> io::Result<()>,
    sync: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<Identity> {
    let shown = file.display();
    let write = || -> io::Result<(Keypair, Option<String>)> {
        let bytes = new()?;
        let keypair = parse_protobuf(&bytes).ok_or(io::ErrorKind::InvalidData)?;
        let folder = file.parent().filter(|folder| *folder != Path::new(""));
        let folder = folder.unwrap_or(Path::new("."));
        // Created with mode 0600.
        let mut temporary = NamedTempFile::new_in(folder)?;
        temporary.write_all(&bytes)?;
        temporary.as_file().sync_all()?;
        persist(temporary, file)?;
        // Some file systems cannot sync a folder. The key can be used all the same.
        let warning = sync(folder).err().map(|error| {
            format!(
                "--identity {shown}: syncing its folder failed, the key may be lost in a power failure: \
                 {error}; keep a copy"
            )
        });
        Ok((keypair, warning))
    };
    let (keypair, warning) = write().with_context(|| {
        format!("--identity {shown}: cannot be written; name a file in a writable folder")
    })?;
    let created = Some(fs::canonicalize(file).unwrap_or_else(|_| file.to_owned()));
    Ok(Identity { keypair, created, warning })
}

/// Renames the temporary file to `file` unless that exists.
///
/// Some file systems (network ones, FUSE) support neither `renameat2` without replacing nor hard links. There it copies
/// the file, which other programs may see incomplete.
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
    OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(to)?;
    let written = file.write_all(&bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(to); // created above, and incomplete
    }
    written
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// A warning if other users can read the key in `file`, which `flag` names.
pub(super) fn permission_warning(flag: &str, file: &Path) -> Option<String> {
    use rustix::fs::{Mode, StatVfs, StatVfsMountFlags, stat, statvfs};

    let mode = Mode::from_raw_mode(stat(file).ok()?.st_mode);
    if !mode.intersects(Mode::RWXG | Mode::RWXO) {
        return None;
    }
    let shown = file.display();
    let is_read_only = |it: StatVfs| it.f_flag.contains(StatVfsMountFlags::RDONLY);
    let remedy = match statvfs(file).is_ok_and(is_read_only) {
        true => "mount it readable by its owner only (in Kubernetes: defaultMode: 0400)".into(),
        false => format!("protect it: chmod 600 {shown}"),
    };
    Some(format!("{flag} {shown}: other users can read this key; {remedy}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_or_create_file(file: &Path) -> Result<Identity> {
        super::load_or_create_file(file, generate)
    }

    #[test]
    fn a_created_key_is_loaded_on_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        let made = load_or_create_file(&file).unwrap();
        assert!(made.created.unwrap().is_absolute());
        let found = load_or_create_file(&file).unwrap();
        assert_eq!(found.created, None);
        assert_eq!(found.warning, None);
        assert_eq!(found.keypair.public(), made.keypair.public());
    }

    #[test]
    fn the_folder_of_a_new_key_is_synced_once_the_key_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        let mut synced = Vec::new();
        let created = create(generate, &file, persist, |folder| {
            synced.push((folder.to_owned(), file.exists()));
            sync_folder(folder)
        });
        assert_eq!(created.unwrap().warning, None);
        assert_eq!(synced, [(folder.path().to_owned(), true)]);
        fs::remove_file(&file).unwrap();
        let created =
            create(generate, &file, persist, |_| Err(io::ErrorKind::Unsupported.into())).unwrap();
        let warning = created.warning.unwrap();
        assert!(warning.contains("relay.key") && warning.contains("keep a copy"), "{warning}");
    }

    #[test]
    fn a_file_system_that_cannot_rename_gets_a_copy_of_the_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        let copied = |temporary: NamedTempFile, file: &Path| copy(temporary.path(), file);
        let created = create(generate, &file, copied, sync_folder).unwrap();
        let found = load_or_create_file(&file).unwrap();
        assert_eq!(found.keypair.public(), created.keypair.public());
        assert_eq!(found.warning, None, "only its owner can read it");
        let again = create(generate, &file, copied, sync_folder).err().unwrap();
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
                    load_or_create_file(&file).unwrap().keypair.public()
                })
            });
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
    }

    /// On a file system where the key is copied: [`persist`].
    #[test]
    fn an_empty_file_that_another_program_is_writing_is_read_once_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        let key = generate().unwrap();
        for _ in 0..10 {
            File::create(&file).unwrap();
            thread::scope(|scope| {
                scope.spawn(|| fs::write(&file, &*key).unwrap());
                assert!(load_or_create_file(&file).is_ok());
            });
        }
    }

    #[test]
    fn a_fifo_or_a_folder_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        for file in [&fifo, folder.path()] {
            let error = load_or_create_file(file).err().unwrap().to_string();
            assert!(error.contains("not a regular file"), "{error}");
        }
    }

    #[test]
    fn a_key_in_another_encoding_is_an_error_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        let key = data_encoding::BASE64.encode(&generate().unwrap());
        let converted =
            "holds a key, but not in libp2p's protobuf; convert it: relaylet id --import";
        for (content, expected) in [
            (format!("{key}\n"), converted),
            (format!("{{ \"Identity\": {{ \"PrivKey\": \"{key}\" }} }}"), converted),
            ("-----BEGIN ENCRYPTED PRIVATE KEY-----\n".into(), "decrypt it: openssl pkey"),
        ] {
            fs::write(&file, content).unwrap();
            let error = load_or_create_file(&file).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn an_invalid_key_file_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        for content in [&b""[..], b"no key", &[0xff; 100]] {
            fs::write(&file, content).unwrap();
            let error = load_or_create_file(&file).err().unwrap().to_string();
            assert!(error.contains("relay.key") && error.contains("backup"), "{error}");
            assert_eq!(fs::read(&file).unwrap(), content);
        }
    }

    #[test]
    fn a_key_that_other_users_can_read_is_a_warning() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("relay.key");
        load_or_create_file(&file).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(load_or_create_file(&file).unwrap().warning.unwrap().contains("chmod 600"));
    }
}
