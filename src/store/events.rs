//! The `events` table: what happened, in one growing sequence that is never re-used. Written in the transaction of the
//! change it tells of, so that there is no event without its change and no change without its event.

use serde_json::Value;

use super::{Connection, StoreError};
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
