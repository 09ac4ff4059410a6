//! The certificate of `/tls/ws` and its key: read from PEM and checked against each other; what is wrong with
//! them, and the remedy.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_rustls::rustls::{
    self, ServerConfig,
    crypto::ring,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
    version::{TLS12, TLS13},
};
use libp2p::{Multiaddr, multiaddr::Protocol};
use x509_parser::{extensions::GeneralName, time::ASN1Time};
use zeroize::Zeroizing;

use crate::wall_clock;

/// What a relay that listens in TLS presents to its clients.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// The TLS configuration that presents it.
    pub config: Arc<ServerConfig>,
    /// When it is valid, and for which names.
    pub validity: Validity,
}

/// When a certificate is valid, and for which names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The first moment at which it is valid.
    pub not_before: SystemTime,
    /// The last moment at which it is valid.
    pub not_after: SystemTime,
    /// The DNS names of its subject, in lower case; the first label may be a `*`.
    pub names: Vec<String>,
}

/// Why a certificate or a key cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// There is something wrong with the certificate.
    #[error("the certificate's PEM {0}")]
    Certificate(String),
    /// There is something wrong with the key.
    #[error("the key's PEM {0}")]
    Key(String),
    /// The key is another certificate's.
    #[error("the key belongs to another certificate")]
    Mismatch,
}

impl Certificate {
    /// Reads a chain of certificates, the relay's own first, and the private key of that one, both in PEM.
    /// Other sections are ignored, so that both may come from one file.
    ///
    /// # Errors
    ///
    /// When one of them cannot be used, or they do not belong together.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, Unusable> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
        let is_empty = matches!(&chain, Ok(chain) if chain.is_empty());
        let chain = if is_empty { Err(pem::Error::NoItemsFound) } else { chain };
        let chain = chain.map_err(|error| Unusable::Certificate(problem(&error, "CERTIFICATE")))?;
        if ENCRYPTED.iter().any(|mark| contains(key, mark)) {
            return Err(Unusable::Key(
                "is encrypted, and a passphrase cannot be entered here; decrypt it: openssl pkey -in FILE \
                 -out key.pem"
                    .into(),
            ));
        }
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|error| Unusable::Key(problem(&error, "PRIVATE KEY")))?;
        let key = Zeroizing::new(key);
        if contains(key.secret_der(), P521) {
            return Err(Unusable::Key(
                "holds a P-521 key, which is not supported; have the certificate issued for a P-256 key".into(),
            ));
        }
        let own = chain.first().and_then(|own| Validity::of(own));
        let unreadable =
            || Unusable::Certificate("cannot be parsed as a certificate; copy it again".into());
        // A copy for rustls, which does not wipe it.
        let config = tls_config(chain, key.clone_key()).map_err(|error| unusable(&error))?;
        Ok(Self { config: config.into(), validity: own.ok_or_else(unreadable)? })
    }
}

impl Validity {
    /// Reads the validity of a certificate in DER (RFC 5280, 4.1.2.5 and 4.2.1.6).
    fn of(certificate: &[u8]) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
        let time = |time: ASN1Time| {
            let seconds = u64::try_from(time.timestamp()).unwrap_or_default();
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
        };
        let names = certificate.subject_alternative_name().ok()?;
        let names = names.iter().flat_map(|names| &names.value.general_names);
        let dns = names.filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_lowercase()),
            _ => None,
        });
        Some(Self {
            not_before: time(certificate.validity().not_before)?,
            not_after: time(certificate.validity().not_after)?,
            names: dns.collect(),
        })
    }

    /// Returns whether it is for this DNS name (RFC 6125, 6.4): a `*` stands for one label.
    fn is_for(&self, name: &str) -> bool {
        let name = name.to_lowercase();
        let parent = name.split_once('.').map(|(_, parent)| parent);
        self.names.iter().any(|own| match own.strip_prefix("*.") {
            Some(own) => Some(own) == parent,
            None => *own == name,
        })
    }

    /// Returns what makes clients refuse it, now or within [`SOON`], and the remedy.
    pub fn warnings(&self, announced: &[Multiaddr], now: SystemTime) -> Vec<String> {
        let date = |time: SystemTime| humantime::format_rfc3339_seconds(time);
        let (from, until) = (self.not_before, self.not_after);
        let mut warnings = Vec::new();
        if !wall_clock::is_set(now) {
            // No date can be checked. The behaviour warns about the clock.
        } else if now > until {
            warnings.push(format!("expired at {}: clients refuse it; renew it", date(until)));
        } else if now < from {
            warnings.push(format!(
                "is not valid before {}: clients refuse it; check this machine's clock",
                date(from)
            ));
        } else if until.duration_since(now).is_ok_and(|left| left <= SOON) {
            warnings.push(format!("expires at {}; renew it", date(until)));
        }
        let names: Vec<_> = announced.iter().filter_map(name_in_tls).collect();
        if !names.is_empty() && !names.iter().any(|name| self.is_for(name)) {
            warnings.push(format!(
                "is for {}, and for none of the names that are announced ({}): browsers refuse it; announce one of \
                 its names, or have it issued for one of those",
                if self.names.is_empty() { "no name".into() } else { self.names.join(", ") },
                names.join(", "),
            ));
        }
        warnings
    }
}

