//! The same conversations with our server, with qemu-nbd and with nbdkit. Where they differ, the table in `differences` says
//! why and who is right; a difference that is not there fails, and so does one that is there and not seen.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

#[path = "../common/mod.rs"]
mod common;
mod conversation;
mod differences;
#[path = "../common/programs.rs"]
mod programs;
mod rows;
mod script;
mod servers;
