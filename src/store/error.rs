//! What can go wrong with a statement, sorted by what the caller can do about it.

use sqlx::error::ErrorKind;

/// A statement failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another writer held the database for longer than the busy timeout, or no connection came free: try again.
    #[error("the database is busy")]
    Busy(#[source] sqlx::Error),
    /// The file system of the database is full.
    #[error("the file system of the database is full")]
    Full(#[source] sqlx::Error),
    /// A UNIQUE rule of the schema refused the row: somebody else was faster, or the caller did not look first.
    #[error("the row exists already")]
    Exists(#[source] sqlx::Error),
    /// Another row still refers to this one.
    #[error("another row refers to this one, or a row it refers to does not exist")]
    Referenced(#[source] sqlx::Error),
    /// Anything else: a damaged file, a mistake in a statement, a closed pool.
    #[error("the database failed")]
    Failed(#[source] sqlx::Error),
}

/// Primary result codes of SQLite (the low byte of the extended ones): <https://www.sqlite.org/rescode.html>.
const SQLITE_BUSY: u32 = 5;
const SQLITE_LOCKED: u32 = 6;
const SQLITE_FULL: u32 = 13;

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        if matches!(error, sqlx::Error::PoolTimedOut) {
            return Self::Busy(error);
        }
        let Some(database) = error.as_database_error() else { return Self::Failed(error) };
        match database.kind() {
            ErrorKind::UniqueViolation => Self::Exists(error),
            ErrorKind::ForeignKeyViolation => Self::Referenced(error),
            _ => match database.code().and_then(|code| code.parse::<u32>().ok()).map(|code| code & 0xff) {
                Some(SQLITE_BUSY | SQLITE_LOCKED) => Self::Busy(error),
                Some(SQLITE_FULL) => Self::Full(error),
                _ => Self::Failed(error),
            },
        }
    }
}
