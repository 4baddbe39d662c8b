//! Backups: start, list, look, cancel. What the backup client itself calls is in `callbacks`.

mod answer;
mod overview;
mod refusal;
mod repeat;

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::header::LOCATION;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::answer::{BackupAnswer, StartAnswer};
use super::extract::{JsonBytes, QueryParams, parse_json};
use super::listing;
use super::problem::{Code, Problem};
use crate::app::AppState;
use crate::backup::{Cancelled, NewBackup, VmChoice};
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::store::backups::{self, BackupRow, Filter};
use crate::words::{BackupType, JobState, OldStatus, RequestedType};

pub(super) use refusal::{complete_refused, sentence};

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_backups, start_backup_alias))
        .routes(routes!(start_backup))
        .merge(overview::routes())
        .routes(routes!(show_backup))
        .routes(routes!(cancel_backup))
}

/// The longest time a `GET` waits for a change of state, in seconds.
const WAIT_MAX_S: u64 = 60;
/// Longest name, id or policy, in characters.
const TEXT_MAX: usize = 1000;
/// What a start request may hold; anything else is named in a warning.
const START_FIELDS: &[&str] = &["vm_name", "vm_context_id", "repository_id", "backup_type", "policy_id", "tags"];

/// A request to back up all disks of one VM.
#[derive(Deserialize, ToSchema)]
struct StartBody {
    /// The VM by its name, which only one VM may have.
    #[schema(example = "db-server")]
    vm_name: Option<String>,
    /// The VM by its id; wins over the name.
    #[schema(example = "vm-01JC0A7K2E5H8M3P6R9T1V4X7Z")]
    vm_context_id: Option<String>,
    /// Where the restore point goes.
    #[schema(example = "repo-001")]
    repository_id: String,
    /// `full`; `auto`: each disk incremental where it can be, else full; `incremental`: the same, but refused when no disk can be.
    backup_type: RequestedType,
    /// Stored and echoed.
    policy_id: Option<String>,
    /// Stored and echoed.
    #[serde(default)]
    #[schema(example = json!({"reason": "nightly"}))]
    tags: BTreeMap<String, String>,
}

/// Only for the description: the handlers read the header themselves.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[allow(dead_code, reason = "read by the description")]
struct StartHeaders {
    /// At most 255 characters. The same key with the same body gets the first answer again, marked `Idempotency-Replayed: true`.
    #[param(rename = "Idempotency-Key")]
    idempotency_key: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct BackupList {
    backups: Vec<BackupAnswer>,
    /// Backups on all pages together.
    total: u64,
    next_page_token: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct BackupQuery {
    /// Only backups of VMs that had exactly this name.
    vm_name: Option<String>,
    /// Only backups of this VM.
    #[param(value_type = Option<String>)]
    vm_context_id: Option<VmId>,
    /// Only backups into this repository.
    #[param(value_type = Option<String>)]
    repository_id: Option<RepositoryId>,
    /// Only backups of this old status.
    status: Option<OldStatus>,
    /// Only backups in this state.
    state: Option<JobState>,
    /// Only backups of this type.
    backup_type: Option<BackupType>,
    /// Only backups accepted at this time or later.
    #[param(value_type = Option<String>)]
    since: Option<UtcTime>,
    /// 1 to 1000.
    limit: Option<u32>,
    /// `next_page_token` of the page before.
    page_token: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WaitQuery {
    /// Answer when the state changes, or after this many seconds (at most 60). A backup that is over answers at once.
    wait: Option<u64>,
}

/// Backs up all disks of a VM from one snapshot. Answered when the node has been asked to start, not when the copy is done.
#[utoipa::path(post, path = "/backups/vm", tag = "backups", request_body = StartBody, params(StartHeaders),
    responses((status = 200, body = StartAnswer)))]
async fn start_backup(State(app): State<AppState>, headers: HeaderMap, body: JsonBytes) -> Result<Response, Problem> {
    start(&app, &headers, &body, "/api/v1/backups/vm").await
}

/// The same as `POST /backups/vm`.
#[utoipa::path(post, path = "/backups", tag = "backups", request_body = StartBody, params(StartHeaders),
    responses((status = 200, body = StartAnswer)))]
async fn start_backup_alias(
    State(app): State<AppState>,
    headers: HeaderMap,
    body: JsonBytes,
) -> Result<Response, Problem> {
    start(&app, &headers, &body, "/api/v1/backups").await
}

async fn start(
    app: &AppState,
    headers: &HeaderMap,
    JsonBytes(bytes): &JsonBytes,
    instance: &'static str,
) -> Result<Response, Problem> {
    let new = new_backup(bytes)?;
    if let Some(key) = repeat::key(headers, bytes)? {
        return repeat::start(app, new, key, instance).await;
    }
    let started = app.backups.start(new).await.map_err(refusal::start_refused)?;
    let location = format!("/api/v1/backups/{}", started.facts.id);
    let answer = StartAnswer::new(&started, &app.config.nbd);
    Ok((StatusCode::OK, [(LOCATION, location)], Json(answer)).into_response())
}

