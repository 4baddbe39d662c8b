//! One export from its opening to its end, and the task that owns all it holds.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use blockyard_qcow2::{Access, AsyncImage};
use tokio::sync::watch;
use tokio::time::Instant;

use super::chain::{self, Found};
use super::overlay::{self, OverlayFile};
use super::{Mode, NewExport, RestoreError, Shared};
use crate::clock::UtcTime;
use crate::export::ImageExport;
use crate::export::meter::Meter;
use crate::export::signals::Signals;
use crate::id::{BackupId, ExportId};
use crate::listeners::live::ServedDisk;
use crate::listeners::ports::{BoundPort, PortError};
use crate::listeners::{DiskListener, ListenerFigures};
use crate::points::pins::Pins;
use crate::store::leases;

/// How long requests in flight may take at the end, and clients to go. A guess: a client that is told ESHUTDOWN hangs up at
/// once, and one that asks nothing would stay for ever.
pub(super) const DRAIN: Duration = Duration::from_secs(2);

/// What does not change about an export.
#[derive(Clone, Debug)]
pub struct ExportFacts {
    /// Its id.
    pub id: ExportId,
    /// The restore point.
    pub point_id: BackupId,
    /// The number of the disk.
    pub disk_id: u32,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Whether it takes writes.
    pub mode: Mode,
    /// Its name on the wire.
    pub export_name: String,
    /// Where it is served.
    pub port: u16,
    /// The same for clients.
    pub uri: String,
    /// What the caller should know of the point.
    pub warnings: Vec<String>,
    /// When it was made.
    pub created_at: UtcTime,
}

/// An export that clients can reach.
#[derive(Debug)]
pub struct LiveExport {
    facts: ExportFacts,
    figures: ListenerFigures,
    meter: Arc<Meter>,
    signals: Arc<Signals>,
    ttl: Duration,
    renewed: Mutex<Instant>,
    asked_to_end: watch::Sender<bool>,
    ended: watch::Sender<bool>,
}

impl LiveExport {
    /// What does not change.
    pub fn facts(&self) -> &ExportFacts {
        &self.facts
    }

    /// What it counts.
    pub fn figures(&self) -> &ListenerFigures {
        &self.figures
    }

    /// When it ends, unless it is used or renewed before.
    pub fn expires_at(&self) -> UtcTime {
        (SystemTime::now() + self.deadline().saturating_duration_since(Instant::now())).into()
    }

    pub(super) fn read_bytes(&self) -> u64 {
        self.meter.reading().read_bytes
    }

