//! The keys by which callers repeat a start request without starting a second backup.
//!
//! A key is held in memory from the first look at the request until its answer is stored, and recorded in the transaction that
//! makes the job. So of two requests with one key that come at once only one goes on, and a process that dies in
//! between leaves the key with its job.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::Backups;
use crate::clock::UtcTime;
use crate::store::StoreError;
use crate::store::idempotency::{self, KeyRow, StoredAnswer};

/// A caller's key, with a digest of what it asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// The caller's word.
    pub key: String,
    /// Of the body.
    pub body_hash: String,
}

/// What a key means for the request that carries it.
#[derive(Debug)]
pub enum Claimed {
    /// Nobody has used it: go on, and keep this until the answer is stored.
    New(HeldKey),
    /// It has made a job before.
    Used(KeyRow),
}

/// Why a request with a key is not looked at.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The key came with another body.
    #[error("the key was used for another request")]
    Reused,
    /// Its first request has not been answered yet.
    #[error("the first request with this key is still running")]
    InProgress,
    /// The database could not be asked.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The keys whose first request is being answered, with the digests of their bodies.
#[derive(Debug, Default)]
pub(super) struct KeysInUse {
    held: Mutex<BTreeMap<String, String>>,
}

/// A key whose request is being answered; dropping it lets the next one look at what was stored.
#[derive(Debug)]
pub struct HeldKey {
    keys: Arc<KeysInUse>,
    key: String,
}

impl Drop for HeldKey {
    fn drop(&mut self) {
        self.keys.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

impl KeysInUse {
    fn hold(self: &Arc<Self>, wanted: &IdempotencyKey) -> Result<HeldKey, KeyError> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        match held.get(&wanted.key) {
            Some(body_hash) if *body_hash == wanted.body_hash => Err(KeyError::InProgress),
            Some(_) => Err(KeyError::Reused),
            None => {
                held.insert(wanted.key.clone(), wanted.body_hash.clone());
                Ok(HeldKey { keys: Arc::clone(self), key: wanted.key.clone() })
            }
        }
    }
}

impl Backups {
    /// Takes a key for a request, or says what became of its first one.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub async fn claim_key(&self, key: &IdempotencyKey) -> Result<Claimed, KeyError> {
        let held = self.shared.keys.hold(key)?;
        let mut connection = self.shared.store.read().await?;
        match idempotency::find(&mut connection, &key.key, UtcTime::now()).await? {
            Some(row) if row.body_hash != key.body_hash => Err(KeyError::Reused),
            Some(row) => Ok(Claimed::Used(row)),
            None => Ok(Claimed::New(held)),
        }
    }

    /// Stores what the caller was told. Nothing is stored for a request that made no job.
    ///
    /// # Errors
    /// The database's.
    pub async fn store_answer(&self, key: &HeldKey, answer: &StoredAnswer) -> Result<(), StoreError> {
        let mut transaction = self.shared.store.write().await?;
        idempotency::complete(&mut transaction, &key.key, answer).await?;
        transaction.commit().await
    }
}
