//! The table of all problem codes: status, title, whether a repeat may help, and what it means.
//!
//! A code never changes its meaning and is never removed: callers branch on it. `docs/problems.md` and the page at
//! `/docs/problems` are written from this table.

use std::fmt::Write as _;

use axum::http::StatusCode;

/// One row of the table.
#[derive(Debug)]
pub struct Entry {
    /// The code as it is sent.
    pub name: &'static str,
    /// The HTTP status.
    pub status: u16,
    /// The kind of problem in words.
    pub title: &'static str,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// What it means and what to do.
    pub meaning: &'static str,
}

/// Marks rows whose request may succeed when it is repeated.
const RETRY: bool = true;
const FINAL: bool = false;

macro_rules! codes {
    ($($code:ident $name:literal $status:literal $retryable:ident $title:literal $meaning:literal;)+) => {
        /// A kind of problem.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Code {
            $(#[doc = $title] $code,)+
        }

        impl Code {
            /// Every code, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$code,)+];

            /// Its row of the table.
            pub const fn entry(self) -> &'static Entry {
                match self {
                    $(Self::$code => &Entry {
                        name: $name, status: $status, title: $title, retryable: $retryable, meaning: $meaning,
                    },)+
                }
            }
        }
    };
}

codes! {
    InvalidJson "invalid_json" 400 FINAL "The body is not valid JSON"
        "The body cannot be parsed; the detail names line and column.";
    InvalidField "invalid_field" 400 FINAL "A field of the request is not valid"
        "A field is missing, unknown, of the wrong type or out of range; `errors` points at it.";
    DiskIdNotAllowed "disk_id_not_allowed" 400 FINAL "A backup cannot be asked for one disk"
        "A backup covers all disks of the VM from one snapshot. Leave `disk_id` out.";
    TokenMissing "token_missing" 401 FINAL "No token"
        "Send `Authorization: Bearer` with the content of the token file.";
    TokenInvalid "token_invalid" 401 FINAL "The token is not valid"
        "The token is not the one in the token file of this service.";
    ReadOnlyToken "read_only_token" 403 FINAL "The token may only read"
        "The token of `auth.read_token_file` serves GET requests only.";
    CallbackPeerRefused "callback_peer_refused" 403 FINAL "Callbacks from this address are refused"
        "The peer of a callback is in none of the networks of `auth.callback_peers`.";
    HostRefused "host_refused" 403 FINAL "The Host header names another machine"
        "`Host` must be a loopback name or address, or the address the service listens on; anything else may be a browser \
         that was led here by a foreign name.";
    OriginRefused "origin_refused" 403 FINAL "Requests from pages of other origins are refused"
        "A browser sent the request for a page that this service did not serve.";
    NotFound "not_found" 404 FINAL "There is nothing at this path"
        "No route has this path; `/docs` lists them.";
    VmNotFound "vm_not_found" 404 FINAL "No such VM"
        "No VM has this id or name; `GET /api/v1/vms` lists them.";
    VmNotDiscovered "vm_not_discovered" 404 FINAL "The node does not find the VM"
        "It has another path in vCenter than in the inventory, is not in the datacenter that was looked in (the first segment \
         of its path, or `datacenter` of its credential), or is gone; the inventory is as it was.";
    VmHasNoDisks "vm_has_no_disks" 404 FINAL "The VM has no disks"
        "There is nothing to back up: describe the disks of the VM first.";
    RepositoryNotFound "repository_not_found" 404 FINAL "No such repository"
        "No repository has this id; `GET /api/v1/repositories` lists them.";
    BackupNotFound "backup_not_found" 404 FINAL "No such backup"
        "No backup has this id.";
    DiskNotInBackup "disk_not_in_backup" 404 FINAL "The backup has no such disk"
        "The backup exists, but none of its disks has this number.";
    PointNotFound "point_not_found" 404 FINAL "No such restore point"
        "No restore point has this id, or it was deleted.";
    ExportNotFound "export_not_found" 404 FINAL "No such export"
        "No export has this id: it was ended, expired, or the service was restarted.";
    MethodNotAllowed "method_not_allowed" 405 FINAL "The path does not take this method"
        "The header `Allow` names the methods that it takes.";
    BackupInProgress "backup_in_progress" 409 RETRY "A backup of this VM is running"
        "Only one job per VM runs at a time; `links.active` is the one in the way.";
    VmNameBusy "vm_name_busy" 409 RETRY "A VM of the same inventory name is being backed up"
        "The backup client asks by inventory name, so two VMs that share one take turns.";
    VmAmbiguous "vm_ambiguous" 409 FINAL "Several VMs have this name"
        "Name the VM by `vm_context_id`; the candidates are in the detail.";
    BackupEnded "backup_ended" 409 FINAL "The backup has ended"
        "It failed or was cancelled; nothing that is said about it later changes that.";
    ChangeIdConflict "change_id_conflict" 409 FINAL "The disk was completed with another change id"
        "A repeat of a completion must carry the same change id.";
    DiskNotConnected "disk_not_connected" 409 FINAL "The disk was never connected"
        "A disk whose export never had a connection cannot be complete.";
    CoverageIncomplete "coverage_incomplete" 409 FINAL "The full backup lacks bytes"
        "A full backup must have received every byte of the disk; the job has failed.";
    EpochMismatch "epoch_mismatch" 409 FINAL "Change tracking was reset during the copy"
        "The new change id does not continue the old one and the copy is not complete; the job has failed.";
    IdempotencyInProgress "idempotency_in_progress" 409 RETRY "The first request with this key is still running"
        "Repeat it later to get the answer of the first one.";
    PointHasDependents "point_has_dependents" 409 FINAL "Other restore points build on this one"
        "`dependents` names those directly upon it: delete them first.";
    PointInUse "point_in_use" 409 RETRY "The restore point is in use"
        "It is exported, or pinned by a job or a task that `holders` names; or what a backup would build upon is just going.";
    PointDamaged "point_damaged" 409 FINAL "The restore point is damaged"
        "Its files are not what was committed. With `accept_damage` it is opened all the same, as far as that is possible; what \
         is read may be wrong.";
    RepositoryNotEmpty "repository_not_empty" 409 FINAL "The repository holds restore points"
        "Delete or expire its points first.";
    VmExists "vm_exists" 409 FINAL "The VM exists already"
        "A VM with this vCenter and path is there; `links.existing` leads to it.";
    RepositoryExists "repository_exists" 409 FINAL "The repository exists already"
        "A repository with this id or folder is there; `links.existing` leads to it.";
    EtagMismatch "etag_mismatch" 412 FINAL "Somebody changed it in between"
        "`If-Match` names an older version, or the VM was described anew while its node was asked: read it again, then repeat \
         the change.";
    BodyTooLarge "body_too_large" 413 FINAL "The body is too large"
        "The body is larger than `server.body_limit_bytes`.";
    UnsupportedMediaType "unsupported_media_type" 415 FINAL "The body is not JSON"
        "Send it with `Content-Type: application/json`.";
    RangeNotSatisfiable "range_not_satisfiable" 416 FINAL "The range lies outside the disk"
        "`Content-Range` tells the size of the disk.";
    DiskKeyMissing "disk_key_missing" 422 FINAL "A disk has no device key"
        "Every disk needs `device_key` or `unit_number`.";
    DiskKeyDuplicate "disk_key_duplicate" 422 FINAL "Two disks have the same device key"
        "The backup client tells disks apart by their key alone, so keys must differ.";
    DiskSizeInvalid "disk_size_invalid" 422 FINAL "The size of a disk is not valid"
        "A size is in bytes, above 0 and a multiple of 512.";
    NoParentPoint "no_parent_point" 422 FINAL "There is no restore point to build on"
        "An incremental backup was asked for and no disk has a usable parent; ask for `auto` or `full`.";
    CredentialMissing "credential_missing" 422 FINAL "No usable credential for the vCenter"
        "The VM names no credential, one that the configuration lacks or that is for another vCenter, or its password file \
         cannot be read.";
    IdempotencyKeyReused "idempotency_key_reused" 422 FINAL "The key was used for another request"
        "An `Idempotency-Key` belongs to one body.";
    PointProtected "point_protected" 423 FINAL "The restore point is protected"
        "It cannot be deleted before `protected_until`, nor its protection be shortened without `force`.";
    EtagRequired "etag_required" 428 FINAL "If-Match is required"
        "Send the `ETag` of the version that is to be replaced as `If-Match`.";
    Internal "internal" 500 RETRY "The service failed"
        "The log has the reason under the `request_id` of the document.";
    ImageFailed "image_failed" 500 FINAL "An image could not be written safely"
        "A write, a sync or the check of the structure failed; the job has failed.";
    NodeRejected "node_rejected" 502 FINAL "The node refused the request"
        "Its status and text are in the detail. A job was undone; after a discovery the inventory is as it was.";
    NodeUnreachable "node_unreachable" 502 RETRY "The node cannot be reached"
        "No byte of a start left, and the job was undone; or a discovery got no whole answer, and the inventory is as it was.";
    NodeAnswerMalformed "node_answer_malformed" 502 FINAL "The node's answer cannot be relied upon"
        "Discovery only: it is not in the form of an answer, has the VM twice, names no disk of it, or one that cannot be; the \
         detail says what, and the inventory is as it was.";
    Starting "starting" 503 RETRY "The service is starting"
        "It brings its records in order first; `/readyz` tells when it is done.";
    NoPorts "no_ports" 503 RETRY "Not enough free ports"
        "The port range has fewer free ports than the VM has disks; nothing was started.";
    TooManyJobs "too_many_jobs" 503 RETRY "Too many jobs are running"
        "A limit of `jobs`, of the node or of the repository is reached, or as many verifications wait as may; nothing was started.";
    Draining "draining" 503 RETRY "The service is stopping"
        "Running jobs end, new ones are refused.";
    RepositoryUnavailable "repository_unavailable" 503 RETRY "The repository cannot be used"
        "It is disabled, its folder is missing or cannot be written, or another hub owns it.";
    DatabaseBusy "database_busy" 503 RETRY "The database is busy"
        "Another request holds it for longer than usual.";
    NodeTimeout "node_timeout" 504 RETRY "The node did not answer in time"
        "Discovery only, and the inventory is as it was: a job whose start was not answered goes on and waits for a sign of \
         life.";
    InsufficientStorage "insufficient_storage" 507 RETRY "Not enough free space"
        "The detail names the repository, the space needed and the space free; nothing was started.";
}

