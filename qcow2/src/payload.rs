//! Payload on its way to the file: memory that several owners read, and parts of it.

use std::fmt;
use std::ops::Range;

use crate::buffer::BufferPool;
use crate::sync::Arc;

/// Bytes that nobody changes any more, owned by whoever still has to write or read them.
pub(crate) type Memory = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A part of some memory.
#[derive(Clone)]
pub(crate) struct Piece {
    memory: Memory,
    range: Range<usize>,
}

impl Piece {
    pub(crate) fn new(memory: Memory) -> Self {
        let range = 0..(*memory).as_ref().len();
        Self { memory, range }
    }

    /// Of bytes that somebody else keeps: in memory that may go around the page cache.
    pub(crate) fn copy_of(bytes: &[u8]) -> Self {
        let mut memory = BufferPool::shared().lend(bytes.len());
        memory.as_mut().copy_from_slice(bytes);
        Self::new(Arc::new(memory))
    }

    pub(crate) fn from_vec(bytes: Vec<u8>) -> Self {
        Self::new(Arc::new(bytes))
    }

    pub(crate) fn len(&self) -> u64 {
        self.range.len() as u64
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        (*self.memory).as_ref().get(self.range.clone()).unwrap_or_default()
    }

    /// `length` bytes from `offset` on, both within this piece.
    pub(crate) fn part(&self, offset: u64, length: u64) -> Self {
        let start = (self.range.start + offset as usize).min(self.range.end);
        let end = (start + length as usize).min(self.range.end);
        Self { memory: self.memory.clone(), range: start..end }
    }
}

impl fmt::Debug for Piece {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Piece").field("range", &self.range).finish_non_exhaustive()
    }
}
