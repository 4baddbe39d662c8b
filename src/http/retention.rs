//! The end of restore points: deleting them, protecting them from that, and letting a repository's rules decide.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::backups;
use super::extract::{JsonBody, QueryParams};
use super::points::{self, PointAnswer};
use super::problem::{Code, Problem};
use crate::app::AppState;
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::points::delete::DeleteError;
use crate::points::protect::{ProtectError, Shortening};
use crate::points::prune::{Mode, Outcome, PruneError};
use crate::points::retention::Decision;
use crate::store::events::Actor;
use crate::store::repositories::Retention;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(delete_point))
        .routes(routes!(protect_point))
        .routes(routes!(delete_backup))
        .routes(routes!(prune_repository))
}

/// Deletes a restore point with its files. Refused while others build upon it, while it is in use, and while it is protected.
#[utoipa::path(delete, path = "/points/{id}", tag = "points", params(("id" = String, Path)), responses((status = 204)))]
async fn delete_point(State(app): State<AppState>, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    let id = parse_id(&id)?;
    app.points.delete(&id, Actor::User).await.map_err(delete_refused)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Deletes what a backup left: its restore point, or, when it has none, its record with what it has put aside.
#[utoipa::path(delete, path = "/backups/{id}", tag = "backups", params(("id" = String, Path)), responses((status = 204)))]
async fn delete_backup(State(app): State<AppState>, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    let id = backups::parse_id(&id)?;
    app.points.delete_backup(&id, Actor::User).await.map_err(delete_refused)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Until when a restore point is kept by everybody and everything.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ProtectBody {
    /// A time in the future; `null` ends the protection.
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<String>, format = DateTime, required = true, example = "2027-01-01T00:00:00Z")]
    until: Option<UtcTime>,
    /// Whether a protection that still lasts may be shortened or ended; without it that is refused.
    #[serde(default)]
    force: bool,
}

/// A field that may be `null` but not left out: leaving it out by mistake must not end a protection.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<UtcTime>, D::Error> {
    Option::deserialize(deserializer)
}

/// Protects a restore point until a date, or ends that. A protection that lasts can be extended; shortening it needs `force`.
#[utoipa::path(post, path = "/points/{id}/protect", tag = "points", request_body = ProtectBody,
    params(("id" = String, Path)), responses((status = 200, body = PointAnswer)))]
async fn protect_point(
    State(app): State<AppState>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ProtectBody>,
) -> Result<Json<PointAnswer>, Problem> {
    let id = parse_id(&id)?;
    let shortening = if body.force { Shortening::Forced } else { Shortening::Refused };
    app.points.protect(&id, body.until, shortening).await.map_err(protect_refused)?;
    points::load(&app, id.as_str()).await.map(Json)
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PruneQuery {
    /// `false` deletes; `true`, and leaving it out, only tells what would be deleted.
    dry_run: Option<bool>,
}

/// What the rules of a repository say of every restore point in it.
#[derive(Serialize, ToSchema)]
struct PruneAnswer {
    #[schema(value_type = String, example = "repo-001")]
    repository_id: RepositoryId,
    /// Whether nothing was done.
    dry_run: bool,
    retention: Retention,
    points: Vec<PrunedPoint>,
    /// Points that stay, or would.
    kept: usize,
    /// Points that went, or would.
    deleted: usize,
    /// Points that went, or would, after the one upon them was made anew without them.
    merged: usize,
    /// Points that should have gone and are still there.
    failed: usize,
    /// Bytes that became free, or would.
    frees_bytes: u64,
}

/// What became, or would become, of one restore point.
#[derive(Serialize, ToSchema)]
struct PrunedPoint {
    #[schema(value_type = String, example = "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB")]
    point_id: BackupId,
    /// The name of the VM.
    vm: String,
    #[schema(value_type = String)]
    vm_context_id: VmId,
    #[schema(value_type = String, format = DateTime)]
    committed_at: UtcTime,
    /// `keep`, `delete` or `merge`.
    #[schema(example = "keep")]
    decision: &'static str,
    /// Everything that keeps it; empty when it goes.
    #[schema(example = json!(["last 3", "daily 2026-11-23"]))]
    reasons: Vec<String>,
    /// Bytes of images that go with it. Of a merge that is not done yet, the most it can be.
    frees_bytes: u64,
    /// The point that takes up what it holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    merged_into: Option<BackupId>,
    /// Why it is still there although no rule keeps it.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl From<Outcome> for PrunedPoint {
    fn from(outcome: Outcome) -> Self {
        let (decision, merged_into) = match outcome.verdict.decision {
            Decision::Keep => ("keep", None),
            Decision::Delete => ("delete", None),
            Decision::Merge { into } => ("merge", Some(into)),
        };
        Self {
            point_id: outcome.verdict.id,
            vm: outcome.vm_name,
            vm_context_id: outcome.vm_id,
            committed_at: outcome.committed_at,
            decision,
            reasons: outcome.verdict.reasons.iter().map(ToString::to_string).collect(),
            frees_bytes: outcome.frees_bytes,
            merged_into,
            error: outcome.error,
        }
    }
}

/// Lets the rules of a repository decide about its restore points. Only tells what they say unless `dry_run=false`.
#[utoipa::path(post, path = "/repositories/{id}/prune", tag = "inventory", params(("id" = String, Path), PruneQuery),
    responses((status = 200, body = PruneAnswer)))]
