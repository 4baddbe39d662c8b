//! NBD URIs: `nbd://host[:port]/export` and `nbd+unix:///export?socket=PATH`. No port means 10809. `nbds` and `nbds+unix` mean
//! TLS and nothing less, with the certificates in the folder of `tls-certificates=DIR`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::percent_decode_str;

/// IANA's port for NBD.
const DEFAULT_PORT: u16 = 10809;

/// Where an export is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// How to get to the server.
    pub transport: Transport,
    /// Name of the export; may be empty.
    pub export: String,
    /// Whether and how to encrypt.
    pub tls: Option<UriTls>,
}

/// What a URI says about TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UriTls {
    /// `tls-certificates`: the folder for [`ClientTls::load`](crate::tls::ClientTls::load).
    pub certificates: Option<PathBuf>,
    /// `tls-hostname`: the name that the server's certificate must be for, if it is not the host of the URI.
    pub hostname: Option<String>,
}

impl Uri {
    /// The name that the server's certificate must be for. A Unix socket has none of its own and stands for `localhost`.
    pub fn tls_hostname(&self) -> &str {
        let own = match &self.transport {
            Transport::Tcp { host, .. } => host,
            Transport::Unix(_) => "localhost",
        };
        self.tls.as_ref().and_then(|tls| tls.hostname.as_deref()).unwrap_or(own)
    }
}

/// How to get to a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Name or address, IPv6 without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// Why a text is no NBD URI that this client can use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{uri:?} is no usable NBD URI: {reason}")]
pub struct UriError {
    /// The text.
    pub uri: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(uri: &str) -> Result<Self, UriError> {
        parse(uri).map_err(|reason| UriError { uri: uri.to_owned(), reason })
    }
}

fn parse(uri: &str) -> Result<Uri, &'static str> {
    let (scheme, rest) = uri.split_once("://").ok_or("it has no scheme")?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode(path)?;
    let value = |key| {
        let value = query.split('&').find_map(|pair| pair.split_once('=').filter(|(name, _)| *name == key));
        value.map(|(_, value)| decode(value)).transpose()
    };
    let (unix, tls) = match scheme {
        "nbd" => (false, false),
        "nbds" => (false, true),
        "nbd+unix" => (true, false),
        "nbds+unix" => (true, true),
        _ => return Err("the scheme is none of nbd, nbds, nbd+unix, nbds+unix"),
    };
    let transport = match unix {
        false => tcp(authority)?,
        true if authority.is_empty() => Transport::Unix(value("socket")?.ok_or("it names no socket")?.into()),
        true => return Err("a Unix socket has no host"),
    };
    let tls = if tls {
        // Encryption without knowing with whom is not what anybody asks for.
        if value("tls-verify-peer")?.is_some_and(|verify| verify != "1" && verify != "true") {
            return Err("a server that is not verified is not supported");
        }
        if value("tls-type")?.is_some_and(|kind| kind != "x509") {
            return Err("TLS is supported with x509 only");
        }
        let certificates = value("tls-certificates")?.map(PathBuf::from);
        Some(UriTls { certificates, hostname: value("tls-hostname")? })
    } else if query.split('&').any(|pair| pair.starts_with("tls-")) {
        // Plain text where encryption was meant would be worse than no connection.
        return Err("TLS needs the scheme nbds or nbds+unix");
    } else {
        None
    };
    Ok(Uri { transport, export, tls })
}

fn tcp(authority: &str) -> Result<Transport, &'static str> {
    if authority.contains('@') {
        return Err("a user is not supported");
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or("the bracket is not closed")?;
            (host, if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or("no port behind ]")?) })
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let port = match port {
        None | Some("") => DEFAULT_PORT,
        Some(port) => port.parse().map_err(|_| "the port is no number below 65536")?,
    };
    let host = if host.is_empty() { "localhost".to_owned() } else { decode(host)? };
    Ok(Transport::Tcp { host, port })
}

fn decode(text: &str) -> Result<String, &'static str> {
    let text = percent_decode_str(text).decode_utf8().map_err(|_| "it is no UTF-8")?;
    if text.contains('\0') { Err("it has a NUL") } else { Ok(text.into_owned()) }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> Uri {
        Uri { transport: Transport::Tcp { host: host.into(), port }, export: export.into(), tls: None }
    }

    #[test]
    fn tcp_uris_name_host_port_and_export() {
        for (text, expected) in [
            ("nbd://127.0.0.1:10810/disk0", tcp("127.0.0.1", 10810, "disk0")),
            ("nbd://host", tcp("host", 10809, "")),
            ("nbd://host/", tcp("host", 10809, "")),
            ("nbd:///x", tcp("localhost", 10809, "x")),
            ("nbd://[::1]:7/a%20b/c", tcp("::1", 7, "a b/c")),
            ("nbd://[::1]/", tcp("::1", 10809, "")),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn unix_uris_name_socket_and_export() {
        let uri: Uri = "nbd+unix:///disk%3F?socket=/run/a%20b&x=y".parse().unwrap();
        assert_eq!(uri, Uri { transport: Transport::Unix("/run/a b".into()), export: "disk?".into(), tls: None });
    }

    #[test]
    fn tls_uris_name_certificates_and_host() {
        let uri: Uri = "nbds://[::1]:7/d?tls-certificates=/a%20b&tls-type=x509&tls-verify-peer=1".parse().unwrap();
        let tls = UriTls { certificates: Some("/a b".into()), hostname: None };
        assert_eq!(uri, Uri { tls: Some(tls), ..tcp("::1", 7, "d") });
        assert_eq!(uri.tls_hostname(), "::1");
        let uri: Uri = "nbds://10.0.0.1/?tls-hostname=hub.example".parse().unwrap();
        assert_eq!(uri.tls_hostname(), "hub.example");
        let uri: Uri = "nbds+unix:///d?socket=/s".parse().unwrap();
        assert_eq!(uri.tls, Some(UriTls::default()));
        assert_eq!(uri.tls_hostname(), "localhost");
    }

    #[test]
    fn what_cannot_be_used_is_refused() {
        for text in [
            "",
            "disk",
            "http://x/",
            "nbds+unix:///x",
            "nbd://h/x?tls-certificates=/d",
            "nbd+unix:///x?socket=/s&tls-hostname=h",
            "nbds://h/x?tls-verify-peer=0",
            "nbds://h/x?tls-verify-peer=false",
            "nbds://h/x?tls-type=psk",
            "nbds://u@h/x",
            "nbd+unix:///x",
            "nbd://h:99999/",
            "nbd://h:x/",
            "nbd://[::1/",
            "nbd://u@h/",
            "nbd://h/%00",
            "nbd://h/%ff",
        ] {
            assert!(text.parse::<Uri>().is_err(), "{text}");
        }
    }
}
