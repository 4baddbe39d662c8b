//! Listing jobs: filters, newest first, a page at a time by the id of the last one, so that rows that come or go between
//! two pages are never skipped or shown twice.

use sqlx::{QueryBuilder, Sqlite};

use super::row::BackupRow;
use crate::backup::state::{BackupType, JobState, OldStatus};
use crate::clock::UtcTime;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::store::{Connection, StoreError};

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

/// One page of jobs.
#[derive(Clone, Debug)]
pub struct Page {
    /// Newest first.
    pub backups: Vec<BackupRow>,
    /// How many match in all.
    pub total: u64,
    /// Where the next page begins, when there is one.
    pub next: Option<BackupId>,
}

/// The jobs that match, older than `before`, at most `limit`.
///
/// # Errors
/// The database's, and words in the rows that this version does not know.
pub async fn list(
    connection: &mut Connection,
    filter: &Filter,
    before: Option<&BackupId>,
    limit: u32,
) -> Result<Page, StoreError> {
    let mut count = QueryBuilder::new("SELECT count(*) FROM backups WHERE 1 = 1");
    restrict(&mut count, filter);
    let total: i64 = count.build_query_scalar().fetch_one(&mut *connection).await?;

    let mut query = QueryBuilder::new("SELECT * FROM backups WHERE 1 = 1");
    restrict(&mut query, filter);
    if let Some(before) = before {
        query.push(" AND id < ").push_bind(before.clone());
    }
    // One more than asked for tells whether there is a next page.
    query.push(" ORDER BY id DESC LIMIT ").push_bind(i64::from(limit) + 1);
    let mut backups: Vec<BackupRow> = query.build_query_as().fetch_all(connection).await?;
    let more = backups.len() > limit as usize;
    backups.truncate(limit as usize);
    let next = if more { backups.last().map(|backup| backup.id.clone()) } else { None };
    Ok(Page { backups, total: u64::try_from(total).unwrap_or(0), next })
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
