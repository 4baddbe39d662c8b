//! Exports of restore points: made, listed, renewed and ended.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::LOCATION;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::JsonBody;
use super::problem::{Code, Problem};
use crate::app::AppState;
use crate::clock::UtcTime;
use crate::config::TlsMode;
use crate::id::{BackupId, ExportId};
use crate::restore::live::LiveExport;
use crate::restore::{Damage, Mode, NewExport, RestoreError};

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(export_point))
        .routes(routes!(list_exports))
        .routes(routes!(show_export, end_export))
        .routes(routes!(renew_export))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ExportBody {
    disk_id: u32,
    /// `read-only`, or `overlay`: writes go to a file that is removed with the export.
    #[serde(default)]
    mode: Mode,
    /// Opens a point that is known to be damaged, as far as that is possible.
    #[serde(default)]
    accept_damage: bool,
}

/// One disk of a restore point, served over NBD.
#[derive(Serialize, ToSchema)]
struct ExportAnswer {
    #[schema(value_type = String, example = "export-01JD8Z3M6Q9V4T2R7XK5N0WCHB")]
    id: ExportId,
    #[schema(value_type = String)]
    point_id: BackupId,
    disk_id: u32,
    size_bytes: u64,
    mode: Mode,
    #[schema(example = "nbd://127.0.0.1:10300/db-server-backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB-disk0")]
    uri: String,
    /// When it ends, unless it is used or renewed before.
    #[schema(value_type = String, format = DateTime)]
    expires_at: UtcTime,
    #[schema(value_type = String, format = DateTime)]
    created_at: UtcTime,
    /// A line that copies the disk into a raw file.
    command: String,
    /// Connections that are open now.
    connections: u64,
    /// What should be known of the point: that it is suspect, or corrupt.
    warnings: Vec<String>,
}

#[derive(Serialize, ToSchema)]
struct ExportList {
    total: usize,
    exports: Vec<ExportAnswer>,
}

/// Serves one disk of a restore point over NBD. It answers when this does, and ends when it was not used for `restore.ttl_s`.
#[utoipa::path(post, path = "/points/{id}/exports", tag = "restore", params(("id" = String, Path)),
    request_body = ExportBody, responses((status = 201, body = ExportAnswer)))]
async fn export_point(
    State(app): State<AppState>,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<ExportBody>,
) -> Result<Response, Problem> {
    let new = NewExport {
        point_id: point_id(&id)?,
        disk_id: body.disk_id,
        mode: body.mode,
        damage: damage(body.accept_damage),
    };
    let export = app.restores.export(new).await?;
    let location = format!("/api/v1/exports/{}", export.facts().id);
    Ok((StatusCode::CREATED, [(LOCATION, location)], Json(ExportAnswer::new(&app, &export))).into_response())
}

/// The exports of restore points, oldest first.
#[utoipa::path(get, path = "/exports", tag = "restore", responses((status = 200, body = ExportList)))]
async fn list_exports(State(app): State<AppState>) -> Json<ExportList> {
    let exports: Vec<_> = app.restores.all().iter().map(|export| ExportAnswer::new(&app, export)).collect();
    Json(ExportList { total: exports.len(), exports })
}

/// One export.
#[utoipa::path(get, path = "/exports/{id}", tag = "restore", params(("id" = String, Path)),
    responses((status = 200, body = ExportAnswer)))]
async fn show_export(State(app): State<AppState>, Path(id): Path<String>) -> Result<Json<ExportAnswer>, Problem> {
    let export = app.restores.find(&export_id(&id)?).ok_or_else(|| not_found(&id))?;
    Ok(Json(ExportAnswer::new(&app, &export)))
}

/// Gives an export its whole time to live again.
#[utoipa::path(post, path = "/exports/{id}/renew", tag = "restore", params(("id" = String, Path)),
    responses((status = 200, body = ExportAnswer)))]
