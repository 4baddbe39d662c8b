//! The `events` table: what happened, in one growing sequence that is never re-used. Written in the transaction of the
//! change it tells of, so that there is no event without its change and no change without its event.
//!
//! Whoever has read the event with number N has missed none below N. SQLite has one writer, and a number is given inside its
//! transaction: a transaction that is rolled back gives its numbers back too, and the next one begins only after the one
//! before has committed. So numbers become visible in their order and without holes, and "everything after N" is all that a
//! reader has to ask. With several writers that would no longer hold.

use std::str::FromStr;

use serde_json::Value;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::{Connection, StoreError};
use crate::clock::UtcTime;
use crate::words::UnknownWord;

/// Every kind of event. `disk.progress` is told on live streams only and never stored.
pub const KINDS: [&str; 12] = [
    "job.state",
    "disk.state",
    "disk.progress",
    "job.warning",
    "job.deleted",
    "point.committed",
    "point.trust",
    "point.merged",
    "point.protected",
    "point.deleting",
    "point.deleted",
    "alert",
];

/// The kind that is never stored.
pub const PROGRESS: &str = "disk.progress";

/// One stored event.
#[derive(Clone, Debug, PartialEq)]
pub struct EventRow {
    /// Its number.
    pub sequence: i64,
    /// When it happened.
    pub at: UtcTime,
    /// What it is.
    pub kind: String,
    /// Id of what it is about.
    pub subject: String,
    /// The rest, an object.
    pub data: Value,
}

impl sqlx::FromRow<'_, SqliteRow> for EventRow {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        let data: String = row.try_get("data")?;
        Ok(Self {
            sequence: row.try_get("sequence")?,
            at: row.try_get("at")?,
            kind: row.try_get("kind")?,
            subject: row.try_get("subject")?,
            // An object, also in a database that was changed by hand: what is told adds members to it.
            data: serde_json::from_str(&data).map(Value::Object).map_err(|error| sqlx::Error::Decode(error.into()))?,
        })
    }
}

impl EventRow {
    /// The event as it is told: its data with `seq` and `at`.
    pub fn told(&self) -> Value {
        let mut told = self.data.clone();
        told["seq"] = self.sequence.into();
        told["at"] = self.at.to_string().into();
        told
    }
}

/// Who caused a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor {
    /// A caller of the API.
    User,
    /// This service.
    Service,
    /// A deadline.
    Clock,
    /// The backup client.
    Client,
    /// A rule that an operator set: retention.
    Policy,
}

impl Actor {
    /// The word in events.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Service => "service",
            Self::Clock => "clock",
            Self::Client => "client",
            Self::Policy => "policy",
        }
    }
}

impl FromStr for Actor {
    type Err = UnknownWord;

    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        [Self::User, Self::Service, Self::Clock, Self::Client, Self::Policy]
            .into_iter()
            .find(|actor| actor.as_str() == word)
            .ok_or_else(|| UnknownWord { kind: "Actor", word: word.to_owned() })
    }
}

/// Appends an event and returns its number.
///
/// # Errors
/// The database's.
pub async fn append(
    connection: &mut Connection,
    kind: &str,
    subject: &str,
    data: &Value,
    actor: Actor,
    at: UtcTime,
) -> Result<i64, StoreError> {
    let done = sqlx::query("INSERT INTO events (at, kind, subject, data, actor) VALUES (?, ?, ?, ?, ?)")
        .bind(at)
        .bind(kind)
        .bind(subject)
        .bind(data.to_string())
        .bind(actor.as_str())
        .execute(connection)
        .await?;
    Ok(done.last_insert_rowid())
}

/// The events about one thing, oldest first: kind and data.
///
/// # Errors
/// The database's.
pub async fn about(connection: &mut Connection, subject: &str) -> Result<Vec<(String, Value)>, StoreError> {
    let rows: Vec<(String, String)> =
        sqlx::query_as("SELECT kind, data FROM events WHERE subject = ? ORDER BY sequence")
            .bind(subject)
            .fetch_all(connection)
            .await?;
    rows.into_iter()
        .map(|(kind, data)| {
            let data = serde_json::from_str(&data).map_err(|error| sqlx::Error::Decode(error.into()))?;
            Ok((kind, data))
        })
        .collect()
}

