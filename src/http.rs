//! The HTTP side: routes, who may call them, what goes wrong, and the description of it all.
//!
//! A route group is a file with a `routes` function; adding one is a line in `api`. The description is made from the
//! handlers' types, so a route that is served is described, and one that is described is served. Handlers are thin: they
//! parse, call the layer below, and answer.

pub mod auth;
#[allow(unused_qualifications, reason = "the macro of utoipa repeats the type of a query")]
mod backups;
#[allow(unused_qualifications, reason = "the macro of utoipa repeats the type of a query")]
mod callbacks;
pub mod codes;
mod describe;
mod disks;
pub mod etag;
#[allow(unused_qualifications, reason = "the macro of utoipa repeats the type of a query")]
mod events;
mod exports;
pub mod extract;
mod health;
pub mod listing;
mod metrics;
mod nbd_exports;
#[allow(unused_qualifications, reason = "the macro of utoipa repeats the type of a query")]
mod points;
mod ports;
pub mod problem;
#[allow(unused_qualifications, reason = "the macro of utoipa repeats the type of a query")]
mod raw;
mod refresh;
#[allow(unused_qualifications, reason = "the macro of utoipa repeats the type of a query")]
mod repositories;
pub mod request_id;
#[allow(unused_qualifications, reason = "the macro of utoipa repeats the type of a query")]
mod retention;
mod token;
#[allow(unused_qualifications, reason = "the macro of utoipa repeats the type of a query")]
mod verification;
#[allow(unused_qualifications, reason = "the macro of utoipa repeats the type of a query")]
mod vms;

use axum::extract::DefaultBodyLimit;
use axum::response::{IntoResponse, Response};
use axum::{Router, middleware};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::router::OpenApiRouter;

pub use problem::{Code, Problem};
pub use token::{Grant, TokenError, Tokens};

use crate::app::AppState;

/// Everything under `/api/v1` that demands a token.
fn api() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .merge(vms::routes())
        .merge(refresh::routes())
        .merge(repositories::routes())
        .merge(backups::routes())
        .merge(points::routes())
        .merge(verification::routes())
        .merge(retention::routes())
        .merge(events::routes())
        .merge(exports::routes())
        .merge(raw::routes())
        .merge(ports::routes())
        .merge(nbd_exports::routes())
}

/// The routes of the backup client, under `/api/v1` too; also served alone at `server.callbacks_bind`.
fn callbacks() -> OpenApiRouter<AppState> {
    callbacks::routes()
}

/// The whole service as a router.
pub fn router(app: &AppState) -> Router {
    let described = OpenApiRouter::with_openapi(describe::frame())
        .merge(health::routes())
        .merge(metrics::routes())
        .nest("/api/v1", api().merge(callbacks()));
    let (routes, mut openapi) = described.split_for_parts();
    describe::complete(&mut openapi);
    shell(app, routes.merge(describe::pages(openapi)))
}

/// The three callbacks and nothing else.
pub fn callbacks_router(app: &AppState) -> Router {
    let (routes, _) = OpenApiRouter::new().nest("/api/v1", callbacks()).split_for_parts();
    shell(app, routes)
}

/// What surrounds every route, the outermost last: request id and log line, problem bodies, panics, admission, body limit.
fn shell(app: &AppState, routes: Router<AppState>) -> Router {
    routes
        .fallback(|| async { Problem::new(Code::NotFound, "There is nothing at this path.") })
        .layer(DefaultBodyLimit::max(app.config.server.body_limit_bytes))
        .layer(middleware::from_fn_with_state(app.clone(), auth::guard))
        .layer(CatchPanicLayer::custom(answer_panic))
        .layer(middleware::from_fn(problem::finish))
        .layer(middleware::from_fn(request_id::attach))
        .with_state(app.clone())
}

/// A panic is a broken invariant of ours: the request fails, the service goes on.
#[allow(clippy::needless_pass_by_value, reason = "the signature that the layer calls")]
fn answer_panic(panic: Box<dyn std::any::Any + Send + 'static>) -> Response {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    tracing::error!(panic = text.unwrap_or("unknown"), "a request handler panicked");
    Problem::new(Code::Internal, "The service failed. Its log has the reason under the request id.").into_response()
}
