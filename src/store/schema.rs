//! Migrations and the check that the tables are those of this binary.
//!
//! Three things refuse to start: a migration that this binary does not know (the database is newer), one whose text
//! differs (it was edited after it ran), and tables that are not what the migrations make (somebody ran ALTER by hand).
//! Each answer says what to do.

use std::collections::BTreeMap;
use std::str::FromStr;

use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection as _, Row, SqlSafeStr, SqlitePool};

use super::{Connection, StoreError};

/// Every migration in order: version, name, SQL. A released one is never edited; a test holds the list against the folder.
pub const fn migrations() -> &'static [(i64, &'static str, &'static str)] {
    &[
        (1, "initial", include_str!("../../migrations/0001_initial.sql")),
        (2, "point_life", include_str!("../../migrations/0002_point_life.sql")),
    ]
}

/// The database cannot be used by this binary.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// The file cannot be opened as a database.
    #[error("the database cannot be opened: check that the file is a SQLite database and that its folder is writable")]
    Open {
        /// What SQLite said.
        source: StoreError,
    },
    /// A newer version of the service has written it.
    #[error(
        "the database has schema version {found}, this binary knows up to {known}: start the version that wrote it, or \
         restore the copy of the database made before the upgrade"
    )]
    Newer {
        /// Version of the first unknown migration.
        found: i64,
        /// Newest migration of this binary.
        known: i64,
    },
    /// A migration ran with another text than this binary has.
    #[error(
        "migration {version} ran with another text than this binary has: the binary was built from a changed migration; \
         start the version that made the database"
    )]
    Edited {
        /// The migration that differs.
        version: i64,
    },
    /// Tables or indexes are not what the migrations make.
    #[error(
        "the schema was changed outside the service ({}): restore the database from a copy, or undo the change by hand",
        objects.join(", ")
    )]
    Changed {
        /// Tables and indexes that differ, are missing or are too many.
        objects: Vec<String>,
    },
    /// A migration failed to run; it was rolled back.
    #[error("a migration of the database failed")]
    Migration {
        /// What failed.
        source: MigrateError,
    },
    /// The check itself failed.
    #[error("the schema could not be read")]
    Read {
        /// What failed.
        source: StoreError,
    },
}

/// Runs what is missing, then compares the result with a fresh database made by the same migrations.
pub(super) async fn prepare(pool: &SqlitePool) -> Result<(), SchemaError> {
    let read = |source: sqlx::Error| SchemaError::Read { source: source.into() };
    let mut connection = pool.acquire().await.map_err(read)?;
    migrate(&mut connection).await?;
    let found = objects(&mut connection).await.map_err(read)?;

    let mut fresh = SqliteConnectOptions::from_str("sqlite::memory:")
        .map_err(read)?
        .disable_statement_logging()
        .connect()
        .await
        .map_err(read)?;
    migrate(&mut fresh).await?;
    let wanted = objects(&mut fresh).await.map_err(read)?;
    fresh.close().await.map_err(read)?;

    if found == wanted {
        return Ok(());
    }
    let mut differing: Vec<String> =
        wanted.iter().filter(|(name, sql)| found.get(*name) != Some(sql)).map(|(name, _)| name.clone()).collect();
    differing.extend(found.keys().filter(|name| !wanted.contains_key(*name)).cloned());
    Err(SchemaError::Changed { objects: differing })
}

async fn migrate(connection: &mut Connection) -> Result<(), SchemaError> {
    let known = migrations().last().map_or(0, |(version, ..)| *version);
    let migrator = Migrator::with_migrations(
        migrations()
            .iter()
            .map(|&(version, name, sql)| {
                Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
            })
            .collect(),
    );
    migrator.run_direct(None, connection, false).await.map_err(|error| match error {
        MigrateError::VersionMissing(found) => SchemaError::Newer { found, known },
        MigrateError::VersionMismatch(version) => SchemaError::Edited { version },
        MigrateError::Execute(source) => SchemaError::Open { source: source.into() },
        source => SchemaError::Migration { source },
    })
}

/// Name and definition of every table, index, view and trigger, without SQLite's own and the migrator's table.
async fn objects(connection: &mut Connection) -> Result<BTreeMap<String, Option<String>>, sqlx::Error> {
    sqlx::query("SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND tbl_name <> '_sqlx_migrations'")
        .fetch_all(connection)
        .await?
        .iter()
        .map(|row| Ok((row.try_get("name")?, row.try_get("sql")?)))
        .collect()
}
