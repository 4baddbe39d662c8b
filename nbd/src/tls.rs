//! TLS: what server and client are configured with, read from PEM files and checked before anything is served.
//!
//! Which connection must speak TLS is the handshake's business ("TLS support" in the protocol text), shaking hands in TLS that of
//! the [`server`](crate::server) and the [`client`](crate::client). Versions 1.2 and 1.3, certificates only, no resumption:
//! connections live long, and each one shows its certificate anew.

mod subject;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::client::danger::HandshakeSignatureValid;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error as RustlsError, InconsistentKeys,
    RootCertStore, ServerConfig, SignatureScheme,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use x509_cert::Certificate;
use x509_cert::der::Decode;

pub use self::subject::{Subject, SubjectError};

/// Whether a server speaks TLS, and with what.
#[derive(Clone, Debug, Default)]
pub enum Tls {
    /// It does not.
    #[default]
    Off,
    /// With clients that ask for it. Whoever sits between client and server can keep them from asking.
    On(ServerTls),
    /// With everybody; without it a client learns nothing.
    Required(ServerTls),
}

impl Tls {
    pub(crate) fn acceptor(&self) -> Option<TlsAcceptor> {
        match self {
            Self::Off => None,
            Self::On(tls) | Self::Required(tls) => Some(tls.0.clone().into()),
        }
    }
}

/// The files that a server's side of TLS is made of, all of them PEM.
#[derive(Clone, Debug, Default)]
pub struct TlsFiles {
    /// The server's certificate and, behind it, those that lead to a root that clients know.
    pub certificate: PathBuf,
    /// Its private key, without a password.
    pub key: PathBuf,
    /// The roots of client certificates. With this file a client must show a certificate, without it none is asked for.
    pub client_ca: Option<PathBuf>,
    /// Whose certificates are accepted; empty: all of the roots in `client_ca`.
    pub allow: Vec<Subject>,
}

/// A server's side of TLS, ready to be used by any number of servers.
#[derive(Clone, Debug)]
pub struct ServerTls(Arc<ServerConfig>);

/// A client's side of TLS.
#[derive(Clone, Debug)]
pub struct ClientTls(Arc<ClientConfig>);

/// Why TLS cannot be configured.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is damaged.
    #[error("{} is not valid PEM: {reason}", path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file has no certificate in it.
    #[error("{} holds no certificate in PEM form", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// A certificate is none, or not one that can be used here.
    #[error("the certificate in {} cannot be used: {reason}", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file has no key in it.
    #[error("{} holds no private key without a password in PEM form", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// A key is none, or of a kind that is not supported.
    #[error("the private key in {} cannot be used: {reason}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificate and key are not a pair.
    #[error("the private key in {} does not belong to the certificate in {}", key.display(), certificate.display())]
    KeyMismatch {
        /// File of the key.
        key: PathBuf,
        /// File of the certificate.
        certificate: PathBuf,
    },
    /// A subject is none.
    #[error(transparent)]
    Subject(#[from] SubjectError),
    /// Subjects are allowed, and no certificate would be asked for.
    #[error("subjects are allowed, but without the roots of client certificates no client is asked for one")]
    SubjectsWithoutRoots,
}

impl ServerTls {
    /// Reads and checks the files. A certificate that has expired is logged: which clients mind is theirs to say.
    ///
    /// # Errors
    /// The first file that cannot be used, and why.
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let chain = certificates(&files.certificate)?;
        warn_of_dates(&files.certificate, &chain);
        let key = private_key(&files.key)?;
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| pair_error(&files.certificate, &files.key, &error))?;
        let builder = match &files.client_ca {
            Some(path) => {
                let verifier = WebPkiClientVerifier::builder_with_provider(roots(path)?.into(), provider).build();
                let chain = verifier.map_err(|error| certificate_error(path, error))?;
                builder.with_client_cert_verifier(Arc::new(Allowed { chain, subjects: files.allow.clone() }))
            }
            None if files.allow.is_empty() => builder.with_no_client_auth(),
            None => return Err(TlsError::SubjectsWithoutRoots),
        };
        let config = builder.with_single_cert(chain, key);
        let mut config = config.map_err(|error| pair_error(&files.certificate, &files.key, &error))?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self(config.into()))
    }
}

