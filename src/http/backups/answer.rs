//! What callers are shown of a backup: from its rows, and while it runs with the numbers of the NBD layer.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use utoipa::ToSchema;

use crate::app::App;
use crate::backup::Started;
use crate::backup::job::LiveDisk;
use crate::backup::progress::{DiskProgress, eta_s, percent};
use crate::clock::UtcTime;
use crate::config;
use crate::export::busy::Bottleneck;
use crate::http::points::QUIESCE;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::repository::layout::BackupPaths;
use crate::store::backups::{self, BackupDiskRow, BackupRow, NodeOutcome};
use crate::store::{Connection, StoreError, points, repositories};
use crate::words::{BackupType, DiskState, FailureCode, JobResult, JobState, OldStatus, RequestedType, TypeReason};

/// The answer to a start request.
#[derive(Serialize, ToSchema)]
pub(super) struct StartAnswer {
    #[schema(value_type = String, example = "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB")]
    backup_id: BackupId,
    /// The same once more, where older callers look for it.
    #[schema(value_type = String)]
    backup_job_id: BackupId,
    #[schema(value_type = String)]
    vm_context_id: VmId,
    vm_name: String,
    #[schema(value_type = String)]
    repository_id: RepositoryId,
    /// `full` when every disk is, else `incremental`.
    backup_type: BackupType,
    /// The same once more, where older callers look for it.
    r#type: BackupType,
    requested_type: RequestedType,
    /// `started`, or `starting` while the node has not answered.
    #[schema(example = "started")]
    status: &'static str,
    disk_results: Vec<DiskResult>,
    /// What the node was told: device key and export of every disk.
    nbd_targets_string: String,
    disks_count: usize,
    total_bytes: u64,
    #[schema(value_type = String, format = DateTime)]
    created_at: UtcTime,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy_id: Option<String>,
    tags: BTreeMap<String, String>,
    warnings: Vec<String>,
}

/// What became of one disk.
#[derive(Serialize, ToSchema)]
pub(super) struct DiskResult {
    disk_id: u32,
    device_key: u32,
    /// The port that the backup client is told.
    nbd_port: Option<u16>,
    nbd_export_name: Option<String>,
    status: String,
    backup_type: BackupType,
    reason: TypeReason,
    size_bytes: u64,
    /// Where the image will be, or is, once the backup is committed.
    qcow2_path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_message: Option<String>,
}

impl StartAnswer {
    pub(super) fn new(started: &Started, nbd: &config::Nbd) -> Self {
        let facts = &started.facts;
        let status = if started.confirmed { "started" } else { "starting" };
        let disk_results = facts.disks.iter().map(|disk| DiskResult {
            disk_id: disk.plan.disk_id,
            device_key: disk.plan.device_key,
            nbd_port: Some(disk.advertised_port),
            nbd_export_name: Some(disk.plan.export_name.clone()),
            status: status.to_owned(),
            backup_type: disk.plan.backup_type(),
            reason: disk.plan.reason,
            size_bytes: disk.plan.size_bytes,
            qcow2_path: facts.paths.published_image(disk.plan.disk_id).display().to_string(),
            error_message: None,
        });
        Self {
            backup_id: facts.id.clone(),
            backup_job_id: facts.id.clone(),
            vm_context_id: facts.vm.id.clone(),
            vm_name: facts.vm.name.clone(),
            repository_id: facts.repository.id.clone(),
            backup_type: facts.backup_type,
            r#type: facts.backup_type,
            requested_type: facts.requested_type,
            status,
            disk_results: disk_results.collect(),
            nbd_targets_string: facts.targets(nbd),
            disks_count: facts.disks.len(),
            total_bytes: facts.disks.iter().map(|disk| disk.plan.size_bytes).sum(),
            created_at: facts.created_at,
            policy_id: facts.policy_id.clone(),
            tags: facts.tags.clone(),
            warnings: facts.warnings.iter().chain(&started.warnings).cloned().collect(),
        }
    }
}

/// A backup as it is now.
#[derive(Serialize, ToSchema)]
pub(super) struct BackupAnswer {
    #[schema(value_type = String, example = "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB")]
    backup_id: BackupId,
    #[schema(value_type = String)]
    backup_job_id: BackupId,
    #[schema(value_type = String)]
    vm_context_id: VmId,
    vm_name: String,
    #[schema(value_type = String)]
    repository_id: RepositoryId,
    backup_type: BackupType,
    r#type: BackupType,
    requested_type: RequestedType,
    /// The state in the words of older callers.
    status: OldStatus,
    state: JobState,
    /// `none` until there is proof.
    result: JobResult,
    /// Why it failed, as a stable word.
    code: Option<FailureCode>,
    /// Why it failed, for people.
    error_message: Option<String>,
    /// 0 to 100, from the bytes covered; 100 once committed, although a delta covers less.
    progress_percent: f64,
    /// The state once more, where older callers look for it.
    current_phase: JobState,
    /// Payload written per second, over the last ten seconds.
    transfer_speed_bps: u64,
    /// Seconds until all disks are covered, at the pace of the last ten seconds; `null` where nobody can say.
    eta_seconds: Option<u64>,
    /// Payload written so far.
    bytes_transferred: u64,
    total_bytes: u64,
    #[schema(value_type = String, format = DateTime)]
    created_at: UtcTime,
    /// The first sign of life of the backup client.
    #[schema(value_type = Option<String>, format = DateTime)]
    started_at: Option<UtcTime>,
    #[schema(value_type = Option<String>, format = DateTime)]
    completed_at: Option<UtcTime>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy_id: Option<String>,
    tags: BTreeMap<String, String>,
    warnings: Vec<String>,
    facets: Facets,
    disks_count: usize,
    disk_results: Vec<DiskResult>,
    nbd_targets_string: String,
    disks: Vec<DiskAnswer>,
}

