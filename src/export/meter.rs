//! What one export has seen, measured where the bytes pass: connections, bytes written and zeroed, covered ranges, and the
//! first failure. Read by the job; written by the export only.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::coverage::{Coverage, Run};
use super::rate::Rate;
use super::received::{Pieces, Received, ReceivedMarks};
use super::signals::Signals;

/// How many ranges of a disk may lie apart from each other: more take over a hundred megabytes of memory, and make a manifest that
/// nobody reads.
const RANGES_MAX: usize = 2 << 20;

/// Why an image stopped being usable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The file system is full (or a quota or limit is reached).
    pub no_space: bool,
    /// What the engine said.
    pub text: String,
}

/// The numbers of one export.
#[derive(Debug)]
pub struct Meter {
    signals: Arc<Signals>,
    connections: AtomicUsize,
    ever_connected: AtomicBool,
    changed: AtomicBool,
    late_change: AtomicBool,
    written_bytes: AtomicU64,
    zeroed_bytes: AtomicU64,
    zeroed_over_data_bytes: AtomicU64,
    identical_bytes: AtomicU64,
    read_bytes: AtomicU64,
    /// None where nobody asks: it grows with every range that touches no other.
    coverage: Option<Mutex<Covered>>,
    rate: Mutex<Rate>,
    /// When the last connection went, while there is none.
    lost_at: Mutex<Option<Instant>>,
    failure: Mutex<Option<Failure>>,
}

/// The covered ranges, how fast they grow, and what was received for them.
#[derive(Debug)]
struct Covered {
    ranges: Coverage,
    received: Received,
    rate: Rate,
}

/// One look at a [`Meter`]. Numbers of requests that end meanwhile may be in some of them and not in others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Connections open now.
    pub connections: usize,
    /// Whether there ever was one.
    pub ever_connected: bool,
    /// Whether anything was written or zeroed.
    pub changed: bool,
    /// Payload of successful writes.
    pub written_bytes: u64,
    /// Length of successful zero requests.
    pub zeroed_bytes: u64,
    /// Of that, in requests of 4 MiB and more, what was data in the last usable restore point of the disk.
    pub zeroed_over_data_bytes: u64,
    /// Of what was written or zeroed, what the image read the same already and therefore did not store.
    pub identical_bytes: u64,
    /// Payload of successful reads.
    pub read_bytes: u64,
    /// Distinct bytes written or zeroed.
    pub covered_bytes: u64,
}

/// Counts a connection until dropped.
#[derive(Debug)]
pub struct ConnectionCount {
    meter: Arc<Meter>,
}

impl Meter {
    /// Nothing seen yet of a disk of this size.
    pub fn new(size_bytes: u64, signals: Arc<Signals>) -> Self {
        let (ranges, received, rate) = (Coverage::new(), Received::new(size_bytes), Rate::default());
        Self {
            signals,
            connections: AtomicUsize::new(0),
            ever_connected: AtomicBool::new(false),
            changed: AtomicBool::new(false),
            late_change: AtomicBool::new(false),
            written_bytes: AtomicU64::new(0),
            zeroed_bytes: AtomicU64::new(0),
            zeroed_over_data_bytes: AtomicU64::new(0),
            identical_bytes: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            coverage: Some(Mutex::new(Covered { ranges, received, rate })),
            rate: Mutex::default(),
            lost_at: Mutex::default(),
            failure: Mutex::default(),
        }
    }

    /// The same without a memory of which ranges were written.
    pub fn without_coverage(signals: Arc<Signals>) -> Self {
        Self { coverage: None, ..Self::new(0, signals) }
    }

