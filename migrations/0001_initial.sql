-- The whole state of one hub. Rules of every table:
--   * absent is NULL, never '' (checked where a column may be absent);
--   * times are UTC, RFC 3339 with milliseconds and Z, so that text order is time order;
--   * ids are opaque text, sizes are bytes, booleans are 0 or 1;
--   * nothing is deleted by way of something else (ON DELETE RESTRICT everywhere).

-- Virtual machines as the operator described them. A VM that still has backups is kept with removed_at set.
CREATE TABLE vms (
    id         TEXT    NOT NULL PRIMARY KEY,              -- vm-<ulid>
    name       TEXT    NOT NULL CHECK (name <> ''),       -- for display; not unique
    vcenter    TEXT    NOT NULL CHECK (vcenter <> ''),
    path       TEXT    NOT NULL CHECK (path <> ''),       -- inventory path; its last segment is the inventory name
    uuid       TEXT             CHECK (uuid <> ''),
    node       TEXT    NOT NULL CHECK (node <> ''),       -- a [nodes.<name>] of the configuration
    credential TEXT             CHECK (credential <> ''), -- a [credentials.<name>] of the configuration, never a secret
    dir        TEXT             CHECK (dir <> ''),        -- folder in every repository, fixed at the first backup
    revision   INTEGER NOT NULL CHECK (revision > 0),     -- grows by one with each PUT; the ETag
    created_at TEXT    NOT NULL,
    removed_at TEXT
) STRICT;

CREATE UNIQUE INDEX vms_path ON vms (vcenter, path) WHERE removed_at IS NULL;
CREATE UNIQUE INDEX vms_dir ON vms (dir);
CREATE INDEX vms_name ON vms (name);

-- Disks by identity (device key + VMDK UUID, or path when no UUID is known). A row is never deleted while its VM
-- exists and disk_id is never given again: a disk that went away stays with present = 0.
CREATE TABLE vm_disks (
    vm_id       TEXT    NOT NULL REFERENCES vms (id) ON DELETE RESTRICT,
    disk_id     INTEGER NOT NULL CHECK (disk_id >= 0),
    device_key  INTEGER NOT NULL CHECK (device_key > 0),
    unit_number INTEGER          CHECK (unit_number >= 0),
    vmdk_uuid   TEXT             CHECK (vmdk_uuid <> ''),
    vmdk_path   TEXT             CHECK (vmdk_path <> ''),
    size_bytes  INTEGER NOT NULL CHECK (size_bytes > 0 AND size_bytes % 512 = 0),
    present     INTEGER NOT NULL CHECK (present IN (0, 1)),
    PRIMARY KEY (vm_id, disk_id)
) STRICT;

CREATE UNIQUE INDEX vm_disks_device_key ON vm_disks (vm_id, device_key) WHERE present = 1;

-- Folders that hold restore points. A repository that jobs still refer to is kept with removed_at set.
CREATE TABLE repositories (
    id            TEXT    NOT NULL PRIMARY KEY,
    name          TEXT    NOT NULL CHECK (name <> ''),
    path          TEXT    NOT NULL CHECK (path <> ''),
    enabled       INTEGER NOT NULL CHECK (enabled IN (0, 1)),
    retention     TEXT    NOT NULL,                       -- JSON object, {} keeps everything
    max_running   INTEGER          CHECK (max_running > 0),
    last_check_at TEXT,
    revision      INTEGER NOT NULL CHECK (revision > 0),
    created_at    TEXT    NOT NULL,
    removed_at    TEXT
) STRICT;

CREATE UNIQUE INDEX repositories_path ON repositories (path) WHERE removed_at IS NULL;

