//! Repositories: the folders that restore points go to.

mod folder;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Component, Path as FsPath, PathBuf};

use axum::Json;
use axum::extract::{Path, State};
use axum::http::header::LOCATION;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{JsonBody, QueryParams};
use super::problem::{Code, Problem};
use super::vms::check_text;
use super::{etag, listing};
use crate::app::AppState;
use crate::clock::UtcTime;
use crate::id::RepositoryId;
use crate::store::repositories::{self, Repository, RepositoryDescription, Retention};
use crate::store::{Connection, StoreError, WriteTransaction};

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().merge(folder::routes()).routes(routes!(list_repositories, add_repository)).routes(routes!(
        show_repository,
        replace_repository,
        remove_repository
    ))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RepositoryBody {
    /// Made from the name when left out.
    #[schema(value_type = Option<String>, example = "repo-001")]
    id: Option<RepositoryId>,
    #[schema(example = "Main")]
    name: String,
    /// Absolute path of a folder that exists.
    #[schema(example = "/srv/backups")]
    path: String,
    /// Whether new backups may go there.
    #[serde(default = "enabled_by_default")]
    #[schema(default = true)]
    enabled: bool,
    #[serde(default)]
    retention: Retention,
    /// Jobs at once into it; left out, it has no limit of its own.
    #[schema(minimum = 1)]
    max_running: Option<u32>,
}

fn enabled_by_default() -> bool {
    true
}

#[derive(Serialize, ToSchema)]
struct RepositoryAnswer {
    #[schema(value_type = String, example = "repo-001")]
    id: RepositoryId,
    name: String,
    path: String,
    enabled: bool,
    /// `null` while the folder cannot be reached.
    free_bytes: Option<u64>,
    /// `null` while the folder cannot be reached.
    total_bytes: Option<u64>,
    retention: Retention,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_running: Option<u32>,
    /// When its folders were last held against its records; left out until then.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    last_check_at: Option<UtcTime>,
}

impl RepositoryAnswer {
    async fn measure(app: &AppState, repository: Repository) -> Self {
        let space = app.repositories.space(&repository.path).await;
        Self {
            id: repository.id,
            name: repository.name,
            path: repository.path,
            enabled: repository.enabled,
            free_bytes: space.map(|(free, _)| free),
            total_bytes: space.map(|(_, total)| total),
            retention: repository.retention,
            max_running: repository.max_running,
            last_check_at: repository.last_check_at,
        }
    }
}

#[derive(Serialize, ToSchema)]
struct RepositoryList {
    repositories: Vec<RepositoryAnswer>,
    /// Repositories on all pages together.
    total: u64,
    next_page_token: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct RepositoryQuery {
    /// 1 to 1000.
    limit: Option<u32>,
    /// `next_page_token` of the page before.
    page_token: Option<String>,
}

/// All repositories, newest first.
#[utoipa::path(get, path = "/repositories", tag = "inventory", params(RepositoryQuery),
    responses((status = 200, body = RepositoryList)))]
async fn list_repositories(
    State(app): State<AppState>,
    QueryParams(query): QueryParams<RepositoryQuery>,
) -> Result<Json<RepositoryList>, Problem> {
    let page = listing::page(query.limit, query.page_token.as_deref())?;
    let found = repositories::list(&mut *app.store.read().await?, &page).await?;
    let next_page_token = listing::next_page_token(&found);
    let mut answers = Vec::with_capacity(found.rows.len());
    for repository in found.rows {
        answers.push(RepositoryAnswer::measure(&app, repository).await);
    }
    Ok(Json(RepositoryList { repositories: answers, total: found.total, next_page_token }))
}

/// Adds a folder that exists as a repository.
#[utoipa::path(post, path = "/repositories", tag = "inventory", request_body = RepositoryBody,
    responses((status = 201, body = RepositoryAnswer)))]
