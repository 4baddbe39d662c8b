//! Why a folder cannot be examined, or images cannot be written there at all.

use std::io;
use std::path::{Path, PathBuf};

use blockyard_qcow2 as qcow2;

use crate::cli::Exit;

/// What went wrong in a folder.
#[derive(Debug, thiserror::Error)]
pub enum DoctorError {
    /// The folder cannot be looked at.
    #[error("{} cannot be examined", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something else has this name.
    #[error("{} is not a folder", path.display())]
    NotAFolder {
        /// What was named.
        path: PathBuf,
    },
    /// A step that every image needs.
    #[error("images cannot be written in {}: {step} fails", path.display())]
    Step {
        /// The folder.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The engine cannot make, open or write one.
    #[error("images cannot be written in {}: {error}", path.display())]
    Image {
        /// The folder.
        path: PathBuf,
        // Not its source: what the engine says ends with the system's answer already.
        /// What the engine said.
        error: qcow2::Error,
    },
    /// Ctrl-C.
    #[error("interrupted; nothing is left behind")]
    Interrupted,
    /// A bug here.
    #[error("the examination ended by a panic")]
    Panicked,
}

impl DoctorError {
    pub(super) fn step(path: &Path, step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Step { path: path.to_owned(), step, source }
    }

    pub(super) fn image(path: &Path) -> impl FnOnce(qcow2::Error) -> Self {
        move |error| Self::Image { path: path.to_owned(), error }
    }

    /// The exit code.
    pub(in crate::cli) fn exit(&self) -> Exit {
        match self {
            Self::Folder { source, .. } if source.kind() == io::ErrorKind::NotFound => Exit::NotFound,
            Self::NotAFolder { .. } => Exit::Usage,
            Self::Interrupted => Exit::Interrupted,
            Self::Folder { .. } | Self::Step { .. } | Self::Image { .. } | Self::Panicked => Exit::Failed,
        }
    }
}
