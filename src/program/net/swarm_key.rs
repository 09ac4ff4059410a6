//! Private networks: a peer without the network's key cannot connect.
//!
//! Each side sends a nonce. All that follows on the TCP connection is encrypted with the nonce and the key (XSalsa20),
//! so that with another key the negotiation fails. See [the specification].
//!
//! [the specification]: https://github.com/libp2p/specs/blob/master/pnet/Private-Networks-PSK-V1.md

use std::{fs::File, io, path::Path};

use anyhow::{Context, Result};
use data_encoding::{BASE64, HEXLOWER_PERMISSIVE};
use libp2p::{
    futures::{AsyncRead, AsyncWrite, future::Either},
    pnet::{PnetConfig, PnetOutput},
};
use zeroize::Zeroizing;

use super::admission::handshake_failure::{Stage, StageError};
use crate::program::secret_file;

pub use libp2p::pnet::PreSharedKey;

/// How many bytes of a file are read: no encoding of a key takes more.
const MAX_FILE: usize = 1024;

/// The first line of a file.
const HEADING: &str = "/key/swarm/psk/1.0.0/";

/// A connection; encrypted in a private network, and only then boxed: most connections are not encrypted.
pub type Encrypted<S> = Either<S, Box<PnetOutput<S>>>;

/// Reads the key in `file`, in the format of go-ipfs (`/base16/`, `/base64/` or `/bin/`), and logs its fingerprint.
///
/// # Errors
///
/// When the file cannot be read or holds no such key; one line with the remedy.
pub fn load(file: &Path) -> Result<PreSharedKey> {
    let shown = file.display();
    let read = File::open(file).and_then(|opened| secret_file::read(opened, MAX_FILE));
    let bytes = read.with_context(|| {
        format!("--swarm-key {shown}: cannot be read; make it readable or name another file")
    })?;
    let key = parse(&bytes).with_context(|| {
        format!(
            "--swarm-key {shown}: holds no swarm key; its lines are {HEADING}, /base16/, and 64 \
             hexadecimal digits, the same on each machine of the network"
        )
    })?;
    log::info!("private network {}: peers with another key cannot connect", key.fingerprint());
    Ok(key)
}

fn parse(file: &[u8]) -> Option<PreSharedKey> {
    let mut parts = file.splitn(3, |byte| *byte == b'\n');
    let (heading, encoding, key) = (parts.next()?, parts.next()?, parts.next()?);
    let key = Zeroizing::new(match encoding.trim_ascii_end() {
        b"/base16/" => HEXLOWER_PERMISSIVE.decode(key.trim_ascii()).ok()?,
        b"/base64/" => BASE64.decode(key.trim_ascii()).ok()?,
        b"/bin/" => key.get(..32)?.to_vec(),
        _ => return None,
    });
    let key = PreSharedKey::new(key.as_slice().try_into().ok()?);
    (heading.trim_ascii_end() == HEADING.as_bytes()).then_some(key)
}

/// Exchanges nonces over `stream` and encrypts it, if there is a key.
///
/// # Errors
///
/// When the peer does not send its nonce.
pub async fn encrypt<S>(key: Option<PreSharedKey>, stream: S) -> io::Result<Encrypted<S>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let Some(key) = key else {
        return Ok(Either::Left(stream));
    };
    let encrypted = PnetConfig::new(key).handshake(stream).await;
    let failed = |error| StageError::wrap(Stage::SwarmKey, None, io::Error::other(error));
    encrypted.map(|stream| Either::Right(Box::new(stream))).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGITS: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191A1B1C1D1E1F";

    fn key() -> PreSharedKey {
        PreSharedKey::new(std::array::from_fn(|at| at as u8))
    }

    #[test]
    fn a_key_is_read_in_each_encoding_of_go_ipfs() {
        let bin: Vec<u8> = (0..32).collect();
        let base64 = BASE64.encode(&bin);
        for (encoding, text) in [
            ("/base16/", format!("{DIGITS}\n").as_bytes()),
            ("/base16/", DIGITS.as_bytes()),
            ("/base64/", base64.as_bytes()),
            ("/bin/", &bin),
        ] {
            for end in ["\n", "\r\n"] {
                let mut file = format!("{HEADING}{end}{encoding}{end}").into_bytes();
                file.extend(text);
                assert!(parse(&file) == Some(key()), "{encoding}");
            }
        }
        assert!(parse(key().to_key_file().as_bytes()) == Some(key()));
    }

    #[test]
    fn a_file_without_a_key_is_a_one_line_error_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("swarm.key");
        let digits = |digits: &str| format!("{HEADING}\n/base16/\n{digits}\n").into_bytes();
        for bytes in [
            vec![],
            b"\n\n\n".to_vec(),
            DIGITS.into(),
            HEADING.into(),
            digits(""),
            digits(&DIGITS[..62]),
            digits(&format!("{DIGITS}00")),
            digits(&"ä".repeat(32)),
            digits(&"+f".repeat(32)),
            format!("/key/swarm/psk/2.0.0/\n/base16/\n{DIGITS}\n").into(),
            format!("{HEADING}\n/base32/\n{DIGITS}\n").into(),
            format!("{HEADING}\n/bin/\ntoo short").into(),
            format!("{HEADING}\n/base64/\n{}\n", BASE64.encode(&[0; 31])).into(),
            vec![b'a'; 1 << 20],
        ] {
            std::fs::write(&file, &bytes).unwrap();
            let error = format!("{:#}", load(&file).unwrap_err());
            let name = format!("--swarm-key {}: holds no swarm key; ", file.display());
            assert!(error.starts_with(&name), "{error}");
            assert_eq!(error.lines().count(), 1);
        }
        std::fs::remove_file(&file).unwrap();
        let error = format!("{:#}", load(&file).unwrap_err());
        assert!(error.contains("cannot be read; make it readable"), "{error}");
    }
}
