//! The inventory: which VMs there are and which disks they have.

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
use super::{disks, etag, listing};
use crate::app::AppState;
use crate::clock::UtcTime;
use crate::config::{Config, DEFAULT_NODE};
use crate::id::VmId;
use crate::store::vms::{self, Vm, VmDescription, VmDisk, VmFilter};
use crate::store::{Connection, StoreError};

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_vms, add_vm))
        .routes(routes!(show_vm, replace_vm, remove_vm))
        .routes(routes!(list_vm_disks))
}

/// Longest name, path and the like, in characters. vSphere allows 80 for a name; inventory paths of several add up.
const TEXT_MAX: usize = 1000;

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct VmBody {
    /// For display; need not be unique.
    #[schema(example = "db-server")]
    name: String,
    #[schema(example = "vc.example")]
    vcenter_host: String,
    /// Inventory path; its last segment is the name that the backup client uses.
    #[schema(example = "/DC1/vm/prod/db-server")]
    path: String,
    uuid: Option<String>,
    /// Name of a `[credentials.<name>]` of the configuration.
    #[schema(example = "main")]
    credential: Option<String>,
    /// Name of a `[nodes.<name>]` of the configuration.
    #[schema(example = "default", default = "default")]
    node: Option<String>,
    /// All disks. Required by `PUT`, where an empty list takes all disks away.
    disks: Option<Vec<disks::DiskBody>>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct VmAnswer {
    #[schema(value_type = String, example = "vm-01JC0A7K2E5H8M3P6R9T1V4X7Z")]
    id: VmId,
    name: String,
    vcenter_host: String,
    path: String,
    uuid: Option<String>,
    node: String,
    credential: Option<String>,
    #[schema(value_type = String, format = DateTime)]
    created_at: UtcTime,
    /// The disks it has now, by number.
    disks: Vec<disks::DiskAnswer>,
}

impl VmAnswer {
    pub(super) fn new(vm: Vm, disks: Vec<VmDisk>) -> Self {
        Self {
            id: vm.id,
            name: vm.name,
            vcenter_host: vm.vcenter,
            path: vm.path,
            uuid: vm.uuid,
            node: vm.node,
            credential: vm.credential,
            created_at: vm.created_at,
            disks: disks.into_iter().filter(|disk| disk.present).map(Into::into).collect(),
        }
    }
}

#[derive(Serialize, ToSchema)]
struct VmList {
    vms: Vec<VmAnswer>,
    /// VMs on all pages together.
    total: u64,
    next_page_token: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct VmDiskList {
    /// Every disk the VM ever had, by number.
    disks: Vec<disks::DiskAnswer>,
    total: usize,
    next_page_token: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct VmQuery {
    /// Only VMs of exactly this name.
    name: Option<String>,
    /// 1 to 1000.
    limit: Option<u32>,
    /// `next_page_token` of the page before.
    page_token: Option<String>,
}

/// All VMs, newest first.
#[utoipa::path(get, path = "/vms", tag = "inventory", params(VmQuery), responses((status = 200, body = VmList)))]
async fn list_vms(
    State(app): State<AppState>,
    QueryParams(query): QueryParams<VmQuery>,
) -> Result<Json<VmList>, Problem> {
    let page = listing::page(query.limit, query.page_token.as_deref())?;
    let mut connection = app.store.read().await?;
    let found = vms::list(&mut connection, &VmFilter { name: query.name }, &page).await?;
    let next_page_token = listing::next_page_token(&found);
    let mut answers = Vec::with_capacity(found.rows.len());
    for vm in found.rows {
        let disks = vms::disks(&mut connection, &vm.id).await?;
        answers.push(VmAnswer::new(vm, disks));
    }
    Ok(Json(VmList { vms: answers, total: found.total, next_page_token }))
}

/// Adds a VM. Disks get their numbers in the order of their device keys.
#[utoipa::path(post, path = "/vms", tag = "inventory", request_body = VmBody, responses((status = 201, body = VmAnswer)))]
async fn add_vm(State(app): State<AppState>, JsonBody(body): JsonBody<VmBody>) -> Result<Response, Problem> {
    let description = describe(body, &app.config)?;
    let mut transaction = app.store.write().await?;
    let id = match vms::insert(&mut transaction, &description).await {
        Ok(id) => id,
        Err(error) => return Err(taken(&mut transaction, error, &description).await),
    };
    let vm = load(&mut transaction, id.as_str()).await?;
    let disks = vms::disks(&mut transaction, &id).await?;
    transaction.commit().await?;
    let location = [(LOCATION, format!("/api/v1/vms/{id}"))];
    Ok((StatusCode::CREATED, location, etag::header(vm.revision), Json(VmAnswer::new(vm, disks))).into_response())
}

/// One VM. The `ETag` is for a later `PUT`.
#[utoipa::path(get, path = "/vms/{id}", tag = "inventory", params(("id" = String, Path)), responses((status = 200, body = VmAnswer)))]
async fn show_vm(State(app): State<AppState>, Path(id): Path<String>) -> Result<Response, Problem> {
    let mut connection = app.store.read().await?;
    let vm = load(&mut connection, &id).await?;
    let disks = vms::disks(&mut connection, &vm.id).await?;
    Ok((etag::header(vm.revision), Json(VmAnswer::new(vm, disks))).into_response())
}

/// Replaces the description of a VM. A disk that is described again keeps its number; numbers of disks that went away are
/// never given to others.
#[utoipa::path(put, path = "/vms/{id}", tag = "inventory", request_body = VmBody,
    params(("id" = String, Path), ("If-Match" = String, Header, description = "ETag of the version to replace")),
    responses((status = 200, body = VmAnswer)))]
async fn replace_vm(
    State(app): State<AppState>,
    Path(id): Path<String>,
    headers: HeaderMap,
    JsonBody(body): JsonBody<VmBody>,
) -> Result<Response, Problem> {
    if body.disks.is_none() {
        return Err(Problem::invalid_field(
            "/disks",
            "is required: PUT replaces all disks, an empty list takes them away",
        ));
    }
    let mut transaction = app.store.write().await?;
    let vm = load(&mut transaction, &id).await?;
    etag::check(&headers, vm.revision)?;
    let description = describe(body, &app.config)?;
    if let Err(error) = vms::replace(&mut transaction, &vm.id, &description).await {
        return Err(taken(&mut transaction, error, &description).await);
    }
    let vm = load(&mut transaction, &id).await?;
    let disks = vms::disks(&mut transaction, &vm.id).await?;
    transaction.commit().await?;
    Ok((etag::header(vm.revision), Json(VmAnswer::new(vm, disks))).into_response())
}

/// Removes a VM from the inventory. Its restore points stay.
#[utoipa::path(delete, path = "/vms/{id}", tag = "inventory", params(("id" = String, Path)), responses((status = 204)))]
async fn remove_vm(State(app): State<AppState>, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    let mut transaction = app.store.write().await?;
    let vm = load(&mut transaction, &id).await?;
    if let Some(backup) = vms::active_backup(&mut transaction, &vm.id).await? {
        return Err(Problem::new(Code::BackupInProgress, format!("VM {} is being backed up by {backup}.", vm.name))
            .with("backup_id", backup.as_str())
            .with_link("active", format!("/api/v1/backups/{backup}")));
    }
    vms::remove(&mut transaction, &vm.id).await?;
    transaction.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Every disk the VM ever had; those that went away are marked.
#[utoipa::path(get, path = "/vms/{id}/disks", tag = "inventory", params(("id" = String, Path)),
    responses((status = 200, body = VmDiskList)))]
