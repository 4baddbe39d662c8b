//! How far long work is, and the caller's way to end it.

use std::ops::ControlFlow;

use crate::error::{Error, Result};

/// How far work on a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Guest bytes that are done, holes included; never falls.
    pub done: u64,
    /// Guest bytes that there are.
    pub total: u64,
}

/// Hears of progress, after every piece of 2 MiB at most or a skipped hole, and at the end once more. A break cancels the
/// work: it ends with [`Error::Cancelled`] before the next piece.
pub type Watch<'a> = dyn FnMut(Progress) -> ControlFlow<()> + 'a;

/// Tells the caller; an error when the answer is to stop.
pub(crate) fn tell(watch: &mut Watch<'_>, done: u64, total: u64) -> Result<()> {
    match watch(Progress { done, total }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Cancelled),
    }
}
