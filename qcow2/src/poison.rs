//! The first failure after which the disk's state is unknown. It is never forgotten: from then on nothing is acknowledged.

use std::sync::OnceLock;

use crate::error::{Error, Result};

#[derive(Debug)]
struct Cause {
    text: String,
    no_space: bool,
}

/// Shared by the image and its write-behind workers.
#[derive(Debug, Default)]
pub(crate) struct Poison(OnceLock<Cause>);

impl Poison {
    /// Remembers the first failure and hands the error on.
    pub(crate) fn by(&self, error: Error) -> Error {
        self.set(error.to_string(), error.is_no_space());
        error
    }

    pub(crate) fn by_panic(&self) {
        self.set("an operation ended by a panic".into(), false);
    }

    fn set(&self, text: String, no_space: bool) {
        // Already set: the first failure is the one that counts.
        let _ = self.0.set(Cause { text, no_space });
    }

    pub(crate) fn cause(&self) -> Option<&str> {
        self.0.get().map(|cause| cause.text.as_str())
    }

    pub(crate) fn refuse(&self) -> Result<()> {
        match self.0.get() {
            Some(_) if mutant!("poison_forgotten") => Ok(()),
            Some(Cause { text, no_space }) => Err(Error::Poisoned { cause: text.clone(), no_space: *no_space }),
            None => Ok(()),
        }
    }
}
