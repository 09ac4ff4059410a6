//! Reads private keys in libp2p's protobuf, in base64, in kubo's configuration, and in PEM. Sans-IO.

use data_encoding::BASE64;
use libp2p::identity::{Keypair, ecdsa, ed25519, rsa, secp256k1};
use zeroize::Zeroizing;

const PEM: &[u8] = b"-----BEGIN";
const PEM_BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const PEM_END: &str = "-----END PRIVATE KEY-----";

/// The name of the field with the key in kubo's configuration.
const KUBO_FIELD: &str = "\"PrivKey\"";

/// The part of a PKCS #8 structure between its version and the 32 bytes of an Ed25519 key (RFC 8410, 7), and its
/// offset.
const ED25519_HEADER: [u8; 11] = [0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
const ED25519_OFFSET: usize = 5;

/// The part of an ECDSA key (RFC 5915, 3) before its 32 secret bytes, and its offset.
const ECDSA_HEADER: [u8; 5] = [0x02, 0x01, 0x01, 0x04, 0x20];
const ECDSA_OFFSET: usize = 2;

/// Reads a key in libp2p's protobuf; `None` if it is something else. Wipes each copy of the key that it makes.
///
/// `Keypair::from_protobuf_encoding` is not used: prost copies the key to the heap and does not wipe the copy.
pub fn parse_protobuf(bytes: &[u8]) -> Option<Keypair> {
    let (kind, rest) = bytes.strip_prefix(&[0x08])?.split_first()?;
    let rest = rest.strip_prefix(&[0x12])?;
    let (length, key) = unsigned_varint::decode::usize(rest).ok()?;
    let mut key = Zeroizing::new((key.len() == length).then(|| key.to_vec())?);
    Some(match kind {
        0 => rsa::Keypair::try_decode_pkcs1(&mut key).ok()?.into(),
        1 => ed25519::Keypair::try_from_bytes(&mut key).ok()?.into(),
        2 => {
            let secret = secp256k1::SecretKey::try_from_bytes(&mut *key).ok()?;
            secp256k1::Keypair::from(secret).into()
        }
        3 => {
            let secret = key.get(ECDSA_OFFSET..)?.strip_prefix(&ECDSA_HEADER)?.get(..32)?;
            ecdsa::Keypair::from(ecdsa::SecretKey::try_from_bytes(secret).ok()?).into()
        }
        _ => return None,
    })
}

/// Reads a key in libp2p's protobuf, the same in base64, in kubo's configuration, or an Ed25519 key in PEM. Returns the
/// protobuf and not a `Keypair`, because libp2p cannot encode an RSA key.
///
/// # Errors
///
/// What the bytes are instead, and the remedy.
pub fn decode(bytes: &[u8]) -> Result<Zeroizing<Vec<u8>>, &'static str> {
    if parse_protobuf(bytes).is_some() {
        return Ok(Zeroizing::new(bytes.to_vec()));
    }
    let text = str::from_utf8(bytes).unwrap_or_default().trim();
    if text.as_bytes().starts_with(PEM) {
        return parse_pem(text);
    }
    let base64 = match text.split_once(KUBO_FIELD) {
        Some((_, rest)) => rest.split('"').nth(1).unwrap_or_default(),
        None => text,
    };
    decode_base64(base64).filter(|bytes| parse_protobuf(bytes).is_some()).ok_or(
        "holds no libp2p private key; give kubo's config, an exported key, or an Ed25519 key in PEM",
    )
}

/// Decodes base64, which may have line breaks.
fn decode_base64(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let mut base64 = Zeroizing::new(Vec::with_capacity(text.len()));
    base64.extend(text.bytes().filter(|byte| !byte.is_ascii_whitespace()));
    BASE64.decode(&base64).ok().map(Zeroizing::new)
}

fn parse_pem(text: &str) -> Result<Zeroizing<Vec<u8>>, &'static str> {
    const ENCRYPTED: &str = "holds an encrypted key, and a passphrase cannot be entered here; decrypt it: openssl pkey \
                             -in FILE -out key.pem";
    const OTHER: &str = "holds no Ed25519 private key in PKCS #8 PEM; generate one: openssl genpkey -algorithm \
                         ed25519";
    if text.contains("ENCRYPTED") {
        return Err(ENCRYPTED);
    }
    let body = text.split_once(PEM_BEGIN).and_then(|(_, rest)| rest.split_once(PEM_END));
    let der = body.and_then(|(body, _)| decode_base64(body)).ok_or(OTHER)?;
    let rest = der.get(ED25519_OFFSET..).unwrap_or_default();
    let secret = rest.strip_prefix(&ED25519_HEADER).and_then(|key| key.get(..32)).ok_or(OTHER)?;
    let mut secret = Zeroizing::new(secret.to_vec());
    let keypair = Keypair::ed25519_from_bytes(secret.as_mut_slice()).map_err(|_| OTHER)?;
    keypair.to_protobuf_encoding().map(Zeroizing::new).map_err(|_| OTHER)
}

