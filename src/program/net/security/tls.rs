//! libp2p's TLS 1.3, with a limit on the cost of verifying a peer's certificate.
//!
//! The relay's own certificate and the verification of others' are libp2p's. But libp2p accepts RSA keys of 8,192 bits and
//! exponents of 33 bits, which take 17 times as long to verify as the largest keys in use, and it verifies each certificate
//! three times. Here a certificate with such a key is rejected before any signature is verified, and each signature is
//! verified once. libp2p also writes the secrets of each session to the file that the environment variable
//! `SSLKEYLOGFILE` names; this module does not.
//!
//! See [the specification](https://github.com/libp2p/specs/blob/master/tls/tls.md).

use std::{error::Error, io, net::Ipv4Addr, sync::Arc};

use either::{Either, for_both};
use futures_rustls::rustls::{
    self, AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct,
    DistinguishedName, ServerConfig, SignatureScheme,
    client::{
        Resumption, UnbufferedClientConnection,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{
        WebPkiSupportedAlgorithms, aws_lc_rs::default_provider, verify_tls13_signature_with_raw_key,
    },
    pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime},
    server::{
        NoServerSessionStorage, UnbufferedServerConnection,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use libp2p::{
    PeerId,
    futures::{AsyncRead, AsyncWrite},
    identity::{Keypair, PublicKey},
    tls,
};
use x509_parser::{
    asn1_rs::{self, FromDer, OctetString, Oid, Sequence, oid},
    nom::Err as Malformed,
    prelude::X509Certificate,
    public_key::{PublicKey as CertificateKey, RSAPublicKey},
};

use super::tls_stream::TlsStream;
use crate::program::net::admission::handshake_failure::{Reason, Stage, StageError, causes};

const ALPN: &str = "libp2p";

/// The extension of a certificate that holds the peer's public key, and its signature of the certificate's key.
const PEER_KEY: Oid<'static> = oid!(1.3.6.1.4.1.53594.1.1);

/// The largest certificate, in bytes. One whose two keys are RSA with 4,096 bits takes 2.5 KiB.
const MAX_CERTIFICATE: usize = 4096;

/// The longest modulus of an RSA key, in bytes, and the only exponent, as all libp2p implementations generate it.
const MAX_MODULUS: usize = 512;
const EXPONENT: [u8; 3] = [1, 0, 1];

/// A secured connection and its peer. Behind a pointer: the state of TLS takes a KiB more than that of Noise.
type Secured<C> = io::Result<(PeerId, Box<TlsStream<C>>)>;

/// The handshakes for either end of a connection.
#[derive(Clone)]
pub struct Tls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Tls {
    /// Secures connections under the identity of `keypair`.
    ///
    /// # Errors
    ///
    /// When the key cannot sign the certificate.
    pub fn new(keypair: &Keypair) -> anyhow::Result<Self> {
        let provider = Arc::new(default_provider());
        let verifier = Arc::new(Verifier(provider.signature_verification_algorithms));
        let (certificate, key) = tls::certificate::generate(keypair)?;
        let key = provider.key_provider.load_private_key(key)?;
        let own = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate], key)));
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::clone(&verifier) as _)
            .with_cert_resolver(Arc::clone(&own) as _);
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .dangerous() // the certificate names no host, but proves the peer id
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(own);
        server.alpn_protocols = vec![ALPN.into()];
        client.alpn_protocols = vec![ALPN.into()];
        // go-libp2p and rust-libp2p never resume a session; each ticket costs memory, and time in the handshake.
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        // rustls stores tickets by the server's name. Peers have none: it would offer the tickets of one to the next.
        client.resumption = Resumption::disabled();
        Ok(Self { server: Arc::new(server), client: Arc::new(client) })
    }

    /// Performs the handshake of a listener.
    pub async fn accept<C: AsyncRead + AsyncWrite + Unpin>(self, connection: C) -> Secured<C> {
        let session = UnbufferedServerConnection::new(self.server).map_err(io::Error::other)?;
        with_peer(TlsStream::handshake(Either::Left(session), connection).await)
    }

    /// Performs the handshake of a dialer.
    pub async fn connect<C: AsyncRead + AsyncWrite + Unpin>(self, connection: C) -> Secured<C> {
        let no_name = ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into()); // sends no server name
        let session = UnbufferedClientConnection::new(self.client, no_name);
        let session = session.map_err(io::Error::other)?;
        with_peer(TlsStream::handshake(Either::Right(session), connection).await)
    }
}

