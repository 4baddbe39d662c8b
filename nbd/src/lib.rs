//! An NBD server and a small client for tokio.
#![forbid(unsafe_code)]

pub mod error;
pub mod export;

pub use error::{Error, ErrorKind};
pub use export::{Buffer, Device, Durability, Export, Extent, ZeroFlags};