/// What a key file holds instead of a key in protobuf, and the remedy.
pub fn explain(bytes: &[u8]) -> &'static str {
    match decode(bytes) {
        Ok(_) => {
            "holds a key, but not in libp2p's protobuf; convert it: relaylet id --import FILE --identity NEW-FILE"
        }
        Err(problem) if bytes.trim_ascii_start().starts_with(PEM) => problem,
        Err(_) => {
            "holds no libp2p private key; restore it from a backup, or move it away to start with a new identity"
        }
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

    /// Made for this test.
    const RSA: &str = "\
        CAASpwkwggSjAgEAAoIBAQDGhhN3U1vqem2u8ZowVg+TIAk/yRpzLHP56euPTF4sqwQy2yVSX4WL9DdCK4Rklav0kZP6lxRkwQaJ\
        wV0+9wbQ/i+icc6ivW3j4SqoaJMOOhRt2unz0b/flW+HnC6k+3/rIPGumOPe8vixIVYEvVd8zqSiAnFQMqAmliAYd/4iJAk/ZsTf\
        ZlCC9FHkdtS/hwr/GFR2WI6Y+8z1BnUI8KxEn/60aVENNybi8qI89cY+tFcdFiF4dLVS1SGJOjwRHfK6Ub0ZXLciV13Zq62hop/t\
        oiIVG6AmzGNypresGGbm/oVRFVme2bIB/h5qL+13NnngmlEdhSCa/9ie7a4sp8lXAgMBAAECggEAFkpOnDrNWr4FW7u/6sZ2+DeE\
        IlfTsvPeT8S+kLfr6QsIrScjASU9ivHQVIsrUdnmVU8VNPFKtmdf8w61iBDXgJbRxWUO5QHs+UW6cu9O9614xr7qPtihuRp/y9Oy\
        /w5IFh/8UvTSvSE94DGUhXK3BIn1PUWV8IHGrp5zmxu5+p4rfZr+WJm8I+IGnAqIDZmolAw7O7zmf+D1BnnsXgaqnzrwzwe1j3pO\
        2vyLJETS5ZGtFpeU/qwnwJoCwbxP2Crwh5cBnASzQ/HCnBVPcx16O2uAxNgxk4Avdgj4+lmfO2E7XF9DzZ6ehMEGfHlypYhZFpGI\
        7Lq2+WQkBNe92gcpyQKBgQDvlrJcAB1kdwxmds3lLG62VSkWgjPuSGv8PqDAMnFW3oHppRjikxJLgZAK/m64I4jh7zaWNBbY+VUv\
        B0uyva+m50muC8n20K8bax4EjiTZLbD4wGGl3uvwxXOvEFWrL1DGbq8l2105dhGdBNnz0/51V2PCjbLykRj2eChIF1vS2QKBgQDU\
        H0k09nO0e7bZWk/agT2Vkv9SjN19jNGs7wB9wAoaw7MaQwu8c6STY+kwDBD5HUEtrVHBbP7sGbQnd17nhQxok7aFr16OjBpiniYA\
        3ttmmDiuuFAzzHxpWGJmO9MZViWj1O5l1HvSjUvoaHyR8pMF+5AE0fgBrZnPWSMz0fF/rwKBgE2AohHAt8FYAVrj85a+2NGCmtf9\
        Jm9eXhAq8jU6HA/NypiaH4KrsK9cKgxkYcyPMihkCXRtRTbK8RNVeNdJJRkImH0Es0B0ITDtZbhzgtf+P9E36l6NziUEundXAV9u\
        3uJRy7ajT3TXDLuOZjLJ0PaEXnEBBXISHdEc7Wrko3+BAoGAYsLCQd9xFZn4ExCCV1iPBMHxEE03none4aZRUzsDOVzeWZ7XqwEo\
        odsFqfIkQOgG/a5Rfz4xHloFT867KA4BLfuAIpP48WN3sWyygvs/qW+8DFUSOlu9nQqinbjC22wJkFLGQDEDCY/xxJ5JSWZoX4O1\
        lRjxYE6kay60Ph9EUk8CgYEAiG3qs1e/si9FDdXCd3Bml88vpDweHMhj0140bkxfTxXH6170GveYpGJW/2VB3oDy4lqZ9hslTukC\
        dODvV6uu9Hr4Dn7OoUA/upnjlfbr4w7JmLKnBLzNHB9Wv7DsTTCC3STktDAnG7c4Bysb/4iEcWJK0FSm7lTx2kAXdq7/+TI=";

    #[test]
    fn an_ed25519_key_in_pem_is_read() {
        for pem in RFC_8410 {
            let public = parse_protobuf(&decode(pem.as_bytes()).unwrap()).unwrap().public();
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
        // The program `base64` wraps its lines at 76 characters.
        let wrapped = [&base64[..76], &base64[76..]].join("\n");
        for bytes in [protobuf.clone(), wrapped.into(), format!("{base64}\n").into(), kubo.into()] {
            assert_eq!(*decode(&bytes).unwrap(), protobuf);
        }
    }

    #[test]
    fn an_rsa_key_in_kubos_configuration_is_imported() {
        let folder = tempfile::tempdir().unwrap();
        let [from, to] = ["config", "relaylet.key"].map(|name| folder.path().join(name));
        std::fs::write(&from, format!("{{ \"Identity\": {{ \"PrivKey\": \"{RSA}\" }} }}")).unwrap();
        let imported = super::super::import(&from, &to).unwrap();
        let protobuf = std::fs::read(&to).unwrap();
        assert_eq!(BASE64.encode(&protobuf), RSA);
        assert_eq!(parse_protobuf(&protobuf).unwrap().public(), imported.keypair.public());
    }

    #[test]
    fn each_type_of_key_is_read_from_protobuf() {
        for keypair in
            [Keypair::generate_ed25519(), Keypair::generate_secp256k1(), Keypair::generate_ecdsa()]
        {
            let protobuf = keypair.to_protobuf_encoding().unwrap();
            assert_eq!(parse_protobuf(&protobuf).unwrap().public(), keypair.public());
            for end in 0..protobuf.len() {
                assert!(parse_protobuf(&protobuf[..end]).is_none());
            }
            assert!(parse_protobuf(&[&*protobuf, &[0]].concat()).is_none());
        }
        // libp2p cannot encode an RSA key.
        let rsa = BASE64.decode(RSA.as_bytes()).unwrap();
        let expected = Keypair::from_protobuf_encoding(&rsa).unwrap().public();
        assert_eq!(parse_protobuf(&rsa).unwrap().public(), expected);
    }

    #[cfg(target_os = "linux")]
    const MASK: u8 = 0x5a;

    #[cfg(target_os = "linux")]
    fn mask(bytes: &[u8]) -> Vec<u8> {
        bytes.iter().map(|byte| byte ^ MASK).collect()
    }

    /// How many copies of a key are on the heap after `decode`. The keypair stores an ECDSA key in another byte order,
    /// and the test masks its own copy: only copies of the file's bytes are found.
    #[cfg(target_os = "linux")]
    fn copies_after(masked: &[u8], decode: impl Fn(&[u8]) -> Option<Keypair>) -> usize {
        use std::{fs, os::unix::fs::FileExt};

        let bytes = Zeroizing::new(mask(masked));
        let here = bytes.as_ptr() as u64;
        let keypair = decode(&bytes).unwrap();
        drop(bytes);

        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let mut ranges = maps.lines().filter_map(|line| {
            let (from, to) = line.split_once(' ')?.0.split_once('-')?;
            Some(u64::from_str_radix(from, 16).ok()?..u64::from_str_radix(to, 16).ok()?)
        });
        let heap = ranges.find(|range| range.contains(&here)).unwrap();
        let mut memory = vec![0; (heap.end - heap.start) as usize];
        let file = fs::File::open("/proc/self/mem").unwrap();
        file.read_exact_at(&mut memory, heap.start).unwrap();
        let secret = &masked[27..43];
        let is_copy = |window: &[u8]| window.iter().zip(secret).all(|(a, b)| a ^ MASK == *b);
        let copies = memory.windows(secret.len()).filter(|window| is_copy(window)).count();
        drop(keypair);
        copies
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn reading_a_key_leaves_no_copy_on_the_heap() {
        // On another thread: the copies made here are in another malloc arena.
        let encode = || Keypair::generate_ecdsa().to_protobuf_encoding().unwrap();
        let masked = std::thread::spawn(move || mask(&encode())).join().unwrap();
        let before = copies_after(&masked, |_| Some(Keypair::generate_ed25519()));
        // Another thread may overwrite a copy before the search, so one run without a copy proves nothing.
        assert!((0..16).all(|_| copies_after(&masked, parse_protobuf) <= before));
        // The search itself works. Once libp2p leaves no copy either, `parse_protobuf` is not needed.
        let decode = |bytes: &[u8]| Keypair::from_protobuf_encoding(bytes).ok();
        assert!((0..16).any(|_| copies_after(&masked, decode) > before));
    }

    #[test]
    fn bytes_without_a_supported_key_are_an_error_with_the_remedy() {
        for (bytes, problem) in [
            (&b""[..], "holds no libp2p private key"),
            (&[0xff; 100], "holds no libp2p private key"),
            (b"{ \"Identity\": { \"PrivKey\": } }", "holds no libp2p private key"),
            (b"{ \"PrivKey\"", "holds no libp2p private key"),
            (b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n", "decrypt it"),
            (b"-----BEGIN RSA PRIVATE KEY-----\n", "no Ed25519"),
            (b"-----BEGIN CERTIFICATE-----\n", "holds no Ed25519 private key"),
            (b"-----BEGIN PUBLIC KEY-----\n", "holds no Ed25519 private key"),
            (b"-----BEGIN PRIVATE KEY-----\nMC4CAQAw\n-----END PRIVATE KEY-----\n", "no Ed25519"),
            (b"-----BEGIN PRIVATE KEY-----\n\xc3\xa4\n-----END PRIVATE KEY-----\n", "no Ed25519"),
        ] {
            let error = decode(bytes).unwrap_err();
            assert!(error.contains(problem) && error.contains("; "), "{error}");
        }
    }
}