async fn renew_export(State(app): State<AppState>, Path(id): Path<String>) -> Result<Json<ExportAnswer>, Problem> {
    let export = app.restores.renew(&export_id(&id)?).await?.ok_or_else(|| not_found(&id))?;
    Ok(Json(ExportAnswer::new(&app, &export)))
}

/// Ends an export: clients are told that it goes away, what was written to an overlay is gone.
#[utoipa::path(delete, path = "/exports/{id}", tag = "restore", params(("id" = String, Path)),
    responses((status = 204)))]
async fn end_export(State(app): State<AppState>, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    if app.restores.end(&export_id(&id)?).await { Ok(StatusCode::NO_CONTENT) } else { Err(not_found(&id)) }
}

/// The id of a path; whatever else was written names no point.
pub(super) fn point_id(id: &str) -> Result<BackupId, Problem> {
    let not_found = |_| Problem::new(Code::PointNotFound, format!("There is no restore point with the id {id}."));
    id.parse().map_err(not_found)
}

pub(super) fn damage(accept: bool) -> Damage {
    if accept { Damage::Accept } else { Damage::Refuse }
}

fn export_id(id: &str) -> Result<ExportId, Problem> {
    id.parse().map_err(|_| not_found(id))
}

fn not_found(id: &str) -> Problem {
    Problem::new(Code::ExportNotFound, format!("There is no export with the id {id}, or it is over."))
}

impl ExportAnswer {
    fn new(app: &AppState, export: &LiveExport) -> Self {
        let facts = export.facts();
        Self {
            id: facts.id.clone(),
            point_id: facts.point_id.clone(),
            disk_id: facts.disk_id,
            size_bytes: facts.size_bytes,
            mode: facts.mode,
            uri: facts.uri.clone(),
            expires_at: export.expires_at(),
            created_at: facts.created_at,
            command: command(app.config.nbd.tls, &facts.uri, &facts.export_name),
            connections: export.figures().snapshot().connections,
            warnings: facts.warnings.clone(),
        }
    }
}

/// Nothing in it needs quoting: names are sanitised, and an address is one.
fn command(tls: TlsMode, uri: &str, name: &str) -> String {
    match tls {
        // What qemu-img wants for TLS does not fit into a URI.
        TlsMode::Required => format!("nbdcopy --progress '{uri}?tls-certificates=DIR' {name}.raw"),
        TlsMode::Off | TlsMode::On => format!("qemu-img convert -p -f raw -O raw {uri} {name}.raw"),
    }
}

impl From<RestoreError> for Problem {
    fn from(error: RestoreError) -> Self {
        match &error {
            RestoreError::PointNotFound(id) => {
                Self::new(Code::PointNotFound, format!("There is no restore point with the id {id}."))
            }
            RestoreError::NoSuchDisk { point_id, disk_id } => {
                Self::new(Code::DiskNotInBackup, format!("The restore point {point_id} has no disk {disk_id}."))
            }
            RestoreError::RepositoryUnavailable { .. } => Self::new(Code::RepositoryUnavailable, format!("{error}.")),
            RestoreError::FilesMissing(id) => Self::new(
                Code::RepositoryUnavailable,
                format!("Files of the restore point {id}, or of one below it, are not there."),
            ),
            RestoreError::Damaged { point_id, reason } => {
                Self::new(Code::PointDamaged, format!("The restore point {point_id} is damaged: {reason}."))
            }
            RestoreError::Ports(ports) => {
                tracing::error!(error = %ports, "no port for an export");
                Self::new(Code::NoPorts, "restore.port_range has no free port; end an export, or widen the range.")
            }
            RestoreError::Overlay(overlay) if overlay.is_no_space() => {
                Self::new(Code::InsufficientStorage, "There is no space for an overlay in the hub's state folder.")
            }
            RestoreError::Draining => Self::new(Code::Draining, "The service is stopping."),
            RestoreError::Overlay(_) | RestoreError::Listen(_) | RestoreError::Panicked => Self::internal(&error),
            RestoreError::Store(_) => match error {
                RestoreError::Store(store) => store.into(),
                other => Self::internal(&other),
            },
        }
    }
}