async fn add_repository(
    State(app): State<AppState>,
    JsonBody(body): JsonBody<RepositoryBody>,
) -> Result<Response, Problem> {
    let id = body.id.clone().unwrap_or_else(|| RepositoryId::from_name(&body.name));
    let description = describe(&app, body).await?;
    let (mut transaction, taken) = begin_with_folder(&app, &id, &description.path).await?;
    refuse_taken(taken)?;
    if let Err(error) = repositories::insert(&mut transaction, &id, &description).await {
        return Err(match error {
            StoreError::Exists(_) => exists(&id, format!("There is a repository with the id {id} already.")),
            error => error.into(),
        });
    }
    let repository = load(&mut transaction, id.as_str()).await?;
    transaction.commit().await?;
    let location = [(LOCATION, format!("/api/v1/repositories/{id}"))];
    let etag = etag::header(repository.revision);
    Ok((StatusCode::CREATED, location, etag, Json(RepositoryAnswer::measure(&app, repository).await)).into_response())
}

/// One repository. The `ETag` is for a later `PUT`.
#[utoipa::path(get, path = "/repositories/{id}", tag = "inventory", params(("id" = String, Path)),
    responses((status = 200, body = RepositoryAnswer)))]
async fn show_repository(State(app): State<AppState>, Path(id): Path<String>) -> Result<Response, Problem> {
    let repository = load(&mut *app.store.read().await?, &id).await?;
    Ok((etag::header(repository.revision), Json(RepositoryAnswer::measure(&app, repository).await)).into_response())
}

/// Replaces the description of a repository. The folder can change only while no restore point is in it.
#[utoipa::path(put, path = "/repositories/{id}", tag = "inventory", request_body = RepositoryBody,
    params(("id" = String, Path), ("If-Match" = String, Header, description = "ETag of the version to replace")),
    responses((status = 200, body = RepositoryAnswer)))]
async fn replace_repository(
    State(app): State<AppState>,
    Path(id): Path<String>,
    headers: HeaderMap,
    JsonBody(body): JsonBody<RepositoryBody>,
) -> Result<Response, Problem> {
    if body.id.as_ref().is_some_and(|given| given.as_str() != id) {
        return Err(Problem::invalid_field("/id", format!("must be {id} or left out: an id cannot change")));
    }
    let description = describe(&app, body).await?;
    let known = load(&mut *app.store.read().await?, &id).await?;
    let (mut transaction, taken) = begin_with_folder(&app, &known.id, &description.path).await?;
    let repository = load(&mut transaction, &id).await?;
    etag::check(&headers, repository.revision)?;
    if repository.path != description.path {
        refuse_in_use(&mut transaction, &repository).await?;
        refuse_taken(taken)?;
    }
    repositories::replace(&mut transaction, &repository.id, &description).await?;
    let repository = load(&mut transaction, &id).await?;
    transaction.commit().await?;
    Ok((etag::header(repository.revision), Json(RepositoryAnswer::measure(&app, repository).await)).into_response())
}