/// Returns the DNS name in an announced address over TLS.
fn name_in_tls(address: &Multiaddr) -> Option<String> {
    let is_in_tls = address.iter().any(|part| matches!(part, Protocol::Tls | Protocol::Wss(_)));
    match address.iter().next()? {
        Protocol::Dns(name) | Protocol::Dns4(name) | Protocol::Dns6(name) if is_in_tls => {
            Some(name.into_owned())
        }
        _ => None,
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// TLS 1.2 is for reverse proxies: by default, nginx before 1.23.4 connects to its upstreams with nothing newer.
/// libp2p's own TLS stays at 1.3, as its specification demands.
fn tls_config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    ServerConfig::builder_with_provider(ring::default_provider().into())
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_no_client_auth()
        .with_single_cert(chain, key)
}

/// How long before a certificate expires to warn about it.
pub const SOON: Duration = Duration::from_secs(14 * 24 * 60 * 60);

/// What a PEM file with an encrypted key contains: PKCS #8 (RFC 7468, 11), or the older form (RFC 1421, 4.6.1.1).
const ENCRYPTED: [&[u8]; 2] = [b"BEGIN ENCRYPTED PRIVATE KEY", b"Proc-Type: 4,ENCRYPTED"];

/// The object identifier of the curve P-521 in DER (RFC 5480, 2.1.1.1).
const P521: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x23];

/// Describes an error without its own text, which may contain a part of the key.
fn problem(error: &pem::Error, name: &str) -> String {
    match error {
        pem::Error::NoItemsFound => {
            format!("has no BEGIN {name} in it; name a file in PEM that has")
        }
        _ => "is damaged; copy it again".into(),
    }
}

