//! The node's HTTP side: its routes, starting a job, and saying whether one is known.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{ConnectInfo, Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;
use tokio::net::TcpListener;

use super::client;
use super::discover::discover;
use super::faults::{StartFault, StatusFault};
use super::log::{Event, StartCall};
use super::socket::{Cut, CuttableListener};
use super::{Shared, lock};
use crate::clock::UtcTime;

/// How many bytes of an answer leave before it breaks off: more than its headers have.
const BROKEN_OFF_AT: usize = 1000;

pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let router = Router::new()
        .route("/api/v1/backup/start", post(start))
        .route("/api/v1/status/{job_id}", get(status))
        .route("/api/v1/discover", post(discover))
        .with_state(shared)
        .into_make_service_with_connect_info::<Cut>();
    if let Err(error) = axum::serve(CuttableListener(listener), router).await {
        tracing::error!(%error, "the fake node ended");
    }
}

/// The node requires every field; it answers with plain text when something is wrong.
async fn start(State(shared): State<Arc<Shared>>, ConnectInfo(cut): ConnectInfo<Cut>, body: String) -> Response {
    let call: StartCall = match serde_json::from_str(&body) {
        Ok(call) => call,
        Err(error) => return (StatusCode::BAD_REQUEST, format!("bad request: {error}")).into_response(),
    };
    shared.log.push(Event::Called(call.clone()));
    let fault = lock(&shared.config).faults.start.clone();
    match fault {
        StartFault::None => started(&shared, &call),
        StartFault::Late(pause) => {
            let answer = started(&shared, &call);
            tokio::time::sleep(pause).await;
            answer
        }
        StartFault::Status { status, launch } => {
            launch_if(launch, &shared, &call);
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            (status, format!("cannot start as {}: {}", call.vcenter_user, call.vcenter_password)).into_response()
        }
        StartFault::Hang { launch } => {
            launch_if(launch, &shared, &call);
            tokio::time::sleep(Duration::MAX).await;
            StatusCode::OK.into_response()
        }
        StartFault::Reset { launch } => {
            launch_if(launch, &shared, &call);
            cut.after(0);
            StatusCode::OK.into_response()
        }
        StartFault::Body { body, launch } => {
            launch_if(launch, &shared, &call);
            body.into_response()
        }
        StartFault::Truncated { launch } => {
            launch_if(launch, &shared, &call);
            broken_off(&cut)
        }
        StartFault::LaunchTwice => {
            launch_if(true, &shared, &call);
            started(&shared, &call)
        }
        StartFault::StatusFailed => {
            Json(json!({"job_id": call.job_id, "status": "failed", "message": "VDDK is not installed"})).into_response()
        }
        StartFault::Redirect(location) => {
            (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, location)]).into_response()
        }
    }
}

fn started(shared: &Arc<Shared>, call: &StartCall) -> Response {
    launch_if(true, shared, call);
    Json(json!({
        "job_id": call.job_id, "status": "started", "message": format!("Backup started for {}", call.vm_name),
        "started_at": UtcTime::now(), "pid": std::process::id(),
    }))
    .into_response()
}

fn launch_if(launch: bool, shared: &Arc<Shared>, call: &StartCall) {
    if launch {
        shared.log.push(Event::Launched { job_id: call.job_id.clone() });
        lock(&shared.clients).spawn(client::run(Arc::clone(shared), call.clone()));
    }
}

/// An answer that is long enough to break off within its body.
pub(super) fn broken_off(cut: &Cut) -> Response {
    cut.after(BROKEN_OFF_AT);
    Json(json!({"status": "started", "message": "x".repeat(4 * BROKEN_OFF_AT)})).into_response()
}

/// 404 before the launch, `running` for ever after.
async fn status(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(cut): ConnectInfo<Cut>,
    Path(job_id): Path<String>,
) -> Response {
    shared.log.push(Event::StatusAsked { job_id: job_id.clone() });
    let fault = lock(&shared.config).faults.status.clone();
    match fault {
        StatusFault::None => known(&shared, &job_id),
        StatusFault::Status(status) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            (status, "not this time").into_response()
        }
        StatusFault::Body(body) => body.into_response(),
        StatusFault::Hang => {
            tokio::time::sleep(Duration::MAX).await;
            StatusCode::OK.into_response()
        }
        StatusFault::Reset => {
            cut.after(0);
            StatusCode::OK.into_response()
        }
        StatusFault::Truncated => broken_off(&cut),
        StatusFault::Late(pause) => {
            tokio::time::sleep(pause).await;
            known(&shared, &job_id)
        }
    }
}

fn known(shared: &Shared, job_id: &str) -> Response {
    let launched = |event: &Event| matches!(event, Event::Launched { job_id: launched } if launched == job_id);
    if shared.log.events().iter().any(launched) {
        Json(json!({"job_id": job_id, "status": "running"})).into_response()
    } else {
        (StatusCode::NOT_FOUND, "no such job").into_response()
    }
}
