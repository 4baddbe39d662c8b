//! Payload on its way to the file: memory that several owners read, and parts of it.

use std::fmt;
use std::io::IoSlice;
use std::ops::Range;

use crate::room::Share;
use crate::sync::Arc;

/// Bytes that nobody changes any more, owned by whoever still has to write or read them.
pub(crate) type Memory = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Memory with the room that it takes up.
struct Lodged<B> {
    bytes: B,
    _share: Share,
}

impl<B: AsRef<[u8]>> AsRef<[u8]> for Lodged<B> {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

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

    /// Bytes that take up some room until the last piece of them is gone.
    pub(crate) fn in_room(bytes: impl AsRef<[u8]> + Send + Sync + 'static, share: Share) -> Self {
        Self::new(Arc::new(Lodged { bytes, _share: share }))
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

/// Bytes that go to the file in one write, one piece behind the other. Clones are the same bytes.
#[derive(Clone, Debug)]
pub struct Payload(Arc<Vec<Piece>>);

impl Payload {
    pub(crate) fn new(pieces: Vec<Piece>) -> Self {
        Self(Arc::new(pieces))
    }

    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.0
    }

    /// In bytes.
    pub fn len(&self) -> u64 {
        self.0.iter().map(Piece::len).sum()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes. They stay where they are, unchanged, as long as any clone of this lives.
    pub fn slices(&self) -> Vec<IoSlice<'_>> {
        self.0.iter().map(|piece| IoSlice::new(piece.bytes())).collect()
    }
}
