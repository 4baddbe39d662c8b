//! One reader's way through the events: from where it stopped to now, then on as they come, with live progress in between.
//!
//! A feed is pulled. It reads a page when it is asked for more than it has, so that what it holds is bounded however slow its
//! reader is, and nobody waits for it. Progress is looked up at the moment it is told: who comes late gets new numbers, not old
//! ones. A feed holds no job, no connection of the database and no lock between two questions.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::app::{AppState, Phase};
use crate::backup::progress::DiskProgress;
use crate::clock::UtcTime;
use crate::id::BackupId;
use crate::store::events::{self, EventRow, PROGRESS};
use crate::store::{StoreError, backups};
use crate::words::JobState;

/// Events that are read at once. A guess: some ten kilobytes.
const PAGE: u32 = 64;
/// Between two looks at the progress of a disk.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
/// Silence after which a sign of life is sent. Then the database is looked at too, should a commit ever go untold.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// What a feed tells.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// An event, in the order of numbers.
    Stored(EventRow),
    /// Where a disk is now; stored nowhere.
    Progress(Value),
    /// Events may be missing here: `after` is the number that the reader gave, `next` the first that can follow.
    Gap {
        /// What the reader had seen.
        after: i64,
        /// What comes next at the earliest.
        next: i64,
    },
    /// Nothing happened for a while.
    Heartbeat,
}

/// What a feed is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum About {
    /// Everything, until the service closes its sockets.
    All,
    /// One thing, by its id, until the service closes its sockets.
    Subject(String),
    /// One backup: from its beginning, until it is over.
    Backup(BackupId),
}

impl About {
    fn subject(&self) -> Option<&str> {
        match self {
            Self::All => None,
            Self::Subject(subject) => Some(subject),
            Self::Backup(id) => Some(id.as_str()),
        }
    }
}

/// There is no such backup, or the database failed.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// No backup has this id.
    #[error("there is no backup {0}")]
    NoBackup(BackupId),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// One reader's way through the events.
#[derive(Debug)]
pub struct Feed {
    app: AppState,
    about: About,
    /// Kinds that are told; all when empty.
    kinds: Vec<String>,
    commits: watch::Receiver<()>,
    phase: watch::Receiver<Phase>,
    /// Everything up to this number was read.
    read: i64,
    /// The number of the event that ends the feed, where that has happened already.
    end: Option<i64>,
    /// Read and not told yet: a page at most.
    ready: VecDeque<Told>,
    /// Whether there may be more to read.
    look: bool,
    finished: bool,
    progress: Progress,
    heartbeat: Instant,
}

/// The disks whose progress is to be told, and what was told last.
#[derive(Debug)]
struct Progress {
    due: VecDeque<(BackupId, u32)>,
    told: BTreeMap<(BackupId, u32), DiskProgress>,
    next: Instant,
}

impl Feed {
    /// A feed of what comes after the event number `after`. Without one it is about new events only, that of a backup about all.
    ///
    /// # Errors
    /// See [`FeedError`].
    pub async fn open(app: &AppState, about: About, kinds: Vec<String>, after: Option<i64>) -> Result<Self, FeedError> {
        let commits = app.store.watch_commits();
        let mut connection = app.store.read().await?;
        // The row before the events: an end that is on record has its event.
        let mut end = None;
        if let About::Backup(id) = &about {
            let row = backups::find(&mut connection, id).await?.ok_or_else(|| FeedError::NoBackup(id.clone()))?;
            if row.state.is_terminal() {
                let told = events::last_of_kind(&mut connection, id.as_str(), "job.state").await?;
                end = Some(told.map_or(0, |event| event.sequence));
            }
        }
        let (oldest, newest) = events::bounds(&mut connection).await?;
        drop(connection);
        let (beginning, first) = if matches!(about, About::Backup(_)) { (0, oldest) } else { (newest, newest + 1) };
        let mut ready = VecDeque::new();
        let read = match after {
            None => beginning,
            // Numbers that were never given: of another database.
            Some(after) if after > newest => {
                ready.push_back(Told::Gap { after, next: first });
                beginning
            }
            Some(after) => {
                if after + 1 < oldest {
                    ready.push_back(Told::Gap { after, next: oldest });
                }
                after
            }
        };
        let now = Instant::now();
        Ok(Self {
            phase: app.watch_phase(),
            app: app.clone(),
            about,
            kinds,
            commits,
            read,
            end,
            ready,
            look: true,
            finished: false,
            progress: Progress { due: VecDeque::new(), told: BTreeMap::new(), next: now },
            heartbeat: now + HEARTBEAT,
        })
    }

