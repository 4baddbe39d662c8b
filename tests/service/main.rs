//! The service through its HTTP side: a real service in this process, real requests over loopback.
//!
//! One binary with a file per topic, because linking takes longer than running.

#[path = "../support/mod.rs"]
mod support;

mod inventory;
