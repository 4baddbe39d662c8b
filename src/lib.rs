//! Blockyard backs up all disks of a VM from one snapshot, through NBD servers in its own process, into qcow2 images.
#![forbid(unsafe_code)]

pub mod backup;
pub mod node;
pub mod repository;
