//! The database: pool, schema check and every line of SQL of the service.
//!
//! One file per group of tables. Queries are free functions over a connection, so that a caller can put several of them
//! into one transaction: [`Store::write`] begins one, [`Store::read`] lends a connection. Nothing here knows HTTP or the
//! rules of a backup; it knows tables and says in types what they can answer.

pub mod backups;
mod ballast;
mod column;
mod error;
pub mod events;
pub mod idempotency;
pub mod leases;
mod page;
pub mod points;
pub mod repositories;
mod schema;
pub mod trust;
pub mod vms;
pub mod webhooks;

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection as _, Sqlite, SqlitePool, Transaction};
use tokio::sync::watch;

use ballast::Ballast;
pub use error::StoreError;
pub use page::{Listing, Page};
pub use schema::{SchemaError, migrations};

/// One open connection, as the query functions of this module take it.
pub type Connection = sqlx::SqliteConnection;

/// Connections of the pool; a caller that needs one more waits. A guess: WAL lets readers work beside the one writer, and handlers hold a connection for
/// microseconds.
pub const POOL_SIZE: u32 = 8;

/// How long a statement waits for the writer before it, and how long a caller waits for a connection of the pool.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The open database of one hub. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    pool: SqlitePool,
    commits: Arc<watch::Sender<()>>,
    settling: watch::Sender<usize>,
    ballast: Arc<Ballast>,
}

/// A transaction that owns the write lock. Dropped without [`Self::commit`] it is rolled back.
#[derive(Debug)]
pub struct WriteTransaction {
    transaction: Transaction<'static, Sqlite>,
    commits: Arc<watch::Sender<()>>,
    relief: Relief,
}

/// Makes room, if that is what was missing, for the next transaction after one that was not committed.
#[derive(Debug)]
struct Relief {
    ballast: Arc<Ballast>,
    needed: bool,
}

impl Drop for Relief {
    fn drop(&mut self) {
        if self.needed {
            self.ballast.relieve();
        }
    }
}

impl WriteTransaction {
    /// Makes it durable, and wakes whoever watches for commits.
    ///
    /// # Errors
    /// The database's; whether it was committed is unknown then.
    pub async fn commit(mut self) -> Result<(), StoreError> {
        self.transaction.commit().await?;
        self.relief.needed = false;
        self.commits.send_replace(());
        Ok(())
    }
}

impl Deref for WriteTransaction {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.transaction
    }
}

impl DerefMut for WriteTransaction {
    fn deref_mut(&mut self) -> &mut Connection {
        &mut self.transaction
    }
}

impl Store {
    /// Opens or creates the database file at `path` and brings it to the schema of this binary.
    ///
    /// # Errors
    ///
    /// [`SchemaError`] when the file is no database, was written by a newer version, or its tables were changed by hand.
    pub async fn open(path: &Path) -> Result<Self, SchemaError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // A commit that was answered survives a power cut; the default of WAL may lose the last ones.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT)
            .disable_statement_logging();
        let pool = SqlitePoolOptions::new()
            .max_connections(POOL_SIZE)
            .acquire_timeout(BUSY_TIMEOUT)
            // SQLite itself rolls a transaction back that meets a full disk. The driver does not see that: it would take the
            // connection to be inside of a transaction for ever.
            .after_release(|connection, _| {
                Box::pin(async move {
                    connection.ping().await?;
                    Ok(!connection.is_in_transaction())
                })
            })
            .connect_with(options)
            .await
            .map_err(|source| SchemaError::Open { source: source.into() })?;
        if let Err(error) = schema::prepare(&pool).await {
            pool.close().await;
            return Err(error);
        }
        let ballast = Ballast::new(path.parent().unwrap_or(Path::new(".")));
        let (commits, settling) = (Arc::new(watch::Sender::new(())), watch::Sender::new(0));
        Ok(Self { pool, commits, settling, ballast: Arc::new(ballast) })
    }

    /// A connection for reading. Each statement sees what is committed by then; several that must agree belong into one
    /// [`Store::snapshot`], or into [`Store::write`] when something is to follow from them.
    pub async fn read(&self) -> Result<PoolConnection<Sqlite>, StoreError> {
        Ok(self.pool.acquire().await?)
    }

    /// A connection whose statements all see the state that the first of them saw, whatever is committed meanwhile. Holds up
    /// no writer, and must not be written through. Keep it short: the log of the database cannot shrink below it.
    pub async fn snapshot(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        Ok(self.pool.begin().await?)
    }

    /// A transaction that owns the write lock from its first moment, so that it never fails half-way because another
    /// writer came first.
    ///
    /// # Durability
    ///
    /// Once `commit` has returned, a crash or power cut loses nothing of it.
    pub async fn write(&self) -> Result<WriteTransaction, StoreError> {
        let relief = Relief { ballast: Arc::clone(&self.ballast), needed: true };
        let transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        Ok(WriteTransaction { transaction, commits: Arc::clone(&self.commits), relief })
    }

    /// Sets space aside for the moment at which the file system is full, if it is not set aside already. Says whether there is
    /// room; while there is none, nothing new should begin.
    pub async fn has_room(&self) -> bool {
        let ballast = Arc::clone(&self.ballast);
        // Nothing is refused for a task that panicked: the database itself will say what it lacks.
        tokio::task::spawn_blocking(move || ballast.hold()).await.unwrap_or(true)
    }

    /// Whether the space that was set aside had to be given to the database.
    pub fn is_out_of_room(&self) -> bool {
        self.ballast.is_spent()
    }

    /// Tells when something was committed, for whoever looks for new events.
    pub fn watch_commits(&self) -> watch::Receiver<()> {
        self.commits.subscribe()
    }

    /// How many wait for a record that is about to follow its files. For whoever waits, and for tests.
    pub fn settling(&self) -> &watch::Sender<usize> {
        &self.settling
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1").execute(&self.pool).await?;
        Ok(())
    }

    /// Whether [`Self::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.pool.is_closed()
    }

    /// Waits for running statements and closes the file. Later calls fail.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}
