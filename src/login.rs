//! The login for a VM's vCenter: which one it is, and its password, read when it is needed.

use crate::config::Config;
use crate::secret::{Secret, SecretError};
use crate::store::vms::Vm;

/// A login with its password.
#[derive(Clone, Debug)]
pub struct Login {
    /// Login name.
    pub username: String,
    /// Read just now, so that what uses it never fails for it later.
    pub password: Secret,
    /// Where discovery is told to look for VMs.
    pub datacenter: Option<String>,
}

/// There is no login for the VM's vCenter.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// None is named, it is not in the configuration, or it has no password.
    #[error("VM {vm_name} has no usable credential: {reason}")]
    Missing {
        /// The VM.
        vm_name: String,
        /// Why, without paths.
        reason: String,
    },
    /// Reading the file ended by a panic.
    #[error("reading a password ended by a panic")]
    Panicked,
}

impl Login {
    /// The login that the VM names.
    ///
    /// # Errors
    /// There is none that can be used.
    pub async fn read(config: &Config, vm: &Vm) -> Result<Self, LoginError> {
        let missing = |reason: String| LoginError::Missing { vm_name: vm.name.clone(), reason };
        let name = vm.credential.as_ref().ok_or_else(|| missing("none is named in the inventory".to_owned()))?;
        let credential = config
            .credentials
            .get(name)
            .ok_or_else(|| missing(format!("credentials.{name} is not in the configuration")))?;
        let file = credential.password_file.clone();
        let password = tokio::task::spawn_blocking(move || Secret::read_regular(&file)).await;
        match password.map_err(|_| LoginError::Panicked)? {
            Ok(password) => {
                Ok(Self { username: credential.username.clone(), password, datacenter: credential.datacenter.clone() })
            }
            Err(error) => {
                tracing::error!(credential = name, %error, "the password cannot be read");
                let why = match error {
                    SecretError::Unreadable { source, .. } => source.kind().to_string(),
                    SecretError::Empty { .. } => "it is empty".to_owned(),
                };
                Err(missing(format!("the password file of credentials.{name} cannot be used: {why}")))
            }
        }
    }
}