impl ClientTls {
    /// Reads `ca-cert.pem` of a folder, the roots of server certificates, and where one of them is there `client-cert.pem` and
    /// `client-key.pem`: the names that libnbd and QEMU use.
    ///
    /// # Errors
    /// The first file that cannot be used, and why.
    pub fn load(folder: &Path) -> Result<Self, TlsError> {
        let file = |name| folder.join(name);
        let (certificate, key) = (file("client-cert.pem"), file("client-key.pem"));
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| pair_error(&certificate, &key, &error))?
            .with_root_certificates(roots(&file("ca-cert.pem"))?);
        let mut config = if certificate.exists() || key.exists() {
            let builder = builder.with_client_auth_cert(certificates(&certificate)?, private_key(&key)?);
            builder.map_err(|error| pair_error(&certificate, &key, &error))?
        } else {
            builder.with_no_client_auth()
        };
        config.resumption = Resumption::disabled();
        Ok(Self(config.into()))
    }

    pub(crate) fn connector(&self) -> TlsConnector {
        self.0.clone().into()
    }
}

/// Accepts a client certificate that leads to a root, of a subject that is allowed.
#[derive(Debug)]
struct Allowed {
    chain: Arc<dyn ClientCertVerifier>,
    /// Empty: all.
    subjects: Vec<Subject>,
}

impl ClientCertVerifier for Allowed {
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, RustlsError> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        if self.subjects.is_empty() {
            return Ok(verified);
        }
        let certificate = Certificate::from_der(end_entity).map_err(|_| CertificateError::BadEncoding)?;
        let subject = certificate.tbs_certificate().subject();
        if self.subjects.contains(&Subject::from(subject)) {
            return Ok(verified);
        }
        // The client is told access_denied.
        tracing::warn!(%subject, "a client certificate of a subject that is not allowed");
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        self.chain.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        self.chain.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// The subject of a certificate, as text.
pub(crate) fn subject(certificate: &CertificateDer<'_>) -> Option<String> {
    Certificate::from_der(certificate).ok().map(|certificate| certificate.tbs_certificate().subject().to_string())
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Unreadable { path: path.to_owned(), source })
}

/// All certificates of a file, at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    let certificates = certificates.map_err(|error| not_pem(path, &error))?;
    if certificates.is_empty() {
        return Err(TlsError::NoCertificate { path: path.to_owned() });
    }
    Ok(certificates)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| match error {
        pem::Error::NoItemsFound => TlsError::NoKey { path: path.to_owned() },
        error => not_pem(path, &error),
    })
}

fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| certificate_error(path, error))?;
    }
    Ok(roots)
}

fn not_pem(path: &Path, error: &pem::Error) -> TlsError {
    TlsError::NotPem { path: path.to_owned(), reason: error.to_string() }
}

fn certificate_error(path: &Path, error: impl std::fmt::Display) -> TlsError {
    TlsError::Certificate { path: path.to_owned(), reason: error.to_string() }
}

/// What is wrong with a certificate and its key: rustls looks at both at once.
fn pair_error(certificate: &Path, key: &Path, error: &RustlsError) -> TlsError {
    match error {
        RustlsError::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            TlsError::KeyMismatch { key: key.to_owned(), certificate: certificate.to_owned() }
        }
        RustlsError::InvalidCertificate(_) => certificate_error(certificate, error),
        _ => TlsError::Key { path: key.to_owned(), reason: error.to_string() },
    }
}

fn warn_of_dates(path: &Path, chain: &[CertificateDer<'_>]) {
    let Some(Ok(certificate)) = chain.first().map(|first| Certificate::from_der(first)) else { return };
    let validity = certificate.tbs_certificate().validity();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    if now < validity.not_before.to_unix_duration() || validity.not_after.to_unix_duration() < now {
        let (from, until) = (validity.not_before, validity.not_after);
        tracing::warn!(path = %path.display(), %from, %until, "the server's certificate is not valid today");
    }
}
