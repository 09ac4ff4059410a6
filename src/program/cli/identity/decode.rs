//! Reads private keys in libp2p's protobuf, in base64, in kubo's configuration, and in PEM. Sans-IO.

use data_encoding::BASE64;
use libp2p::identity::Keypair;
use zeroize::Zeroizing;

/// The first characters of keys in base64: RSA, Ed25519, secp256k1, ECDSA.
const IN_BASE64: [&[u8]; 4] = [b"CAAS", b"CAES", b"CAIS", b"CAMS"];

const PEM: &[u8] = b"-----BEGIN";
const PEM_BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const PEM_END: &str = "-----END PRIVATE KEY-----";

/// The name of the key in kubo's configuration.
const KUBO: &str = "\"PrivKey\"";

/// The part of a PKCS #8 structure between its version and the 32 bytes of an Ed25519 key (RFC 8410, 7), and how many
/// bytes precede that part.
const ED25519: [u8; 11] = [0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
const BEFORE: usize = 5;

/// Reads a key in libp2p's protobuf, that in base64, in kubo's configuration, or an Ed25519 key in PEM.
///
/// # Errors
///
/// What the bytes are instead, and the remedy.
pub fn decode(bytes: &[u8]) -> Result<Keypair, &'static str> {
    if let Ok(keypair) = Keypair::from_protobuf_encoding(bytes) {
        return Ok(keypair);
    }
    let text = str::from_utf8(bytes).unwrap_or_default().trim();
    if text.as_bytes().starts_with(PEM) {
        return of_pem(text);
    }
    let base64 = match text.split_once(KUBO) {
        Some((_, rest)) => rest.split('"').nth(1).unwrap_or_default(),
        None => text,
    };
    let decoded = BASE64.decode(base64.as_bytes()).map(Zeroizing::new);
    let keypair = decoded.ok().and_then(|bytes| Keypair::from_protobuf_encoding(&bytes).ok());
    keypair.ok_or(
        "holds no libp2p private key; name kubo's config, an exported key, or Ed25519 in PEM",
    )
}

fn of_pem(text: &str) -> Result<Keypair, &'static str> {
    const ENCRYPTED: &str = "holds an encrypted key, and a passphrase cannot be entered here; decrypt it: openssl pkey \
                             -in FILE -out key.pem";
    const OTHER: &str = "holds a key in PEM that is not Ed25519 in PKCS #8; generate one: openssl genpkey -algorithm \
                         ed25519";
    if text.contains("ENCRYPTED") {
        return Err(ENCRYPTED);
    }
    let body = text.split_once(PEM_BEGIN).and_then(|(_, rest)| rest.split_once(PEM_END));
    let (body, _) = body.ok_or(OTHER)?;
    let base64 = body.bytes().filter(|byte| !byte.is_ascii_whitespace());
    let base64 = Zeroizing::new(base64.collect::<Vec<_>>());
    let der = Zeroizing::new(BASE64.decode(&base64).map_err(|_| OTHER)?);
    let rest = der.get(BEFORE..).and_then(|rest| rest.strip_prefix(&ED25519)).ok_or(OTHER)?;
    let mut secret = Zeroizing::new(rest.get(..32).ok_or(OTHER)?.to_vec());
    Keypair::ed25519_from_bytes(secret.as_mut_slice()).map_err(|_| OTHER)
}

/// What a key file holds instead of a key in protobuf, and the remedy.
pub fn not_a_key(bytes: &[u8]) -> &'static str {
    let text = bytes.trim_ascii_start();
    let has = |part: &[u8]| text.windows(part.len()).any(|window| window == part);
    if text.starts_with(PEM) {
        "holds a key in PEM, not in libp2p's protobuf; convert it: relaylet id --import FILE --identity relaylet.key"
    } else if text.starts_with(b"{") && has(b"PrivKey") {
        "holds kubo's configuration; take the key out of it: relaylet id --import FILE --identity relaylet.key"
    } else if IN_BASE64.iter().any(|prefix| text.starts_with(prefix)) {
        "holds a key in base64; decode it: relaylet id --import FILE --identity relaylet.key"
    } else {
        "holds no libp2p private key; restore it from a backup, or move it away to start with a new identity"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8410, 10.3: the private key alone, and followed by its public key.
    const RFC_8410: [&str; 2] = [
        "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
         -----END PRIVATE KEY-----\n",
        "-----BEGIN PRIVATE KEY-----\nMHICAQEwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
         oB8wHQYKKoZIhvcNAQkJFDEPDA1DdXJkbGUgQ2hhaXJzgSEAGb9ECWmEzf6FQbrB\nZ9w7lshQhqowtrbLDFw4rXAxZuE=\n\
         -----END PRIVATE KEY-----\n",
    ];
    const PUBLIC: &[u8] = &[
        0x19, 0xbf, 0x44, 0x09, 0x69, 0x84, 0xcd, 0xfe, 0x85, 0x41, 0xba, 0xc1, 0x67, 0xdc, 0x3b,
        0x96, 0xc8, 0x50, 0x86, 0xaa, 0x30, 0xb6, 0xb6, 0xcb, 0x0c, 0x5c, 0x38, 0xad, 0x70, 0x31,
        0x66, 0xe1,
    ];

    #[test]
    fn an_ed25519_key_in_pem_is_read() {
        for pem in RFC_8410 {
            let public = decode(pem.as_bytes()).unwrap().public();
            assert_eq!(public.try_into_ed25519().unwrap().to_bytes(), PUBLIC);
        }
    }

    #[test]
    fn a_key_is_read_from_protobuf_base64_and_kubos_configuration() {
        let keypair = Keypair::generate_ed25519();
        let protobuf = keypair.to_protobuf_encoding().unwrap();
        let base64 = BASE64.encode(&protobuf);
        let kubo = format!(
            "{{\n  \"Identity\": {{\n    \"PeerID\": \"12D3\",\n    \"PrivKey\": \"{base64}\"\n  }}\n}}\n"
        );
        for bytes in [protobuf, format!("{base64}\n").into(), base64.into(), kubo.into()] {
            assert_eq!(decode(&bytes).unwrap().public(), keypair.public());
        }
    }

    #[test]
    fn bytes_without_a_supported_key_are_an_error_with_the_remedy() {
        for (bytes, problem) in [
            (&b""[..], "holds no libp2p private key"),
            (&[0xff; 100], "holds no libp2p private key"),
            (b"{ \"Identity\": { \"PrivKey\": } }", "holds no libp2p private key"),
            (b"{ \"PrivKey\"", "holds no libp2p private key"),
            (b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n", "decrypt it"),
            (b"-----BEGIN RSA PRIVATE KEY-----\n", "not Ed25519"),
            (b"-----BEGIN PRIVATE KEY-----\nMC4CAQAw\n-----END PRIVATE KEY-----\n", "not Ed25519"),
            (b"-----BEGIN PRIVATE KEY-----\n\xc3\xa4\n-----END PRIVATE KEY-----\n", "not Ed25519"),
        ] {
            let told = decode(bytes).unwrap_err();
            assert!(told.contains(problem) && told.contains("; "), "{told}");
        }
    }
}
