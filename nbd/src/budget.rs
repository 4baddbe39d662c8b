//! Memory for payloads, bounded over all connections and listeners of a process.
//!
//! Two pools, so that READ data nobody collects never stand in the way of WRITE payload. A permit is taken before the
//! memory exists and travels with it. Waiting is first come, first served, in the connection and then in the process; a
//! part of each pool is kept for connections that hold nothing, one piece each, so that a few greedy ones cannot starve
//! the rest. Nobody waits for a permit while holding one that cannot be freed without it.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::sync::{Notify, Semaphore};

use crate::limits::BudgetLimits;

/// The bounds that all servers of a process share; make one and hand it to each.
#[derive(Debug)]
pub struct Budget {
    pub(crate) input: Arc<Pool>,
    pub(crate) output: Arc<Pool>,
    pub(crate) connections: Arc<Semaphore>,
    pub(crate) refusals: Arc<Semaphore>,
    pub(crate) max_connections: usize,
    /// What each pool may hold, in bytes.
    half: u32,
}

impl Budget {
    /// A budget with these bounds, nothing of it used.
    pub fn new(limits: &BudgetLimits) -> Arc<Self> {
        Arc::new(Self {
            input: Arc::new(Pool::new(limits)),
            output: Arc::new(Pool::new(limits)),
            connections: Arc::new(Semaphore::new(limits.connections)),
            refusals: Arc::new(Semaphore::new(limits.refusals)),
            max_connections: limits.connections,
            half: half_of(limits),
        })
    }

    /// What is in use now, the most there ever was, and the bounds.
    pub fn usage(&self) -> Usage {
        Usage {
            connections: self.max_connections - self.connections.available_permits().min(self.max_connections),
            max_connections: self.max_connections,
            limit: self.half.into(),
            input: self.input.used.load(Ordering::Relaxed),
            output: self.output.used.load(Ordering::Relaxed),
            input_peak: self.input.peak.load(Ordering::Relaxed),
            output_peak: self.output.peak.load(Ordering::Relaxed),
        }
    }
}

/// See [`Budget::usage`]; payload in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Connections now, those in the handshake included.
    pub connections: usize,
    /// Most connections there may be at once.
    pub max_connections: usize,
    /// Most WRITE payload, and most READ data, that there may be at once.
    pub limit: u64,
    /// WRITE payload now.
    pub input: u64,
    /// READ data now.
    pub output: u64,
    /// Most WRITE payload at once.
    pub input_peak: u64,
    /// Most READ data at once.
    pub output_peak: u64,
}

/// One half of the budget.
#[derive(Debug)]
pub(crate) struct Pool {
    common: Semaphore,
    common_bytes: u32,
    /// One permit per kept piece.
    kept: Semaphore,
    piece: u32,
    used: AtomicU64,
    peak: AtomicU64,
}

fn half_of(limits: &BudgetLimits) -> u32 {
    u32::try_from(limits.bytes / 2).unwrap_or(u32::MAX)
}

impl Pool {
    fn new(limits: &BudgetLimits) -> Self {
        let half = half_of(limits);
        let kept = u32::try_from(limits.kept_bytes).unwrap_or(u32::MAX).min(half / 2);
        let pieces = kept / limits.piece_bytes.max(1);
        Self {
            common: Semaphore::new(half as usize - kept as usize),
            common_bytes: half - kept,
            kept: Semaphore::new(pieces as usize),
            piece: limits.piece_bytes,
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
        }
    }
}

/// What one connection holds of a pool, and its own bound.
#[derive(Debug)]
pub(crate) struct Share {
    pool: Arc<Pool>,
    own: Semaphore,
    own_bytes: u32,
    /// Permits out of the pool that this connection holds.
    held: AtomicUsize,
    freed: Notify,
}

impl Share {
    pub(crate) fn new(pool: &Arc<Pool>, own_bytes: u32) -> Arc<Self> {
        Arc::new(Self {
            pool: pool.clone(),
            own: Semaphore::new(own_bytes as usize),
            own_bytes,
            held: AtomicUsize::new(0),
            freed: Notify::new(),
        })
    }

