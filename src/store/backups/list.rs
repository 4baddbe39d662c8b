//! Listing jobs: filters, newest first, a page at a time by the id of the last one, so that rows that come or go between
//! two pages are never skipped or shown twice.

use sqlx::{QueryBuilder, Sqlite};

use super::row::BackupRow;
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::store::{Connection, Listing, Page, StoreError};
use crate::words::{BackupType, JobState, OldStatus};

/// Which jobs; everything by default.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// By the VM's name at the start.
    pub vm_name: Option<String>,
    /// By VM.
    pub vm_id: Option<VmId>,
    /// By repository.
    pub repository_id: Option<RepositoryId>,
    /// By the old vocabulary.
    pub status: Option<OldStatus>,
    /// By state.
    pub state: Option<JobState>,
    /// By type.
    pub backup_type: Option<BackupType>,
    /// Accepted at this time or later.
    pub since: Option<UtcTime>,
}

/// One page of the jobs that match.
///
/// # Errors
/// The database's, and words in the rows that this version does not know.
pub async fn list(
    connection: &mut Connection,
    filter: &Filter,
    page: &Page<BackupId>,
) -> Result<Listing<BackupRow, BackupId>, StoreError> {
    let mut count = QueryBuilder::new("SELECT count(*) FROM backups WHERE 1 = 1");
    restrict(&mut count, filter);
    let total: i64 = count.build_query_scalar().fetch_one(&mut *connection).await?;

    let mut query = QueryBuilder::new("SELECT * FROM backups WHERE 1 = 1");
    restrict(&mut query, filter);
    if let Some(before) = &page.after {
        query.push(" AND id < ").push_bind(before.clone());
    }
    query.push(" ORDER BY id DESC LIMIT ").push_bind(page.fetch_limit());
    let backups = query.build_query_as().fetch_all(connection).await?;
    Ok(page.listing(backups, total.unsigned_abs(), |backup: &BackupRow| backup.id.clone()))
}

fn restrict(query: &mut QueryBuilder<Sqlite>, filter: &Filter) {
    if let Some(name) = &filter.vm_name {
        query.push(" AND vm_name = ").push_bind(name.clone());
    }
    if let Some(vm) = &filter.vm_id {
        query.push(" AND vm_id = ").push_bind(vm.clone());
    }
    if let Some(repository) = &filter.repository_id {
        query.push(" AND repository_id = ").push_bind(repository.clone());
    }
    if let Some(state) = filter.state {
        query.push(" AND state = ").push_bind(state);
    }
    if let Some(status) = filter.status {
        query.push(" AND state IN (");
        let mut states = query.separated(", ");
        for &state in JobState::ALL.iter().filter(|state| state.old_status() == status) {
            states.push_bind(state);
        }
        query.push(")");
    }
    if let Some(backup_type) = filter.backup_type {
        query.push(" AND backup_type = ").push_bind(backup_type);
    }
    if let Some(since) = filter.since {
        query.push(" AND created_at >= ").push_bind(since);
    }
}
