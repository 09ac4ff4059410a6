//! A certificate and its key, read from PEM and found to belong together before anyone is handed
//! them: libp2p panics over a key that is none.

use std::fmt;

use libp2p_websocket::tls;
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject},
};
use zeroize::Zeroizing;

/// What a relay that listens in TLS shows its clients.
#[derive(Clone, Debug)]
pub struct Certificate(tls::Config);

/// Why a certificate or a key is of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// There is something wrong with the certificate.
    Certificate(String),
    /// There is something wrong with the key.
    Key(String),
    /// The key is another certificate's.
    Mismatch,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certificate(problem) => write!(f, "the certificate's PEM {problem}"),
            Self::Key(problem) => write!(f, "the key's PEM {problem}"),
            Self::Mismatch => f.write_str("the key is another certificate's"),
        }
    }
}

impl std::error::Error for Unusable {}

impl Certificate {
    /// From a chain of certificates, the relay's own first, and the private key of that one; both
    /// in PEM. What else stands there is passed over, so both may come from one file.
    ///
    /// # Errors
    ///
    /// When one of them is none, or they do not belong together.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, Unusable> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
        let chain = match chain {
            Ok(chain) if chain.is_empty() => Err(pem::Error::NoItemsFound),
            read => read,
        };
        let chain = chain.map_err(|error| Unusable::Certificate(problem(&error, "CERTIFICATE")))?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|error| Unusable::Key(problem(&error, "PRIVATE KEY")))?;
        let key = Zeroizing::new(key);
        if PrivateKeyDer::try_from(key.secret_der()).is_err() {
            return Err(Unusable::Key(NO_KEY.into()));
        }
        let chain = chain.iter().map(|one| tls::Certificate::new(one.to_vec()));
        // A copy for libp2p-websocket and rustls, which do not wipe it.
        tls::Config::new(tls::PrivateKey::new(key.secret_der().to_vec()), chain)
            .map(Self)
            .map_err(|error| unusable(&error))
    }
}

impl From<Certificate> for tls::Config {
    fn from(certificate: Certificate) -> Self {
        certificate.0
    }
}

const NO_KEY: &str = "holds a key of no use; give it an ECDSA, Ed25519 or RSA key";

/// In words of our own: those of the error may have a part of the key in them.
fn problem(error: &pem::Error, name: &str) -> String {
    match error {
        pem::Error::NoItemsFound => {
            format!("has no BEGIN {name} in it; name a file in PEM that has")
        }
        _ => "is damaged; copy it again".into(),
    }
}

fn unusable(error: &tls::Error) -> Unusable {
    let tls::Error::Tls(cause) = error else {
        return Unusable::Certificate(format!("is of no use: {error}"));
    };
    match cause.downcast_ref() {
        Some(rustls::Error::InconsistentKeys(_)) => Unusable::Mismatch,
        Some(rustls::Error::InvalidCertificate(why)) => {
            Unusable::Certificate(format!("holds what is no certificate: {why}; copy it again"))
        }
        _ => Unusable::Key(NO_KEY.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(["relay.example.org".to_owned()]);
        let made = made.unwrap();
        (made.cert.pem(), made.key_pair.serialize_pem())
    }

    fn read(chain: &str, key: &str) -> Result<(), Unusable> {
        Certificate::from_pem(chain.as_bytes(), key.as_bytes()).map(|_| ())
    }

    /// As PEM under this name.
    fn under(name: &str, base64: &str) -> String {
        format!("-----BEGIN {name}-----\n{base64}\n-----END {name}-----\n")
    }

    #[test]
    fn a_chain_and_its_key_are_taken_from_two_files_or_one() {
        let ((chain, key), (issuer, _)) = (made(), made());
        assert_eq!(read(&chain, &key), Ok(()));
        assert_eq!(read(&format!("{chain}{issuer}"), &key), Ok(()));
        let both = format!("as they are\n{key}{chain}");
        assert_eq!(read(&both, &both), Ok(()));
    }

    #[test]
    fn what_is_of_no_use_is_told_and_never_a_panic() {
        let ((chain, key), (_, another)) = (made(), made());
        assert_eq!(read(&chain, &another), Err(Unusable::Mismatch));
        let broken = chain.replace("-----END", "-----FIN");
        let garbage = under("CERTIFICATE", "AAAA");
        for chain in ["", &key, &broken, &garbage, "\u{0}", &under("CERTIFICATE", "***")] {
            let refused = read(chain, &key);
            assert!(matches!(refused, Err(Unusable::Certificate(_))), "{chain}: {refused:?}");
        }
        let locked = under("ENCRYPTED PRIVATE KEY", "AAAA");
        let none = ["PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY"];
        let none = none.map(|name| [under(name, "AAAA"), under(name, ""), under(name, "MAMCAQA=")]);
        let mut keys: Vec<_> = none.as_flattened().iter().map(String::as_str).collect();
        let cut = &key[..key.len() / 2];
        keys.extend(["", &chain, &locked, cut]);
        for key in keys {
            let refused = read(&chain, key);
            let Err(Unusable::Key(problem)) = refused else {
                panic!("{key}: {refused:?}");
            };
            assert_eq!(problem.lines().count(), 1, "{problem}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whatever_stands_in_a_key_nothing_panics(base64 in "[A-Za-z0-9+/]{0,80}") {
            let (chain, _) = made();
            for name in ["PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY"] {
                let _ = read(&chain, &under(name, &base64));
            }
        }
    }
}
