//! The table `webhook_cursors`: the last event that each webhook has accepted.

use super::{Connection, StoreError};

/// Keeps a cursor for each of these names, the new ones at the newest event, and forgets all others: a webhook that is
/// configured again begins anew.
///
/// # Errors
/// The database's.
pub async fn keep(connection: &mut Connection, names: &[&str]) -> Result<(), StoreError> {
    let kept: Vec<String> = sqlx::query_scalar("SELECT name FROM webhook_cursors").fetch_all(&mut *connection).await?;
    for gone in kept.iter().filter(|kept| !names.contains(&kept.as_str())) {
        sqlx::query("DELETE FROM webhook_cursors WHERE name = ?").bind(gone).execute(&mut *connection).await?;
    }
    for name in names {
        sqlx::query(
            "INSERT INTO webhook_cursors (name, sequence) VALUES (?, (SELECT COALESCE(max(sequence), 0) FROM events)) \
             ON CONFLICT (name) DO NOTHING",
        )
        .bind(name)
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// The last event that a webhook has accepted, or that it was new after.
///
/// # Errors
/// The database's.
pub async fn cursor(connection: &mut Connection, name: &str) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar("SELECT sequence FROM webhook_cursors WHERE name = ?")
        .bind(name)
        .fetch_optional(connection)
        .await?
        .unwrap_or(0))
}

/// Notes that a webhook has accepted everything up to `sequence`.
///
/// # Errors
/// The database's.
pub async fn advance(connection: &mut Connection, name: &str, sequence: i64) -> Result<(), StoreError> {
    sqlx::query("UPDATE webhook_cursors SET sequence = ? WHERE name = ?")
        .bind(sequence)
        .bind(name)
        .execute(connection)
        .await?;
    Ok(())
}
