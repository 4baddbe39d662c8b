-- What happens to restore points after their commit: verification, retention, and who was told about it.

ALTER TABLE restore_points ADD COLUMN verified_at  TEXT;                                   -- end of the last verification
-- Bytes of its disks that were held against what was received for them, when the disks were last read.
ALTER TABLE restore_points ADD COLUMN compared_bytes INTEGER CHECK (compared_bytes >= 0);
ALTER TABLE restore_points ADD COLUMN trust_reason TEXT CHECK (trust_reason <> '');        -- why it is suspect or corrupt
-- How often its images were made anew: that of its manifest. The files of a point with another one are those of another time.
ALTER TABLE restore_points ADD COLUMN generation   INTEGER NOT NULL DEFAULT 0 CHECK (generation >= 0);

-- Known of points that were committed by a version that stores them; the manifest has them for all.
ALTER TABLE point_disks ADD COLUMN effective_type  TEXT    CHECK (effective_type <> '');
ALTER TABLE point_disks ADD COLUMN from_change_id  TEXT    CHECK (from_change_id <> '');
ALTER TABLE point_disks ADD COLUMN identical_bytes INTEGER CHECK (identical_bytes >= 0);
ALTER TABLE point_disks ADD COLUMN content_digest  TEXT    CHECK (content_digest <> '');   -- of the virtual disk

-- Zeroes of 4 MiB and more over data of the disk's last usable point.
ALTER TABLE backup_disks ADD COLUMN zeroed_over_data_bytes INTEGER NOT NULL DEFAULT 0 CHECK (zeroed_over_data_bytes >= 0);

-- Which names were served on a port: a client may come late for one of them.
CREATE INDEX backup_disks_export ON backup_disks (port, export_name);

-- The last event that each [webhooks.<name>] has accepted.
CREATE TABLE webhook_cursors (
    name     TEXT    NOT NULL PRIMARY KEY CHECK (name <> ''),
    sequence INTEGER NOT NULL CHECK (sequence >= 0)
) STRICT;
