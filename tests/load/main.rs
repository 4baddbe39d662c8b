//! `blockyard nbd` under load and malice: floods of connections, clients that stall, hoard or vanish, and the power going
//! away. The server is the real binary in a process of its own; what it holds is read from `/proc`.
//!
//! No test asserts a speed. Figures are printed: `cargo test --test load -- --nocapture --test-threads 1`.
#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "the figures are for whoever wants to see them")]

mod clients;
mod crash;
mod floods;
mod held;
mod memory;
#[path = "../support/process.rs"]
#[allow(dead_code, reason = "every test binary uses its own part")]
mod process;
#[path = "../../nbd/tests/common/programs.rs"]
mod programs;
#[path = "../image/server.rs"]
#[allow(dead_code, reason = "every test binary uses its own part")]
mod server;
mod slow;
#[path = "../image/tools.rs"]
#[allow(dead_code, reason = "every test binary uses its own part")]
mod tools;
