//! The keys with which a peer may prove its identity over TLS: those in use, and none that takes long to verify.

use std::{
    io,
    net::Ipv4Addr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use aws_lc_rs::{
    encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der},
    rand::SystemRandom,
    rsa::KeySize,
    signature::{KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair},
};
use futures_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        pki_types::{CertificateDer, PrivatePkcs8KeyDer},
        sign::{CertifiedKey, SingleCertAndKey},
    },
};
use libp2p::{
    futures::{AsyncRead, AsyncReadExt, AsyncWrite},
    identity::Keypair,
    tcp::tokio::TcpStream,
    tls,
};
use rcgen::{CertificateParams, CustomExtension, KeyPair};

use crate::{
    common::{
        Relay,
        by_hand::{length_prefixed, negotiate, tcp},
        http::ON_ANY_PORT,
        within,
    },
    handshakes::count,
};

const RSA_4096: &[u8] = include_bytes!("rsa-4096.pk8");
const RSA_8192: &[u8] = include_bytes!("rsa-8192.pk8");
/// The largest exponent that libp2p verifies: 8,589,934,591.
const EXPONENT: &[u8] = include_bytes!("rsa-4096-exponent.pk8");

/// The alerts with which the relay refuses a client before the verification, and after it.
const BEFORE_VERIFICATION: &str = "received fatal alert: HandshakeFailure";
const AFTER_VERIFICATION: &str = "received fatal alert: CertificateUnknown";

/// The certificate of a client, and how it is sent.
struct Client {
    /// The key of the identity.
    identity: RsaKeyPair,
    /// The key of the handshake.
    session: KeyPair,
    /// Whether the identity's signature is valid.
    is_signed: bool,
    /// Whether the extension with the identity is critical, as rust-libp2p's is; go-libp2p's is not.
    is_critical: bool,
    /// The longest TLS record; `None`: several messages share one.
    max_record: Option<usize>,
    /// The length of another extension, which means nothing, in bytes.
    padding: usize,
}

impl Client {
    fn new(identity: &[u8]) -> Self {
        let identity = RsaKeyPair::from_pkcs8(identity).expect("a key");
        let session = KeyPair::generate().unwrap();
        let (is_signed, is_critical) = (true, true);
        Self { identity, session, is_signed, is_critical, max_record: None, padding: 0 }
    }

    /// The certificate, as the specification has it.
    fn certificate(&self) -> CertificateDer<'static> {
        let signed = [b"libp2p-tls-handshake:", &self.session.public_key_der()[..]].concat();
        let mut signature = vec![0; self.identity.public_modulus_len()];
        let random = SystemRandom::new();
        self.identity.sign(&RSA_PKCS1_SHA256, &random, &signed, &mut signature).unwrap();
        signature[0] ^= u8::from(!self.is_signed);
        let key: PublicKeyX509Der<'_> = self.identity.public_key().as_der().unwrap();
        let key = [&[8, 0, 18][..], &length_prefixed(key.as_ref())].concat();
        let content = der(0x30, &[der(4, &key), der(4, &signature)].concat());
        let oid = [1, 3, 6, 1, 4, 1, 53594, 1, 1];
        let mut extension = CustomExtension::from_oid_content(&oid, content);
        extension.set_criticality(self.is_critical);
        let mut params = CertificateParams::default();
        let padding = CustomExtension::from_oid_content(&[1, 2, 3], vec![0; self.padding]);
        params.custom_extensions.extend([extension, padding]);
        params.self_signed(&self.session).unwrap().into()
    }

    /// Sends it byte by byte. A client's handshake ends before the relay has its certificate.
    async fn handshake(&self, relay: &Relay) -> TlsStream<ByteByByte> {
        let mut config = tls::make_client_config(&Keypair::generate_ed25519(), None).unwrap();
        let session = PrivatePkcs8KeyDer::from(self.session.serialize_der()).into();
        let session = config.crypto_provider().key_provider.load_private_key(session).unwrap();
        let certified = CertifiedKey::new(vec![self.certificate()], session);
        config.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(certified));
        config.max_fragment_size = self.max_record;
        let mut stream = tcp(relay).await;
        negotiate(&mut stream, "/tls/1.0.0").await.unwrap();
        let name = Ipv4Addr::UNSPECIFIED.to_string().try_into().unwrap();
        let connecting = TlsConnector::from(Arc::new(config)).connect(name, ByteByByte(stream));
        within(connecting).await.expect("a handshake with the relay")
    }

    /// How the relay refuses it.
    async fn refusal(&self, relay: &Relay) -> String {
        let mut stream = self.handshake(relay).await;
        within(stream.read(&mut [0])).await.expect_err("a refusal").to_string()
    }
}

