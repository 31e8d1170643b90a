//! TLS 1.3 with raw public keys (RFC 7250) on both sides. PROTOCOL.md, "Transport".
//!
//! Invariants: no certificates, no names, no authorities: a key is the peer or it isn't. A caller accepts one key
//! only. A listener takes any key whose owner proves it, and decides after the handshake whether it is a peer's, so
//! that a stranger gets a message that a person understands; before that nothing of the protocol is read.

use std::sync::Arc;

use parking_lot::Mutex;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, ring as provider, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error as TlsError, PeerIncompatible,
    ServerConfig, SignatureScheme, version,
};

use crate::identity::{Identity, PublicKey};

/// The application protocol that both sides name in the handshake. The version is negotiated in Hello.
const ALPN: &[u8] = b"layerfs";

/// What a caller found at the other end.
#[derive(Clone, Debug, Default)]
pub(crate) struct FoundKey(Arc<Mutex<Option<PublicKey>>>);

impl FoundKey {
    /// The key that the other end showed, if it came so far.
    pub(crate) fn get(&self) -> Option<PublicKey> {
        *self.0.lock()
    }
}

/// The configuration for calling a host. With `expected` no other key is accepted; without, any (to see which it is).
pub(crate) fn client_config(
    identity: &Identity,
    expected: Option<PublicKey>,
) -> Result<(Arc<ClientConfig>, FoundKey), TlsError> {
    let found = FoundKey::default();
    let verifier = Arc::new(KeyVerifier { expected, found: found.clone(), algorithms: algorithms() });
    let mut config = ClientConfig::builder_with_provider(crypto())
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(certified(identity)?)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok((Arc::new(config), found))
}

/// The configuration for being called.
pub(crate) fn server_config(identity: &Identity) -> Result<Arc<ServerConfig>, TlsError> {
    let verifier = Arc::new(KeyVerifier { expected: None, found: FoundKey::default(), algorithms: algorithms() });
    let mut config = ServerConfig::builder_with_provider(crypto())
        .with_protocol_versions(&[&version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(certified(identity)?)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The key of the other end of an established connection.
pub(crate) fn peer_key(connection: &rustls::CommonState) -> Option<PublicKey> {
    PublicKey::from_spki(connection.peer_certificates()?.first()?)
}

/// Every key is its own name, so TLS gets one that means nothing.
pub(crate) fn server_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into())
}

fn crypto() -> Arc<CryptoProvider> {
    Arc::new(provider::default_provider())
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    provider::default_provider().signature_verification_algorithms
}

fn certified(identity: &Identity) -> Result<Arc<CertifiedKey>, TlsError> {
    let key = provider::sign::any_eddsa_type(identity.pkcs8())?;
    let spki = identity.public_key().to_spki();
    Ok(Arc::new(CertifiedKey::new(vec![CertificateDer::from(spki.to_vec())], key)))
}

#[derive(Debug)]
struct KeyVerifier {
    expected: Option<PublicKey>,
    found: FoundKey,
    algorithms: WebPkiSupportedAlgorithms,
}

impl KeyVerifier {
    fn check(&self, spki: &CertificateDer<'_>) -> Result<(), TlsError> {
        let key = PublicKey::from_spki(spki).ok_or(CertificateError::BadEncoding)?;
        *self.found.0.lock() = Some(key);
        match self.expected {
            Some(expected) if expected != key => Err(CertificateError::ApplicationVerificationFailure.into()),
            _ => Ok(()),
        }
    }

    fn check_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let spki = SubjectPublicKeyInfoDer::from(key.as_ref());
        verify_tls13_signature_with_raw_key(message, &spki, signature, &self.algorithms)
    }
}

fn only_tls13() -> TlsError {
    PeerIncompatible::Tls12NotOffered.into()
}

/// The methods that both verifier traits have alike.
macro_rules! raw_keys_with_tls13 {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, TlsError> {
            Err(only_tls13())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            key: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, TlsError> {
            self.check_signature(message, key, signature)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for KeyVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    raw_keys_with_tls13!();
}

impl ClientCertVerifier for KeyVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    raw_keys_with_tls13!();
}
