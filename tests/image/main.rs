//! `blockyard nbd`, `image` and `doctor` as a user meets them: the real binary, real files, and the tools that people have.
#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../support/certificates.rs"]
mod certificates;
#[path = "../../nbd/tests/foreign/clients/mod.rs"]
mod clients;
mod command;
mod disks;
mod doctor;
mod ending;
#[path = "../backup/privileged.rs"]
mod privileged;
#[path = "../support/process.rs"]
#[allow(dead_code, reason = "every test binary uses its own part")]
mod process;
#[path = "../../nbd/tests/common/programs.rs"]
mod programs;
mod served;
#[allow(dead_code, reason = "the load tests use it as well")]
mod server;
mod sockets;
mod tls;
mod tools;
