//! Everything that can go wrong with an image, sorted by reach: the caller's request, the image file, the whole session.

use std::io;
use std::path::PathBuf;

/// A failed operation on an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The range reaches past the virtual disk, or wraps. Nothing was changed.
    #[error("bytes {offset}+{length} are outside the disk of {size} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        length: u64,
        /// Virtual size in bytes.
        size: u64,
    },
    /// The image was opened read-only.
    #[error("the image is open read-only")]
    ReadOnly,
    /// The image was closed; nothing more can be done with this handle.
    #[error("the image is closed")]
    Closed,
    /// An option of create or open is outside what the format, or this engine, allows.
    #[error("{option}: {reason}")]
    InvalidOption {
        /// The option's name.
        option: &'static str,
        /// What is allowed.
        reason: String,
    },
    /// A disk only grows. Nothing was changed.
    #[error("the disk of {size} bytes cannot shrink to {wanted} bytes")]
    WouldShrink {
        /// Virtual size in bytes.
        size: u64,
        /// The smaller size asked for.
        wanted: u64,
    },
    /// No room for this request, and the image is healthy. A write changed nothing; of zeroes and discards over several L2
    /// tables, the first tables may have changed.
    #[error("no space left for {length} bytes at host offset {offset}")]
    NoSpace {
        /// Host offset at which space was to be reserved.
        offset: u64,
        /// Bytes wanted.
        length: u64,
    },
    /// The file cannot be read or written. A failed write or sync also poisons the image.
    #[error("{operation} at offset {offset} of the image file: {source}")]
    Io {
        /// What was tried, such as `write` or `fdatasync`.
        operation: &'static str,
        /// Host offset in bytes; 0 for operations on the whole file.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// A path cannot be opened or created.
    #[error("{path}: {source}")]
    Open {
        /// The path as the caller gave it.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// An earlier write or sync failed: what reached the disk since the last flush is unknown, so nothing may be
    /// acknowledged any more.
    #[error("the image is poisoned by an earlier failure: {cause}")]
    Poisoned {
        /// The first failure.
        cause: String,
        /// Whether that was a full disk (or quota).
        no_space: bool,
    },
    /// Somebody else uses the image in a way that forbids this.
    #[error("{path}: the image is in use by another process (lock on byte {byte} of the file)")]
    Locked {
        /// The image.
        path: PathBuf,
        /// The byte whose lock was refused; QEMU's numbering: 100 + permission used, 200 + permission denied to others.
        byte: u64,
    },
    /// The file is not a qcow2 image at all.
    #[error("not a qcow2 image: it does not begin with the magic bytes 'QFI\\xfb'")]
    NotQcow2,
    /// The file breaks a rule of the format.
    #[error("corrupt image: {structure} at offset {offset} holds {value:#x}: {rule}")]
    Corrupt {
        /// The structure, such as `L2 entry`.
        structure: &'static str,
        /// Host offset of the field in bytes.
        offset: u64,
        /// The value found.
        value: u64,
        /// The rule it breaks.
        rule: &'static str,
    },
    /// A legal image that uses something this engine refuses.
    #[error("unsupported: {feature}")]
    Unsupported {
        /// What it uses, and what can be done.
        feature: String,
    },
    /// The backing file cannot be used.
    #[error("backing file '{name}': {reason}")]
    Backing {
        /// The name in the overlay's header.
        name: String,
        /// Why.
        reason: String,
    },
    /// A range of a disk that was being copied or compared cannot be read.
    #[error("bytes {offset}+{length} of the disk cannot be read: {source}")]
    Unreadable {
        /// First guest byte of the range.
        offset: u64,
        /// Bytes that were read in one go.
        length: u64,
        /// What went wrong in the file.
        source: Box<Error>,
    },
    /// The caller asked for an end.
    #[error("cancelled")]
    Cancelled,
    /// A file that was just written does not pass the check. It was removed.
    #[error("the new image does not pass its check ({errors} errors, {leaks} leaks): {detail}")]
    Unclean {
        /// Broken rules, and refcounts that are too low.
        errors: u64,
        /// Refcounts that are too high.
        leaks: u64,
        /// The first broken rule.
        detail: String,
    },
    /// A bug in the engine ended the operation; the image is poisoned.
    #[error("the operation ended by a panic; the image is poisoned")]
    Panicked,
}

impl Error {
    pub(crate) fn io(operation: &'static str, offset: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, offset, source }
    }

    pub(crate) fn corrupt(structure: &'static str, offset: u64, value: u64, rule: &'static str) -> Self {
        Self::Corrupt { structure, offset, value, rule }
    }

    pub(crate) fn unsupported(feature: impl Into<String>) -> Self {
        Self::Unsupported { feature: feature.into() }
    }

    /// Whether the cause is a full disk (or quota), be it found early or by a failed write.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Unreadable { source, .. } => source.is_no_space(),
            Self::NoSpace { .. } | Self::Poisoned { no_space: true, .. } => true,
            Self::Io { source, .. } | Self::Open { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
            ),
            _ => false,
        }
    }
}

/// The result of an operation on an image.
pub type Result<T, E = Error> = std::result::Result<T, E>;
