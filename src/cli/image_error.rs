//! What went wrong with an image, in words that name the file, and its exit code.
//!
//! The engine names a file where it opens one. Everything else it says of "the image", which is not enough for a command that
//! was given two, or a chain.

use std::io::ErrorKind;
use std::path::Path;

use blockyard_qcow2::{self as qcow2, Error};

use super::Exit;

const LEFTOVER: &str =
    ": what an interrupted flatten left, or what one that runs now is making; if none is running it may be removed";

/// How the engine ends what it says of a name that leads out of the folder for backing files.
const OUTSIDE: &str = "the folder that backing files may be in";

/// An error of the engine, and what it is about.
#[derive(Debug, thiserror::Error)]
#[error("{about}{error}{hint}")]
pub struct ImageError {
    /// The file, with a colon; empty where the error names one itself.
    about: String,
    // Not its source: what the engine says ends with the system's answer already.
    error: Error,
    /// What to do about it, if that is known here; otherwise empty.
    hint: &'static str,
}

impl ImageError {
    /// An error of opening or using the image at this path.
    pub(super) fn of(image: &Path, error: Error) -> Self {
        let has_backing = || qcow2::info(image).is_ok_and(|facts| facts.backing.is_some());
        let about = match &error {
            // They name a file or an option, or no file is to blame.
            Error::Open { .. } | Error::Locked { .. } | Error::InvalidOption { .. } | Error::Cancelled => String::new(),
            // The header of the image itself can be read: it is one.
            Error::NotQcow2 if has_backing() => format!("{}, a file below it: ", image.display()),
            Error::Corrupt { .. } | Error::Unsupported { .. } | Error::Unreadable { .. } if has_backing() => {
                format!("{}, or a file below it: ", image.display())
            }
            _ => format!("{}: ", image.display()),
        };
        let is_outside = matches!(&error, Error::Backing { reason, .. } if reason.ends_with(OUTSIDE));
        Self { about, error, hint: if is_outside { " (see --backing-root)" } else { "" } }
    }

    /// An error of flattening an image into a new file.
    pub(super) fn of_flatten(image: &Path, target: &Path, error: Error) -> Self {
        let mut partial = target.as_os_str().to_owned();
        partial.push(".partial");
        match &error {
            Error::Unreadable { .. } => Self::of(image, error),
            Error::Open { path, source }
                if source.kind() == ErrorKind::AlreadyExists && path.as_os_str() == partial =>
            {
                Self { hint: LEFTOVER, ..error.into() }
            }
            _ => Self::of(target, error),
        }
    }

    /// An error of reading one of two disks.
    pub(super) fn of_either(first: &Path, second: &Path, error: Error) -> Self {
        match error {
            Error::Cancelled => error.into(),
            error => Self { about: format!("{} or {}: ", first.display(), second.display()), error, hint: "" },
        }
    }

    /// The exit code.
    pub(super) fn exit(&self) -> Exit {
        exit(&self.error)
    }
}

/// An error that no one file is to blame for.
impl From<Error> for ImageError {
    fn from(error: Error) -> Self {
        Self { about: String::new(), error, hint: "" }
    }
}

fn exit(error: &Error) -> Exit {
    match error {
        Error::Open { source, .. } if source.kind() == ErrorKind::NotFound => Exit::NotFound,
        Error::Open { source, .. } if source.kind() == ErrorKind::AlreadyExists => Exit::Conflict,
        Error::Locked { .. } => Exit::Conflict,
        Error::InvalidOption { .. } | Error::WouldShrink { .. } => Exit::Usage,
        Error::Unreadable { source, .. } => exit(source),
        Error::Cancelled => Exit::Interrupted,
        Error::Corrupt { .. } | Error::NotQcow2 => Exit::Damaged,
        _ => Exit::Failed,
    }
}
