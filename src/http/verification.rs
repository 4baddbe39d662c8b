//! Verifying restore points, and comparing two of them by their digests.

use std::time::Duration;

use axum::Json;
use axum::body::HttpBody;
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::StatusCode;
use axum::http::header::LOCATION;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{JsonBytes, QueryParams, parse_json};
use super::problem::{Code, Problem};
use crate::app::AppState;
use crate::clock::UtcTime;
use crate::id::{BackupId, TaskId};
use crate::points::compare::{ComparedDisk, Likeness};
use crate::points::take::Content;
use crate::points::verification::{self, Outcome, Phase, Scope, Verification, VerifiedPoint};
use crate::points::verify::VerifyError;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(verify_point)).routes(routes!(compare_points))
}

/// What is to be verified.
#[derive(Deserialize, Default, ToSchema)]
#[serde(deny_unknown_fields, default)]
struct VerifyBody {
    /// `chain`: the point and all that it builds upon; `point`: its own files.
    scope: Scope,
    /// Whether the virtual disks of the point are read too and held against their digests.
    content: bool,
}

/// A verification, running or over.
#[derive(Serialize, ToSchema)]
pub(super) struct VerificationAnswer {
    #[schema(value_type = String, example = "task-01JD8Z3M6Q9V4T2R7XK5N0WCHB")]
    id: TaskId,
    #[schema(value_type = String)]
    point_id: BackupId,
    scope: Scope,
    content: bool,
    state: Phase,
    /// What came of the worst of its points; `null` before the end. `failed`: it could not be read, and nothing was concluded.
    outcome: Option<Outcome>,
    /// How many points it reads.
    points_total: usize,
    /// Those that were read, the lowest first.
    points: Vec<VerifiedPoint>,
    /// Files that were hashed.
    files: u64,
    /// Bytes that were hashed, of files and of virtual disks.
    bytes_read: u64,
    /// Bytes that are done, holes of virtual disks included.
    bytes_done: u64,
    /// Bytes that there are to do, as far as that is known.
    bytes_total: u64,
    /// Bytes of virtual disks that were held against what was received for them.
    bytes_compared: u64,
    #[schema(value_type = Option<String>, format = DateTime)]
    started_at: Option<UtcTime>,
    #[schema(value_type = Option<String>, format = DateTime)]
    ended_at: Option<UtcTime>,
}

impl From<&Verification> for VerificationAnswer {
    fn from(verification: &Verification) -> Self {
        let view = verification.view();
        let [files, bytes_read, bytes_done, bytes_total, bytes_compared] = verification.progress();
        Self {
            id: verification.id.clone(),
            point_id: verification.point_id.clone(),
            scope: verification.request.scope,
            content: verification.request.content == Content::Reread,
            state: view.phase,
            outcome: view.outcome,
            points_total: verification.order.len(),
            points: view.points,
            files,
            bytes_read,
            bytes_done,
            bytes_total,
            bytes_compared,
            started_at: view.started_at,
            ended_at: view.ended_at,
        }
    }
}

/// Reads a point and what it builds upon, and holds it against what was committed. Answered when it has begun or waits for its turn; `GET
/// /points/{id}?wait=60` waits for its end. The body may be left out.
#[utoipa::path(post, path = "/points/{id}/verify", tag = "points", params(("id" = String, Path)),
    request_body = Option<VerifyBody>, responses((status = 202, body = VerificationAnswer)))]
async fn verify_point(
    State(app): State<AppState>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let body: VerifyBody = if request.body().is_end_stream() {
        VerifyBody::default()
    } else {
        let JsonBytes(bytes) = JsonBytes::from_request(request, &app).await?;
        parse_json(&bytes)?
    };
    let point = id.parse::<BackupId>().map_err(|_| not_found(&id))?;
    let content = if body.content { Content::Reread } else { Content::Known };
    let verification =
        app.points.verify(&point, verification::Request { scope: body.scope, content }).await.map_err(refused)?;
    let location = format!("/api/v1/points/{point}");
    let answer = VerificationAnswer::from(&*verification);
    Ok((StatusCode::ACCEPTED, [(LOCATION, location)], Json(answer)).into_response())
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct CompareQuery {
    /// The other point.
    with: String,
}

/// How the disks of two points stand to each other.
#[derive(Serialize, ToSchema)]
struct CompareAnswer {
    #[schema(value_type = String)]
    point_id: BackupId,
    #[schema(value_type = String)]
    with: BackupId,
    /// `unknown` when that is all that can be said of a disk and no disk differs.
    status: Likeness,
    disks: Vec<ComparedDisk>,
}

/// Compares two points by their digests, disk by disk. No image is read.
#[utoipa::path(get, path = "/points/{id}/compare", tag = "points", params(("id" = String, Path), CompareQuery),
    responses((status = 200, body = CompareAnswer)))]
async fn compare_points(
    State(app): State<AppState>,
    Path(id): Path<String>,
    QueryParams(query): QueryParams<CompareQuery>,
) -> Result<Json<CompareAnswer>, Problem> {
    let parse = |id: &str| id.parse::<BackupId>().map_err(|_| not_found(id));
    let (point_id, with) = (parse(&id)?, parse(&query.with)?);
    let disks = app.points.compare(&point_id, &with).await?.map_err(|missing| not_found(missing.as_str()))?;
    let any = |status| disks.iter().any(|disk| disk.status == status);
    let status = [Likeness::Different, Likeness::Unknown].into_iter().find(|status| any(*status));
    Ok(Json(CompareAnswer { point_id, with, status: status.unwrap_or(Likeness::Equal), disks }))
}

/// The longest time that a `GET` waits for the end of a verification, in seconds.
const WAIT_MAX_S: u64 = 60;

/// Returns when the verification of a point is over, when there is none, when the service stops, or after so many seconds.
///
/// # Errors
/// More seconds than a request may wait.
pub(super) async fn wait_for_end(app: &AppState, id: &BackupId, seconds: u64) -> Result<(), Problem> {
    if seconds > WAIT_MAX_S {
        return Err(Problem::new(Code::InvalidField, format!("wait must be 0 to {WAIT_MAX_S}, not {seconds}.")));
    }
    let Some(verification) = app.points.verification(id) else { return Ok(()) };
    let mut view = verification.watch();
    let mut phase = app.watch_phase();
    let deadline = Instant::now() + Duration::from_secs(seconds);
    tokio::select! {
        // Either channel ending means that there is nothing left to wait for.
        _ = view.wait_for(|view| view.phase == Phase::Ended) => {}
        _ = phase.wait_for(|phase| *phase == crate::app::Phase::Draining) => {}
        () = tokio::time::sleep_until(deadline) => {}
    }
    Ok(())
}

fn not_found(id: &str) -> Problem {
    Problem::new(Code::PointNotFound, format!("There is no restore point with the id {id}."))
}

fn refused(error: VerifyError) -> Problem {
    match error {
        VerifyError::NotFound(id) => not_found(id.as_str()),
        VerifyError::InUse { .. } => Problem::new(Code::PointInUse, format!("{error}.")),
        VerifyError::TooMany => Problem::new(Code::TooManyJobs, format!("{error}; none was begun.")),
        VerifyError::Stopping => Problem::new(Code::Draining, "The service is stopping."),
        VerifyError::Store(error) => error.into(),
    }
}