    /// The largest permit there can be, in bytes: more would wait for ever.
    pub(crate) fn largest(&self) -> u32 {
        self.pool.common_bytes
    }

    /// A permit for `bytes` if it can be had at once.
    pub(crate) fn try_acquire(self: &Arc<Self>, bytes: u32) -> Option<Permit> {
        let own = self.own.try_acquire_many(bytes.min(self.own_bytes)).ok()?;
        let common = self.pool.common.try_acquire_many(bytes).ok()?;
        own.forget();
        common.forget();
        self.held.fetch_add(1, Ordering::AcqRel);
        Some(self.permit(bytes, Source::Common))
    }

    /// Waits for a permit for `bytes`, at most [`Share::largest`]. A permit larger than the connection's own bound takes
    /// all of that bound.
    ///
    /// # Cancellation
    /// Dropping the future takes nothing.
    pub(crate) async fn acquire(self: &Arc<Self>, bytes: u32) -> Permit {
        if let Some(permit) = self.try_acquire(bytes) {
            return permit;
        }
        // Both semaphores are never closed, so an error cannot come; were it to, waiting for ever is the safe answer.
        let Ok(own) = self.own.acquire_many(bytes.min(self.own_bytes)).await else { std::future::pending().await };
        let source = self.take_from_pool(bytes).await;
        own.forget();
        self.permit(bytes, source)
    }

    async fn take_from_pool(&self, bytes: u32) -> Source {
        let pool = &*self.pool;
        let mut common = pin!(pool.common.acquire_many(bytes));
        loop {
            let mut freed = pin!(self.freed.notified());
            freed.as_mut().enable();
            let claim = if bytes <= pool.piece { Claim::of(&self.held) } else { None };
            tokio::select! {
                biased;
                permit = &mut common => {
                    if let Ok(permit) = permit {
                        permit.forget();
                    }
                    match claim {
                        Some(claim) => claim.keep(),
                        None => { self.held.fetch_add(1, Ordering::AcqRel); }
                    }
                    return Source::Common;
                }
                permit = pool.kept.acquire(), if claim.is_some() => {
                    if let Ok(permit) = permit {
                        permit.forget();
                    }
                    if let Some(claim) = claim {
                        claim.keep();
                    }
                    return Source::Kept;
                }
                () = freed, if claim.is_none() => {}
            }
        }
    }

    fn permit(self: &Arc<Self>, bytes: u32, source: Source) -> Permit {
        let used = self.pool.used.fetch_add(u64::from(bytes), Ordering::Relaxed) + u64::from(bytes);
        self.pool.peak.fetch_max(used, Ordering::Relaxed);
        Permit { share: self.clone(), bytes, source }
    }
}

/// The right of a connection that holds nothing to one kept piece; at most one at a time, since it counts as held.
struct Claim<'a>(Option<&'a AtomicUsize>);

impl<'a> Claim<'a> {
    fn of(held: &'a AtomicUsize) -> Option<Self> {
        held.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Acquire).ok().map(|_| Self(Some(held)))
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if let Some(held) = self.0 {
            held.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Common,
    Kept,
}

/// The right to `bytes` of memory; dropping it gives them back.
#[derive(Debug)]
pub(crate) struct Permit {
    share: Arc<Share>,
    bytes: u32,
    source: Source,
}

impl Permit {
    /// Gives back all but `bytes`.
    pub(crate) fn shrink(&mut self, bytes: u32) {
        if self.source == Source::Common && bytes < self.bytes {
            self.give_back(self.bytes - bytes, bytes);
            self.bytes = bytes;
        }
    }

