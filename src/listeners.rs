//! Listeners.
pub mod ports;
