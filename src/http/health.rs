//! Probes: is the process alive, and can it do its work.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::problem::{Code, Problem};
use crate::app::{AppState, Phase};
use crate::clock::UtcTime;
use crate::store::repositories;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(health)).routes(routes!(readyz))
}

#[derive(Serialize, ToSchema)]
struct Health {
    #[schema(example = "blockyard")]
    service: &'static str,
    /// `ok`, or `degraded` while the database does not answer.
    #[schema(example = "ok")]
    status: &'static str,
    version: &'static str,
    #[schema(value_type = String, format = DateTime)]
    timestamp: UtcTime,
    /// `ok` or `unreachable`.
    #[schema(example = "ok")]
    database: &'static str,
}

/// Whether the process is alive. Always 200.
#[utoipa::path(get, path = "/health", tag = "probes", security(()), responses((status = 200, body = Health)))]
async fn health(State(app): State<AppState>) -> Json<Health> {
    let up = app.store.ping().await.is_ok();
    Json(Health {
        service: "blockyard",
        status: if up { "ok" } else { "degraded" },
        version: env!("CARGO_PKG_VERSION"),
        timestamp: UtcTime::now(),
        database: if up { "ok" } else { "unreachable" },
    })
}

#[derive(Serialize, ToSchema)]
struct Ready {
    ready: bool,
}

/// Whether backups can be started: 503 with reasons while starting, draining, or without database or a repository.
#[utoipa::path(get, path = "/readyz", tag = "probes", security(()), responses((status = 200, body = Ready)))]
async fn readyz(State(app): State<AppState>) -> Result<Json<Ready>, Problem> {
    let mut reasons: Vec<(Code, String)> = Vec::new();
    match app.phase() {
        Phase::Starting => reasons.push((Code::Starting, "the service is starting".to_owned())),
        Phase::Draining | Phase::Closing => reasons.push((Code::Draining, "the service is stopping".to_owned())),
        Phase::Ready => {}
    }
    if app.store.is_out_of_room() && !app.store.has_room().await {
        reasons.push((Code::DatabaseBusy, "the file system of the state folder is full".to_owned()));
    }
    match enabled_repositories(&app).await {
        Err(_) => reasons.push((Code::DatabaseBusy, "the database does not answer".to_owned())),
        Ok(repositories) => {
            for (id, path) in repositories {
                if app.repositories.space(&path).await.is_none() {
                    reasons.push((
                        Code::RepositoryUnavailable,
                        format!("the folder of repository {id} cannot be reached"),
                    ));
                }
            }
        }
    }
    let Some((code, _)) = reasons.first() else { return Ok(Json(Ready { ready: true })) };
    let code = *code;
    let reasons: Vec<String> = reasons.into_iter().map(|(_, reason)| reason).collect();
    Err(Problem::new(code, format!("Not ready: {}.", reasons.join("; "))).with("ready", false).with("reasons", reasons))
}

async fn enabled_repositories(app: &AppState) -> Result<Vec<(String, String)>, crate::store::StoreError> {
    let all = repositories::all(&mut *app.store.read().await?).await?;
    Ok(all.into_iter().filter(|repository| repository.enabled).map(|r| (r.id.to_string(), r.path)).collect())
}