async fn prune_repository(
    State(app): State<AppState>,
    Path(id): Path<String>,
    QueryParams(query): QueryParams<PruneQuery>,
) -> Result<Json<PruneAnswer>, Problem> {
    let repository = super::repositories::load(&mut *app.store.read().await?, &id).await?;
    let dry_run = query.dry_run.unwrap_or(true);
    let mode = if dry_run { Mode::DryRun } else { Mode::Apply(Actor::User) };
    let outcomes = app.points.prune(&repository.id, None, mode).await.map_err(prune_refused)?;
    let points: Vec<PrunedPoint> = outcomes.into_iter().map(PrunedPoint::from).collect();
    let count = |decision: &str| points.iter().filter(|point| point.decision == decision).count();
    Ok(Json(PruneAnswer {
        repository_id: repository.id,
        dry_run,
        retention: repository.retention,
        kept: count("keep"),
        deleted: count("delete"),
        merged: count("merge"),
        failed: points.iter().filter(|point| point.error.is_some()).count(),
        frees_bytes: points.iter().map(|point| point.frees_bytes).sum(),
        points,
    }))
}

fn parse_id(id: &str) -> Result<BackupId, Problem> {
    id.parse().map_err(|_| points::not_found(id))
}

/// The table from everything that can stop a deletion to its problem.
fn delete_refused(error: DeleteError) -> Problem {
    match error {
        DeleteError::NotFound(id) => points::not_found(id.as_str()),
        DeleteError::BackupNotFound(id) => backups::not_found(id.as_str()),
        DeleteError::Active(id) => Problem::new(Code::BackupInProgress, format!("{id} is running: cancel it first."))
            .with("backup_id", id.as_str())
            .with_link("active", format!("/api/v1/backups/{id}")),
        DeleteError::HasDependents { id, children } => {
            let children: Vec<String> = children.iter().map(ToString::to_string).collect();
            let detail = format!("{id} is what {} builds upon.", children.join(", "));
            Problem::new(Code::PointHasDependents, detail).with("dependents", children)
        }
        DeleteError::InUse { id, holders } => {
            let detail = format!("{id} is in use by {}.", holders.join(", "));
            Problem::new(Code::PointInUse, detail).with("holders", holders)
        }
        DeleteError::Protected { id, until } => protected(&id, until),
        DeleteError::RepositoryUnavailable { id, reason } => unavailable(&id, &reason),
        DeleteError::Files { id, source } => {
            tracing::error!(point = %id, error = %source, "the files of a restore point cannot be removed");
            let detail = format!(
                "{id} is being deleted, but not all of its files could be removed yet ({}). Delete it again to go on.",
                source.kind()
            );
            Problem::new(Code::RepositoryUnavailable, detail)
        }
        DeleteError::Left { id, source } => {
            tracing::error!(job_id = %id, error = %source, "what a job has left cannot be removed");
            let kind = source.kind();
            let detail =
                format!("What {id} has left could not be removed ({kind}). Its record stays: delete it again.");
            Problem::new(Code::RepositoryUnavailable, detail)
        }
        DeleteError::Foreign { id, what } => {
            let detail = format!("What {id} has left is not removed, nor is its record: {what}. Take that away first.");
            Problem::new(Code::RepositoryUnavailable, detail)
        }
        DeleteError::Store(error) => error.into(),
        DeleteError::Panicked => Problem::internal(&error),
    }
}

fn protect_refused(error: ProtectError) -> Problem {
    match error {
        ProtectError::NotFound(id) => points::not_found(id.as_str()),
        ProtectError::Past(until) => Problem::invalid_field("/until", format!("{until} is not in the future")),
        ProtectError::Protected { id, until } => protected(&id, until),
        ProtectError::Store(error) => error.into(),
    }
}

fn prune_refused(error: PruneError) -> Problem {
    match error {
        PruneError::RepositoryNotFound(id) => super::repositories::not_found(id.as_str()),
        PruneError::RepositoryUnavailable { id, reason } => unavailable(&id, &reason),
        PruneError::Store(error) => error.into(),
        PruneError::Panicked => Problem::internal(&error),
    }
}

fn protected(id: &BackupId, until: UtcTime) -> Problem {
    Problem::new(Code::PointProtected, format!("{id} is protected until {until}."))
        .with("protected_until", until.to_string())
}

fn unavailable(id: &RepositoryId, reason: &str) -> Problem {
    Problem::new(Code::RepositoryUnavailable, format!("Repository {id} cannot be used: {reason}."))
}
