//! Repositories: which folders hold restore points.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sqlx::sqlite::SqliteRow;
use sqlx::{FromRow, Row};
use utoipa::ToSchema;

use super::{Connection, Listing, Page, StoreError};
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId};

/// A repository as it is kept.
#[derive(Clone, Debug)]
pub struct Repository {
    /// Identity, chosen by the operator.
    pub id: RepositoryId,
    /// For display.
    pub name: String,
    /// Absolute path of the folder.
    pub path: String,
    /// Whether new backups may go there.
    pub enabled: bool,
    /// Which points are kept.
    pub retention: Retention,
    /// Jobs at once into it; `None` means no limit of its own.
    pub max_running: Option<u32>,
    /// When its folders were last held against its records.
    pub last_check_at: Option<UtcTime>,
    /// Grows with every replacement.
    pub revision: i64,
    /// When it was added.
    pub created_at: UtcTime,
}

/// What an operator says about a repository.
#[derive(Clone, Debug)]
pub struct RepositoryDescription {
    /// See [`Repository::name`].
    pub name: String,
    /// See [`Repository::path`].
    pub path: String,
    /// See [`Repository::enabled`].
    pub enabled: bool,
    /// See [`Repository::retention`].
    pub retention: Retention,
    /// See [`Repository::max_running`].
    pub max_running: Option<u32>,
}

/// How many points are kept, by age class. Nothing set keeps all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"keep_daily": 7, "keep_weekly": 4}))]
pub struct Retention {
    /// The newest points.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_last: Option<u32>,
    /// The newest point of each of the last hours that have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_hourly: Option<u32>,
    /// The same for days.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_daily: Option<u32>,
    /// The same for weeks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_weekly: Option<u32>,
    /// The same for months.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_monthly: Option<u32>,
    /// The same for years.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_yearly: Option<u32>,
}

/// What the list of repositories is ordered by: their ids are chosen by people and say nothing about age.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryKey {
    created_at: UtcTime,
    id: RepositoryId,
}

/// The text is no key of the list of repositories.
#[derive(Debug, thiserror::Error)]
#[error("not a page token of this list")]
pub struct RepositoryKeyError;

impl fmt::Display for RepositoryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}~{}", self.created_at, self.id)
    }
}

impl FromStr for RepositoryKey {
    type Err = RepositoryKeyError;

    fn from_str(text: &str) -> Result<Self, RepositoryKeyError> {
        let (created_at, id) = text.split_once('~').ok_or(RepositoryKeyError)?;
        Ok(Self {
            created_at: created_at.parse().map_err(|_| RepositoryKeyError)?,
            id: id.parse().map_err(|_| RepositoryKeyError)?,
        })
    }
}

impl FromRow<'_, SqliteRow> for Repository {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        let retention: &str = row.try_get("retention")?;
        Ok(Self {
            id: row.try_get("id")?,
            name: row.try_get("name")?,
            path: row.try_get("path")?,
            enabled: row.try_get("enabled")?,
            retention: serde_json::from_str(retention)
                .map_err(|source| sqlx::Error::ColumnDecode { index: "retention".to_owned(), source: source.into() })?,
            max_running: row.try_get("max_running")?,
            last_check_at: row.try_get("last_check_at")?,
            revision: row.try_get("revision")?,
            created_at: row.try_get("created_at")?,
        })
    }
}

/// Adds a repository. One of the same id that was removed and kept for its jobs comes back under the new description.
///
/// # Errors
///
/// [`StoreError::Exists`] when the id or the path is taken.
pub async fn insert(
    connection: &mut Connection,
    id: &RepositoryId,
    repository: &RepositoryDescription,
) -> Result<(), StoreError> {
    let removed: bool =
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM repositories WHERE id = ?1 AND removed_at IS NOT NULL)")
            .bind(id)
            .fetch_one(&mut *connection)
            .await?;
    if removed {
        sqlx::query("UPDATE repositories SET removed_at = NULL WHERE id = ?1")
            .bind(id)
            .execute(&mut *connection)
            .await?;
        return replace(connection, id, repository).await;
    }
    sqlx::query(
        "INSERT INTO repositories (id, name, path, enabled, retention, max_running, revision, created_at) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, 1, ?7)",
    )
    .bind(id)
    .bind(&repository.name)
    .bind(&repository.path)
    .bind(repository.enabled)
    .bind(retention_text(&repository.retention)?)
    .bind(repository.max_running)
    .bind(UtcTime::now())
    .execute(connection)
    .await?;
    Ok(())
}

