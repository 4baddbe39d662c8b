//! What exports, connections and listeners have seen so far: plain counters that anyone may read at any time, and channels
//! for those who wait for the first connection or for the end of the last one.
//!
//! A request is counted once, by its connection: a few additions to memory that no other connection touches, and no
//! allocation. An export adds up its live connections and what the closed ones left ([`ExportStats::snapshot`]).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

use crate::ErrorKind;
use crate::transmission::Mode;
use crate::wire::Command;

/// What a request is, for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operation {
    /// `NBD_CMD_READ`.
    Read,
    /// `NBD_CMD_WRITE`.
    Write,
    /// `NBD_CMD_FLUSH`.
    Flush,
    /// `NBD_CMD_TRIM`.
    Trim,
    /// `NBD_CMD_CACHE`.
    Cache,
    /// `NBD_CMD_WRITE_ZEROES`.
    WriteZeroes,
    /// `NBD_CMD_BLOCK_STATUS`.
    BlockStatus,
    /// Any other number; such requests are refused.
    Other,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Trim,
        Self::Cache,
        Self::WriteZeroes,
        Self::BlockStatus,
        Self::Other,
    ];

    /// The protocol's name in small letters: `read`, `write_zeroes`; `other`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::Cache => "cache",
            Self::WriteZeroes => "write_zeroes",
            Self::BlockStatus => "block_status",
            Self::Other => "other",
        }
    }
}

impl From<Command> for Operation {
    fn from(command: Command) -> Self {
        match command {
            Command::READ => Self::Read,
            Command::WRITE => Self::Write,
            Command::FLUSH => Self::Flush,
            Command::TRIM => Self::Trim,
            Command::CACHE => Self::Cache,
            Command::WRITE_ZEROES => Self::WriteZeroes,
            Command::BLOCK_STATUS => Self::BlockStatus,
            _ => Self::Other,
        }
    }
}

/// The upper bound of the first bucket of a [`Latency`] is `1 << FIRST_BUCKET` microseconds.
const FIRST_BUCKET: u32 = 4;
/// Buckets with an upper bound; one more takes the rest.
const BOUNDED_BUCKETS: usize = 22;

/// How long requests took, from their header to the last byte of their reply that the socket took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// Requests per bucket; see [`Latency::bounds`].
    pub buckets: [u64; BOUNDED_BUCKETS + 1],
    /// All durations together, in nanoseconds.
    pub sum_ns: u64,
}

impl Latency {
    /// The upper bounds, inclusive, of all buckets but the last, which has none: powers of two, 16 µs to 33.6 s.
    pub fn bounds() -> [Duration; BOUNDED_BUCKETS] {
        let mut bound = 1 << FIRST_BUCKET;
        [(); BOUNDED_BUCKETS].map(|()| {
            let this = Duration::from_micros(bound);
            bound *= 2;
            this
        })
    }

    /// Requests in all.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    fn bucket(took: Duration) -> usize {
        // Rounded up, so that what is over a bound by nanoseconds is over it.
        let micros = took.as_nanos().div_ceil(1000).max(1);
        let power = u128::BITS - (micros - 1).leading_zeros();
        (power.saturating_sub(FIRST_BUCKET) as usize).min(BOUNDED_BUCKETS)
    }
}

/// What was counted of requests, at one moment. All of it only grows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests received, whatever became of them.
    pub requests: u64,
    /// Bytes handed to clients by READ.
    pub bytes_read: u64,
    /// Bytes of WRITE that the device took.
    pub bytes_written: u64,
    /// Bytes of WRITE_ZEROES that the device took.
    pub bytes_zeroed: u64,
    /// Bytes of TRIM that the device took.
    pub bytes_trimmed: u64,
    /// Extents told in answer to BLOCK_STATUS.
    pub extents: u64,
    /// WRITEs with an extended header and without the flag PAYLOAD_LEN, which the protocol demands and some clients leave
    /// out; it is done without.
    pub writes_without_payload_flag: u64,
    /// Requests answered with an error, in the order of [`ErrorKind::ALL`].
    pub errors: [u64; ErrorKind::ALL.len()],
    /// Requests that are over, in the order of [`Operation::ALL`].
    pub latency: [Latency; Operation::ALL.len()],
}

