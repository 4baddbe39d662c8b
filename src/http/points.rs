//! Restore points: what committed backups left.

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::QueryParams;
use super::listing;
use super::problem::{Code, Problem};
use super::verification::{self, VerificationAnswer};
use crate::app::AppState;
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::store::points::{self, Filter, PointDiskRow, PointRow};
use crate::store::{Connection, StoreError, backups, repositories};
use crate::words::BackupType;
use crate::words::point::{PointState, Trust};

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list_points)).routes(routes!(show_point))
}

/// Nothing in the node's contract turns quiescing off or reports its level.
pub(super) const QUIESCE: &str = "client_default";

/// A restore point: all disks of a VM as they were in one snapshot.
#[derive(Serialize, ToSchema)]
pub(super) struct PointAnswer {
    /// The id of the backup that made it.
    #[schema(value_type = String, example = "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB")]
    id: BackupId,
    #[schema(value_type = String)]
    vm_context_id: VmId,
    vm_name: Option<String>,
    #[schema(value_type = String)]
    repository_id: RepositoryId,
    /// The order of commits over the whole hub.
    sequence: u64,
    state: PointState,
    trust: Trust,
    /// Why it is `suspect` or `corrupt`.
    trust_reason: Option<String>,
    /// When it was last verified, whatever came of it.
    #[schema(value_type = Option<String>, format = DateTime)]
    verified_at: Option<UtcTime>,
    /// Bytes of its disks that were held against what was received for them, when the disks were last read; `null` before that.
    compared_bytes: Option<u64>,
    /// Until when it may not be deleted.
    #[schema(value_type = Option<String>, format = DateTime)]
    protected_until: Option<UtcTime>,
    backup_type: BackupType,
    /// How the file systems were brought to rest: the backup client's own choice, which the node does not confirm.
    #[schema(example = "client_default")]
    quiesce: &'static str,
    #[schema(value_type = String, format = DateTime)]
    committed_at: UtcTime,
    /// The folder, in the repository.
    path: Option<String>,
    disks: Vec<PointDiskAnswer>,
}

/// One disk of a restore point.
#[derive(Serialize, ToSchema)]
struct PointDiskAnswer {
    disk_id: u32,
    device_key: u32,
    vmdk_uuid: Option<String>,
    vmdk_path: Option<String>,
    size_bytes: u64,
    backup_type: BackupType,
    /// The image in the point's folder.
    file: String,
    file_bytes: u64,
    /// The state of the disk in change tracking that the image holds.
    change_id: Option<String>,
    /// The point whose image of the disk this one is an overlay on; `null` for a full.
    #[schema(value_type = Option<String>)]
    parent_id: Option<BackupId>,
    /// How many images a read may pass; 1 for a full.
    chain_depth: u32,
    /// What it became by the bytes that came: `full`, `incremental` or `full_copy_into_overlay`.
    effective_type: Option<String>,
    /// The change id at which its delta begins.
    from_change_id: Option<String>,
    /// Bytes that came and were not stored, being equal to what lies below.
    identical_bytes: Option<u64>,
    /// BLAKE3 of the image file, in hexadecimal digits; `null` until it was taken.
    digest: Option<String>,
    /// The root over the content of the virtual disk, by which disks of two points are compared; `null` until it was taken.
    content_digest: Option<String>,
}

