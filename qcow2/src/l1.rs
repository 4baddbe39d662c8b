//! The L1 table in memory: a table of 32 MiB that is mostly empty costs what its entries need, not what the header says.

use crate::error::Result;

/// Entries per page: 4 KiB of memory.
const PAGE: usize = 512;

/// Host offset of the L2 table of each L1 entry; 0: none.
#[derive(Clone, Debug)]
pub(crate) struct L1 {
    pages: Vec<Option<Box<[u64]>>>,
    length: usize,
}

impl L1 {
    /// A table of `length` entries, all 0.
    pub(crate) fn empty(length: usize) -> Self {
        Self { pages: vec![None; length.div_ceil(PAGE)], length }
    }

    /// A table of `length` entries, filled by a function that is given something to store entries with.
    pub(crate) fn load(length: usize, fill: impl FnOnce(&mut Self) -> Result<()>) -> Result<Self> {
        let mut table = Self::empty(length);
        fill(&mut table)?;
        Ok(table)
    }

    /// Entries.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// Makes the table longer; new entries are 0.
    pub(crate) fn resize(&mut self, length: usize) {
        self.pages.resize(length.div_ceil(PAGE), None);
        self.length = length;
    }

    /// 0 past the end.
    pub(crate) fn get(&self, index: usize) -> u64 {
        let page = self.pages.get(index / PAGE).and_then(Option::as_deref);
        page.and_then(|page| page.get(index % PAGE)).copied().unwrap_or(0)
    }

    /// Returns whether there is such an entry.
    pub(crate) fn set(&mut self, index: usize, host: u64) -> bool {
        let Some(page) = self.pages.get_mut(index / PAGE).filter(|_| index < self.length) else { return false };
        page.get_or_insert_with(|| vec![0; PAGE].into())[index % PAGE] = host;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_found_again_and_empty_pages_cost_nothing() {
        let mut table = L1::empty(1 << 22);
        assert!(table.set(5, 50) && table.set((1 << 22) - 1, 70) && !table.set(1 << 22, 1));
        assert_eq!((table.get(5), table.get(6), table.get((1 << 22) - 1), table.get(1 << 30)), (50, 0, 70, 0));
        table.resize((1 << 22) + 1);
        assert!(table.set(1 << 22, 1) && table.len() == (1 << 22) + 1 && table.get(5) == 50);
        assert_eq!(table.pages.iter().flatten().count(), 3);
    }
}
