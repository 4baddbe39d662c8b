//! Blockyard backs up all disks of a VM from one snapshot, through NBD servers in its own process, into qcow2 images.
//!
//! The service as a library, so that the binary, the demo and the tests run the very same thing. Layers from the outside
//! in: `cli` and `http` parse and answer, `serve` owns the process, `backup` is the job, `points` is what becomes of it, `restore`
//! the way back, `repository` knows its files, `listeners` and `export` join the two engines, `node` calls the appliance,
//! `discovery` asks it which disks a VM has, `store` holds all SQL, `events` and `webhooks` tell what is in it; `config`, `clock`,
//! `digest` and `id` are plain values that every layer may name.
#![forbid(unsafe_code)]

pub mod app;
pub mod backup;
pub mod cli;
pub mod clock;
pub mod config;
pub mod digest;
pub mod discovery;
pub mod events;
pub mod export;
pub mod http;
pub mod id;
pub mod listeners;
pub mod login;
pub mod metrics;
pub mod node;
pub mod points;
pub mod repositories;
pub mod repository;
pub mod restore;
pub mod secret;
pub mod serve;
pub mod store;
pub mod telemetry;
pub mod webhooks;
pub mod words;
