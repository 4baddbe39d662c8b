//! A crash-safe qcow2 engine for backup images.
//!
//! What it promises: a crash, at any moment, loses at most what was not flushed, and changes nothing else; after the first
//! failed write or sync nothing is acknowledged any more; an image that was closed is clean by every tool's judgement.
//! How: host space only grows within a session, data is written before anything points at it, a flush has two barriers, and
//! the dirty bit is durable before the first change. Payload is acknowledged when it is in memory and written behind.
//!
//! Start at [`Image`] (blocking) or [`AsyncImage`]; [`create`], [`check`], [`repair`] and [`info`] work on paths;
//! [`flatten`] and [`compare`] on a [`Disk`]; [`merge`] on the upper layers of a chain.
//!
//! Inside, from the top down: `image` (one file per operation) uses `tables` (the mapping in memory), `allocate` (host
//! space), `write_behind` (payload on its way), `references` and `refcounts` (who owns what), `backing` (the layers below),
//! all over `storage` (the file) and `format` (bytes and values, pure).
#![deny(unsafe_code)]

/// Whether a deliberate mistake is alive; never, but in builds that are there to test the tests (`mutants.rs`).
#[cfg(not(feature = "mutants"))]
macro_rules! mutant {
    ($name:literal) => {
        false
    };
}
#[cfg(feature = "mutants")]
macro_rules! mutant {
    ($name:literal) => {
        crate::mutants::is_alive($name)
    };
}

mod allocate;
mod async_image;
mod backing;
mod bitmaps;
mod buffer;
mod check;
mod cluster_lock;
mod compare;
mod compressed;
mod counts;
mod create;
mod disk;
mod error;
mod finish;
mod flatten;
mod format;
mod geometry;
mod huge;
mod image;
mod info;
mod l1;
mod lock;
mod merge;
#[cfg(feature = "mutants")]
pub mod mutants;
mod packing;
mod partial;
mod payload;
mod poison;
mod preallocate;
mod progress;
mod refcounts;
mod references;
mod regular_file;
mod repair;
mod room;
mod snapshots;
pub mod storage;
mod sync;
mod tables;
mod write_behind;

pub use async_image::AsyncImage;
pub use backing::{Layer, backing_size};
pub use buffer::{Buffer, BufferPool};
pub use check::{CheckReport, check, check_on};
pub use compare::{Comparison, Difference, compare};
pub use compressed::{Compression, CompressionLevel};
pub use create::{CreateOptions, Preallocation, create, create_on};
pub use disk::Disk;
pub use error::{Error, Result};
pub use flatten::{Flattened, Target, flatten};
pub use format::header::{Backing, BackingFormat};
pub use image::{Caching, Durability, Extent, ExtentKind, Identical, Image, OpenOptions, ZeroMode};
pub use info::{ImageInfo, info, info_on};
pub use lock::Access;
pub use merge::{Merged, merge};
pub use progress::{Progress, Watch};
pub use repair::{repair, repair_on};
