//! The key file: who the relay is, from one start to the next.
//!
//! The protobuf encoding of a private key, as other libp2p programs write it.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use libp2p::identity::Keypair;
use zeroize::Zeroizing;

use crate::program::secret_file;

/// No key that libp2p knows takes more: RSA with 8192 bits has about 5 KiB.
const MAX_FILE: usize = 16 * 1024;

/// The relay's key, and what an operator should know about its file.
pub struct Identity {
    /// The key.
    pub keypair: Keypair,
    /// Where it was written, if it was made just now.
    pub new: Option<PathBuf>,
    /// What is not as it should be.
    pub warning: Option<String>,
}

/// Reads the key in `file`, or makes one if there is no such file.
///
/// # Errors
///
/// When there is a file and no key in it, or it cannot be read or written. What is there is never
/// overwritten.
pub fn load_or_make(file: &Path) -> Result<Identity> {
    match File::open(file) {
        Ok(opened) => load(file, opened),
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(file, sync_folder),
        Err(error) => Err(error).with_context(|| {
            let file = file.display();
            format!("--identity {file}: cannot be read; make it readable or name another file")
        }),
    }
}

fn load(file: &Path, opened: File) -> Result<Identity> {
    let shown = file.display();
    let bytes = secret_file::read(opened, MAX_FILE)
        .with_context(|| format!("--identity {shown}: cannot be read"))?;
    let Ok(keypair) = Keypair::from_protobuf_encoding(&bytes) else {
        bail!(
            "--identity {shown}: holds no libp2p private key; restore it from a backup, or move \
             it away to start under a new identity"
        );
    };
    Ok(Identity { keypair, new: None, warning: open_to_others("--identity", file) })
}

/// Writes a new key to a file of its own first: `file` is there whole or not at all.
///
/// A rename is on the disk only once the folder is, and clients know the relay by this key: `sync` is
/// called with the folder before the key is used.
fn make(file: &Path, sync: impl FnOnce(&Path) -> io::Result<()>) -> Result<Identity> {
    let write = || -> io::Result<(Keypair, Option<String>)> {
        let keypair = Keypair::generate_ed25519();
        let bytes = keypair.to_protobuf_encoding().map_err(io::Error::other)?;
        let bytes = Zeroizing::new(bytes);
        let folder = match file.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        // Made with mode 0600, and never put in the place of a file that is there.
        let mut temporary = tempfile::NamedTempFile::new_in(folder)?;
        temporary.write_all(&bytes)?;
        temporary.as_file().sync_all()?;
        temporary.persist_noclobber(file)?;
        // Some file systems cannot sync a folder. The key is good all the same.
        let unsynced = sync(folder).err().map(|error| {
            let file = file.display();
            format!(
                "--identity {file}: may be lost if power fails now, for its folder cannot be synced: \
                 {error}; keep a copy"
            )
        });
        Ok((keypair, unsynced))
    };
    let (keypair, warning) = write().with_context(|| {
        let file = file.display();
        format!("--identity {file}: cannot be written; name a file in a folder that can be")
    })?;
    Ok(Identity {
        keypair,
        new: Some(fs::canonicalize(file).unwrap_or_else(|_| file.to_owned())),
        warning,
    })
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
        let file = file.display();
        format!("{flag} {file}: others can read this key; protect it: chmod 600 {file}")
    })
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
        let made = make(&file, |folder| {
            synced.push((folder.to_owned(), file.exists()));
            sync_folder(folder)
        });
        assert_eq!(made.unwrap().warning, None);
        assert_eq!(synced, [(folder.path().to_owned(), true)]);
        fs::remove_file(&file).unwrap();
        let made = make(&file, |_| Err(io::ErrorKind::Unsupported.into())).unwrap();
        let warning = made.warning.unwrap();
        assert!(warning.contains("relay.key") && warning.contains("keep a copy"), "{warning}");
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
