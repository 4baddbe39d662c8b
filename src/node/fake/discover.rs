//! The node's discovery: VMs and their disks, as they were set.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{ConnectInfo, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::faults::DiscoverFault;
use super::log::{DiscoverCall, Event};
use super::server::broken_off;
use super::socket::Cut;
use super::{Shared, lock};

pub(super) async fn discover(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(cut): ConnectInfo<Cut>,
    body: String,
) -> Response {
    let call: DiscoverCall = match serde_json::from_str(&body) {
        Ok(call) => call,
        Err(error) => return (StatusCode::BAD_REQUEST, format!("bad request: {error}")).into_response(),
    };
    shared.log.push(Event::Discovered(call.clone()));
    let fault = lock(&shared.config).faults.discover.clone();
    match fault {
        DiscoverFault::None => found(&shared, &call),
        DiscoverFault::Status(status) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            (status, format!("cannot log in as {}: {}", call.username, call.password)).into_response()
        }
        DiscoverFault::Body(body) => body.into_response(),
        DiscoverFault::Hang => {
            tokio::time::sleep(Duration::MAX).await;
            StatusCode::OK.into_response()
        }
        DiscoverFault::Reset => {
            cut.after(0);
            StatusCode::OK.into_response()
        }
        DiscoverFault::Truncated => broken_off(&cut),
        DiscoverFault::Wait => {
            let answer = found(&shared, &call);
            shared.resume.notified().await;
            answer
        }
        DiscoverFault::Redirect(location) => {
            (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, location)]).into_response()
        }
    }
}

fn found(shared: &Shared, call: &DiscoverCall) -> Response {
    let filter = call.filter.as_deref().unwrap_or_default();
    let is_told = |vm: &&Value| vm["name"].as_str().unwrap_or_default().contains(filter);
    let vms: Vec<Value> = lock(&shared.config).inventory.iter().filter(is_told).cloned().collect();
    Json(json!({"vms": vms})).into_response()
}
