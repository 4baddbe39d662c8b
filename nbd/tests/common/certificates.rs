//! Certificates for tests, and folders that hold them under the names that libnbd and QEMU use.

use std::net::IpAddr;
use std::ops::Range;
use std::path::Path;

use blockyard_nbd::tls::{ServerTls, TlsFiles};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};
use tempfile::TempDir;

/// Years in which a certificate is valid, unless that is what a test is about.
pub const VALID: Range<i32> = 2020..2099;
pub const EXPIRED: Range<i32> = 2001..2002;
pub const NOT_YET: Range<i32> = 2098..2099;

/// What the certificate of a test's server is for.
pub const NAMES: &[&str] = &["localhost", "127.0.0.1"];
/// The subject of a test's client, most general part first, and as text.
pub const CLIENT: &[(DnType, &str)] = &[(DnType::OrganizationName, "Example"), (DnType::CommonName, "backup-1")];
pub const CLIENT_TEXT: &str = "CN=backup-1,O=Example";

/// Who signs certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: String,
}

/// A certificate with its key, in PEM.
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

impl Authority {
    pub fn new() -> Self {
        Self::called("Root of a test")
    }

    pub fn called(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = params(&[(DnType::CommonName, name)], VALID);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), root }
    }

    pub fn server(&self, names: &[&str], years: Range<i32>) -> Pair {
        let mut params = params(&[(DnType::CommonName, "server")], years);
        params.subject_alt_names = names.iter().map(|name| alternative(name)).collect();
        self.issue(params, ExtendedKeyUsagePurpose::ServerAuth)
    }

    pub fn client(&self, subject: &[(DnType, &str)], years: Range<i32>) -> Pair {
        self.issue(params(subject, years), ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn issue(&self, mut params: CertificateParams, usage: ExtendedKeyUsagePurpose) -> Pair {
        // QEMU takes nothing without the second.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        Pair { certificate: params.signed_by(&key, &self.issuer).unwrap().pem(), key: key.serialize_pem() }
    }
}

fn params(subject: &[(DnType, &str)], years: Range<i32>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    for (kind, value) in subject {
        params.distinguished_name.push(kind.clone(), *value);
    }
    params.not_before = date_time_ymd(years.start, 1, 1);
    params.not_after = date_time_ymd(years.end, 1, 1);
    params
}

fn alternative(name: &str) -> SanType {
    match name.parse::<IpAddr>() {
        Ok(address) => SanType::IpAddress(address),
        Err(_) => SanType::DnsName(name.try_into().unwrap()),
    }
}

/// A folder that trusts `roots`, with the pairs that there are.
pub fn folder(roots: &Authority, server: Option<&Pair>, client: Option<&Pair>) -> TempDir {
    let folder = tempfile::Builder::new().prefix("blockyard-nbd-tls-").tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("ca-cert.pem", &roots.root);
    for (who, pair) in [("server", server), ("client", client)] {
        if let Some(pair) = pair {
            write(&format!("{who}-cert.pem"), &pair.certificate);
            write(&format!("{who}-key.pem"), &pair.key);
        }
    }
    folder
}

/// The files of a server that asks its clients for certificates.
pub fn files(folder: &Path, allow: &[&str]) -> TlsFiles {
    TlsFiles {
        certificate: folder.join("server-cert.pem"),
        key: folder.join("server-key.pem"),
        client_ca: Some(folder.join("ca-cert.pem")),
        allow: allow.iter().map(|subject| subject.parse().unwrap()).collect(),
    }
}

/// An authority, and a folder with a server and a client of it.
pub struct Pki {
    pub authority: Authority,
    pub folder: TempDir,
}

impl Pki {
    pub fn new() -> Self {
        let authority = Authority::new();
        let (server, client) = (authority.server(NAMES, VALID), authority.client(CLIENT, VALID));
        let folder = folder(&authority, Some(&server), Some(&client));
        Self { authority, folder }
    }

    /// The server's side: clients need a certificate of the authority and one of the subjects, if there are any.
    pub fn server(&self, allow: &[&str]) -> ServerTls {
        ServerTls::load(&files(self.folder.path(), allow)).unwrap()
    }

    /// The server's side without certificates of clients.
    pub fn open_server(&self) -> ServerTls {
        ServerTls::load(&TlsFiles { client_ca: None, ..files(self.folder.path(), &[]) }).unwrap()
    }
}