impl Counts {
    /// Requests answered with an error of this kind.
    pub fn errors_of(&self, kind: ErrorKind) -> u64 {
        self.errors[kind as usize]
    }

    /// Requests answered with an error.
    pub fn all_errors(&self) -> u64 {
        self.errors.iter().sum()
    }

    /// How long requests of this kind took.
    pub fn latency_of(&self, operation: Operation) -> &Latency {
        &self.latency[operation as usize]
    }

    /// Requests received and not over: their reply, or a part of it, is still to come or to be sent.
    pub fn in_flight(&self) -> u64 {
        // What is over was loaded before what was begun, but nothing orders the two for other processors.
        self.requests.saturating_sub(self.latency.iter().map(Latency::count).sum())
    }

    /// Adds what was counted elsewhere.
    pub fn add(&mut self, other: &Self) {
        // Taken apart, so that a field that is added to the type is not forgotten here.
        let Self {
            requests,
            bytes_read,
            bytes_written,
            bytes_zeroed,
            bytes_trimmed,
            extents,
            writes_without_payload_flag,
            errors,
            latency,
        } = other;
        self.requests += requests;
        self.bytes_read += bytes_read;
        self.bytes_written += bytes_written;
        self.bytes_zeroed += bytes_zeroed;
        self.bytes_trimmed += bytes_trimmed;
        self.extents += extents;
        self.writes_without_payload_flag += writes_without_payload_flag;
        self.errors.iter_mut().zip(errors).for_each(|(sum, more)| *sum += more);
        for (sum, more) in self.latency.iter_mut().zip(latency) {
            sum.buckets.iter_mut().zip(more.buckets).for_each(|(sum, more)| *sum += more);
            sum.sum_ns += more.sum_ns;
        }
    }
}

/// The counters behind [`Counts`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) requests: AtomicU64,
    pub(crate) bytes_read: AtomicU64,
    pub(crate) bytes_written: AtomicU64,
    pub(crate) bytes_zeroed: AtomicU64,
    pub(crate) bytes_trimmed: AtomicU64,
    pub(crate) extents: AtomicU64,
    pub(crate) writes_without_payload_flag: AtomicU64,
    errors: [AtomicU64; ErrorKind::ALL.len()],
    latency: [LatencyCounters; Operation::ALL.len()],
}

#[derive(Debug, Default)]
struct LatencyCounters {
    buckets: [AtomicU64; BOUNDED_BUCKETS + 1],
    sum_ns: AtomicU64,
}

impl Counters {
    /// So many requests are answered with an error.
    pub(crate) fn failed(&self, kind: ErrorKind, requests: u64) {
        self.errors[kind as usize].fetch_add(requests, Relaxed);
    }

    /// A request is over.
    pub(crate) fn ended(&self, operation: Operation, began: Instant) {
        let took = began.elapsed();
        let latency = &self.latency[operation as usize];
        latency.buckets[Latency::bucket(took)].fetch_add(1, Relaxed);
        latency.sum_ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    fn counts(&self) -> Counts {
        let load = |counter: &AtomicU64| counter.load(Relaxed);
        let latency = self
            .latency
            .each_ref()
            .map(|counters| Latency { buckets: counters.buckets.each_ref().map(load), sum_ns: load(&counters.sum_ns) });
        Counts {
            latency,
            requests: load(&self.requests),
            bytes_read: load(&self.bytes_read),
            bytes_written: load(&self.bytes_written),
            bytes_zeroed: load(&self.bytes_zeroed),
            bytes_trimmed: load(&self.bytes_trimmed),
            extents: load(&self.extents),
            writes_without_payload_flag: load(&self.writes_without_payload_flag),
            errors: self.errors.each_ref().map(load),
        }
    }
}

/// What is known of a connection when it reaches the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFacts {
    /// Where it comes from: address and port, or what stands for them.
    pub peer: String,
    /// The form of replies it asked for.
    pub mode: Mode,
    /// The subject of its certificate, if it showed one.
    pub tls_subject: Option<String>,
}

/// The counters of one connection.
#[derive(Debug)]
struct ConnectionStats {
    client: ClientFacts,
    since: SystemTime,
    counters: Counters,
}

/// One live connection at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionSnapshot {
    /// Its number among the connections of the export, by arrival.
    pub id: u64,
    /// Who it is.
    pub client: ClientFacts,
    /// When it reached the transmission phase.
    pub since: SystemTime,
    /// What it did.
    pub counts: Counts,
}

