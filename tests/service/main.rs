//! The service through its HTTP side and its command line: real services on loopback, in this process or as a child.
//!
//! One binary with a file per topic, because linking takes longer than running.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod auth;
mod cli;
mod configuration;
mod inventory;
mod keys;
mod listing;
mod problems;
mod process;
mod removal;
mod repositories;
mod schema;