/// What is known beside the state and never changes it.
#[derive(Serialize, ToSchema)]
struct Facets {
    /// `alert` when a snapshot may be left on the VM.
    snapshot_cleanup: &'static str,
    /// What a verification said of the restore point: `off`, `pending`, `running`, `verified`, `suspect`, `corrupt`, or `failed`
    /// when it could not be read.
    verify: &'static str,
    /// `complete` when every byte of every disk was received.
    coverage: &'static str,
    /// The backup client's own choice, which the node does not confirm.
    quiesce: &'static str,
}

/// One disk of a backup as it is now.
#[derive(Serialize, ToSchema)]
struct DiskAnswer {
    disk_id: u32,
    device_key: u32,
    state: DiskState,
    backup_type: BackupType,
    /// What was observed: `full`, `incremental`, or `full_copy_into_overlay` for an incremental that received every byte; `null`
    /// until the disk is sealed.
    effective_type: Option<String>,
    reason: TypeReason,
    size_bytes: u64,
    /// Distinct bytes written or zeroed.
    covered_bytes: u64,
    written_bytes: u64,
    zeroed_bytes: u64,
    /// Zeroes in requests of 4 MiB and more over what is data in the last usable restore point of the disk.
    zeroed_over_data_bytes: u64,
    /// Bytes written or zeroed that read the same from the parent and were not stored.
    identical_bytes: u64,
    /// Connections open now.
    connections: usize,
    /// Payload written per second, over the last ten seconds.
    rate_bps: u64,
    /// 0 to 100, of the bytes covered; `null` while nobody knows how much will come, as of an incremental.
    percent: Option<f64>,
    /// Seconds until it is covered, at the pace of the last ten seconds; `null` where nobody can say.
    eta_s: Option<u64>,
    /// What the copy waits for; `null` before there was a second of requests, and once it is over.
    bottleneck: Option<Bottleneck>,
    /// The point that the image builds upon; `null` for a full.
    #[schema(value_type = Option<String>)]
    parent_id: Option<BackupId>,
    /// The state of the disk in change tracking at which the delta begins; `null` for a full.
    from_change_id: Option<String>,
    /// The state of the disk in change tracking that this backup holds.
    change_id: Option<String>,
    /// What failed at this disk, for people; `null` also where it is the whole job that failed.
    error_message: Option<String>,
}

impl BackupAnswer {
    /// Reads what belongs to a row and puts the live numbers beside it.
    pub(super) async fn load(app: &App, connection: &mut Connection, row: BackupRow) -> Result<Self, StoreError> {
        let disks = backups::disks(connection, &row.id).await?;
        let paths = paths(connection, &row).await?;
        // What an ended job measured is recorded with its end, and does not change when its task is gone.
        let job = app.backups.find(&row.id).filter(|_| !row.state.is_terminal());
        let live = job.as_ref().map_or(&[][..], |job| job.live());
        let verify = verify(app, connection, &row).await?;
        Ok(Self::new(app, row, &disks, paths.as_ref(), live, verify))
    }