/// The counters of one export. They only grow, except the number of connections.
#[derive(Debug, Default)]
pub struct ExportStats {
    connections: watch::Sender<usize>,
    accepted: watch::Sender<u64>,
    refused: AtomicU64,
    stalled: AtomicU64,
    clients: Mutex<Clients>,
}

#[derive(Debug, Default)]
struct Clients {
    live: BTreeMap<u64, Arc<ConnectionStats>>,
    /// What connections did that are closed.
    gone: Counts,
}

/// What an export counted, at one moment. Each figure is exact; together they are a snapshot of a moving thing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Connections in the transmission phase now, those included whose last device call still runs.
    pub connections: u64,
    /// Connections that ever reached the transmission phase.
    pub accepted: u64,
    /// Times that a connection was turned away because the export had enough of them; it may try again.
    pub refused: u64,
    /// Connections closed because the peer stalled in the middle of something.
    pub stalled: u64,
    /// What all connections did, the closed ones included.
    pub counts: Counts,
}

impl Snapshot {
    /// Adds what another export counted.
    pub fn add(&mut self, other: &Self) {
        let Self { connections, accepted, refused, stalled, counts } = other;
        self.connections += connections;
        self.accepted += accepted;
        self.refused += refused;
        self.stalled += stalled;
        self.counts.add(counts);
    }
}

impl ExportStats {
    /// All figures now.
    pub fn snapshot(&self) -> Snapshot {
        // Under one lock, so that a connection that closes is neither missed nor counted twice.
        let clients = self.clients();
        let mut counts = clients.gone.clone();
        clients.live.values().for_each(|connection| counts.add(&connection.counters.counts()));
        drop(clients);
        Snapshot {
            connections: u64::try_from(*self.connections.borrow()).unwrap_or(u64::MAX),
            accepted: *self.accepted.borrow(),
            refused: self.refused.load(Relaxed),
            stalled: self.stalled.load(Relaxed),
            counts,
        }
    }

    /// The connections in the transmission phase, in the order of their arrival.
    pub fn live(&self) -> Vec<ConnectionSnapshot> {
        let connection = |(&id, stats): (&u64, &Arc<ConnectionStats>)| ConnectionSnapshot {
            id,
            client: stats.client.clone(),
            since: stats.since,
            counts: stats.counters.counts(),
        };
        self.clients().live.iter().map(connection).collect()
    }

    /// The number of connections in the transmission phase, as it changes. A connection counts until the last device call
    /// that it started has returned, so at 0 nothing touches the device any more on behalf of a client.
    pub fn connections(&self) -> watch::Receiver<usize> {
        self.connections.subscribe()
    }

    /// The number of connections that ever reached the transmission phase, as it grows: above 0 there was a first one,
    /// however short.
    pub fn accepted(&self) -> watch::Receiver<u64> {
        self.accepted.subscribe()
    }

    /// Takes a place for a connection if fewer than `cap` are taken; dropping the place gives it back.
    pub(crate) fn enter(self: &Arc<Self>, cap: usize) -> Option<Place> {
        let entered = self.connections.send_if_modified(|now| {
            let free = *now < cap;
            *now += usize::from(free);
            free
        });
        if !entered {
            self.refused.fetch_add(1, Relaxed);
        }
        entered.then(|| Place(self.clone()))
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room for one connection of an export, until dropped.
#[derive(Debug)]
pub(crate) struct Place(Arc<ExportStats>);

impl Place {
    /// The connection has reached the transmission phase.
    pub(crate) fn transmit(self, client: ClientFacts) -> Seat {
        let connection = Arc::new(ConnectionStats { client, since: SystemTime::now(), counters: Counters::default() });
        let mut id = 0;
        {
            // In the list before anybody hears of it.
            let mut clients = self.0.clients();
            self.0.accepted.send_modify(|accepted| {
                *accepted += 1;
                id = *accepted;
            });
            clients.live.insert(id, connection.clone());
        }
        Seat { connection, id, place: self }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.send_modify(|now| *now -= 1);
    }
}

/// A connection in the transmission phase, in the list of its export until dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    connection: Arc<ConnectionStats>,
    id: u64,
    // After the rest: who hears that the last connection is gone finds its figures in the total.
    place: Place,
}

impl Seat {
    pub(crate) fn counters(&self) -> &Counters {
        &self.connection.counters
    }