/// Removes a repository that holds no restore point. The folder is not touched.
#[utoipa::path(delete, path = "/repositories/{id}", tag = "inventory", params(("id" = String, Path)), responses((status = 204)))]
async fn remove_repository(State(app): State<AppState>, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    let mut transaction = app.store.write().await?;
    let repository = load(&mut transaction, &id).await?;
    refuse_in_use(&mut transaction, &repository).await?;
    repositories::remove(&mut transaction, &repository.id).await?;
    transaction.commit().await?;
    app.repositories.release(&repository.id).await;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn load(connection: &mut Connection, id: &str) -> Result<Repository, Problem> {
    let found = match id.parse() {
        Ok(id) => repositories::find(connection, &id).await?,
        Err(_) => None,
    };
    found.ok_or_else(|| not_found(id))
}

pub(super) fn not_found(id: &str) -> Problem {
    Problem::new(Code::RepositoryNotFound, format!("There is no repository with the id {id}."))
}

fn exists(existing: &RepositoryId, detail: String) -> Problem {
    Problem::new(Code::RepositoryExists, detail).with_link("existing", format!("/api/v1/repositories/{existing}"))
}

/// Points and running jobs tie a repository to its folder.
async fn refuse_in_use(connection: &mut Connection, repository: &Repository) -> Result<(), Problem> {
    if let Some(backup) = repositories::active_backup(connection, &repository.id).await? {
        let detail = format!("{backup} is writing into repository {}.", repository.id);
        return Err(Problem::new(Code::BackupInProgress, detail)
            .with("backup_id", backup.as_str())
            .with_link("active", format!("/api/v1/backups/{backup}")));
    }
    match repositories::point_count(connection, &repository.id).await? {
        0 => Ok(()),
        points => {
            let detail = format!("Repository {} holds {points} restore points.", repository.id);
            Err(Problem::new(Code::RepositoryNotEmpty, detail).with("points", points))
        }
    }
}

/// Begins the transaction that gives a repository its folder, with the other repository that has that folder, if one has. Two
/// repositories in one folder would remove each other's files, also when one of them came by a link.
///
/// Where paths lead is found out before: a mount that hangs holds up this request, and no writer.
async fn begin_with_folder(
    app: &AppState,
    id: &RepositoryId,
    path: &str,
) -> Result<(WriteTransaction, Option<RepositoryId>), Problem> {
    let canonical = app.repositories.resolve(path).await;
    let mut resolved: BTreeMap<String, Option<PathBuf>> = BTreeMap::new();
    loop {
        for other in repositories::all(&mut *app.store.read().await?).await? {
            if let Entry::Vacant(unknown) = resolved.entry(other.path) {
                let leads_to = app.repositories.resolve(unknown.key()).await;
                unknown.insert(leads_to);
            }
        }
        let mut transaction = app.store.write().await?;
        let all = repositories::all(&mut transaction).await?;
        // One that was added meanwhile has to be resolved first.
        if !all.iter().all(|other| resolved.contains_key(&other.path)) {
            continue;
        }
        let same = |other: &&Repository| {
            let leads_to = resolved.get(&other.path).and_then(Option::as_ref);
            other.id != *id && (other.path == path || (leads_to.is_some() && leads_to == canonical.as_ref()))
        };
        let taken = all.iter().find(same).map(|other| other.id.clone());
        return Ok((transaction, taken));
    }
}

fn refuse_taken(taken: Option<RepositoryId>) -> Result<(), Problem> {
    match taken {
        Some(other) => Err(exists(&other, format!("Repository {other} has this folder already."))),
        None => Ok(()),
    }
}

/// Checks a body and puts it into the words of the database.
async fn describe(app: &AppState, body: RepositoryBody) -> Result<RepositoryDescription, Problem> {
    check_text("/name", &body.name)?;
    check_text("/path", &body.path)?;
    if body.max_running == Some(0) {
        return Err(Problem::invalid_field("/max_running", "must be at least 1; leave it out for no limit"));
    }
    let path = normal_path(&body.path)
        .ok_or_else(|| Problem::invalid_field("/path", "must be an absolute path without .. in it"))?;
    match path.into_os_string().into_string() {
        Ok(path) if app.repositories.space(&path).await.is_some() => Ok(RepositoryDescription {
            name: body.name,
            path,
            enabled: body.enabled,
            retention: body.retention,
            max_running: body.max_running,
        }),
        _ => Err(Problem::invalid_field("/path", "must be a folder that exists")),
    }
}

/// An absolute path in its shortest spelling, without looking at the file system.
fn normal_path(path: &str) -> Option<PathBuf> {
    let path = FsPath::new(path);
    let steps = |component: &Component<'_>| matches!(component, Component::ParentDir);
    (path.is_absolute() && !path.components().any(|component| steps(&component))).then(|| path.components().collect())
}