/// The body as a request for a job. One that names a disk is told why that cannot be before anything else is said.
fn new_backup(bytes: &[u8]) -> Result<NewBackup, Problem> {
    let fields: Map<String, Value> = parse_json(bytes)?;
    if fields.contains_key("disk_id") {
        let reason = "a backup covers all disks of the VM from one snapshot; a backup of one disk cannot be restored \
                      consistently";
        return Err(Problem::new(Code::DiskIdNotAllowed, reason).with_error("/disk_id", reason));
    }
    let body: StartBody = parse_json(bytes)?;
    let unknown = fields.keys().filter(|field| !START_FIELDS.contains(&field.as_str()));
    let warnings = unknown.map(|field| format!("unknown_field: {field} is not known and was ignored")).collect();
    let repository_id: RepositoryId = body.repository_id.parse().map_err(|_| {
        Problem::new(Code::RepositoryNotFound, format!("There is no repository with the id {}.", body.repository_id))
    })?;
    let vm = match (present(body.vm_context_id), present(body.vm_name)) {
        (Some(id), _) => VmChoice::Id(
            id.parse::<VmId>()
                .map_err(|_| Problem::new(Code::VmNotFound, format!("There is no VM with the id {id}.")))?,
        ),
        (None, Some(name)) => VmChoice::Name(name),
        (None, None) => return Err(Problem::invalid_field("/vm_name", "vm_name or vm_context_id is required")),
    };
    let policy_id = present(body.policy_id);
    if policy_id.as_ref().is_some_and(|policy| policy.chars().count() > TEXT_MAX) {
        return Err(Problem::invalid_field("/policy_id", format!("must have at most {TEXT_MAX} characters")));
    }
    Ok(NewBackup {
        vm,
        repository_id,
        requested_type: body.backup_type,
        policy_id,
        tags: body.tags,
        warnings,
        idempotency_key: None,
    })
}

/// An empty text means the same as none.
fn present(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}

/// All backups, newest first.
#[utoipa::path(get, path = "/backups", tag = "backups", params(BackupQuery), responses((status = 200, body = BackupList)))]
async fn list_backups(
    State(app): State<AppState>,
    QueryParams(query): QueryParams<BackupQuery>,
) -> Result<Json<BackupList>, Problem> {
    let page = listing::page(query.limit, query.page_token.as_deref())?;
    let filter = Filter {
        vm_name: query.vm_name,
        vm_id: query.vm_context_id,
        repository_id: query.repository_id,
        status: query.status,
        state: query.state,
        backup_type: query.backup_type,
        since: query.since,
    };
    let mut connection = app.store.read().await?;
    let found = backups::list(&mut connection, &filter, &page).await?;
    let next_page_token = listing::next_page_token(&found);
    let mut answers = Vec::with_capacity(found.rows.len());
    for row in found.rows {
        answers.push(BackupAnswer::load(&app, &mut connection, row).await?);
    }
    Ok(Json(BackupList { backups: answers, total: found.total, next_page_token }))
}

/// One backup, with what the server itself has measured of each disk.
#[utoipa::path(get, path = "/backups/{id}", tag = "backups", params(("id" = String, Path), WaitQuery),
    responses((status = 200, body = BackupAnswer)))]
async fn show_backup(
    State(app): State<AppState>,
    Path(id): Path<String>,
    QueryParams(query): QueryParams<WaitQuery>,
) -> Result<Json<BackupAnswer>, Problem> {
    let id = parse_id(&id)?;
    if let Some(seconds) = query.wait {
        if seconds > WAIT_MAX_S {
            return Err(Problem::new(Code::InvalidField, format!("wait must be 0 to {WAIT_MAX_S}, not {seconds}.")));
        }
        wait_for_change(&app, &id, Duration::from_secs(seconds)).await;
    }
    Ok(Json(load(&app, &id).await?))
}

/// Returns when the job's state changes, when it is over, when the service stops, or after `patience`.
async fn wait_for_change(app: &AppState, id: &BackupId, patience: Duration) {
    let Some(job) = app.backups.find(id) else { return };
    let mut view = job.watch();
    let before = view.borrow().state;
    let mut phase = app.watch_phase();
    let deadline = Instant::now() + patience;
    tokio::select! {
        // Either channel ending means that there is nothing left to wait for.
        _ = view.wait_for(|view| view.state != before) => {}
        _ = phase.wait_for(|phase| *phase >= crate::app::Phase::Draining) => {}
        () = tokio::time::sleep_until(deadline) => {}
    }
}

/// Stops a backup and removes what it made. Repeatable; the answer is 200 with the final state when it is over.
#[utoipa::path(post, path = "/backups/{id}/cancel", tag = "backups", params(("id" = String, Path)),
    responses((status = 202, body = BackupAnswer), (status = 200, body = BackupAnswer)))]
async fn cancel_backup(State(app): State<AppState>, Path(id): Path<String>) -> Result<Response, Problem> {
    let id = parse_id(&id)?;
    let Some(cancelled) = app.backups.cancel(&id).await? else { return Err(not_found(id.as_str())) };
    let mut headers = HeaderMap::new();
    let status = match cancelled {
        Cancelled::Over => StatusCode::OK,
        Cancelled::Running => {
            if let Ok(location) = HeaderValue::from_str(&format!("/api/v1/backups/{id}")) {
                headers.insert(LOCATION, location);
            }
            StatusCode::ACCEPTED
        }
    };
    Ok((status, headers, Json(load(&app, &id).await?)).into_response())
}

async fn load(app: &AppState, id: &BackupId) -> Result<BackupAnswer, Problem> {
    let mut connection = app.store.read().await?;
    let row: Option<BackupRow> = backups::find(&mut connection, id).await?;
    match row {
        Some(row) => Ok(BackupAnswer::load(app, &mut connection, row).await?),
        None => Err(not_found(id.as_str())),
    }
}

pub(super) fn parse_id(id: &str) -> Result<BackupId, Problem> {
    id.parse().map_err(|_| not_found(id))
}

pub(super) fn not_found(id: &str) -> Problem {
    Problem::new(Code::BackupNotFound, format!("There is no backup with the id {id}."))
}