async fn list_vm_disks(State(app): State<AppState>, Path(id): Path<String>) -> Result<Json<VmDiskList>, Problem> {
    let mut connection = app.store.read().await?;
    let vm = load(&mut connection, &id).await?;
    let disks: Vec<_> = vms::disks(&mut connection, &vm.id).await?.into_iter().map(Into::into).collect();
    Ok(Json(VmDiskList { total: disks.len(), disks, next_page_token: None }))
}

async fn load(connection: &mut Connection, id: &str) -> Result<Vm, Problem> {
    let found = match id.parse() {
        Ok(id) => vms::find(connection, &id).await?,
        Err(_) => None,
    };
    found.ok_or_else(|| not_found(id))
}

pub(super) fn not_found(id: &str) -> Problem {
    Problem::new(Code::VmNotFound, format!("There is no VM with the id {id}."))
}

/// The problem for a refused row: another VM has the vCenter and path.
async fn taken(connection: &mut Connection, error: StoreError, vm: &VmDescription) -> Problem {
    if !matches!(error, StoreError::Exists(_)) {
        return error.into();
    }
    let problem = Problem::new(Code::VmExists, format!("{} has a VM at {} already.", vm.vcenter, vm.path));
    match vms::find_by_path(connection, &vm.vcenter, &vm.path).await {
        Ok(Some(other)) => {
            problem.with("vm_context_id", other.as_str()).with_link("existing", format!("/api/v1/vms/{other}"))
        }
        _ => problem,
    }
}

