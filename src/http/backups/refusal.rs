//! Why a backup was not started or a disk not completed, as problem documents.

use crate::backup::StartError;
use crate::backup::ending::{CompleteError, Failed};
use crate::backup::plan::PlanError;
use crate::http::problem::{Code, Problem};
use crate::http::refresh;
use crate::id::BackupId;
use crate::words::FailureCode;

/// The table from everything that can stop a start to its problem.
pub(super) fn start_refused(error: StartError) -> Problem {
    let detail = sentence(&error.to_string());
    match error {
        StartError::VmNotFound(_) => Problem::new(Code::VmNotFound, detail),
        StartError::VmAmbiguous { ids, .. } => {
            let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
            Problem::new(Code::VmAmbiguous, format!("{detail} They are {}.", ids.join(", "))).with("candidates", ids)
        }
        StartError::RepositoryNotFound(_) => Problem::new(Code::RepositoryNotFound, detail),
        StartError::RepositoryUnavailable { .. } => Problem::new(Code::RepositoryUnavailable, detail),
        StartError::Plan(error) => Problem::new(plan_code(&error), detail),
        StartError::Login(error) => refresh::refused(error.into()),
        StartError::Refresh(error) => refresh::refused(error),
        StartError::NodeUnknown { .. } => Problem::new(Code::InvalidField, detail),
        StartError::InsufficientStorage { id, needed_bytes, free_bytes } => {
            Problem::new(Code::InsufficientStorage, detail)
                .with("repository_id", id.as_str())
                .with("needed_bytes", needed_bytes)
                .with("free_bytes", free_bytes)
        }
        StartError::InProgress { vm_name, active, state } => {
            let state = state.map(|state| format!(" ({state})")).unwrap_or_default();
            let detail = format!("VM {vm_name} is being backed up by {active}{state}.");
            with_active(Problem::new(Code::BackupInProgress, detail), &active)
        }
        StartError::NameBusy { active, .. } => with_active(Problem::new(Code::VmNameBusy, detail), &active),
        StartError::TooManyJobs { .. } => Problem::new(Code::TooManyJobs, detail),
        StartError::NoPorts(_) => Problem::new(Code::NoPorts, detail),
        StartError::StateFull => Problem::new(Code::InsufficientStorage, detail),
        StartError::ParentsChanging => Problem::new(Code::PointInUse, detail),
        StartError::Draining => Problem::new(Code::Draining, detail),
        StartError::Store(error) => error.into(),
        StartError::Failed { backup_id, failed } => with_backup(failure(&failed), &backup_id),
        StartError::Cancelled(id) => with_backup(Problem::new(Code::BackupEnded, detail), &id),
        StartError::Panicked => Problem::internal(&error),
    }
}

/// The table from everything that can stop a completion to its problem.
pub(in crate::http) fn complete_refused(error: CompleteError, id: &BackupId) -> Problem {
    let detail = sentence(&error.to_string());
    let problem = match error {
        CompleteError::NotFound(_) => Problem::new(Code::BackupNotFound, detail),
        CompleteError::NoSuchDisk { .. } => Problem::new(Code::DiskNotInBackup, detail),
        CompleteError::Ended { .. } => Problem::new(Code::BackupEnded, detail),
        CompleteError::ChangeIdConflict { .. } => Problem::new(Code::ChangeIdConflict, detail),
        CompleteError::NotConnected { .. } => Problem::new(Code::DiskNotConnected, detail),
        CompleteError::Failed(failed) => failure(&failed),
        CompleteError::Store(error) => error.into(),
    };
    with_backup(problem, id)
}

/// The table from the failures of a job to the problems of the request that met them.
fn failure(failed: &Failed) -> Problem {
    let detail = sentence(&failed.message);
    let code = match failed.code {
        FailureCode::NodeRejected => Code::NodeRejected,
        FailureCode::NodeUnreachable => Code::NodeUnreachable,
        FailureCode::CoverageIncomplete => Code::CoverageIncomplete,
        FailureCode::EpochMismatch => Code::EpochMismatch,
        FailureCode::ImageFailed => Code::ImageFailed,
        FailureCode::InsufficientStorage => Code::InsufficientStorage,
        FailureCode::ServiceRestart => Code::Draining,
        FailureCode::PrepareTimeout | FailureCode::SealTimeout | FailureCode::DatabaseError => Code::Internal,
        FailureCode::NodeOutcomeUnknown
        | FailureCode::NoClient
        | FailureCode::ClientDisconnected
        | FailureCode::Stalled
        | FailureCode::WriteAfterComplete => Code::BackupEnded,
    };
    Problem::new(code, detail).with("failure", failed.code.as_str())
}

fn plan_code(error: &PlanError) -> Code {
    match error {
        PlanError::NoDisks => Code::VmHasNoDisks,
        PlanError::KeyMissing { .. } => Code::DiskKeyMissing,
        PlanError::KeyDuplicate { .. } => Code::DiskKeyDuplicate,
        PlanError::SizeInvalid { .. } => Code::DiskSizeInvalid,
        PlanError::NoParent { .. } => Code::NoParentPoint,
    }
}

fn with_active(problem: Problem, active: &BackupId) -> Problem {
    problem.with("backup_id", active.as_str()).with_link("active", format!("/api/v1/backups/{active}"))
}

pub(super) fn with_backup(problem: Problem, id: &BackupId) -> Problem {
    problem.with("backup_id", id.as_str()).with_link("backup", format!("/api/v1/backups/{id}"))
}

/// An error's text as a sentence.
pub(in crate::http) fn sentence(text: &str) -> String {
    let mut characters = text.chars();
    let mut sentence: String =
        characters.next().map(|first| first.to_uppercase().chain(characters).collect()).unwrap_or_default();
    if !sentence.ends_with('.') {
        sentence.push('.');
    }
    sentence
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_are_sentences() {
        assert_eq!(sentence("there is no VM x"), "There is no VM x.");
        assert_eq!(sentence("Done."), "Done.");
    }

    #[test]
    fn every_failure_of_a_job_is_a_known_problem() {
        for &code in FailureCode::ALL {
            let problem = failure(&Failed::new(code, "why"));
            assert!(problem.code().status().as_u16() >= 400);
        }
    }
}