/// The events of one kind after a number, oldest first: number, subject and data.
///
/// # Errors
/// The database's.
pub async fn of_kind_after(
    connection: &mut Connection,
    kind: &str,
    after: i64,
) -> Result<Vec<(i64, String, Value)>, StoreError> {
    let rows: Vec<(i64, String, String)> =
        sqlx::query_as("SELECT sequence, subject, data FROM events WHERE sequence > ? AND kind = ? ORDER BY sequence")
            .bind(after)
            .bind(kind)
            .fetch_all(connection)
            .await?;
    rows.into_iter()
        .map(|(sequence, subject, data)| {
            let data = serde_json::from_str(&data).map_err(|error| sqlx::Error::Decode(error.into()))?;
            Ok((sequence, subject, data))
        })
        .collect()
}

/// The events after the number `after`, oldest first, at most `limit`; with `subject` only those about it.
///
/// # Errors
/// The database's.
pub async fn after(
    connection: &mut Connection,
    after: i64,
    subject: Option<&str>,
    limit: u32,
) -> Result<Vec<EventRow>, StoreError> {
    let rows = match subject {
        Some(subject) => {
            sqlx::query_as("SELECT * FROM events WHERE subject = ? AND sequence > ? ORDER BY sequence LIMIT ?")
                .bind(subject)
                .bind(after)
                .bind(limit)
                .fetch_all(connection)
                .await?
        }
        None => {
            sqlx::query_as("SELECT * FROM events WHERE sequence > ? ORDER BY sequence LIMIT ?")
                .bind(after)
                .bind(limit)
                .fetch_all(connection)
                .await?
        }
    };
    Ok(rows)
}

/// The numbers of the oldest and the newest event that are kept; both 0 before the first.
///
/// # Errors
/// The database's.
pub async fn bounds(connection: &mut Connection) -> Result<(i64, i64), StoreError> {
    // Two queries in one: each is a look at one end of the index.
    Ok(sqlx::query_as(
        "SELECT COALESCE((SELECT min(sequence) FROM events), 0), COALESCE((SELECT max(sequence) FROM events), 0)",
    )
    .fetch_one(connection)
    .await?)
}

/// The newest event of a kind about `subject`.
///
/// # Errors
/// The database's.
pub async fn last_of_kind(
    connection: &mut Connection,
    subject: &str,
    kind: &str,
) -> Result<Option<EventRow>, StoreError> {
    Ok(sqlx::query_as("SELECT * FROM events WHERE subject = ? AND kind = ? ORDER BY sequence DESC LIMIT 1")
        .bind(subject)
        .bind(kind)
        .fetch_optional(connection)
        .await?)
}

/// When an alert of this name about `subject` was raised last.
///
/// # Errors
/// The database's.
pub async fn last_alert(
    connection: &mut Connection,
    subject: &str,
    alert: &str,
) -> Result<Option<UtcTime>, StoreError> {
    let rows: Vec<EventRow> =
        sqlx::query_as("SELECT * FROM events WHERE subject = ? AND kind = 'alert' ORDER BY sequence DESC LIMIT 100")
            .bind(subject)
            .fetch_all(connection)
            .await?;
    Ok(rows.into_iter().find(|row| row.data["alert"] == alert).map(|row| row.at))
}

/// Removes events from before `cutoff`, oldest first, at most `limit`; says how many. Only what lies before everything that is
/// kept goes, so that no reader finds a hole, and the newest event stays, whose number says where new ones begin.
///
/// # Errors
/// The database's.
pub async fn remove_before(connection: &mut Connection, cutoff: UtcTime, limit: u32) -> Result<u64, StoreError> {
    let done = sqlx::query(
        "DELETE FROM events WHERE sequence IN (SELECT sequence FROM events WHERE sequence < COALESCE(\
         (SELECT sequence FROM events WHERE at >= ? ORDER BY sequence LIMIT 1), (SELECT max(sequence) FROM events)) \
         ORDER BY sequence LIMIT ?)",
    )
    .bind(cutoff)
    .bind(limit)
    .execute(connection)
    .await?;
    Ok(done.rows_affected())
}