    /// The connection is closed because its peer stalled.
    pub(crate) fn stalled(&self) {
        self.place.0.stalled.fetch_add(1, Relaxed);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut clients = self.place.0.clients();
        clients.live.remove(&self.id);
        clients.gone.add(&self.connection.counters.counts());
    }
}

/// The counters of one listener: what became of connections before an export was asked for.
#[derive(Debug, Default)]
pub struct ListenerStats {
    pub(crate) accepted: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) dropped: AtomicU64,
    pub(crate) timed_out: AtomicU64,
    pub(crate) evicted: AtomicU64,
    pub(crate) rejected: AtomicU64,
}

/// What a listener counted, at one moment. All of it only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListenerSnapshot {
    /// Connections taken from the socket or handed over.
    pub accepted: u64,
    /// Connections turned away with a reason because the process had enough of them.
    pub refused: u64,
    /// Connections closed without a word because too many were being told a reason.
    pub dropped: u64,
    /// Handshakes that took too long.
    pub timed_out: u64,
    /// Handshakes closed because too many were under way.
    pub evicted: u64,
    /// Handshakes closed because the client broke a rule of them, those of TLS and its certificates included, or asked for what
    /// cannot be refused politely.
    pub rejected: u64,
}

impl ListenerStats {
    /// All figures now.
    pub fn snapshot(&self) -> ListenerSnapshot {
        let load = |counter: &AtomicU64| counter.load(Relaxed);
        ListenerSnapshot {
            accepted: load(&self.accepted),
            refused: load(&self.refused),
            dropped: load(&self.dropped),
            timed_out: load(&self.timed_out),
            evicted: load(&self.evicted),
            rejected: load(&self.rejected),
        }
    }
}

impl ListenerSnapshot {
    /// Adds what another listener counted.
    pub fn add(&mut self, other: &Self) {
        let Self { accepted, refused, dropped, timed_out, evicted, rejected } = other;
        self.accepted += accepted;
        self.refused += refused;
        self.dropped += dropped;
        self.timed_out += timed_out;
        self.evicted += evicted;
        self.rejected += rejected;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_in_the_first_bucket_whose_bound_it_does_not_exceed() {
        let bounds = Latency::bounds();
        assert_eq!((bounds[0].as_micros(), bounds[BOUNDED_BUCKETS - 1].as_micros()), (16, 1 << 25));
        assert_eq!(Latency::bucket(Duration::ZERO), 0);
        for (index, bound) in bounds.into_iter().enumerate() {
            assert_eq!(Latency::bucket(bound), index);
            assert_eq!(Latency::bucket(bound + Duration::from_nanos(1)), index + 1);
        }
        assert_eq!(Latency::bucket(Duration::MAX), BOUNDED_BUCKETS);
    }

    #[test]
    fn enumerations_are_in_the_order_of_their_lists() {
        for (index, operation) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, index);
        }
        for (index, kind) in ErrorKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, index);
        }
    }

    #[test]
    fn a_closed_connection_leaves_the_list_and_keeps_its_share_of_the_total() {
        let stats = Arc::new(ExportStats::default());
        let client = |peer: &str| ClientFacts { peer: peer.into(), mode: Mode::Simple, tls_subject: None };
        let first = stats.enter(2).unwrap().transmit(client("a"));
        let second = stats.enter(2).unwrap().transmit(client("b"));
        assert!(stats.enter(2).is_none());
        first.counters().requests.fetch_add(2, Relaxed);
        first.counters().ended(Operation::Read, Instant::now());
        second.counters().requests.fetch_add(1, Relaxed);
        let before = stats.snapshot();
        assert_eq!((before.connections, before.accepted, before.refused), (2, 2, 1));
        assert_eq!((before.counts.requests, before.counts.in_flight()), (3, 2));
        first.counters().ended(Operation::Read, Instant::now());
        drop(first);
        let after = stats.snapshot();
        assert_eq!((after.connections, after.counts.requests, after.counts.in_flight()), (1, 3, 1));
        let live = stats.live();
        assert_eq!((live.len(), live[0].id, live[0].client.peer.as_str()), (1, 2, "b"));
    }
}
