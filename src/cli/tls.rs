//! The TLS options of `blockyard nbd`, and the files that they name.

use std::path::PathBuf;

use blockyard_nbd::tls::{ServerTls, Subject, Tls, TlsFiles};
use clap::{Args, ValueEnum};

use super::CliError;

#[derive(Debug, Args)]
pub(super) struct TlsArguments {
    /// Whether clients may (`on`) or must (`required`) encrypt.
    #[arg(long, value_enum, value_name = "MODE", default_value_t = Mode::Off)]
    tls: Mode,
    /// The server's certificate in PEM form, and behind it those that lead to a root that clients know.
    #[arg(long, value_name = "FILE", required_if_eq_any([("tls", "on"), ("tls", "required")]))]
    tls_cert: Option<PathBuf>,
    /// Its private key in PEM form, without a password.
    #[arg(long, value_name = "FILE", required_if_eq_any([("tls", "on"), ("tls", "required")]))]
    tls_key: Option<PathBuf>,
    /// Roots of client certificates in PEM form: clients need a certificate. Without this option whoever reaches the port is let
    /// in. Only with `--tls required`.
    #[arg(long, value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
    /// Accept only client certificates of this subject, such as `CN=backup-1,O=Example`; may be repeated.
    #[arg(long, value_name = "SUBJECT", requires = "tls_client_ca")]
    tls_allow: Vec<Subject>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Off,
    On,
    Required,
}

impl TlsArguments {
    /// Reads the files.
    pub(super) fn load(&self) -> Result<Tls, CliError> {
        let server = || {
            ServerTls::load(&TlsFiles {
                certificate: self.tls_cert.clone().unwrap_or_default(),
                key: self.tls_key.clone().unwrap_or_default(),
                client_ca: self.tls_client_ca.clone(),
                allow: self.tls_allow.clone(),
            })
        };
        Ok(match self.tls {
            // Whoever names certificates believes that they are used.
            Mode::Off if [&self.tls_cert, &self.tls_key, &self.tls_client_ca].into_iter().any(Option::is_some) => {
                return Err(CliError::TlsOff);
            }
            Mode::Off => Tls::Off,
            Mode::On if self.tls_client_ca.is_some() => return Err(CliError::TlsOptional),
            Mode::On => Tls::On(server()?),
            Mode::Required => Tls::Required(server()?),
        })
    }
}
