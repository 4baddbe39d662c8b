//! What is served over NBD right now, and the figures of everything that ever was: a listener enters when it begins and
//! leaves when it ends, and what it counted stays in the totals.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockyard_nbd::server::Address;
use blockyard_nbd::stats::{ListenerSnapshot, Snapshot};

use super::ListenerFigures;
use crate::id::{BackupId, ExportId};

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
pub enum ServedDisk {
    /// One that a job receives.
    Job {
        /// The job.
        job_id: BackupId,
        /// Its number.
        disk_id: u32,
    },
    /// One that is restored.
    Point {
        /// The export of it.
        export_id: ExportId,
        /// The restore point.
        point_id: BackupId,
        /// Its number.
        disk_id: u32,
    },
}

impl ServedDisk {
    /// Its number, in the job as in the point.
    pub fn disk_id(&self) -> u32 {
        match self {
            Self::Job { disk_id, .. } | Self::Point { disk_id, .. } => *disk_id,
        }
    }

    /// The job that receives it.
    pub fn job_id(&self) -> Option<&BackupId> {
        match self {
            Self::Job { job_id, .. } => Some(job_id),
            Self::Point { .. } => None,
        }
    }

    /// The export and the point that it is restored from.
    pub fn restored_from(&self) -> Option<(&ExportId, &BackupId)> {
        match self {
            Self::Job { .. } => None,
            Self::Point { export_id, point_id, .. } => Some((export_id, point_id)),
        }
    }
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

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use blockyard_nbd::client::Client;
    use blockyard_nbd::{
        Budget, BudgetLimits, Buffer, Content, Context, Device, Durability, Error, Export, Exports, Extent, Options,
        Server, Space,
    };
    use tokio::sync::Semaphore;

    use super::*;

    /// A disk without content whose flush lasts until the test lets it end.
    struct Held {
        begun: Semaphore,
        end: Semaphore,
    }

    #[async_trait]
    impl Device for Held {
        fn buffer(&self, _: u64, length: usize) -> Buffer {
            Box::new(vec![0; length])
        }

        async fn read(&self, _: u64, buffer: Buffer) -> Result<Content, Error> {
            Ok(buffer.into())
        }

        async fn write(&self, _: u64, _: Buffer, _: Durability) -> Result<(), Error> {
            Ok(())
        }

        async fn zero(&self, _: u64, _: u64, _: Space, _: Durability) -> Result<(), Error> {
            Ok(())
        }

        async fn fast_zero(&self, _: u64, _: u64) -> bool {
            false
        }

        async fn trim(&self, _: u64, _: u64, _: Durability) -> Result<(), Error> {
            Ok(())
        }

        async fn flush(&self) -> Result<(), Error> {
            self.begun.add_permits(1);
            self.end.acquire().await.unwrap().forget();
            Ok(())
        }

        async fn extents(&self, _: Context, _: u64, length: u64, _: usize) -> Result<Vec<Extent>, Error> {
            Ok(vec![Extent { length, status: 0 }])
        }
    }

    struct Disk(Arc<Held>);

    #[async_trait]
    impl Export for Disk {
        fn name(&self) -> &str {
            "disk"
        }

        fn size(&self) -> u64 {
            512
        }

        fn read_only(&self) -> bool {
            false
        }

        async fn open(&self) -> Result<Arc<dyn Device>, Error> {
            Ok(self.0.clone())
        }
    }

    #[tokio::test]
    async fn what_a_device_still_does_when_its_listener_is_gone_is_counted() {
        let held = Arc::new(Held { begun: Semaphore::new(0), end: Semaphore::new(0) });
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let options = Options::new(Budget::new(&BudgetLimits::default()));
        let server = Server::start(socket, Exports::single(Arc::new(Disk(held.clone()))).unwrap(), options).unwrap();
        let figures = ListenerFigures { export: server.stats("disk").unwrap(), listener: server.listener_stats() };
        let live = Arc::new(LiveExports::default());
        let entry = live.enter(LiveExport {
            name: "disk".to_owned(),
            address: server.address().clone(),
            disk: ServedDisk::Job { job_id: BackupId::new(), disk_id: 0 },
            size_bytes: 512,
            read_only: false,
            figures: figures.clone(),
        });
        let client = Client::connect(&server.uris()[0].parse().unwrap()).await.unwrap();
        let flush = tokio::spawn(async move { client.flush().await });
        held.begun.acquire().await.unwrap().forget();
        drop((server, entry));
        assert!(flush.await.unwrap().is_err(), "the connection is closed");

        assert!(live.all().is_empty());
        let totals = live.totals().exports;
        assert_eq!((totals.accepted, totals.connections, totals.counts.in_flight()), (1, 1, 1));
        held.end.add_permits(1);
        figures.export.connections().wait_for(|connections| *connections == 0).await.unwrap();
        for _ in 0..2 {
            let totals = live.totals();
            assert_eq!((totals.exports.accepted, totals.exports.connections), (1, 0));
            assert_eq!((totals.exports.counts.requests, totals.exports.counts.in_flight()), (1, 0));
            assert_eq!(totals.listeners.accepted, 1);
        }
        assert!(live.lock().ending.is_empty());
    }
}