fn rsa_session(key: &[u8]) -> KeyPair {
    let key = PrivatePkcs8KeyDer::from(key);
    KeyPair::from_pkcs8_der_and_sign_algo(&key, &rcgen::PKCS_RSA_SHA256).expect("a key")
}

/// A DER value of 256 bytes or more.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap();
    assert!(length >= 256);
    [&[tag, 0x82][..], &length.to_be_bytes(), content].concat()
}

/// A connection each of whose writes sends one byte.
struct ByteByByte(TcpStream);

impl AsyncRead for ByteByByte {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for ByteByByte {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, &bytes[..bytes.len().min(1)])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_close(cx)
    }
}

#[tokio::test]
async fn rsa_keys_in_use_are_admitted_however_their_certificate_arrives() {
    let relay = Relay::start(&[]);
    let small: Pkcs8V1Der<'_> = RsaKeyPair::generate(KeySize::Rsa2048).unwrap().as_der().unwrap();
    for key in [small.as_ref(), RSA_4096] {
        for is_critical in [true, false] {
            for max_record in [None, Some(64)] {
                let client = Client { is_critical, max_record, ..Client::new(key) };
                let mut stream = client.handshake(&relay).await;
                negotiate(&mut stream, "/yamux/1.0.0").await.expect("admission");
            }
        }
    }
}

#[tokio::test]
async fn any_kind_of_session_key_is_admitted() {
    let relay = Relay::start(&[]);
    let kinds =
        [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519];
    let kinds = kinds.map(|kind| KeyPair::generate_for(kind).unwrap());
    for session in kinds.into_iter().chain([rsa_session(RSA_4096)]) {
        let client = Client { session, ..Client::new(RSA_4096) };
        let mut stream = client.handshake(&relay).await;
        negotiate(&mut stream, "/yamux/1.0.0").await.expect("admission");
    }
}

#[tokio::test]
async fn a_key_that_takes_long_to_verify_is_refused_before_any_verification() {
    let relay = Relay::start(&[ON_ANY_PORT]);
    let session = Client { session: rsa_session(EXPONENT), ..Client::new(RSA_4096) };
    let mut refused = 0;
    for mut client in [Client::new(RSA_8192), Client::new(EXPONENT), session] {
        for is_signed in [true, false] {
            client.is_signed = is_signed;
            assert_eq!(client.refusal(&relay).await, BEFORE_VERIFICATION);
            refused += 1;
            count(&relay, "security", "protocol", refused).await;
        }
    }
    // Others are verified.
    let forged = Client { is_signed: false, ..Client::new(RSA_4096) };
    assert_eq!(forged.refusal(&relay).await, AFTER_VERIFICATION);
}

#[tokio::test]
async fn a_certificate_that_is_larger_than_any_two_keys_need_is_refused() {
    let relay = Relay::start(&[]);
    let mut client = Client { session: rsa_session(RSA_4096), ..Client::new(RSA_4096) };
    println!("the largest certificate: {} bytes", client.certificate().len());
    client.padding = 4096 - client.certificate().len();
    assert_eq!(client.refusal(&relay).await, BEFORE_VERIFICATION);
}
