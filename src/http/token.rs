//! The bearer tokens: read from their files at the start, made when there is none yet.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::config::{AuthMode, Config};
use crate::secret::{Secret, SecretError};

/// Random bytes of a token: 256 bits, written as 64 hexadecimal digits.
const TOKEN_BYTES: usize = 32;

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Everything.
    Full,
    /// GET and HEAD.
    Read,
}

/// The tokens of this service. Without one, in mode "off", everybody is let in.
#[derive(Debug)]
pub struct Tokens {
    full: Option<Secret>,
    read: Option<Secret>,
}

/// The tokens cannot be had; the service does not start without them.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// A token file cannot be read or is empty.
    #[error("the token cannot be read")]
    Secret(#[from] SecretError),
    /// The token file cannot be made.
    #[error("the token file {} cannot be made", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Everybody on this machine could read it.
    #[error("the token file {} can be read by everybody (mode {mode:04o}): chmod 600 it, and replace the token", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
}

impl Tokens {
    /// Reads the token files that the configuration names; makes the first one when it does not exist.
    pub fn load(config: &Config) -> Result<Self, TokenError> {
        if config.auth.mode == AuthMode::Off {
            return Ok(Self { full: None, read: None });
        }
        let path = config.token_file();
        create_if_missing(&path)?;
        let full = read(&path)?;
        let read = config.auth.read_token_file.as_deref().map(read).transpose()?;
        Ok(Self { full: Some(full), read })
    }

    /// Whether nobody needs a token.
    pub fn is_off(&self) -> bool {
        self.full.is_none()
    }

    /// What `token` allows, `None` for a wrong one.
    pub fn grant(&self, token: &str) -> Option<Grant> {
        let is = |secret: &Option<Secret>| secret.as_ref().is_some_and(|secret| secret.matches(token));
        // Both are always compared, so that the time does not tell which one was close.
        match (is(&self.full), is(&self.read)) {
            (true, _) => Some(Grant::Full),
            (false, true) => Some(Grant::Read),
            (false, false) => None,
        }
    }
}

fn read(path: &Path) -> Result<Secret, TokenError> {
    let secret = Secret::read(path)?;
    let unreadable = |source| SecretError::Unreadable { path: path.to_owned(), source };
    let mode = std::fs::metadata(path).map_err(unreadable)?.permissions().mode() & 0o7777;
    if mode & 0o007 != 0 {
        return Err(TokenError::Exposed { path: path.to_owned(), mode });
    }
    Ok(secret)
}

/// Makes the token file, 0600 from its first moment. One that is there is left alone.
fn create_if_missing(path: &Path) -> Result<(), TokenError> {
    let failed = |source| TokenError::Create { path: path.to_owned(), source };
    let mut file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
        Err(source) => return Err(failed(source)),
    };
    let mut bytes = [0; TOKEN_BYTES];
    getrandom::fill(&mut bytes).map_err(|error| failed(std::io::Error::other(error)))?;
    let token: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    writeln!(file, "{token}").and_then(|()| file.sync_all()).map_err(failed)?;
    tracing::info!(path = %path.display(), "made a new token");
    Ok(())
}