    /// All numbers at once.
    pub fn reading(&self) -> Reading {
        Reading {
            connections: self.connections.load(Ordering::Acquire),
            ever_connected: self.ever_connected.load(Ordering::Acquire),
            changed: self.changed.load(Ordering::Acquire),
            written_bytes: self.written_bytes.load(Ordering::Acquire),
            zeroed_bytes: self.zeroed_bytes.load(Ordering::Acquire),
            zeroed_over_data_bytes: self.zeroed_over_data_bytes.load(Ordering::Acquire),
            identical_bytes: self.identical_bytes.load(Ordering::Acquire),
            read_bytes: self.read_bytes.load(Ordering::Acquire),
            covered_bytes: self.coverage.as_ref().map_or(0, |coverage| lock(coverage).ranges.covered_bytes()),
        }
    }

    /// A copy of the covered ranges; none without coverage.
    pub fn coverage(&self) -> Coverage {
        self.coverage.as_ref().map(|coverage| lock(coverage).ranges.clone()).unwrap_or_default()
    }

    /// The ranges that were received, and the digests of what came for them; none without coverage.
    pub fn received(&self) -> Option<(Vec<Run>, ReceivedMarks)> {
        let coverage = lock(self.coverage.as_ref()?);
        let ranges: Vec<Run> = coverage.ranges.runs().collect();
        let marks = coverage.received.marks(&ranges);
        Some((ranges, marks))
    }

    /// Whether anybody asks what was received.
    pub(super) fn takes_pieces(&self) -> bool {
        self.coverage.is_some()
    }

    /// Since when there has been no connection, when there was one before.
    pub fn disconnected_since(&self) -> Option<Instant> {
        *lock(&self.lost_at)
    }

    /// Payload written per second, over the last ten seconds.
    pub fn written_per_second(&self) -> u64 {
        lock(&self.rate).per_second(Instant::now())
    }

    /// Bytes that came to be covered per second, over the last ten seconds; 0 without coverage.
    pub fn covered_per_second(&self) -> u64 {
        self.coverage.as_ref().map_or(0, |coverage| lock(coverage).rate.per_second(Instant::now()))
    }

    /// Whether a write or zero request came after the gate was closed.
    pub fn late_change(&self) -> bool {
        self.late_change.load(Ordering::Acquire)
    }

    /// The first failure of the image.
    pub fn failure(&self) -> Option<Failure> {
        lock(&self.failure).clone()
    }

    pub(super) fn connected(self: &Arc<Self>) -> ConnectionCount {
        {
            let mut lost_at = lock(&self.lost_at);
            self.connections.fetch_add(1, Ordering::AcqRel);
            *lost_at = None;
        }
        self.ever_connected.store(true, Ordering::Release);
        self.signals.change();
        ConnectionCount { meter: Arc::clone(self) }
    }

    /// A read is done; says when, so that nobody has to look at the clock again.
    pub(super) fn read(&self, length: u64) -> Instant {
        let now = Instant::now();
        self.read_bytes.fetch_add(length, Ordering::AcqRel);
        self.signals.life_at(now);
        now
    }

    /// A write of this range is done, with these pieces of the disk if it had whole ones; says when.
    pub(super) fn written(&self, offset: u64, length: u64, pieces: Option<&Pieces>) -> Instant {
        let now = Instant::now();
        self.written_bytes.fetch_add(length, Ordering::AcqRel);
        lock(&self.rate).add(length, now);
        self.covered(offset, length, now, |received, once| received.written(offset, length, pieces, once));
        now
    }

    /// What the image has left out so far. Requests end in any order, and the count only grows.
    pub(super) fn identical(&self, bytes: u64) {
        self.identical_bytes.fetch_max(bytes, Ordering::AcqRel);
    }

    /// Zeroes of this range are done; says when.
    pub(super) fn zeroed(&self, offset: u64, length: u64) -> Instant {
        let now = Instant::now();
        self.zeroed_bytes.fetch_add(length, Ordering::AcqRel);
        self.covered(offset, length, now, |received, once| received.zeroed(offset, length, once));
        now
    }

    /// This range was discarded: it may read as it did, or not.
    pub(super) fn discarded(&self, offset: u64, length: u64) {
        if let Some(coverage) = &self.coverage {
            lock(coverage).received.forget(offset, length);
        }
        self.signals.life();
    }

