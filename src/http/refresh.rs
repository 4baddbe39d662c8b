//! `POST /vms/{id}/refresh`: the inventory brought to what the VM's node finds, and the problems of that.

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::backups::sentence;
use super::etag;
use super::problem::{Code, Problem};
use super::vms::{VmAnswer, not_found};
use crate::app::AppState;
use crate::discovery::{DiskChange, RefreshError, Refreshed};
use crate::login::LoginError;
use crate::node::discover::DiscoverError;
use crate::node::discovered::AnswerError;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(refresh_vm))
}

#[derive(Serialize, ToSchema)]
struct RefreshAnswer {
    #[serde(flatten)]
    vm: VmAnswer,
    /// What is not as it was before, by the number of the disk; empty when the inventory was right.
    changes: Vec<DiskChangeAnswer>,
}

#[derive(Serialize, ToSchema)]
struct DiskChangeAnswer {
    disk_id: u32,
    device_key: u32,
    change: Change,
    /// Capacity in bytes; of a disk that is gone, the last one known.
    size_bytes: u64,
    /// What a disk that was resized had before.
    size_bytes_before: Option<u64>,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Change {
    /// The VM has it now.
    Appeared,
    /// The VM has it no more; its number stays taken.
    Gone,
    /// It has another size.
    Resized,
    /// Its path or unit became known, or is another one.
    Described,
}

impl From<&DiskChange> for DiskChangeAnswer {
    fn from(change: &DiskChange) -> Self {
        let (disk, change, size_bytes_before) = match change {
            DiskChange::Appeared(disk) => (disk, Change::Appeared, None),
            DiskChange::Gone(disk) => (disk, Change::Gone, None),
            DiskChange::Resized { disk, before_bytes } => (disk, Change::Resized, Some(*before_bytes)),
            DiskChange::Described(disk) => (disk, Change::Described, None),
        };
        let (disk_id, device_key, size_bytes) = (disk.disk_id, disk.device_key, disk.size_bytes);
        Self { disk_id, device_key, change, size_bytes, size_bytes_before }
    }
}

/// Asks the VM's node which disks the VM has, and takes that over as `PUT` would. An answer that cannot be relied upon changes
/// nothing. A backup that runs goes on with the disks it began with.
#[utoipa::path(post, path = "/vms/{id}/refresh", tag = "inventory", params(("id" = String, Path)),
    responses((status = 200, body = RefreshAnswer)))]
async fn refresh_vm(State(app): State<AppState>, Path(id): Path<String>) -> Result<Response, Problem> {
    let vm = id.parse().map_err(|_| not_found(&id))?;
    let Refreshed { vm, disks, changes } = app.backups.discovery().refresh(&vm, None).await.map_err(refused)?;
    let changes = changes.iter().map(Into::into).collect();
    let tag = etag::header(vm.revision);
    Ok((tag, Json(RefreshAnswer { vm: VmAnswer::new(vm, disks), changes })).into_response())
}

/// The table from everything that can stop a discovery to its problem.
pub(super) fn refused(error: RefreshError) -> Problem {
    let detail = sentence(&error.to_string());
    match error {
        RefreshError::VmNotFound(id) => not_found(id.as_str()),
        RefreshError::Login(error @ LoginError::Panicked) => Problem::internal(&error),
        RefreshError::Login(LoginError::Missing { .. }) => Problem::new(Code::CredentialMissing, detail),
        RefreshError::NodeUnknown { .. } => Problem::new(Code::InvalidField, detail),
        RefreshError::Node { source, .. } => match source {
            DiscoverError::Unreachable { .. } => Problem::new(Code::NodeUnreachable, detail),
            DiscoverError::TimedOut { .. } => Problem::new(Code::NodeTimeout, detail),
            DiscoverError::Rejected { .. } => Problem::new(Code::NodeRejected, detail),
            DiscoverError::Answer(AnswerError::NoSuchVm { .. }) => Problem::new(Code::VmNotDiscovered, detail),
            DiscoverError::TooLong | DiscoverError::Answer(_) => Problem::new(Code::NodeAnswerMalformed, detail),
            error @ DiscoverError::Panicked => Problem::internal(&error),
        },
        RefreshError::ChangedMeanwhile(_) => Problem::new(Code::EtagMismatch, detail),
        RefreshError::Store(error) => error.into(),
    }
}
