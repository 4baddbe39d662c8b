//! What the backup client calls. It sends no token, never repeats a call, and stops copying on anything but 200, so each
//! answer here is bounded and says exactly what happened.

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::backups::{complete_refused, not_found, parse_id};
use super::extract::{JsonBody, QueryParams};
use super::problem::{Code, Problem};
use crate::app::AppState;
use crate::backup::Known;
use crate::clock::UtcTime;
use crate::id::BackupId;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(change_id)).routes(routes!(complete_disk)).routes(routes!(take_telemetry))
}

/// The only job type there is.
const JOB_TYPE: &str = "backup";
/// Longest change id that is stored. VMware's have about 60 characters.
const CHANGE_ID_MAX: usize = 1000;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ChangeIdQuery {
    /// The last segment of the VM's inventory path.
    vm_name: String,
    /// The number of the disk; 0 when the client does not know it yet.
    #[serde(default)]
    disk_id: String,
}

/// One flat object of strings: anything else the backup client takes for "no change id".
#[derive(Serialize, ToSchema)]
struct ChangeIdAnswer {
    vm_name: String,
    disk_id: String,
    /// The running backup of the VM; absent when there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    backup_job_id: Option<BackupId>,
    /// Empty: copy the whole disk.
    change_id: String,
    message: &'static str,
}

/// Where the delta of a disk begins. The answer alone decides whether the client copies a delta or the whole disk; a disk that
/// is to be copied whole is answered with an empty change id. Disk 0 means the disk that is copied next, until export 0 is
/// connected (`jobs.predict_next_disk`).
#[utoipa::path(get, path = "/backups/changeid", tag = "callbacks", params(ChangeIdQuery), security(()),
    responses((status = 200, body = ChangeIdAnswer)))]
async fn change_id(
    State(app): State<AppState>,
    QueryParams(query): QueryParams<ChangeIdQuery>,
) -> Json<ChangeIdAnswer> {
    // What is no number is the number of no disk.
    let disk_id = if query.disk_id.is_empty() { Some(0) } else { query.disk_id.parse().ok() };
    let previous = app.backups.previous_change_id(&query.vm_name, disk_id);
    let (backup_job_id, change_id) = previous.map_or((None, None), |previous| (Some(previous.job), previous.change_id));
    let message = if change_id.is_some() { "Previous change_id found" } else { "No previous backup found" };
    let change_id = change_id.unwrap_or_default();
    Json(ChangeIdAnswer { vm_name: query.vm_name, disk_id: query.disk_id, backup_job_id, change_id, message })
}

#[derive(Deserialize, ToSchema)]
struct CompleteBody {
    /// The state of the disk in change tracking, from the snapshot that was copied.
    #[serde(default)]
    #[schema(example = "52 c2 1f aa 00 3b 71 0e-9d 4c 2e 11 5a 60 77 f0/5540")]
    change_id: Option<String>,
    disk_id: u32,
}

#[derive(Serialize, ToSchema)]
struct CompleteAnswer {
    #[schema(example = "completed")]
    status: &'static str,
    #[schema(value_type = String)]
    backup_id: BackupId,
    change_id: String,
    #[schema(example = "disk 0 sealed, 1 of 2")]
    message: String,
    #[schema(value_type = String, format = DateTime)]
    timestamp: UtcTime,
}

/// A disk is copied. Answered when its image is durable and proven; with the last disk, when the restore point exists.
#[utoipa::path(post, path = "/backups/{id}/complete", tag = "callbacks", request_body = CompleteBody, security(()),
    params(("id" = String, Path)), responses((status = 200, body = CompleteAnswer)))]
async fn complete_disk(
    State(app): State<AppState>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<CompleteBody>,
) -> Result<Json<CompleteAnswer>, Problem> {
    let id = parse_id(&id)?;
    let change_id = body.change_id.filter(|change_id| !change_id.is_empty());
    if change_id.as_ref().is_some_and(|change_id| change_id.chars().count() > CHANGE_ID_MAX) {
        return Err(Problem::invalid_field("/change_id", format!("must have at most {CHANGE_ID_MAX} characters")));
    }
    let completed = app.backups.complete(&id, body.disk_id, change_id).await;
    let sealed = completed.map_err(|error| {
        tracing::warn!(job_id = %id, disk_id = body.disk_id, %error, "completion refused");
        complete_refused(error, &id)
    })?;
    Ok(Json(CompleteAnswer {
        status: "completed",
        backup_id: id,
        change_id: sealed.change_id.unwrap_or_default(),
        message: format!("disk {} sealed, {} of {}", sealed.disk_id, sealed.sealed, sealed.disks),
        timestamp: UtcTime::now(),
    }))
}

/// What the client says of its progress. Kept nowhere: the server's own numbers are the ones that count.
#[derive(Deserialize, ToSchema)]
struct TelemetryBody {
    /// The client's word; `completed` comes after every disk and means nothing for the job.
    #[schema(value_type = Option<String>, example = "running")]
    status: Option<serde_json::Value>,
}

#[derive(Serialize, ToSchema)]
struct TelemetryAnswer {
    /// `success`, or `ignored` when the job is over.
    #[schema(example = "success")]
    status: &'static str,
    message: &'static str,
    #[schema(value_type = String, format = DateTime)]
    timestamp: UtcTime,
}

/// A sign of life and a hint. It never changes the state of a job.
#[utoipa::path(post, path = "/telemetry/{job_type}/{id}", tag = "callbacks", request_body = TelemetryBody, security(()),
    params(("job_type" = String, Path), ("id" = String, Path)), responses((status = 200, body = TelemetryAnswer)))]
async fn take_telemetry(
    State(app): State<AppState>,
    Path((job_type, id)): Path<(String, String)>,
    JsonBody(body): JsonBody<TelemetryBody>,
) -> Result<Json<TelemetryAnswer>, Problem> {
    if job_type != JOB_TYPE {
        return Err(Problem::new(Code::NotFound, format!("There are no jobs of the type {job_type}.")));
    }
    let id = parse_id(&id)?;
    tracing::debug!(job_id = %id, status = ?body.status, "telemetry");
    let (status, message) = match app.backups.sign_of_life(&id).await? {
        Known::Running => ("success", "noted"),
        Known::Ended => ("ignored", "the backup is over"),
        Known::Unknown => return Err(not_found(id.as_str())),
    };
    Ok(Json(TelemetryAnswer { status, message, timestamp: UtcTime::now() }))
}