/// Replaces the description of a repository that exists; its revision grows.
///
/// # Errors
///
/// [`StoreError::Exists`] when another repository has the new path.
pub async fn replace(
    connection: &mut Connection,
    id: &RepositoryId,
    repository: &RepositoryDescription,
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE repositories SET name = ?2, path = ?3, enabled = ?4, retention = ?5, max_running = ?6, \
         revision = revision + 1 WHERE id = ?1",
    )
    .bind(id)
    .bind(&repository.name)
    .bind(&repository.path)
    .bind(repository.enabled)
    .bind(retention_text(&repository.retention)?)
    .bind(repository.max_running)
    .execute(connection)
    .await?;
    Ok(())
}

fn retention_text(retention: &Retention) -> Result<String, sqlx::Error> {
    serde_json::to_string(retention).map_err(|source| sqlx::Error::Encode(source.into()))
}

/// The repository, unless it was removed.
pub async fn find(connection: &mut Connection, id: &RepositoryId) -> Result<Option<Repository>, StoreError> {
    let repository = sqlx::query_as("SELECT * FROM repositories WHERE id = ?1 AND removed_at IS NULL").bind(id);
    Ok(repository.fetch_optional(connection).await?)
}

/// Every repository, for what must look at all of them.
pub async fn all(connection: &mut Connection) -> Result<Vec<Repository>, StoreError> {
    let rows = sqlx::query_as("SELECT * FROM repositories WHERE removed_at IS NULL ORDER BY created_at, id");
    Ok(rows.fetch_all(connection).await?)
}

/// One page of the repositories.
pub async fn list(
    connection: &mut Connection,
    page: &Page<RepositoryKey>,
) -> Result<Listing<Repository, RepositoryKey>, StoreError> {
    let total: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM repositories WHERE removed_at IS NULL")
        .fetch_one(&mut *connection)
        .await?;
    let rows = sqlx::query_as(
        "SELECT * FROM repositories WHERE removed_at IS NULL \
         AND (?1 IS NULL OR created_at < ?1 OR (created_at = ?1 AND id < ?2)) \
         ORDER BY created_at DESC, id DESC LIMIT ?3",
    )
    .bind(page.after.as_ref().map(|key| key.created_at))
    .bind(page.after.as_ref().map(|key| &key.id))
    .bind(page.fetch_limit())
    .fetch_all(connection)
    .await?;
    Ok(page.listing(rows, total.unsigned_abs(), |repository: &Repository| RepositoryKey {
        created_at: repository.created_at,
        id: repository.id.clone(),
    }))
}

/// Notes that its folders were held against its records.
///
/// # Errors
/// The database's.
pub async fn set_checked(connection: &mut Connection, id: &RepositoryId, at: UtcTime) -> Result<(), StoreError> {
    sqlx::query("UPDATE repositories SET last_check_at = ? WHERE id = ?").bind(at).bind(id).execute(connection).await?;
    Ok(())
}

/// How many restore points it holds, whatever their state short of deleted.
pub async fn point_count(connection: &mut Connection, id: &RepositoryId) -> Result<u64, StoreError> {
    let count: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM restore_points WHERE repository_id = ?1 AND state <> 'deleted'")
            .bind(id)
            .fetch_one(connection)
            .await?;
    Ok(count.unsigned_abs())
}

/// A job that writes into it now, if one does.
pub async fn active_backup(connection: &mut Connection, id: &RepositoryId) -> Result<Option<BackupId>, StoreError> {
    let backup = sqlx::query_scalar(
        "SELECT id FROM backups WHERE repository_id = ?1 AND state NOT IN ('committed', 'cancelled', 'failed') \
         ORDER BY id DESC LIMIT 1",
    );
    Ok(backup.bind(id).fetch_optional(connection).await?)
}

/// Removes a repository. Its row stays, out of sight, while jobs refer to it; the folder is not touched.
pub async fn remove(connection: &mut Connection, id: &RepositoryId) -> Result<(), StoreError> {
    let has_backups: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM backups WHERE repository_id = ?1)")
        .bind(id)
        .fetch_one(&mut *connection)
        .await?;
    let removal = if has_backups {
        sqlx::query("UPDATE repositories SET removed_at = ?2 WHERE id = ?1").bind(id).bind(UtcTime::now())
    } else {
        sqlx::query("DELETE FROM repositories WHERE id = ?1").bind(id)
    };
    removal.execute(connection).await?;
    Ok(())
}