/// Checks a body and puts it into the words of the database. An empty optional text counts as left out.
fn describe(body: VmBody, config: &Config) -> Result<VmDescription, Problem> {
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let node = given(body.node).unwrap_or_else(|| DEFAULT_NODE.to_owned());
    let vm = VmDescription {
        name: body.name,
        // Host names are the same in either case; one spelling keeps two descriptions of one VM from standing apart.
        vcenter: body.vcenter_host.to_ascii_lowercase(),
        path: body.path,
        uuid: given(body.uuid),
        node,
        credential: given(body.credential),
        disks: disks::describe(body.disks.unwrap_or_default())?,
    };
    let texts = [
        ("/name", Some(&vm.name)),
        ("/vcenter_host", Some(&vm.vcenter)),
        ("/path", Some(&vm.path)),
        ("/uuid", vm.uuid.as_ref()),
    ];
    for (pointer, text) in texts.into_iter().filter_map(|(pointer, text)| Some((pointer, text?))) {
        check_text(pointer, text)?;
    }
    if !vm.path.starts_with('/') || vm.path.ends_with('/') {
        return Err(Problem::invalid_field("/path", "must be an inventory path such as /DC1/vm/prod/db-server"));
    }
    if !config.nodes.contains_key(&vm.node) {
        return Err(Problem::invalid_field("/node", format!("the configuration has no [nodes.{}]", vm.node)));
    }
    if let Some(name) = &vm.credential {
        check_credential(config, name, &vm.vcenter)?;
    }
    Ok(vm)
}

/// Texts end up in logs, file names and the backup client: not empty, not endless, no control characters.
pub(super) fn check_text(pointer: &str, text: &str) -> Result<(), Problem> {
    if text.trim().is_empty() {
        return Err(Problem::invalid_field(pointer, "must not be empty"));
    }
    if text.chars().count() > TEXT_MAX {
        return Err(Problem::invalid_field(pointer, format!("must have at most {TEXT_MAX} characters")));
    }
    if text.chars().any(char::is_control) {
        return Err(Problem::invalid_field(pointer, "must not hold control characters"));
    }
    Ok(())
}

fn check_credential(config: &Config, name: &str, vcenter: &str) -> Result<(), Problem> {
    let problem = |detail: String| Problem::new(Code::CredentialMissing, &detail).with_error("/credential", detail);
    match config.credentials.get(name) {
        None => Err(problem(format!("the configuration has no [credentials.{name}]"))),
        Some(credential) if !credential.vcenter_host.eq_ignore_ascii_case(vcenter) => {
            Err(problem(format!("credential {name} is for {}, the VM is on {vcenter}", credential.vcenter_host)))
        }
        Some(_) => Ok(()),
    }
}
