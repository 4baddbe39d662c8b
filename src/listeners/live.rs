//! What is served over NBD right now, and the figures of everything that ever was: a listener enters when it begins and
//! leaves when it ends, and what it counted stays in the totals.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockyard_nbd::server::Address;
use blockyard_nbd::stats::{ListenerSnapshot, Snapshot};

use super::ListenerFigures;
use crate::id::BackupId;

/// The live exports of a process, and the totals.
#[derive(Debug, Default)]
pub struct LiveExports {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    live: BTreeMap<u64, Arc<LiveExport>>,
    /// Exports that ended while a device call of a connection ran on; what that does is still counted.
    ending: Vec<ListenerFigures>,
    ended: Totals,
}

/// One export that clients can reach.
#[derive(Debug)]
pub struct LiveExport {
    /// Its name.
    pub name: String,
    /// Where it is served.
    pub address: Address,
    /// Whose disk it is.
    pub disk: ServedDisk,
    /// Its size.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What it counts.
    pub figures: ListenerFigures,
}

/// The disk behind an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedDisk {
    /// The job that receives it.
    pub job_id: BackupId,
    /// Its number.
    pub disk_id: u32,
}

/// Figures of many exports together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Of the exports.
    pub exports: Snapshot,
    /// Of their listeners.
    pub listeners: ListenerSnapshot,
}

impl Totals {
    fn add(&mut self, figures: &ListenerFigures) {
        self.exports.add(&figures.snapshot());
        self.listeners.add(&figures.listener());
    }
}

impl LiveExports {
    /// Adds an export until the value is dropped.
    pub(super) fn enter(self: &Arc<Self>, export: LiveExport) -> Entry {
        let mut inner = self.lock();
        inner.settle();
        let number = inner.next;
        inner.next += 1;
        inner.live.insert(number, Arc::new(export));
        Entry { exports: Arc::clone(self), number }
    }

    /// All live exports, in the order of their beginning.
    pub fn all(&self) -> Vec<Arc<LiveExport>> {
        self.lock().live.values().cloned().collect()
    }

    /// The figures of all exports since the start of the process, live and ended. What is counted never goes back.
    pub fn totals(&self) -> Totals {
        let mut inner = self.lock();
        inner.settle();
        let mut totals = inner.ended.clone();
        inner.live.values().map(|export| &export.figures).chain(&inner.ending).for_each(|figures| totals.add(figures));
        totals
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Adds up what can no longer change.
    fn settle(&mut self) {
        let Self { ending, ended, .. } = self;
        ending.retain(|figures| {
            let over = figures.snapshot().connections == 0;
            if over {
                ended.add(figures);
            }
            !over
        });
    }
}

/// The presence of one export among the live ones.
#[derive(Debug)]
pub(super) struct Entry {
    exports: Arc<LiveExports>,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut inner = self.exports.lock();
        if let Some(export) = inner.live.remove(&self.number) {
            inner.ending.push(export.figures.clone());
        }
        inner.settle();
    }
}