impl Code {
    /// The HTTP status.
    pub fn status(self) -> StatusCode {
        // The table holds valid statuses only; a unit test reads each.
        StatusCode::from_u16(self.entry().status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

/// The table as Markdown: the content of `docs/problems.md`.
pub fn markdown() -> String {
    let mut text = String::from(
        "# Problems\n\n\
         Every answer that is no success is a problem document (RFC 9457, `application/problem+json`). `type` is\n\
         `urn:blockyard:problem:<code>`; type and code are stable for ever. `retryable` says whether the same request may\n\
         succeed later; a 503 carries `Retry-After`. `errors` points into the body with JSON pointers, `links` leads on.\n\n\
         | code | status | retryable | title | meaning |\n|---|---|---|---|---|\n",
    );
    for entry in Code::ALL.iter().map(|code| code.entry()) {
        let retryable = if entry.retryable { "yes" } else { "no" };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "| `{}` | {} | {retryable} | {} | {} |",
            entry.name, entry.status, entry.title, entry.meaning
        );
    }
    text
}

/// The table as a page.
pub fn html() -> String {
    let mut rows = String::new();
    for entry in Code::ALL.iter().map(|code| code.entry()) {
        let retryable = if entry.retryable { "yes" } else { "no" };
        // Writing to a string cannot fail. Nothing of the table needs escaping; a unit test sees to it.
        let _ = writeln!(
            rows,
            "<tr id=\"{0}\"><td><code>{0}</code></td><td>{1}</td><td>{retryable}</td><td>{2}</td><td>{3}</td></tr>",
            entry.name, entry.status, entry.title, entry.meaning
        );
    }
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Problems - Blockyard</title>\
         <style>body{{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}}\
         td,th{{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;border-top:1px solid #ddd}}</style>\
         <h1>Problems</h1><p>Every answer that is no success is a problem document (RFC 9457). Its <code>type</code> is \
         <code>urn:blockyard:problem:&lt;code&gt;</code>.</p>\
         <table><tr><th>code</th><th>status</th><th>retryable</th><th>title</th><th>meaning</th></tr>\n{rows}</table></html>\n"
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_code_has_an_error_status_and_a_name_of_its_own() {
        let names: BTreeSet<_> = Code::ALL.iter().map(|code| code.entry().name).collect();
        assert_eq!(names.len(), Code::ALL.len());
        for code in Code::ALL {
            assert_eq!(code.status().as_u16(), code.entry().status, "{code:?}");
            assert!(code.status().is_client_error() || code.status().is_server_error(), "{code:?}");
        }
    }

    #[test]
    fn texts_of_the_table_need_no_escaping() {
        for entry in Code::ALL.iter().map(|code| code.entry()) {
            let text = format!("{} {}", entry.title, entry.meaning);
            assert!(!text.contains(['<', '>', '&', '|']), "{text}");
        }
    }
}