    /// What comes next; nothing when the feed is over.
    ///
    /// # Cancellation
    /// Nothing is lost: what was read stays until it is told.
    pub async fn next(&mut self) -> Option<Told> {
        let told = self.wait().await?;
        self.heartbeat = Instant::now() + HEARTBEAT;
        Some(told)
    }

    async fn wait(&mut self) -> Option<Told> {
        loop {
            if let Some(told) = self.ready.pop_front() {
                return Some(told);
            }
            if self.finished || *self.phase.borrow() >= Phase::Closing {
                return None;
            }
            if self.look {
                // Marked as seen before the look, so that what is committed during it is looked for again.
                self.commits.mark_unchanged();
                if let Err(error) = self.fill().await {
                    // The reader comes again and goes on where it was.
                    tracing::warn!(%error, "a stream of events ends: the database cannot be read");
                    return None;
                }
                continue;
            }
            if let Some(progress) = self.next_progress() {
                return Some(Told::Progress(progress));
            }
            let (progress_at, heartbeat) = (self.progress.next, self.heartbeat);
            let wants_progress = self.tells(PROGRESS);
            tokio::select! {
                changed = self.commits.changed() => {
                    changed.ok()?;
                    self.look = true;
                }
                _ = self.phase.wait_for(|phase| *phase >= Phase::Closing) => return None,
                () = tokio::time::sleep_until(progress_at), if wants_progress => {}
                () = tokio::time::sleep_until(heartbeat) => {
                    self.look = true;
                    return Some(Told::Heartbeat);
                }
            }
        }
    }

    /// Reads the next page.
    async fn fill(&mut self) -> Result<(), StoreError> {
        let mut connection = self.app.store.read().await?;
        let rows = events::after(&mut connection, self.read, self.about.subject(), PAGE).await?;
        drop(connection);
        self.look = rows.len() == PAGE as usize;
        for row in rows {
            if self.end.is_some_and(|end| row.sequence > end) {
                // Of the restore point, after the backup.
                self.finished = true;
                return Ok(());
            }
            self.read = row.sequence;
            let last = matches!(self.about, About::Backup(_)) && is_end(&row);
            if self.tells(&row.kind) {
                self.ready.push_back(Told::Stored(row));
            }
            if last {
                self.finished = true;
                return Ok(());
            }
        }
        self.finished = !self.look && self.end.is_some();
        Ok(())
    }

    fn tells(&self, kind: &str) -> bool {
        self.kinds.is_empty() || self.kinds.iter().any(|told| told == kind)
    }

    /// The progress of the next disk that has moved since it was told, at most twice a second each.
    fn next_progress(&mut self) -> Option<Value> {
        let now = Instant::now();
        if !self.tells(PROGRESS) {
            return None;
        }
        if self.progress.due.is_empty() {
            if now < self.progress.next {
                return None;
            }
            self.progress.next = now + PROGRESS_INTERVAL;
            let subject = self.about.subject();
            for job in self.app.backups.running() {
                let id = &job.facts().id;
                if subject.is_none_or(|subject| subject == id.as_str()) {
                    self.progress.due.extend(job.live().iter().map(|disk| (id.clone(), disk.disk_id)));
                }
            }
            let due = &self.progress.due;
            self.progress.told.retain(|disk, _| due.contains(disk));
        }
        while let Some(disk) = self.progress.due.pop_front() {
            let Some(job) = self.app.backups.find(&disk.0).filter(|job| moves(job.view().state)) else { continue };
            let Some(live) = job.live().iter().find(|live| live.disk_id == disk.1) else { continue };
            let progress = DiskProgress::of(live, live.state_seen());
            if self.progress.told.get(&disk) == Some(&progress) {
                continue;
            }
            // From here, so that a reader that was slow is not told faster afterwards.
            self.progress.next = now + PROGRESS_INTERVAL;
            // Numbers and words always become JSON.
            let mut told = serde_json::to_value(&progress).unwrap_or_default();
            told["seq"] = self.read.into();
            told["at"] = UtcTime::now().to_string().into();
            told["job_id"] = disk.0.as_str().into();
            told["disk_id"] = disk.1.into();
            self.progress.told.insert(disk, progress);
            return Some(told);
        }
        None
    }
}

/// Whether a job in this state has disks that move, and has not told its end.
fn moves(state: JobState) -> bool {
    matches!(state, JobState::Starting | JobState::Transferring | JobState::Stalled | JobState::Sealing)
}

/// Whether this is the last event of a backup.
fn is_end(event: &EventRow) -> bool {
    let state = event.data["state"].as_str().and_then(|state| state.parse::<JobState>().ok());
    event.kind == "job.state" && state.is_some_and(JobState::is_terminal)
}
