//! What can go wrong for a client, sorted by whose fault it is.

use std::io;
use std::sync::Arc;

use crate::tls::TlsError;
use crate::wire::option::{OptionCode, ReplyType};

/// Why a client call failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The connection failed or was closed; requests under way may or may not have been done.
    #[error("the connection to the NBD server failed: {0}")]
    Connection(Arc<io::Error>),
    /// The server broke a rule of the protocol; the connection is of no use any more.
    #[error("the NBD server broke the protocol: {0}")]
    Protocol(&'static str),
    /// The server refused an option; the handshake may go on.
    #[error("the NBD server refused option {}: {text} (reply {:#010x})", .option.0, .reply.0)]
    Refused {
        /// The option.
        option: OptionCode,
        /// The error reply.
        reply: ReplyType,
        /// What the server says about it, cut to 4096 bytes; may be empty.
        text: String,
    },
    /// TLS was wanted, and cannot be configured as asked; nothing was sent.
    #[error("TLS cannot be used: {0}")]
    TlsFiles(Arc<TlsError>),
    /// TLS was wanted, and where its certificates are was not said; nothing was sent.
    #[error("TLS was asked for without certificates: name their folder with tls-certificates=DIR")]
    NoCertificates,
    /// The server is not who it should be, or does not shake hands in TLS; the connection is closed.
    #[error("the TLS handshake with the NBD server failed: {0}")]
    TlsHandshake(Arc<io::Error>),
    /// A request failed; the connection goes on.
    #[error("the NBD server answered error {errno}: {text}")]
    Request {
        /// The number on the wire ("Error values").
        errno: u32,
        /// What the server says about it; empty after a simple reply.
        text: String,
        /// The byte of the export at which it happened, if the server told.
        offset: Option<u64>,
    },
    /// The request cannot be sent: too long, or not part of what was negotiated.
    #[error("the request cannot be sent: {0}")]
    Unsendable(&'static str),
}

impl ClientError {
    /// The error number, if the server answered a request with one.
    pub fn errno(&self) -> Option<u32> {
        match self {
            Self::Request { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

impl From<TlsError> for ClientError {
    fn from(error: TlsError) -> Self {
        Self::TlsFiles(Arc::new(error))
    }
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        Self::Connection(Arc::new(error))
    }
}