/// A restore point with what this process verified of it.
#[derive(Serialize, ToSchema)]
struct PointDetail {
    #[serde(flatten)]
    point: PointAnswer,
    /// The running or the last verification of it in this process.
    verification: Option<VerificationAnswer>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WaitQuery {
    /// Answer when its verification is over, or after this many seconds (at most 60); at once when there is none.
    wait: Option<u64>,
}

#[derive(Serialize, ToSchema)]
struct PointList {
    points: Vec<PointAnswer>,
    /// Points on all pages together.
    total: u64,
    next_page_token: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PointQuery {
    /// Only points of this VM.
    #[param(value_type = Option<String>)]
    vm_context_id: Option<VmId>,
    /// Only points in this repository.
    #[param(value_type = Option<String>)]
    repository_id: Option<RepositoryId>,
    /// 1 to 1000.
    limit: Option<u32>,
    /// `next_page_token` of the page before.
    page_token: Option<String>,
}

/// All restore points, newest first. Only whole VMs are ever here.
#[utoipa::path(get, path = "/points", tag = "points", params(PointQuery), responses((status = 200, body = PointList)))]
async fn list_points(
    State(app): State<AppState>,
    QueryParams(query): QueryParams<PointQuery>,
) -> Result<Json<PointList>, Problem> {
    let page = listing::page(query.limit, query.page_token.as_deref())?;
    let filter = Filter { vm_id: query.vm_context_id, repository_id: query.repository_id };
    let mut connection = app.store.read().await?;
    let found = points::list(&mut connection, &filter, &page).await?;
    let next_page_token = listing::next_page_token(&found);
    let mut answers = Vec::with_capacity(found.rows.len());
    for row in found.rows {
        answers.push(PointAnswer::load(&mut connection, row).await?);
    }
    Ok(Json(PointList { points: answers, total: found.total, next_page_token }))
}

/// One restore point.
#[utoipa::path(get, path = "/points/{id}", tag = "points", params(("id" = String, Path), WaitQuery),
    responses((status = 200, body = PointDetail)))]
async fn show_point(
    State(app): State<AppState>,
    Path(id): Path<String>,
    QueryParams(query): QueryParams<WaitQuery>,
) -> Result<Json<PointDetail>, Problem> {
    let point_id = id.parse::<BackupId>().map_err(|_| not_found(&id))?;
    if let Some(seconds) = query.wait {
        verification::wait_for_end(&app, &point_id, seconds).await?;
    }
    // Looked at before the rows: what has ended by now is in them.
    let verification = app.points.verification(&point_id).map(|last| VerificationAnswer::from(&*last));
    Ok(Json(PointDetail { point: load(&app, &id).await?, verification }))
}

/// A point that is not deleted, as it is shown.
pub(super) async fn load(app: &AppState, id: &str) -> Result<PointAnswer, Problem> {
    let mut connection = app.store.read().await?;
    let row = match id.parse::<BackupId>() {
        Ok(id) => points::find(&mut connection, &id).await?.filter(|row| row.state != PointState::Deleted),
        Err(_) => None,
    };
    match row {
        Some(row) => Ok(PointAnswer::load(&mut connection, row).await?),
        None => Err(not_found(id)),
    }
}

pub(super) fn not_found(id: &str) -> Problem {
    Problem::new(Code::PointNotFound, format!("There is no restore point with the id {id}."))
}

impl PointAnswer {
    pub(super) async fn load(connection: &mut Connection, row: PointRow) -> Result<Self, StoreError> {
        let disks = points::disks(connection, &row.id).await?;
        let repository = repositories::find(connection, &row.repository_id).await?;
        let backup = backups::find(connection, &row.id).await?;
        let all_full = disks.iter().all(|disk| disk.backup_type == BackupType::Full);
        Ok(Self {
            path: repository.map(|repository| format!("{}/{}", repository.path, row.dir)),
            id: row.id,
            vm_context_id: row.vm_id,
            vm_name: backup.map(|backup| backup.vm_name),
            repository_id: row.repository_id,
            sequence: row.sequence,
            state: row.state,
            trust: row.trust,
            trust_reason: row.trust_reason,
            verified_at: row.verified_at,
            compared_bytes: row.compared_bytes,
            protected_until: row.protected_until,
            backup_type: if all_full { BackupType::Full } else { BackupType::Incremental },
            quiesce: QUIESCE,
            committed_at: row.committed_at,
            disks: disks.into_iter().map(Into::into).collect(),
        })
    }
}

impl From<PointDiskRow> for PointDiskAnswer {
    fn from(disk: PointDiskRow) -> Self {
        Self {
            disk_id: disk.disk_id,
            device_key: disk.device_key,
            vmdk_uuid: disk.vmdk_uuid,
            vmdk_path: disk.vmdk_path,
            size_bytes: disk.size_bytes,
            backup_type: disk.backup_type,
            file: disk.file,
            file_bytes: disk.file_bytes,
            change_id: disk.change_id,
            parent_id: disk.parent_id,
            chain_depth: disk.chain_depth,
            effective_type: disk.effective_type,
            from_change_id: disk.from_change_id,
            identical_bytes: disk.identical_bytes,
            digest: disk.digest,
            content_digest: disk.content_digest,
        }
    }
}
