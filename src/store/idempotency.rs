//! The table `idempotency_keys`: which job a key of a start request made, and what its caller was told.

use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row};

use super::{Connection, StoreError};
use crate::clock::UtcTime;
use crate::id::BackupId;

/// What is known of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRow {
    /// Digest of the body that came with it.
    pub body_hash: String,
    /// The job it made.
    pub backup_id: BackupId,
    /// The answer, when one was given.
    pub answer: Option<StoredAnswer>,
}

/// An answer as it was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredAnswer {
    /// The HTTP status.
    pub status: u16,
    /// The JSON document.
    pub body: String,
}

impl FromRow<'_, SqliteRow> for KeyRow {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        let (status, body): (Option<u16>, Option<String>) = (row.try_get("status")?, row.try_get("answer")?);
        Ok(Self {
            body_hash: row.try_get("body_hash")?,
            backup_id: row.try_get("backup_id")?,
            answer: status.zip(body).map(|(status, body)| StoredAnswer { status, body }),
        })
    }
}

/// A key that has not expired.
///
/// # Errors
/// The database's.
pub async fn find(connection: &mut Connection, key: &str, now: UtcTime) -> Result<Option<KeyRow>, StoreError> {
    Ok(sqlx::query_as("SELECT * FROM idempotency_keys WHERE key = ? AND expires_at > ?")
        .bind(key)
        .bind(now)
        .fetch_optional(connection)
        .await?)
}

/// Stores a key without an answer, in the transaction that makes its job.
///
/// # Errors
/// [`StoreError::Exists`] when it is there, else the database's.
pub async fn insert(
    connection: &mut Connection,
    key: &str,
    body_hash: &str,
    backup: &BackupId,
    expires_at: UtcTime,
) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO idempotency_keys (key, body_hash, backup_id, expires_at) VALUES (?, ?, ?, ?)")
        .bind(key)
        .bind(body_hash)
        .bind(backup)
        .bind(expires_at)
        .execute(connection)
        .await?;
    Ok(())
}

/// Stores what the caller was told.
///
/// # Errors
/// The database's.
pub async fn complete(connection: &mut Connection, key: &str, answer: &StoredAnswer) -> Result<(), StoreError> {
    sqlx::query("UPDATE idempotency_keys SET status = ?, answer = ? WHERE key = ?")
        .bind(answer.status)
        .bind(&answer.body)
        .bind(key)
        .execute(connection)
        .await?;
    Ok(())
}

/// Removes the keys that have expired.
///
/// # Errors
/// The database's.
pub async fn remove_expired(connection: &mut Connection, now: UtcTime) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM idempotency_keys WHERE expires_at <= ?").bind(now).execute(connection).await?;
    Ok(())
}
