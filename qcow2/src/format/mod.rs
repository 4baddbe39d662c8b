//! The on-disk format, as pure functions between bytes and values: no files, no tokio, no clock, no panic.
//!
//! Section numbers in this folder are those of the published specification (QEMU's `docs/interop/qcow2.rst`).
#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

pub(crate) mod backing;
pub(crate) mod entry;
mod feature_names;
pub(crate) mod header;
pub(crate) mod refcount;

/// Big-endian number at a byte offset, `None` past the end.
pub(crate) fn be32(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().map(|chunk| u32::from_be_bytes(*chunk))
}

/// Big-endian number at a byte offset, `None` past the end.
pub(crate) fn be64(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes.get(offset..)?.first_chunk().map(|chunk| u64::from_be_bytes(*chunk))
}