-- One row per attempt to back up one VM.
CREATE TABLE backups (
    id             TEXT    NOT NULL PRIMARY KEY,           -- backup-<ulid>; also the fence against late callers
    vm_id          TEXT    NOT NULL REFERENCES vms (id) ON DELETE RESTRICT,
    repository_id  TEXT    NOT NULL REFERENCES repositories (id) ON DELETE RESTRICT,
    vm_name        TEXT    NOT NULL CHECK (vm_name <> ''), -- as it was at the start; the VM may be renamed later
    requested_type TEXT    NOT NULL CHECK (requested_type IN ('full', 'incremental', 'auto')),
    backup_type    TEXT    NOT NULL CHECK (backup_type IN ('full', 'incremental')),
    state          TEXT    NOT NULL CHECK (state IN ('accepted', 'preparing', 'starting', 'transferring', 'stalled',
                       'sealing', 'committing', 'committed', 'cancelling', 'cancelled', 'failing', 'failed')),
    result         TEXT    NOT NULL CHECK (result IN ('none', 'success', 'warning', 'failed', 'cancelled')),
    code           TEXT             CHECK (code <> ''),    -- why it failed
    message        TEXT             CHECK (message <> ''), -- the same for people
    node_outcome   TEXT             CHECK (node_outcome <> ''), -- NULL: the node was never called
    boot_id        TEXT    NOT NULL CHECK (boot_id <> ''), -- the process start that owns a running job
    policy_id      TEXT             CHECK (policy_id <> ''),
    tags           TEXT    NOT NULL,                       -- JSON object of strings
    warnings       TEXT    NOT NULL,                       -- JSON array of strings
    created_at     TEXT    NOT NULL,
    started_at     TEXT,                                   -- first sign of life of the backup client
    completed_at   TEXT                                    -- when the terminal state was reached
) STRICT;

CREATE INDEX backups_vm ON backups (vm_id, id);
CREATE INDEX backups_repository ON backups (repository_id, id);
CREATE INDEX backups_state ON backups (state);

CREATE TABLE backup_disks (
    backup_id        TEXT    NOT NULL REFERENCES backups (id) ON DELETE RESTRICT,
    disk_id          INTEGER NOT NULL CHECK (disk_id >= 0),
    device_key       INTEGER NOT NULL CHECK (device_key > 0),
    vmdk_uuid        TEXT             CHECK (vmdk_uuid <> ''),
    vmdk_path        TEXT             CHECK (vmdk_path <> ''),
    size_bytes       INTEGER NOT NULL CHECK (size_bytes > 0 AND size_bytes % 512 = 0),
    backup_type      TEXT    NOT NULL CHECK (backup_type IN ('full', 'incremental')),
    effective_type   TEXT             CHECK (effective_type <> ''),
    reason           TEXT    NOT NULL CHECK (reason <> ''),
    parent_id        TEXT             REFERENCES restore_points (id) ON DELETE RESTRICT,
    from_change_id   TEXT             CHECK (from_change_id <> ''),
    change_id        TEXT             CHECK (change_id <> ''), -- of this backup, known once sealed
    port             INTEGER          CHECK (port BETWEEN 1 AND 65535),
    export_name      TEXT             CHECK (export_name <> ''),
    state            TEXT    NOT NULL CHECK (state IN ('allocated', 'listening', 'connected', 'writing', 'disconnected',
                         'draining', 'sealed', 'failed')),
    error_message    TEXT             CHECK (error_message <> ''),
    covered_bytes    INTEGER NOT NULL DEFAULT 0 CHECK (covered_bytes >= 0),
    written_bytes    INTEGER NOT NULL DEFAULT 0 CHECK (written_bytes >= 0),
    zeroed_bytes     INTEGER NOT NULL DEFAULT 0 CHECK (zeroed_bytes >= 0),
    identical_bytes  INTEGER NOT NULL DEFAULT 0 CHECK (identical_bytes >= 0),
    sealed_at        TEXT,
    PRIMARY KEY (backup_id, disk_id)
) STRICT;