    pub(super) fn zeroed_over_data(&self, length: u64) {
        self.zeroed_over_data_bytes.fetch_add(length, Ordering::AcqRel);
    }

    pub(super) fn alive(&self) {
        self.signals.life();
    }

    pub(super) fn late(&self) {
        self.late_change.store(true, Ordering::Release);
        self.signals.change();
    }

    pub(super) fn failed(&self, failure: Failure) {
        lock(&self.failure).get_or_insert(failure);
        self.signals.change();
    }

    /// `receive` is told whether none of these bytes had come before.
    fn covered(&self, offset: u64, length: u64, now: Instant, receive: impl FnOnce(&mut Received, bool)) {
        if let Some(coverage) = &self.coverage {
            let mut coverage = lock(coverage);
            let more = coverage.ranges.add(offset, length);
            coverage.rate.add(more, now);
            receive(&mut coverage.received, more == length);
            if coverage.ranges.runs().len() > RANGES_MAX {
                let text = format!("writes lie apart in more than {RANGES_MAX} places");
                self.failed(Failure { no_space: false, text });
            }
        }
        if self.changed.swap(true, Ordering::AcqRel) {
            self.signals.life_at(now);
        } else {
            self.signals.change();
        }
    }
}

impl Drop for ConnectionCount {
    fn drop(&mut self) {
        {
            let mut lost_at = lock(&self.meter.lost_at);
            if self.meter.connections.fetch_sub(1, Ordering::AcqRel) == 1 {
                *lost_at = Some(Instant::now());
            }
        }
        self.meter.signals.change();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_disk_is_disconnected_when_its_last_connection_is_gone() {
        let meter = Arc::new(Meter::new(1 << 30, Arc::default()));
        assert_eq!(meter.disconnected_since(), None);
        let idle = meter.connected();
        let busy = meter.connected();
        drop(busy);
        assert_eq!((meter.reading().connections, meter.disconnected_since()), (1, None));
        drop(idle);
        assert_eq!(meter.disconnected_since(), Some(Instant::now()));
        let _again = meter.connected();
        assert_eq!(meter.disconnected_since(), None);
        assert!(meter.reading().ever_connected);
    }

    #[tokio::test]
    async fn progress_counts_kinds_apart_and_covers_each_byte_once() {
        let meter = Arc::new(Meter::new(1 << 30, Arc::default()));
        meter.written(0, 1024, None);
        meter.written(512, 1024, None);
        meter.zeroed(4096, 512);
        let reading = meter.reading();
        assert_eq!((reading.written_bytes, reading.zeroed_bytes, reading.covered_bytes), (2048, 512, 2048));
        assert_eq!(meter.coverage().first_gap(8192), Some((1536, 2560)));
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_twice_counts_as_payload_and_not_as_coverage() {
        let meter = Meter::new(1 << 30, Arc::default());
        for second in 0..20 {
            meter.written(second * 1000, 1000, None);
            meter.written(second * 1000, 1000, None);
            meter.zeroed((1 << 20) + second * 500, 500);
            tokio::time::advance(std::time::Duration::from_secs(1)).await;
        }
        assert_eq!((meter.written_per_second(), meter.covered_per_second()), (2000, 1500));
    }

    #[test]
    fn writes_that_lie_apart_in_too_many_places_are_a_failure_and_no_memory_without_end() {
        let meter = Meter::new(1 << 30, Arc::default());
        for place in 0..RANGES_MAX as u64 {
            meter.zeroed(place * 1024, 512);
        }
        assert_eq!(meter.failure(), None);
        meter.zeroed(1 << 40, 512);
        assert!(meter.failure().unwrap().text.contains("places"));
    }

    #[test]
    fn the_first_failure_is_the_one_that_counts() {
        let meter = Meter::new(1 << 30, Arc::default());
        meter.failed(Failure { no_space: true, text: "full".into() });
        meter.failed(Failure { no_space: false, text: "poisoned".into() });
        assert_eq!(meter.failure().unwrap().text, "full");
    }
}
