//! The life of a restore point after its commit.
//!
//! Whoever opens the files of a point pins it first, with everything below it, in the transaction in which it sees the point
//! committed ([`leases::pin_chain`](crate::store::leases::pin_chain)); whoever removes files does so only to a point that, in one transaction, nobody pins and
//! nothing builds upon. So no file goes under a reader, whatever runs side by side.

pub mod state;
