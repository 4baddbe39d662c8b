//! The `events` table: what happened, in one growing sequence that is never re-used. Written in the transaction of the
//! change it tells of, so that there is no event without its change and no change without its event.

use std::str::FromStr;

use serde_json::Value;

use super::{Connection, StoreError};
use crate::backup::state::UnknownWord;
use crate::clock::UtcTime;

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

/// The number of the last event.
///
/// # Errors
/// The database's.
pub async fn last_sequence(connection: &mut Connection) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar("SELECT COALESCE(max(sequence), 0) FROM events").fetch_one(connection).await?)
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