    pub(super) fn renew(&self) {
        *self.renewed.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub(super) fn ask_to_end(&self) {
        self.asked_to_end.send_replace(true);
    }

    /// Ends it and waits until nothing is left of it.
    pub(super) async fn end(&self) {
        self.ask_to_end();
        // The sender is in this value.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Waits until no connection is left.
    async fn deserted(&self) {
        while self.meter.reading().connections > 0 {
            self.signals.changed().await;
        }
    }

    fn deadline(&self) -> Instant {
        let renewed = *self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        self.signals.last_life().map_or(renewed, |life| life.max(renewed)) + self.ttl
    }
}

/// Counts an export as there until dropped.
#[derive(Debug)]
struct Presence {
    shared: Arc<Shared>,
}

impl Presence {
    fn begin(shared: &Arc<Shared>) -> Result<Self, RestoreError> {
        let registry = shared.registry();
        if registry.closed {
            return Err(RestoreError::Draining);
        }
        // Under the lock: whoever closes the registry sees all that came before.
        shared.present.send_modify(|present| *present += 1);
        drop(registry);
        Ok(Self { shared: Arc::clone(shared) })
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.shared.present.send_modify(|present| *present -= 1);
    }
}

/// Everything an export holds, in the order in which it is given back.
#[derive(Debug)]
struct Held {
    export: ImageExport,
    listener: DiskListener,
    overlay: Option<OverlayFile>,
    pins: Pins,
}

/// An export is listed until this is dropped, at the end of its task or by a panic in it: then it has ended, and whoever waits
/// for that is told.
struct Listed {
    shared: Arc<Shared>,
    live: Arc<LiveExport>,
    presence: Option<Presence>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        {
            let mut registry = self.shared.registry();
            registry.live.remove(&self.live.facts.id);
            registry.ended_bytes += self.live.read_bytes();
        }
        self.presence = None;
        self.live.ended.send_replace(true);
    }
}

/// Makes an export whose listener answers.
pub(super) async fn open(shared: &Arc<Shared>, new: NewExport) -> Result<Arc<LiveExport>, RestoreError> {
    let presence = Presence::begin(shared)?;
    chain::own_repository(shared, &new.point_id).await?;
    let id = ExportId::new();
    let port = bind(shared)?;
    let (found, pins) = pin(shared, &id, &new, &port).await?;
    match serve(shared, &id, &new, found, port).await {
        Ok((live, export, listener, overlay)) => {
            begin(shared, &live, Held { export, listener, overlay, pins }, presence);
            Ok(live)
        }
        Err(error) => {
            pins.release().await;
            Err(error)
        }
    }
}

type Served = (Arc<LiveExport>, ImageExport, DiskListener, Option<OverlayFile>);

/// Opens what is pinned and puts it behind the port.
async fn serve(
    shared: &Shared,
    id: &ExportId,
    new: &NewExport,
    found: Found,
    port: BoundPort,
) -> Result<Served, RestoreError> {
    let (found, image) = chain::open(shared, found, new.damage).await?;
    let (image, overlay) = match new.mode {
        Mode::ReadOnly => (image, None),
        Mode::Overlay => {
            let (folder, owner) = (shared.overlays(), id.clone());
            let limit = shared.config.restore.overlay_limit_bytes;
            let made = tokio::task::spawn_blocking(move || overlay::create(&folder, &owner, image, limit));
            let (image, file) = made.await.map_err(|_| RestoreError::Panicked)??;
            (image, Some(file))
        }
    };
    let signals = Arc::new(Signals::default());
    let access = if new.mode == Mode::Overlay { Access::ReadWrite } else { Access::ReadOnly };
    let image = AsyncImage::new(image);
    let export = ImageExport::without_coverage(&found.export_name, image, access, Arc::clone(&signals));
    let served =
        ServedDisk::Point { export_id: id.clone(), point_id: found.point_id.clone(), disk_id: found.disk.disk_id };
    let number = port.lease.port();
    let listener = DiskListener::serve(port, &export, served, &shared.listeners)?;
    let live = Arc::new(LiveExport {
        facts: ExportFacts {
            id: id.clone(),
            point_id: found.point_id,
            disk_id: found.disk.disk_id,
            size_bytes: export.image().size(),
            mode: new.mode,
            export_name: found.export_name,
            port: number,
            uri: listener.uri(),
            warnings: found.warnings,
            created_at: UtcTime::now(),
        },
        figures: listener.figures(),
        meter: Arc::clone(export.meter()),
        signals,
        ttl: Duration::from_secs(shared.config.restore.ttl_s),
        renewed: Mutex::new(Instant::now()),
        asked_to_end: watch::Sender::new(false),
        ended: watch::Sender::new(false),
    });
    let LiveExport { facts: ExportFacts { point_id, disk_id, .. }, .. } = &*live;
    tracing::info!(export_id = %id, %point_id, disk_id, port = number, "export opened");
    Ok((live, export, listener, overlay))
}

fn bind(shared: &Shared) -> Result<BoundPort, RestoreError> {
    let range = shared.config.restore.port_range.ports();
    let none = PortError::Exhausted { wanted: 1, found: 0, range: range.clone() };
    shared.ports.lease(&range, 1)?.pop().ok_or_else(|| none.into())
}

/// One transaction: the point is seen committed, its chain is pinned, and the export is on record.
async fn pin(shared: &Shared, id: &ExportId, new: &NewExport, port: &BoundPort) -> Result<(Found, Pins), RestoreError> {
    let deadline = UtcTime::now().plus_seconds(shared.config.restore.ttl_s);
    let boot_id = shared.boot_id.as_str();
    let mut transaction = shared.store.write().await?;
    let found = chain::pin(&mut transaction, shared, id, &new.point_id, new.disk_id, new.damage).await?;
    let number = port.lease.port().to_string();
    leases::take_over(&mut transaction, leases::LeaseKind::Port, &number, id.as_str(), boot_id).await?;
    leases::record_export(&mut transaction, id, deadline, boot_id).await?;
    // Before the commit, whose outcome may stay unknown.
    let pins = Pins::of(&shared.store, id.as_str());
    transaction.commit().await?;
    Ok((found, pins))
}

fn begin(shared: &Arc<Shared>, live: &Arc<LiveExport>, held: Held, presence: Presence) {
    let mut registry = shared.registry();
    if registry.closed {
        live.ask_to_end();
    }
    let task = tokio::spawn(run(Arc::clone(shared), Arc::clone(live), held, presence));
    registry.live.insert(live.facts.id.clone(), (Arc::clone(live), Some(task.abort_handle())));
}

async fn run(shared: Arc<Shared>, live: Arc<LiveExport>, held: Held, presence: Presence) {
    let _listed = Listed { shared: Arc::clone(&shared), live: Arc::clone(&live), presence: Some(presence) };
    run_to_its_end(&shared, &live, held).await;
}

/// Nothing of what it holds is left when this returns.
async fn run_to_its_end(shared: &Shared, live: &LiveExport, held: Held) {
    let why = wait(shared, live).await;
    tracing::info!(export_id = %live.facts.id, why, "export ends");
    let Held { export, listener, overlay, pins } = held;
    // From here on each request is answered with ESHUTDOWN. A connection that is quiet is closed as soon as its listener is told
    // to stop, so clients have a moment before that in which they ask and learn why.
    export.refuse();
    if tokio::time::timeout(DRAIN, live.deserted()).await.is_err() {
        tracing::info!(export_id = %live.facts.id, "connections are cut whose clients did not go");
    }
    listener.stop(DRAIN).await;
    drop(export);
    if let Some(overlay) = overlay {
        // Freeing a large file takes its time.
        let _ = tokio::task::spawn_blocking(move || drop(overlay)).await;
    }
    pins.release().await;
}

/// Waits until the export is to end, and says why.
async fn wait(shared: &Shared, live: &LiveExport) -> &'static str {
    let mut asked = live.asked_to_end.subscribe();
    loop {
        let deadline = live.deadline();
        tokio::select! {
            _ = asked.wait_for(|asked| *asked) => return "it was asked to",
            () = tokio::time::sleep_until(deadline) => {}
        }
        if live.deadline() <= Instant::now() {
            return "it was not used for restore.ttl_s";
        }
        // There was traffic meanwhile. The record is for people, so it need not be newer than that.
        if let Err(error) = shared.record_deadline(live).await {
            tracing::warn!(export_id = %live.facts.id, %error, "the deadline of an export could not be recorded");
        }
    }
}
