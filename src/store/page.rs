//! Keyset paging: a page starts after the last row of the page before it, so rows that come or go in between neither
//! repeat nor hide others.

/// Which part of a list is wanted. `K` is what the list is ordered by, and unique.
#[derive(Clone, Debug)]
pub struct Page<K> {
    /// Rows at most.
    pub limit: u32,
    /// Key of the last row of the page before; `None` starts at the newest.
    pub after: Option<K>,
}

/// One page of a list, newest first.
#[derive(Clone, Debug)]
pub struct Listing<T, K> {
    /// The rows of this page.
    pub rows: Vec<T>,
    /// Rows of all pages together.
    pub total: u64,
    /// Key of the last row when there are more behind it.
    pub next: Option<K>,
}

impl<K> Page<K> {
    /// What to ask the database for: one row more than wanted tells whether there are more.
    pub(super) fn fetch_limit(&self) -> i64 {
        i64::from(self.limit) + 1
    }

    /// The page made of what [`Page::fetch_limit`] rows brought.
    pub(super) fn listing<T>(&self, mut rows: Vec<T>, total: u64, key: impl Fn(&T) -> K) -> Listing<T, K> {
        let limit = usize::try_from(self.limit).unwrap_or(usize::MAX);
        let more = rows.len() > limit;
        rows.truncate(limit);
        let next = if more { rows.last().map(key) } else { None };
        Listing { rows, total, next }
    }
}