-- What a committed job leaves. The id is the job's id; sequence is the order of commits over the whole hub.
CREATE TABLE restore_points (
    id              TEXT    NOT NULL PRIMARY KEY REFERENCES backups (id) ON DELETE RESTRICT,
    vm_id           TEXT    NOT NULL REFERENCES vms (id) ON DELETE RESTRICT,
    repository_id   TEXT    NOT NULL REFERENCES repositories (id) ON DELETE RESTRICT,
    sequence        INTEGER NOT NULL UNIQUE,
    dir             TEXT    NOT NULL CHECK (dir <> ''),    -- published folder, relative to the repository
    state           TEXT    NOT NULL CHECK (state IN ('committed', 'missing', 'deleting', 'deleted')),
    trust           TEXT    NOT NULL CHECK (trust IN ('unverified', 'verified', 'suspect', 'corrupt')),
    protected_until TEXT,
    committed_at    TEXT    NOT NULL
) STRICT;

CREATE INDEX restore_points_vm ON restore_points (vm_id, repository_id, sequence);

CREATE TABLE point_disks (
    point_id    TEXT    NOT NULL REFERENCES restore_points (id) ON DELETE RESTRICT,
    disk_id     INTEGER NOT NULL CHECK (disk_id >= 0),
    device_key  INTEGER NOT NULL CHECK (device_key > 0),
    vmdk_uuid   TEXT             CHECK (vmdk_uuid <> ''),
    vmdk_path   TEXT             CHECK (vmdk_path <> ''),
    size_bytes  INTEGER NOT NULL CHECK (size_bytes > 0 AND size_bytes % 512 = 0),
    backup_type TEXT    NOT NULL CHECK (backup_type IN ('full', 'incremental')),
    file        TEXT    NOT NULL CHECK (file <> ''),       -- name inside the point's folder
    file_bytes  INTEGER NOT NULL CHECK (file_bytes >= 0),
    change_id   TEXT             CHECK (change_id <> ''),
    parent_id   TEXT             REFERENCES restore_points (id) ON DELETE RESTRICT,
    chain_depth INTEGER NOT NULL CHECK (chain_depth >= 1), -- 1: a full
    digest      TEXT             CHECK (digest <> ''),     -- NULL until the first verification
    PRIMARY KEY (point_id, disk_id)
) STRICT;

CREATE INDEX point_disks_parent ON point_disks (parent_id);

-- Who owns what right now. Rows of another boot_id are void.
CREATE TABLE leases (
    id       INTEGER NOT NULL PRIMARY KEY,
    kind     TEXT    NOT NULL CHECK (kind IN ('vm', 'name', 'port', 'pin', 'export')),
    key      TEXT    NOT NULL CHECK (key <> ''),
    owner    TEXT    NOT NULL CHECK (owner <> ''),         -- a backup id or an export id
    boot_id  TEXT    NOT NULL CHECK (boot_id <> ''),
    deadline TEXT
) STRICT;

CREATE UNIQUE INDEX leases_one_owner ON leases (kind, key) WHERE kind <> 'pin';
CREATE INDEX leases_owner ON leases (owner);

-- Events and audit in one growing sequence, never re-used.
CREATE TABLE events (
    sequence   INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    at         TEXT    NOT NULL,
    kind       TEXT    NOT NULL CHECK (kind <> ''),        -- job.state, disk.state, point.committed, alert ...
    subject    TEXT    NOT NULL CHECK (subject <> ''),     -- id of the thing it is about
    data       TEXT    NOT NULL,                           -- JSON object
    actor      TEXT             CHECK (actor <> ''),       -- user, service, clock, client, policy
    request_id TEXT             CHECK (request_id <> '')
) STRICT;

CREATE INDEX events_subject ON events (subject, sequence);

-- Answers of start requests that created a job, kept for repeats. status and answer are NULL while the first runs.
CREATE TABLE idempotency_keys (
    key        TEXT    NOT NULL PRIMARY KEY CHECK (key <> ''),
    body_hash  TEXT    NOT NULL CHECK (body_hash <> ''),
    backup_id  TEXT    NOT NULL REFERENCES backups (id) ON DELETE RESTRICT,
    status     INTEGER          CHECK (status BETWEEN 200 AND 599),
    answer     TEXT             CHECK (answer <> ''),
    expires_at TEXT    NOT NULL
) STRICT;

CREATE INDEX idempotency_keys_expires ON idempotency_keys (expires_at);
