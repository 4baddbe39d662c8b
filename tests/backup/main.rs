//! Whole backups over real sockets: the service in this process or as a child, a fake node with its client, and QEMU's
//! and libnbd's tools as clients and judges.
#![allow(unreachable_pub, reason = "the files of one binary share what they need")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "seeds and counts are for whoever repeats a run")]

#[path = "../support/mod.rs"]
mod support;

mod bounds;
mod cancel;
mod cli;
mod client;
mod complete;
mod crash;
mod discover;
mod durable_order;
mod enospc;
mod events;
mod foreign;
mod full_state;
mod hung;
mod idempotency;
mod idle;
mod import;
mod incremental;
mod kills;
mod kills_of_points;
mod late_client;
mod late_mount;
mod limits;
mod lists;
mod many;
mod merge;
mod merge_crash;
mod merge_generations;
mod merge_orphans;
mod merge_seam;
mod metrics;
mod names;
mod nbd;
mod node;
mod node_failures;
mod overview;
mod privileged;
mod process;
mod quarantine;
mod received;
mod refusals;
mod restart;
mod restore;
mod restore_cli;
mod retain;
mod rig;
mod sse;
mod start;
mod tls;
mod trust;
mod verify;
mod watch;
mod webhooks;
mod zeroes;
