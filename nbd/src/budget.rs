//! Memory for payloads, bounded over all connections and listeners of a process.
//!
//! Two pools, so that READ data nobody collects never stand in the way of WRITE payload. A permit is taken before the
//! memory exists and travels with it. Waiting is first come, first served, in the connection and then in the process; a
//! part of each pool is kept for connections that hold nothing, one small piece for each connection that there may be, so
//! that no number of greedy ones can starve the rest. Nobody waits for a permit while holding one that cannot be freed
//! without it.

use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};

use crate::half_open::HalfOpen;
use crate::limits::BudgetLimits;

/// The least that is kept for one connection, in bytes, however many there may be: less is not worth a call.
const LEAST: u32 = 4 << 10;
/// The most that one gets out of what is kept, in bytes: a larger piece ([`crate::Limits::piece_bytes`]) is not asked for.
const MOST: u32 = 1 << 20;

/// The bounds that all servers of a process share; make one and hand it to each.
#[derive(Debug)]
pub struct Budget {
    pub(crate) input: Arc<Pool>,
    pub(crate) output: Arc<Pool>,
    pub(crate) connections: Arc<Semaphore>,
    pub(crate) refusals: Arc<Semaphore>,
    pub(crate) half_open: Arc<HalfOpen>,
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
            half_open: HalfOpen::new(limits.half_open),
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
    kept: Mutex<Kept>,
    used: AtomicU64,
    peak: AtomicU64,
}

/// The part for connections that hold nothing. Half of it is promised, the same to each; of the other half each who comes gets
/// a fraction of what is left, so that the first get more and nobody gets the rest.
#[derive(Debug)]
struct Kept {
    left: u32,
    /// What each connection is promised, a power of two.
    promise: u32,
    /// Connections that may still come and ask for it; below 0 if device calls outlive theirs.
    to_come: i64,
}

/// How a request can use what is kept.
#[derive(Clone, Copy, Debug)]
enum Need {
    /// With any size.
    Pieces,
    /// With all that it asks for, or not at all.
    Whole,
}

impl Kept {
    fn new(bytes: u32, connections: u32) -> Self {
        let promise = (1 << (bytes / 2 / connections.max(1)).max(1).ilog2()).clamp(LEAST, MOST);
        Self { left: bytes, promise, to_come: connections.into() }
    }

    /// How much there is for a connection that holds nothing. Less than `bytes` is a power of two.
    fn offer(&self, bytes: u32, need: Need) -> Option<u32> {
        let promised = i64::from(self.promise) * self.to_come.max(0);
        let spare = u32::try_from(i64::from(self.left) - promised).unwrap_or(0);
        let size = match need {
            Need::Pieces => bytes.min((1 << (spare / 16).max(1).ilog2()).clamp(self.promise, MOST)),
            Need::Whole if bytes <= self.promise.max((spare / 4).min(MOST)) => bytes,
            Need::Whole => return None,
        };
        Some(size).filter(|size| *size <= self.left)
    }

    fn take(&mut self, size: u32) {
        self.left -= size;
        self.to_come -= 1;
    }

    fn give_back(&mut self, size: u32) {
        self.left += size;
        self.to_come += 1;
    }
}

fn half_of(limits: &BudgetLimits) -> u32 {
    u32::try_from(limits.bytes / 2).unwrap_or(u32::MAX)
}

