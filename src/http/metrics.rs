//! `GET /metrics`: the figures of the service for Prometheus.

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::problem::{Code, Problem};
use crate::app::AppState;
use crate::metrics;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(metrics))
}

/// All figures of this process in the text format of Prometheus. Needs no token when `observability.metrics_public` is set.
#[utoipa::path(
    get, path = "/metrics", tag = "probes",
    responses((status = 200, body = String, content_type = "text/plain"))
)]
async fn metrics(State(app): State<AppState>) -> Result<Response, Problem> {
    let trust = app.points.trust_counts().await?;
    let text =
        metrics::text(&app, &trust).map_err(|_| Problem::new(Code::Internal, "The figures could not be written."))?;
    Ok(([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}
