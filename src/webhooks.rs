//! Webhooks: stored events, delivered to addresses of the configuration in their order and at least once.
//!
//! One task per webhook, which reads the events at its own pace and keeps its place in the database
//! ([`store::webhooks`](crate::store::webhooks)); what goes over the wire is in [`delivery`]. No job knows of them: a receiver that
//! is gone delays its own webhook and nothing else. What goes wrong with one is told by the log alone: an event about it would be
//! one more event to deliver.

pub mod delivery;

use std::time::Duration;

use tokio::task::JoinSet;

use crate::config::Config;
use crate::secret::{Secret, SecretError};
use crate::store::events::{self, EventRow};
use crate::store::{Store, StoreError, webhooks};

use delivery::{Delivery, Outcome};

/// Events that are read at once.
const PAGE: u32 = 64;
/// Silence after which the database is looked at, should a commit ever go untold.
const LOOK: Duration = Duration::from_secs(60);
/// The pause after a failure of the database.
const STORE_PAUSE: Duration = Duration::from_secs(5);
/// Events of other kinds that are passed over before the place is written down.
const PASSED_OVER: i64 = 100;

/// A webhook cannot be used, so that the service does not start.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// Without its secret nobody could tell whose the events are.
    #[error("the secret of webhook {name}")]
    Secret {
        /// The webhook.
        name: String,
        /// Why.
        source: SecretError,
    },
    /// Its HTTP client cannot be made.
    #[error("the HTTP client of webhook {name} cannot be made")]
    Client {
        /// The webhook.
        name: String,
        /// Why.
        source: reqwest::Error,
    },
}

/// How long a receiver is given.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// The first pause before an event is sent again; it doubles each time.
    pub first: Duration,
    /// The longest.
    pub longest: Duration,
    /// How often an event is sent to a receiver that refuses it, before it is passed over.
    pub refusals: u32,
}

impl Default for Patience {
    /// A receiver that is gone is tried for ever, in the end once an hour. One that refuses an event has eight minutes in which
    /// to change its mind: whoever puts it back in order should not lose what came meanwhile. Guesses.
    fn default() -> Self {
        Self { first: Duration::from_secs(1), longest: Duration::from_secs(3600), refusals: 10 }
    }
}

/// One `[webhooks.<name>]`, ready to be used.
pub struct Webhook {
    name: String,
    /// Kinds that are delivered; all when empty.
    events: Vec<String>,
    delivery: Delivery,
    patience: Patience,
}

impl Webhook {
    /// Those of the configuration, with their secrets.
    ///
    /// # Errors
    /// A secret cannot be read or is empty.
    pub fn all(config: &Config, patience: Patience) -> Result<Vec<Self>, WebhookError> {
        let made = config.webhooks.iter().map(|(name, webhook)| {
            let secret = Secret::read(&webhook.secret_file)
                .map_err(|source| WebhookError::Secret { name: name.clone(), source })?;
            let delivery = Delivery::new(&webhook.url, secret)
                .map_err(|source| WebhookError::Client { name: name.clone(), source })?;
            Ok(Self { name: name.clone(), events: webhook.events.clone(), delivery, patience })
        });
        made.collect()
    }

    /// Starts the tasks. They end with `tasks`, wherever they are: what was not noted as accepted is sent again next time.
    ///
    /// # Errors
    /// The database's.
    pub async fn start(all: Vec<Self>, store: &Store, tasks: &mut JoinSet<()>) -> Result<(), StoreError> {
        let names: Vec<&str> = all.iter().map(|webhook| webhook.name.as_str()).collect();
        let mut transaction = store.write().await?;
        webhooks::keep(&mut transaction, &names).await?;
        transaction.commit().await?;
        for webhook in all {
            tasks.spawn(webhook.run(store.clone()));
        }
        Ok(())
    }

    async fn run(self, store: Store) {
        let mut commits = store.watch_commits();
        let mut place: Option<Place> = None;
        loop {
            // Marked as seen before the look, so that what is committed during it is looked for again.
            commits.mark_unchanged();
            match self.round(&store, &mut place).await {
                Ok(Round::More) => {}
                Ok(Round::Done) => {
                    tokio::select! {
                        changed = commits.changed() => if changed.is_err() { return },
                        () = tokio::time::sleep(LOOK) => {}
                    }
                }
                Err(error) => {
                    tracing::warn!(webhook = self.name, %error, "a webhook waits for the database");
                    tokio::time::sleep(STORE_PAUSE).await;
                }
            }
        }
    }

    /// Delivers the next page of events.
    async fn round(&self, store: &Store, place: &mut Option<Place>) -> Result<Round, StoreError> {
        let mut connection = store.read().await?;
        let place = match place {
            Some(place) => place,
            None => {
                let cursor = webhooks::cursor(&mut connection, &self.name).await?;
                let (oldest, newest) = events::bounds(&mut connection).await?;
                if cursor + 1 < oldest {
                    tracing::warn!(
                        webhook = self.name,
                        cursor,
                        oldest,
                        "events were removed before they were delivered"
                    );
                }
                // A place that was never reached is of another database.
                place.insert(Place { read: cursor.min(newest), noted: cursor })
            }
        };
        let rows = events::after(&mut connection, place.read, None, PAGE).await?;
        drop(connection);
        let more = if rows.len() == PAGE as usize { Round::More } else { Round::Done };
        for row in rows {
            let wanted = self.events.is_empty() || self.events.contains(&row.kind);
            if wanted {
                self.deliver(&row).await;
            }
            place.read = row.sequence;
            if wanted || place.read - place.noted >= PASSED_OVER {
                // When this fails the next one makes up for it; until then only a restart sends it again.
                let mut transaction = store.write().await?;
                webhooks::advance(&mut transaction, &self.name, place.read).await?;
                transaction.commit().await?;
                place.noted = place.read;
            }
        }
        Ok(more)
    }

    /// Sends one event until it is accepted, or refused too often.
    async fn deliver(&self, event: &EventRow) {
        let mut pause = self.patience.first;
        let mut refusals = 0;
        loop {
            let outcome = self.delivery.send(event).await;
            let (webhook, sequence) = (self.name.as_str(), event.sequence);
            match &outcome {
                Outcome::Accepted => return,
                Outcome::Refused { status } => {
                    refusals += 1;
                    if refusals >= self.patience.refusals {
                        tracing::error!(webhook, sequence, status, "the receiver refuses an event; it is passed over");
                        return;
                    }
                    tracing::warn!(webhook, sequence, status, ?pause, "the receiver refuses an event; once more later");
                }
                Outcome::Unreachable { reason } => {
                    tracing::warn!(webhook, sequence, reason, ?pause, "an event was not delivered; once more later");
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(self.patience.longest);
        }
    }
}

/// How far a webhook is.
struct Place {
    /// Everything up to this number was delivered or passed over.
    read: i64,
    /// The same, as the database knows it.
    noted: i64,
}

enum Round {
    /// There may be more at once.
    More,
    /// There is nothing new.
    Done,
}