/// Adds the peer id that the certificate has proved.
fn with_peer<C>(secured: io::Result<TlsStream<C>>) -> Secured<C> {
    let stream = secured.map_err(with_reason)?;
    let certificates = for_both!(&stream.session, session => session.peer_certificates());
    let [certificate] = certificates.unwrap_or_default() else {
        return Err(io::Error::other("no certificate"));
    };
    let peer = Keys::of(certificate).map_err(io::Error::other)?.peer.to_peer_id();
    Ok((peer, Box::new(stream)))
}

/// The error of a handshake. Its reason is known if the peer has rejected our certificate, as a go-libp2p dialer does
/// if it expected another peer id.
fn with_reason(error: io::Error) -> io::Error {
    use AlertDescription::{AccessDenied, BadCertificate, CertificateUnknown, UnknownCA};

    let is_refusal = |cause: &(dyn Error + 'static)| match cause.downcast_ref() {
        Some(rustls::Error::AlertReceived(alert)) => {
            matches!(alert, AccessDenied | BadCertificate | CertificateUnknown | UnknownCA)
        }
        _ => false,
    };
    let reason = causes(&error).any(is_refusal).then_some(Reason::PeerId);
    StageError::wrap(Stage::Security, reason, error)
}

/// The keys of a certificate. No signature by them has been verified yet, and none takes too long to verify.
struct Keys<'a> {
    peer: PublicKey,
    /// The certificate's own key, which signs the certificate and the handshake.
    session: SubjectPublicKeyInfoDer<'a>,
}

impl<'a> Keys<'a> {
    fn of(certificate: &'a CertificateDer<'_>) -> Result<Self, rustls::Error> {
        if certificate.len() > MAX_CERTIFICATE {
            return Err(rustls::Error::General("the peer's certificate is too large".into()));
        }
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(malformed)?;
        let session = parsed.tbs_certificate.subject_pki.raw.into();
        if let CertificateKey::RSA(key) = parsed.public_key().parsed().map_err(malformed)? {
            check_rsa(&key)?;
        }
        let extension = parsed.get_extension_unique(&PEER_KEY).map_err(malformed)?;
        let signed_key = extension.map(|extension| extension.value).unwrap_or_default();
        let key = Sequence::from_der_and_then(signed_key, OctetString::from_der);
        let (_, key) = key.map_err(malformed::<Malformed<asn1_rs::Error>>)?;
        let peer = PublicKey::try_decode_protobuf(key.as_ref()).map_err(malformed)?;
        if let Ok(key) = peer.clone().try_into_rsa() {
            let key = key.encode_pkcs1();
            check_rsa(&RSAPublicKey::from_der(&key).map_err(malformed)?.1)?;
        }
        Ok(Self { peer, session })
    }
}

fn malformed<E>(_: E) -> rustls::Error {
    CertificateError::BadEncoding.into()
}

/// Rejects an RSA key whose signatures take longer to verify than those of a 4,096-bit key with the exponent 65,537.
fn check_rsa(key: &RSAPublicKey<'_>) -> Result<(), rustls::Error> {
    let modulus = key.modulus.strip_prefix(&[0]).unwrap_or(key.modulus);
    if modulus.len() > MAX_MODULUS || key.exponent != EXPONENT {
        let problem = "the peer's key takes too long to verify: RSA above 4096 bits, or with an exponent other than 65537";
        return Err(rustls::Error::General(problem.into()));
    }
    Ok(())
}

/// Verifies certificates: of listeners and dialers by the same rules.
#[derive(Debug)]
struct Verifier(WebPkiSupportedAlgorithms);

impl Verifier {
    fn verify(
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
    ) -> Result<(), rustls::Error> {
        if !others.is_empty() {
            return Err(rustls::Error::General("more than one certificate".into()));
        }
        let keys = Keys::of(certificate)?;
        // libp2p reads the peer's key from the certificate with another parser: both have to find the same peer.
        let proved = tls::certificate::parse(certificate)?.peer_id();
        if proved == keys.peer.to_peer_id() { Ok(()) } else { Err(malformed(proved)) }
    }
}

/// The methods that the verifier traits of both ends require.
macro_rules! verify_handshake {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::General("TLS 1.2 is not offered".into()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let session = Keys::of(certificate)?.session;
            verify_tls13_signature_with_raw_key(message, &session, signature, &self.0)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.supported_schemes()
        }
    };
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Self::verify(certificate, others).map(|()| ClientCertVerified::assertion())
    }

    verify_handshake!();
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Self::verify(certificate, others).map(|()| ServerCertVerified::assertion())
    }

    verify_handshake!();
}