impl Pool {
    fn new(limits: &BudgetLimits) -> Self {
        let half = half_of(limits);
        let kept = u32::try_from(limits.kept_bytes).unwrap_or(u32::MAX).min(half / 2);
        let connections = u32::try_from(limits.connections).unwrap_or(u32::MAX);
        Self {
            common: Semaphore::new(half as usize - kept as usize),
            common_bytes: half - kept,
            kept: Mutex::new(Kept::new(kept, connections)),
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long a connection that holds nothing waits its turn before it takes what is kept: as long as memory moves, large pieces
/// are worth waiting for. Guess.
const PATIENCE: Duration = Duration::from_millis(100);

/// What one connection holds of a pool, and its own bound.
#[derive(Debug)]
pub(crate) struct Share {
    pool: Arc<Pool>,
    own: Semaphore,
    own_bytes: u32,
    /// Permits out of the pool that this connection holds.
    held: AtomicUsize,
    freed: Notify,
    /// It has waited in vain, and takes what is kept until its turn comes.
    impatient: AtomicBool,
}

impl Share {
    pub(crate) fn new(pool: &Arc<Pool>, own_bytes: u32) -> Arc<Self> {
        Arc::new(Self {
            pool: pool.clone(),
            own: Semaphore::new(own_bytes as usize),
            own_bytes,
            held: AtomicUsize::new(0),
            freed: Notify::new(),
            impatient: AtomicBool::new(false),
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
        Some(self.common_permit(bytes))
    }

    /// Waits for a permit for `bytes`, at most [`Share::largest`]. A permit larger than the connection's own bound takes
    /// all of that bound.
    ///
    /// # Cancellation
    /// Dropping the future takes nothing.
    pub(crate) async fn acquire(self: &Arc<Self>, bytes: u32) -> Permit {
        Line::new(self, bytes).wait(bytes, Need::Whole).await
    }

    /// Waits for its turn.
    async fn turn(self: Arc<Self>, bytes: u32) -> Permit {
        let own = self.own.acquire_many(bytes.min(self.own_bytes)).await;
        let common = self.pool.common.acquire_many(bytes).await;
        // Both semaphores are never closed, so an error cannot come; were it to, waiting for ever is the safe answer.
        let (Ok(own), Ok(common)) = (own, common) else { std::future::pending().await };
        own.forget();
        common.forget();
        self.common_permit(bytes)
    }

    fn common_permit(self: &Arc<Self>, bytes: u32) -> Permit {
        self.held.fetch_add(1, Ordering::AcqRel);
        self.impatient.store(false, Ordering::Relaxed);
        self.permit(bytes, Source::Common)
    }

    /// Takes what is kept, unless the connection holds something.
    fn take_kept(self: &Arc<Self>, bytes: u32, need: Need) -> Option<Permit> {
        let mut kept = self.pool.kept();
        let size = kept.offer(bytes, need)?;
        self.held.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Acquire).ok()?;
        kept.take(size);
        drop(kept);
        Some(self.permit(size, Source::Kept))
    }

    fn permit(self: &Arc<Self>, bytes: u32, source: Source) -> Permit {
        let used = self.pool.used.fetch_add(u64::from(bytes), Ordering::Relaxed) + u64::from(bytes);
        self.pool.peak.fetch_max(used, Ordering::Relaxed);
        Permit { share: self.clone(), bytes, source }
    }
}

/// The place of one request in the queue for memory. The request keeps it while it goes on with kept pieces.
pub(crate) struct Line {
    share: Arc<Share>,
    most: u32,
    turn: Option<Pin<Box<dyn Future<Output = Permit> + Send>>>,
}

impl Line {
    /// For a request whose pieces are at most `most` bytes.
    pub(crate) fn new(share: &Arc<Share>, most: u32) -> Self {
        Self { share: share.clone(), most, turn: None }
    }

    /// A permit for the next piece, of `bytes`; or, when memory is short and the connection holds nothing, for less of it,
    /// which is a power of two.
    ///
    /// # Cancellation
    /// Dropping the future takes nothing, and the place in the queue stays.
    pub(crate) async fn next(&mut self, bytes: u32) -> Permit {
        self.wait(bytes, Need::Pieces).await
    }

    /// Gives up the place in the queue: there is no next piece.
    pub(crate) fn leave(&mut self) {
        self.turn = None;
    }

    async fn wait(&mut self, bytes: u32, need: Need) -> Permit {
        let Self { share, most, turn } = self;
        if turn.is_none()
            && let Some(permit) = share.try_acquire(bytes)
        {
            return permit;
        }
        let waiting = turn.get_or_insert_with(|| Box::pin(share.clone().turn((*most).max(bytes))));
        loop {
            let mut freed = pin!(share.freed.notified());
            freed.as_mut().enable();
            let impatient = share.impatient.load(Ordering::Relaxed);
            // Whose connection holds something hears of its freedom; others may give back what is kept without a word.
            let timed = !impatient || share.held.load(Ordering::Acquire) == 0;
            tokio::select! {
                biased;
                mut permit = &mut *waiting => {
                    *turn = None;
                    permit.shrink(bytes);
                    return permit;
                }
                Some(permit) = async { share.take_kept(bytes, need) }, if impatient => return permit,
                () = freed, if impatient => {}
                () = tokio::time::sleep(PATIENCE), if timed => share.impatient.store(true, Ordering::Relaxed),
            }
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
    /// How many bytes it is for.
    pub(crate) fn bytes(&self) -> u32 {
        self.bytes
    }

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
        match self.source {
            Source::Common => {
                // A permit above the connection's own bound took no more than that bound.
                own.add_permits(((left + count).min(*own_bytes) - left.min(*own_bytes)) as usize);
                pool.common.add_permits(count as usize);
            }
            // It took nothing of that bound, which may be given to requests that wait their turn.
            Source::Kept => pool.kept().give_back(count),
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

    /// What each connection of [`small`] is promised.
    const LITTLE: u32 = 256 << 10;

    fn small() -> Arc<Budget> {
        // Each half: 6 MiB in common, and 2 MiB kept for four connections.
        Budget::new(&BudgetLimits { bytes: 16 << 20, kept_bytes: 2 << 20, connections: 4, ..BudgetLimits::default() })
    }

    async fn ready<F: Future>(future: F) -> Option<F::Output> {
        tokio::time::timeout(10 * PATIENCE, future).await.ok()
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
    async fn a_connection_with_nothing_gets_a_little_when_the_pool_is_empty() {
        let budget = small();
        let greedy = Share::new(&budget.output, 6 * MIB);
        let all = greedy.acquire(6 * MIB).await;
        assert!(ready(greedy.acquire(LITTLE)).await.is_none(), "it holds something");
        let modest = Share::new(&budget.output, 2 * MIB);
        let kept = ready(modest.acquire(LITTLE)).await.unwrap();
        assert!(ready(modest.acquire(LITTLE)).await.is_none(), "once for each");
        let other = Share::new(&budget.output, 2 * MIB);
        assert!(ready(other.acquire(MIB)).await.is_none(), "a whole reply of this size waits");
        let piece = ready(Line::new(&other, MIB).next(MIB)).await.unwrap();
        assert_eq!(piece.bytes(), LITTLE, "in pieces it goes on");
        drop((kept, piece, all));
        assert!(ready(other.acquire(6 * MIB)).await.is_some());
        assert_eq!(budget.usage().output, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn however_many_are_greedy_each_connection_gets_a_little() {
        let limits = BudgetLimits::default();
        let budget = Budget::new(&limits);
        let mut held = Vec::new();
        let mut sizes = Vec::new();
        for _ in 0..limits.connections {
            let share = Share::new(&budget.input, 8 * MIB);
            let first = ready(Line::new(&share, MIB).next(MIB)).await.unwrap();
            sizes.push(first.bytes());
            held.push(first);
            while let Some(more) = share.try_acquire(MIB) {
                held.push(more);
            }
        }
        // 112 MiB are in common; who comes later gets less and less.
        assert_eq!(sizes[..14], [MIB; 14]);
        assert_eq!(sizes[14..17], [512 << 10, 256 << 10, 256 << 10]);
        assert!(sizes[14..].is_sorted_by(|a, b| a >= b));
        assert_eq!(sizes[limits.connections - 1], 8 << 10);
        assert!(budget.usage().input <= 128 << 20);
        drop(held);
        assert_eq!(budget.usage().input, 0);
        let share = Share::new(&budget.input, 112 * MIB);
        assert!(share.try_acquire(112 * MIB).is_some(), "all is back");
        let Kept { left, to_come, .. } = *budget.input.kept();
        assert_eq!((left, to_come), (16 << 20, 1024));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_keeps_its_place_while_it_goes_on_with_less() {
        let budget = small();
        let greedy = Share::new(&budget.output, 6 * MIB);
        let all = greedy.acquire(6 * MIB).await;
        let modest = Share::new(&budget.output, 2 * MIB);
        let mut line = Line::new(&modest, MIB);
        for _ in 0..3 {
            assert_eq!(ready(line.next(MIB)).await.unwrap().bytes(), LITTLE);
        }
        // Another one that asks later is served later.
        let late = Share::new(&budget.output, 6 * MIB);
        let mut later = Box::pin(late.acquire(6 * MIB));
        assert!(ready(&mut later).await.is_none());
        drop(all);
        let turn = ready(line.next(MIB)).await.unwrap();
        assert_eq!(turn.bytes(), MIB);
        assert!(ready(&mut later).await.is_none());
        drop(turn);
        assert!(ready(&mut later).await.is_some());
        assert_eq!(budget.usage().output, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_whose_connection_becomes_empty_gets_a_little() {
        let budget = small();
        let greedy = Share::new(&budget.output, 6 * MIB);
        let _all = greedy.acquire(6 * MIB).await;
        let modest = Share::new(&budget.output, 2 * MIB);
        let first = modest.acquire(LITTLE).await;
        let waiting = tokio::spawn({
            let modest = modest.clone();
            async move { modest.acquire(LITTLE).await }
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
        let kept = other.acquire(LITTLE).await;
        assert!(ready(other.acquire(LITTLE)).await.is_none());
        drop((held, kept));
        assert_eq!(budget.usage().input, 0);
        assert!(ready(other.acquire(6 * MIB)).await.is_some());
    }
}
