//! What a device reports when it cannot do what was asked, and the one table that turns it into an NBD error number.

use std::io;

/// Why a request failed, in the terms of the protocol ("Error values").
///
/// These are the only errors a client ever sees; [`ErrorKind::errno`] is the one table from here to the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Writing to a read-only export: `NBD_EPERM`.
    NotPermitted,
    /// The medium failed, or the device is poisoned by an earlier failure: `NBD_EIO`.
    Io,
    /// The request itself is wrong: `NBD_EINVAL`.
    Invalid,
    /// No room, or a write past the end: `NBD_ENOSPC`.
    NoSpace,
    /// The reply would be larger than the protocol allows: `NBD_EOVERFLOW`.
    Overflow,
    /// A fast zero that would be slow: `NBD_ENOTSUP`.
    NotSupported,
    /// The export is going away: `NBD_ESHUTDOWN`.
    Shutdown,
}

impl ErrorKind {
    /// The number on the wire.
    pub fn errno(self) -> u32 {
        match self {
            Self::NotPermitted => 1,
            Self::Io => 5,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSupported => 95,
            Self::Shutdown => 108,
        }
    }
}

/// A failed request: what kind, where, and a text for the person who reads the client's log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Error {
    /// The class, which decides the number on the wire.
    pub kind: ErrorKind,
    /// The byte of the export at which it happened, when the device knows; inside the request.
    pub offset: Option<u64>,
    /// For humans; never contains paths or secrets, since it is sent to the peer.
    pub text: String,
}

impl Error {
    /// An error without a position.
    pub fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self { kind, offset: None, text: text.into() }
    }

    /// The same error at a byte of the export.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }
}

impl From<&io::Error> for ErrorKind {
    /// ENOSPC, EDQUOT and EFBIG mean "no room"; EROFS and EPERM "not permitted"; everything else is a failed medium.
    fn from(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => Self::NoSpace,
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => Self::NotPermitted,
            _ => Self::Io,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_operating_system_become_the_few_that_the_protocol_has() {
        use io::ErrorKind as Os;
        for (os, kind) in [
            (Os::StorageFull, ErrorKind::NoSpace),
            (Os::QuotaExceeded, ErrorKind::NoSpace),
            (Os::FileTooLarge, ErrorKind::NoSpace),
            (Os::ReadOnlyFilesystem, ErrorKind::NotPermitted),
            (Os::PermissionDenied, ErrorKind::NotPermitted),
            (Os::OutOfMemory, ErrorKind::Io),
            (Os::UnexpectedEof, ErrorKind::Io),
            (Os::Other, ErrorKind::Io),
        ] {
            assert_eq!(ErrorKind::from(&io::Error::from(os)), kind, "{os:?}");
        }
    }
}