    /// Returns `count` bytes to where they came from; `left` stay.
    fn give_back(&self, count: u32, left: u32) {
        let Share { pool, own, own_bytes, .. } = &*self.share;
        pool.used.fetch_sub(u64::from(count), Ordering::Relaxed);
        // A permit above the connection's own bound took no more than that bound.
        own.add_permits(((left + count).min(*own_bytes) - left.min(*own_bytes)) as usize);
        match self.source {
            Source::Common => pool.common.add_permits(count as usize),
            Source::Kept => pool.kept.add_permits(1),
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        // `held` first: whoever wakes up because of the bytes must find the connection empty if it is.
        self.share.held.fetch_sub(1, Ordering::AcqRel);
        self.give_back(self.bytes, 0);
        self.share.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u32 = 1 << 20;

    fn small() -> Arc<Budget> {
        // Each half: 6 MiB in common and 2 kept pieces.
        Budget::new(&BudgetLimits { bytes: 16 << 20, kept_bytes: 2 << 20, ..BudgetLimits::default() })
    }

    async fn ready<F: Future>(future: F) -> Option<F::Output> {
        tokio::time::timeout(std::time::Duration::from_millis(1), future).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_never_holds_more_than_its_own_bound() {
        let budget = small();
        let share = Share::new(&budget.input, 2 * MIB);
        let first = share.try_acquire(MIB).unwrap();
        let _second = share.acquire(MIB).await;
        assert!(share.try_acquire(MIB).is_none());
        assert!(ready(share.acquire(MIB)).await.is_none());
        drop(first);
        assert!(share.try_acquire(MIB).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_with_nothing_gets_a_kept_piece_when_the_pool_is_empty() {
        let budget = small();
        let greedy = Share::new(&budget.output, 6 * MIB);
        let all = greedy.acquire(6 * MIB).await;
        assert!(ready(greedy.acquire(MIB)).await.is_none(), "it holds something");
        let modest = Share::new(&budget.output, 2 * MIB);
        let kept = ready(modest.acquire(MIB)).await.unwrap();
        assert!(ready(modest.acquire(MIB)).await.is_none(), "one kept piece for each");
        let other = Share::new(&budget.output, 2 * MIB);
        let _other = ready(other.acquire(MIB)).await.unwrap();
        let third = Share::new(&budget.output, 2 * MIB);
        assert!(ready(third.acquire(MIB)).await.is_none(), "only two were kept");
        assert_eq!((budget.usage().output, budget.usage().limit), (8 << 20, 8 << 20));
        drop(kept);
        assert!(ready(third.acquire(MIB)).await.is_some());
        drop(all);
        assert!(ready(third.acquire(6 * MIB)).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_whose_connection_becomes_empty_gets_a_kept_piece() {
        let budget = small();
        let greedy = Share::new(&budget.output, 6 * MIB);
        let _all = greedy.acquire(6 * MIB).await;
        let modest = Share::new(&budget.output, 2 * MIB);
        let first = modest.acquire(MIB).await;
        let waiting = tokio::spawn({
            let modest = modest.clone();
            async move { modest.acquire(MIB).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(first);
        ready(waiting).await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_permit_takes_the_whole_bound_of_the_connection() {
        let budget = small();
        let share = Share::new(&budget.output, 2 * MIB);
        let mut large = share.acquire(5 * MIB).await;
        assert!(ready(share.acquire(1)).await.is_none());
        large.shrink(MIB);
        let _small = ready(share.acquire(MIB)).await.unwrap();
        drop(large);
        assert_eq!(budget.usage().output, 1 << 20);
        assert_eq!(budget.usage().output_peak, 5 << 20);
    }

    #[tokio::test(start_paused = true)]
    async fn giving_up_waiting_takes_nothing() {
        let budget = small();
        let share = Share::new(&budget.input, 6 * MIB);
        let held = share.acquire(6 * MIB).await;
        let other = Share::new(&budget.input, 6 * MIB);
        let kept = other.acquire(MIB).await;
        assert!(ready(other.acquire(MIB)).await.is_none());
        drop((held, kept));
        assert_eq!(budget.usage().input, 0);
        assert!(ready(other.acquire(6 * MIB)).await.is_some());
    }
}
