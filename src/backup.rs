//! The backup job.

pub mod coverage;
pub mod state;
