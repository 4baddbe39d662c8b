//! Two questions of existing callers: how much there is, and what a VM's points build upon.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::AppState;
use crate::clock::UtcTime;
use crate::http::extract::QueryParams;
use crate::http::points::PointAnswer;
use crate::http::problem::{Code, Problem};
use crate::id::{RepositoryId, VmId};
use crate::store::{points, vms};

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(backup_stats)).routes(routes!(backup_chain))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct StatsQuery {
    /// Only points of VMs that had exactly this name.
    vm_name: Option<String>,
    /// Only points in this repository.
    #[param(value_type = Option<String>)]
    repository_id: Option<RepositoryId>,
}

#[derive(Serialize, ToSchema)]
struct BackupStats {
    /// Restore points that are not deleted.
    backup_count: u64,
    /// The length of their images together.
    total_size_bytes: u64,
    /// When the newest was committed; `null` when there is none.
    #[schema(value_type = Option<String>, format = DateTime)]
    last_backup_at: Option<UtcTime>,
}

#[derive(Serialize, ToSchema)]
struct BackupChain {
    vm_name: String,
    #[schema(value_type = String)]
    vm_context_id: VmId,
    /// In the order of their commits, so that every `parent_id` names one before it.
    points: Vec<PointAnswer>,
    total: usize,
}

/// How many restore points there are, how large, and how old the newest is.
#[utoipa::path(get, path = "/backups/stats", tag = "backups", params(StatsQuery),
    responses((status = 200, body = BackupStats)))]
async fn backup_stats(
    State(app): State<AppState>,
    QueryParams(query): QueryParams<StatsQuery>,
) -> Result<Json<BackupStats>, Problem> {
    let mut connection = app.store.read().await?;
    let stats = points::stats(&mut connection, query.vm_name.as_deref(), query.repository_id.as_ref()).await?;
    Ok(Json(BackupStats {
        backup_count: stats.points,
        total_size_bytes: stats.bytes,
        last_backup_at: stats.last_committed_at,
    }))
}

/// The restore points of a VM, oldest first, each disk with the point that it builds upon.
#[utoipa::path(get, path = "/backups/{vm_name}/chain", tag = "backups", params(("vm_name" = String, Path)),
    responses((status = 200, body = BackupChain)))]
async fn backup_chain(State(app): State<AppState>, Path(vm_name): Path<String>) -> Result<Json<BackupChain>, Problem> {
    let mut connection = app.store.read().await?;
    let rows = points::of_name(&mut connection, &vm_name).await?;
    let mut owners: BTreeSet<VmId> = rows.iter().map(|point| point.vm_id.clone()).collect();
    owners.extend(vms::find_by_name(&mut connection, &vm_name).await?.into_iter().map(|vm| vm.id));
    let Some(vm_context_id) = owners.pop_first() else {
        return Err(Problem::new(Code::VmNotFound, format!("No VM is or was called {vm_name}.")));
    };
    if !owners.is_empty() {
        owners.insert(vm_context_id);
        let ids: Vec<String> = owners.iter().map(ToString::to_string).collect();
        let detail = format!("{} VMs are or were called {vm_name}: ask GET /points by vm_context_id.", ids.len());
        return Err(Problem::new(Code::VmAmbiguous, detail).with("candidates", ids));
    }
    let mut answers = Vec::with_capacity(rows.len());
    for row in rows {
        answers.push(PointAnswer::load(&mut connection, row).await?);
    }
    Ok(Json(BackupChain { vm_name, vm_context_id, total: answers.len(), points: answers }))
}
