//! A text that must never be printed.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// The longest file that is taken for a secret.
const MAX_BYTES: u64 = 64 << 10;

/// A password or token. Prints as `[secret]`; only [`Secret::expose`] gives it away.
#[derive(Clone)]
pub struct Secret(String);

/// A secret's file cannot be used. There is no fallback: without its secret a thing does not happen.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// It cannot be read.
    #[error("{} cannot be read", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is nothing in it.
    #[error("{} is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

impl Secret {
    /// The content of a file without the line end that editors add.
    ///
    /// # Errors
    /// It cannot be read as text, is empty, or has more than 64 KiB.
    pub fn read(path: &Path) -> Result<Self, SecretError> {
        let unreadable = |source| SecretError::Unreadable { path: path.to_owned(), source };
        let mut text = String::new();
        let file = File::open(path).map_err(unreadable)?;
        file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(unreadable)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(unreadable(io::ErrorKind::FileTooLarge.into()));
        }
        let text = text.trim_end_matches(['\r', '\n']);
        if text.is_empty() {
            return Err(SecretError::Empty { path: path.to_owned() });
        }
        Ok(Self(text.to_owned()))
    }

    /// The same of a regular file and nothing else: whoever reads a pipe waits for as long as it likes.
    ///
    /// # Errors
    /// Those of [`Secret::read`], and that it is no regular file.
    pub fn read_regular(path: &Path) -> Result<Self, SecretError> {
        let unreadable = |source| SecretError::Unreadable { path: path.to_owned(), source };
        if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
            return Err(unreadable(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")));
        }
        Self::read(path)
    }

    /// The text itself. Keep what is made of it out of logs, errors and the database.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether `text` is the secret, in a time that depends on neither.
    pub fn matches(&self, text: &str) -> bool {
        // Digests have one length, so that not even the length of the secret shows.
        Sha256::digest(&self.0).ct_eq(&Sha256::digest(text)).into()
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_prints_a_placeholder_and_matches_only_itself() {
        let secret = Secret::from("hunter2".to_owned());
        assert_eq!(format!("{secret:?}"), "[secret]");
        assert!(secret.matches("hunter2"));
        assert!(!secret.matches("hunter"));
        assert!(!secret.matches(""));
    }
}
