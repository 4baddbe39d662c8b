//! What is done to the folder of a repository: held against the records, and imported from.

use axum::Json;
use axum::extract::{Path, State};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::AppState;
use crate::http::problem::{Code, Problem};
use crate::id::RepositoryId;
use crate::points::check::CheckReport;
use crate::points::folder::FolderError;
use crate::points::import::ImportReport;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(check_repository)).routes(routes!(import_repository))
}

/// Holds the folders of a repository against its records, both ways. Heads of images are read, their content is not; nothing is
/// removed.
#[utoipa::path(post, path = "/repositories/{id}/check", tag = "inventory", params(("id" = String, Path)),
    responses((status = 200, body = CheckReport)))]
async fn check_repository(State(app): State<AppState>, Path(id): Path<String>) -> Result<Json<CheckReport>, Problem> {
    let (points, id) = (app.points.clone(), parse(&id)?);
    settle(tokio::spawn(async move { points.check(&id).await })).await
}

/// Records the restore points that lie in a repository and are not known, from their manifests. Repeatable.
#[utoipa::path(post, path = "/repositories/{id}/import", tag = "inventory", params(("id" = String, Path)),
    responses((status = 200, body = ImportReport)))]
async fn import_repository(State(app): State<AppState>, Path(id): Path<String>) -> Result<Json<ImportReport>, Problem> {
    let (points, id) = (app.points.clone(), parse(&id)?);
    settle(tokio::spawn(async move { points.import(&id).await })).await
}

fn parse(id: &str) -> Result<RepositoryId, Problem> {
    id.parse().map_err(|_| Problem::new(Code::RepositoryNotFound, format!("There is no repository with the id {id}.")))
}

/// The work goes on when the caller hangs up.
async fn settle<T>(work: tokio::task::JoinHandle<Result<T, FolderError>>) -> Result<Json<T>, Problem> {
    let done = work.await.unwrap_or(Err(FolderError::Panicked));
    done.map(Json).map_err(|error| match error {
        FolderError::NotFound(id) => {
            Problem::new(Code::RepositoryNotFound, format!("There is no repository with the id {id}."))
        }
        FolderError::Unavailable { .. } => Problem::new(Code::RepositoryUnavailable, format!("{error}.")),
        FolderError::Store(error) => error.into(),
        FolderError::Panicked => Problem::internal(&error),
    })
}
