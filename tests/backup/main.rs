//! Whole backups over real sockets: the service in this process, a fake node with its client, foreign tools as judges.
#![allow(unreachable_pub, reason = "the files of one binary share what they need")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod rig;
mod start;
