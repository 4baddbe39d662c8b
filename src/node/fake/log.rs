//! What a fake node saw and did, in order, and a way to wait for the next thing.

use tokio::sync::watch;

use super::step::Step;

/// The body of a start call, as the node reads it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartCall {
    /// The hub's id of the job.
    pub job_id: String,
    /// The display name.
    pub vm_name: String,
    /// The vCenter.
    pub vcenter_host: String,
    /// Its user.
    pub vcenter_user: String,
    /// Its password.
    pub vcenter_password: String,
    /// The inventory path.
    pub vm_path: String,
    /// Where the exports are, for old nodes.
    pub nbd_host: String,
    /// Where each disk goes.
    pub nbd_targets: String,
    /// `full` or `incremental`.
    pub backup_type: String,
    /// Read by nobody.
    pub previous_change_id: String,
}

/// The body of a discovery, as the node reads it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiscoverCall {
    /// The vCenter.
    pub vcenter: String,
    /// Its user.
    pub username: String,
    /// Its password.
    pub password: String,
    /// Where VMs are looked for.
    pub datacenter: String,
    /// Part of the names that are told.
    pub filter: Option<String>,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The node was called.
    Called(StartCall),
    /// The node was asked which VMs there are.
    Discovered(DiscoverCall),
    /// A client was launched.
    Launched {
        /// For this job.
        job_id: String,
    },
    /// The node was asked whether it knows a job.
    StatusAsked {
        /// The job.
        job_id: String,
    },
    /// The hub told a change id.
    ChangeId {
        /// The number that was asked for.
        disk_id: u32,
        /// The answer.
        change_id: String,
    },
    /// Both connections to a disk stand.
    Connected {
        /// The number at the end of the export's name.
        disk_id: u32,
    },
    /// The client waits to be resumed.
    Paused,
    /// A disk's data is at the hub.
    Copied {
        /// Its number.
        disk_id: u32,
        /// How many bytes were written or zeroed.
        bytes: u64,
    },
    /// A step of the client went wrong, as it was told to.
    WentWrong {
        /// Which one.
        step: Step,
    },
    /// A write was refused.
    WriteFailed {
        /// Its disk.
        disk_id: u32,
        /// What the client saw.
        error: String,
    },
    /// `/complete` was answered.
    Completed {
        /// The number that was sent.
        disk_id: u32,
        /// The HTTP status.
        status: u16,
        /// The body.
        body: String,
    },
    /// Telemetry was answered.
    Telemetry {
        /// The word that was sent.
        sent: String,
        /// The HTTP status.
        status: u16,
    },
    /// The client is gone.
    Ended {
        /// Its job.
        job_id: String,
        /// Why it did not copy everything, when it did not.
        error: Option<String>,
    },
}

/// All events so far.
#[derive(Debug)]
pub struct Log {
    events: watch::Sender<Vec<Event>>,
}

impl Default for Log {
    fn default() -> Self {
        Self { events: watch::Sender::new(Vec::new()) }
    }
}

impl Log {
    pub(super) fn push(&self, event: Event) {
        tracing::debug!(?event, "fake node");
        self.events.send_modify(|events| events.push(event));
    }

    /// All events so far.
    pub fn events(&self) -> Vec<Event> {
        self.events.borrow().clone()
    }

    /// The calls so far.
    pub fn calls(&self) -> Vec<StartCall> {
        let calls = self.events().into_iter().filter_map(|event| match event {
            Event::Called(call) => Some(call),
            _ => None,
        });
        calls.collect()
    }

    /// How many events there are so far.
    pub fn count(&self) -> usize {
        self.events.borrow().len()
    }

    /// Waits until an event matches, and returns the first that does. The caller brings its own deadline.
    pub async fn first<T>(&self, matches: impl FnMut(&Event) -> Option<T>) -> T {
        self.first_after(0, matches).await
    }

    /// The same among those behind the first `seen` ones.
    pub async fn first_after<T>(&self, seen: usize, mut matches: impl FnMut(&Event) -> Option<T>) -> T {
        let mut events = self.events.subscribe();
        loop {
            if let Some(found) = events.borrow_and_update().iter().skip(seen).find_map(&mut matches) {
                return found;
            }
            if events.changed().await.is_err() {
                // The sender is in this very value.
                std::future::pending::<()>().await;
            }
        }
    }
}