    fn new(
        app: &App,
        row: BackupRow,
        disks: &[BackupDiskRow],
        paths: Option<&BackupPaths>,
        live: &[LiveDisk],
        verify: &'static str,
    ) -> Self {
        let answers: Vec<DiskAnswer> = disks
            .iter()
            .map(|disk| DiskAnswer::new(disk, live.iter().find(|live| live.disk_id == disk.disk_id)))
            .collect();
        let total_bytes: u64 = disks.iter().map(|disk| disk.size_bytes).sum();
        let covered: u64 = answers.iter().map(|disk| disk.covered_bytes).sum();
        let status = row.state.old_status();
        let nbd = &app.config.nbd;
        let advertised =
            |port: u16| u16::try_from(i32::from(port) + app.config.nbd.advertise_port_offset).unwrap_or(port);
        let disk_results: Vec<DiskResult> = disks
            .iter()
            .map(|disk| DiskResult {
                disk_id: disk.disk_id,
                device_key: disk.device_key,
                nbd_port: disk.port.map(advertised),
                nbd_export_name: disk.export_name.clone(),
                status: status.to_string(),
                backup_type: disk.backup_type,
                reason: disk.reason,
                size_bytes: disk.size_bytes,
                qcow2_path: paths
                    .map(|paths| paths.published_image(disk.disk_id).display().to_string())
                    .unwrap_or_default(),
                error_message: disk.error_message.clone(),
            })
            .collect();
        let targets: Vec<String> = disk_results
            .iter()
            .filter_map(|disk| {
                let (port, name) = (disk.nbd_port?, disk.nbd_export_name.as_ref()?);
                Some(nbd.target(disk.device_key, port, name))
            })
            .collect();
        Self {
            backup_id: row.id.clone(),
            backup_job_id: row.id,
            vm_context_id: row.vm_id,
            vm_name: row.vm_name,
            repository_id: row.repository_id,
            backup_type: row.backup_type,
            r#type: row.backup_type,
            requested_type: row.requested_type,
            status,
            state: row.state,
            result: row.result,
            code: row.code,
            error_message: row.message,
            progress_percent: if row.state == JobState::Committed { 100.0 } else { percent(covered, total_bytes) },
            current_phase: row.state,
            transfer_speed_bps: live.iter().map(|disk| disk.meter.written_per_second()).sum(),
            eta_seconds: if live.is_empty() || disks.iter().any(|disk| disk.backup_type != BackupType::Full) {
                None
            } else {
                let pace = live.iter().map(|disk| disk.meter.covered_per_second()).sum();
                eta_s(total_bytes.saturating_sub(covered), pace)
            },
            bytes_transferred: answers.iter().map(|disk| disk.written_bytes).sum(),
            total_bytes,
            created_at: row.created_at,
            started_at: row.started_at,
            completed_at: row.completed_at,
            policy_id: row.policy_id,
            tags: row.tags,
            warnings: row.warnings,
            facets: Facets {
                snapshot_cleanup: snapshot_cleanup(row.state, row.node_outcome),
                verify,
                coverage: if covered == total_bytes { "complete" } else { "partial" },
                quiesce: QUIESCE,
            },
            disks_count: disks.len(),
            disk_results,
            nbd_targets_string: targets.join(","),
            disks: answers,
        }
    }
}

impl DiskAnswer {
    fn new(disk: &BackupDiskRow, live: Option<&LiveDisk>) -> Self {
        let mut answer = Self {
            disk_id: disk.disk_id,
            device_key: disk.device_key,
            state: disk.state,
            backup_type: disk.backup_type,
            effective_type: disk.effective_type.clone(),
            reason: disk.reason,
            size_bytes: disk.size_bytes,
            covered_bytes: disk.covered_bytes,
            written_bytes: disk.written_bytes,
            zeroed_bytes: disk.zeroed_bytes,
            zeroed_over_data_bytes: disk.zeroed_over_data_bytes,
            identical_bytes: disk.identical_bytes,
            connections: 0,
            rate_bps: 0,
            percent: (disk.state == DiskState::Sealed).then_some(100.0),
            eta_s: None,
            bottleneck: None,
            parent_id: disk.parent_id.clone(),
            from_change_id: disk.from_change_id.clone(),
            change_id: disk.change_id.clone(),
            error_message: disk.error_message.clone(),
        };
        if let Some(live) = live {
            let now = DiskProgress::of(live, live.state(disk.state));
            answer.state = now.state;
            answer.covered_bytes = now.covered_bytes;
            answer.written_bytes = now.written_bytes;
            answer.zeroed_bytes = now.zeroed_bytes;
            answer.zeroed_over_data_bytes = live.meter.reading().zeroed_over_data_bytes;
            answer.identical_bytes = now.identical_bytes;
            answer.connections = now.connections;
            answer.rate_bps = now.rate_bps;
            answer.percent = now.percent;
            answer.eta_s = now.eta_s;
            answer.bottleneck = now.bottleneck;
        }
        answer
    }
}

fn snapshot_cleanup(state: JobState, node: Option<NodeOutcome>) -> &'static str {
    let ended_badly = state.is_ending() && state != JobState::Committed;
    if ended_badly && node.is_some_and(NodeOutcome::may_have_launched) { "alert" } else { "unknown" }
}

/// A job that left nothing has nothing to verify.
async fn verify(app: &App, connection: &mut Connection, row: &BackupRow) -> Result<&'static str, StoreError> {
    if row.state.is_ending() && row.state != JobState::Committed {
        return Ok("off");
    }
    let point = points::find(connection, &row.id).await?;
    Ok(app.points.verify_facet(&row.id, point.map(|point| (point.trust, point.verified_at.is_some()))))
}

async fn paths(connection: &mut Connection, row: &BackupRow) -> Result<Option<BackupPaths>, StoreError> {
    let repository = repositories::find(connection, &row.repository_id).await?;
    let directory = backups::directory_of(connection, &row.vm_id).await?;
    Ok(repository
        .zip(directory)
        .map(|(repository, directory)| BackupPaths::new(Path::new(&repository.path), &directory, row.id.as_str())))
}
