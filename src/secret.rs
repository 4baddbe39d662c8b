//! A text that must never be printed.

use std::fmt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

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
        source: std::io::Error,
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
    pub fn read(path: &Path) -> Result<Self, SecretError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| SecretError::Unreadable { path: path.to_owned(), source })?;
        let text = text.trim_end_matches(['\r', '\n']);
        if text.is_empty() {
            return Err(SecretError::Empty { path: path.to_owned() });
        }
        Ok(Self(text.to_owned()))
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