fn unusable(error: &rustls::Error) -> Unusable {
    match error {
        rustls::Error::InconsistentKeys(_) => Unusable::Mismatch,
        rustls::Error::InvalidCertificate(why) => Unusable::Certificate(format!(
            "cannot be parsed as a certificate: {why}; copy it again"
        )),
        _ => Unusable::Key("holds no usable key; give it an ECDSA, Ed25519 or RSA key".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn self_signed() -> (String, String) {
        let certified = rcgen::generate_simple_self_signed(["relay.example.org".to_owned()]);
        let certified = certified.unwrap();
        (certified.cert.pem(), certified.key_pair.serialize_pem())
    }

    fn read(chain: &str, key: &str) -> Result<(), Unusable> {
        Certificate::from_pem(chain.as_bytes(), key.as_bytes()).map(|_| ())
    }

    /// PEM with this label.
    fn pem(name: &str, base64: &str) -> String {
        format!("-----BEGIN {name}-----\n{base64}\n-----END {name}-----\n")
    }

    #[test]
    fn a_chain_and_its_key_may_be_in_two_files_or_one() {
        let ((chain, key), (issuer, _)) = (self_signed(), self_signed());
        assert_eq!(read(&chain, &key), Ok(()));
        assert_eq!(read(&format!("{chain}{issuer}"), &key), Ok(()));
        let both = format!("as they are\n{key}{chain}");
        assert_eq!(read(&both, &both), Ok(()));
    }

    #[test]
    fn an_unusable_pair_is_an_error_and_never_a_panic() {
        let ((chain, key), (_, another)) = (self_signed(), self_signed());
        assert_eq!(read(&chain, &another), Err(Unusable::Mismatch));
        let broken = chain.replace("-----END", "-----FIN");
        let garbage = pem("CERTIFICATE", "AAAA");
        for chain in ["", &key, &broken, &garbage, "\u{0}", &pem("CERTIFICATE", "***")] {
            let refused = read(chain, &key);
            assert!(matches!(refused, Err(Unusable::Certificate(_))), "{chain}: {refused:?}");
        }
        let locked = pem("ENCRYPTED PRIVATE KEY", "AAAA");
        let labels = ["PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY"];
        let bad = labels.map(|name| [pem(name, "AAAA"), pem(name, ""), pem(name, "MAMCAQA=")]);
        let mut keys: Vec<_> = bad.as_flattened().iter().map(String::as_str).collect();
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

    #[test]
    fn an_encrypted_key_and_one_on_an_unsupported_curve_are_named() {
        let (chain, _) = self_signed();
        let p521 = "MAcGBSuBBAAj"; // its object identifier alone
        for (key, told) in [
            (pem("ENCRYPTED PRIVATE KEY", "AAAA"), "is encrypted"),
            (pem("RSA PRIVATE KEY", "Proc-Type: 4,ENCRYPTED\n\nAAAA"), "is encrypted"),
            (pem("PRIVATE KEY", p521), "holds a P-521 key"),
        ] {
            let Err(Unusable::Key(problem)) = read(&chain, &key) else { panic!("{key}") };
            assert!(problem.starts_with(told), "{problem}");
        }
    }

    #[test]
    fn a_certificate_that_clients_refuse_is_warned_about() {
        let day = |days: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(days * 24 * 60 * 60);
        let mut parameters =
            rcgen::CertificateParams::new(["Relay.example.org".into(), "*.b.example".into()])
                .unwrap();
        (parameters.not_before, parameters.not_after) =
            (rcgen::date_time_ymd(2100, 1, 1), rcgen::date_time_ymd(2101, 1, 1));
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        let read =
            Certificate::from_pem(certificate.pem().as_bytes(), key.serialize_pem().as_bytes())
                .unwrap();
        let validity = &read.validity;
        let (from, until) = (47_482, 47_847); // days since 1970
        assert_eq!((validity.not_before, validity.not_after), (day(from), day(until)));
        let warning = |days, announced: &str| {
            let warnings = validity.warnings(&[announced.parse().unwrap()], day(days));
            assert!(warnings.len() < 2, "{warnings:?}");
            warnings.into_iter().next().unwrap_or_default()
        };
        for good in [
            "/dns4/relay.example.org/tcp/1/tls/ws",
            "/dns6/a.b.example/tcp/1/wss",
            "/ip4/8.8.8.8/tcp/1/tls/ws",
        ] {
            assert_eq!(warning(from + 1, good), "", "{good}");
        }
        let good = "/dns4/relay.example.org/tcp/1/tls/ws";
        assert!(warning(from - 1, good).starts_with("is not valid before 2100-01-01"));
        assert_eq!(warning(0, good), "", "the clock is not set");
        assert_eq!(warning(until - 15, good), "");
        assert!(warning(until - 14, good).starts_with("expires at 2101-01-01"));
        assert!(warning(until + 1, good).starts_with("expired at 2101-01-01"));
        for other in [
            "/dns4/example.org/tcp/1/tls/ws",
            "/dns4/b.example/tcp/1/wss",
            "/dns4/a.a.b.example/tcp/1/wss",
        ] {
            assert!(
                warning(from + 1, other)
                    .starts_with("is for relay.example.org, *.b.example, and for none")
            );
        }
        assert_eq!(warning(from + 1, "/dns4/example.org/tcp/1"), "", "not in TLS");
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_keys_do_not_panic(base64 in "[A-Za-z0-9+/]{0,80}") {
            let (chain, _) = self_signed();
            for name in ["PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY"] {
                let _ = read(&chain, &pem(name, &base64));
            }
        }
    }
}
