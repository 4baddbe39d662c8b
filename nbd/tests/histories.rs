//! Recorded histories of concurrent clients: each 512-byte sector is a register, and what was read of it is explained by
//! some order of its requests in which each takes effect between its start and its end ("Ordering of messages and writes").
//! `SCALE` multiplies the number of histories.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]
#![allow(clippy::print_stdout, reason = "the figures of the run")]

mod common;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use async_trait::async_trait;
use blockyard_nbd::client::{Client, Negotiation};
use blockyard_nbd::{Durability, Error, ZeroFlags};
use common::devices::{Call, Disk, Hook, Hooked, Mem};
use common::servers::{NAME, Served, options};
use common::soon;

const SECTOR: u64 = 512;
const SECTORS: u64 = 48;
/// Requests of one client, one after the other.
const ROUNDS: u64 = 12;

/// What one request did to one sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Wrote(u64),
    Read(u64),
}

#[derive(Clone, Copy, Debug)]
struct Event {
    sector: u64,
    act: Act,
    start: u64,
    end: u64,
}

/// Whether some order explains the events of one sector that began as zeroes. A read that fits may take effect at once,
/// since it changes nothing; only the order of writes has to be tried.
fn is_explained(events: &[Event]) -> bool {
    assert!(events.len() <= 128, "{} events", events.len());
    let all = if events.len() == 128 { u128::MAX } else { (1 << events.len()) - 1 };
    let mut seen = HashSet::new();
    let mut open = vec![(0u128, 0u64)];
    while let Some((mut done, value)) = open.pop() {
        let deadline = |done: u128| {
            let left = events.iter().enumerate().filter(|(at, _)| done >> at & 1 == 0);
            left.map(|(_, event)| event.end).min().unwrap_or(u64::MAX)
        };
        let next = |done: u128| {
            let limit = deadline(done);
            let left = events.iter().enumerate().filter(move |(at, _)| done >> at & 1 == 0);
            left.filter(move |(_, event)| event.start < limit)
        };
        while let Some((at, _)) = next(done).find(|(_, event)| event.act == Act::Read(value)) {
            done |= 1 << at;
        }
        if done == all {
            return true;
        }
        if seen.insert((done, value)) {
            open.extend(next(done).filter_map(|(at, event)| match event.act {
                Act::Wrote(value) => Some((done | 1 << at, value)),
                Act::Read(_) => None,
            }));
        }
    }
    false
}

#[test]
fn the_judge_knows_stale_lost_and_invented_values() {
    let event = |act, start, end| Event { sector: 0, act, start, end };
    let (write, read) = (Act::Wrote, Act::Read);
    assert!(is_explained(&[event(read(0), 0, 1), event(write(7), 2, 3), event(read(7), 4, 5)]));
    assert!(is_explained(&[event(write(7), 0, 9), event(read(0), 1, 2), event(read(7), 3, 4)]), "concurrent");
    assert!(is_explained(&[event(write(7), 0, 9), event(write(8), 1, 8), event(read(7), 10, 11)]), "any order");
    assert!(!is_explained(&[event(write(7), 0, 1), event(read(0), 2, 3)]), "lost");
    assert!(!is_explained(&[event(write(7), 0, 1), event(write(8), 2, 3), event(read(7), 4, 5)]), "stale");
    assert!(!is_explained(&[event(read(7), 0, 1)]), "invented");
    let back = [event(write(7), 0, 9), event(read(7), 1, 2), event(read(0), 3, 4)];
    assert!(!is_explained(&back), "seen, then gone");
}

/// Lets calls wait for each other as chance will have it.
struct Dawdling(AtomicU64);

#[async_trait]
impl Hook for Dawdling {
    async fn before(&self, _: Call, _: u64, _: u64) -> Result<(), Error> {
        let turn = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, SeqCst);
        for _ in 0..(turn >> 60) {
            tokio::task::yield_now().await;
        }
        Ok(())
    }
}

struct Recorder {
    clock: AtomicU64,
    events: std::sync::Mutex<Vec<Event>>,
}

impl Recorder {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, SeqCst)
    }

    fn note(&self, first: u64, start: u64, acts: impl Iterator<Item = Act>) {
        let end = self.now();
        let events = (first..).zip(acts).map(|(sector, act)| Event { sector, act, start, end });
        self.events.lock().unwrap().extend(events);
    }
}

/// The value of each sector, or a failure if one is torn.
fn values(bytes: &[u8]) -> impl Iterator<Item = Act> {
    bytes.chunks(SECTOR as usize).map(|sector| {
        let (words, _) = sector.as_chunks::<8>();
        assert!(words.iter().all(|word| *word == words[0]), "a torn sector");
        Act::Read(u64::from_le_bytes(words[0]))
    })
}

/// Requests of one task, one after the other, on a connection that others use as well.
async fn work(client: Client, recorder: Arc<Recorder>, task: u64, mut seed: u64) {
    for round in 1..=ROUNDS {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let count = (seed >> 40) % 20 + 1;
        let first = (seed >> 50) % (SECTORS - count);
        let (offset, length) = (first * SECTOR, (count * SECTOR) as u32);
        let start = recorder.now();
        match (seed >> 33) % 8 {
            0..3 => {
                let value = task * 1000 + round;
                let data = value.to_le_bytes().repeat(length as usize / 8);
                client.write(offset, data, Durability::OnFlush).await.unwrap();
                recorder.note(first, start, (0..count).map(|_| Act::Wrote(value)));
            }
            3 => {
                client.zero(offset, u64::from(length), ZeroFlags::default(), Durability::OnFlush).await.unwrap();
                recorder.note(first, start, (0..count).map(|_| Act::Wrote(0)));
            }
            _ => {
                let bytes = client.read(offset, length).await.unwrap();
                recorder.note(first, start, values(&bytes));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_sector_behaves_like_a_register_under_concurrent_clients() {
    let mut judged = 0;
    let scale: u64 = std::env::var("SCALE").map_or(1, |scale| scale.parse().unwrap());
    for seed in 0..150 * scale {
        let mut options = options();
        // Requests of up to 10 KiB are worked on in pieces.
        options.limits.piece_bytes = 4096;
        let device = Hooked::new(Mem::new(SECTORS * SECTOR), Dawdling(AtomicU64::new(seed)));
        let served = Served::with(Disk::new(NAME, SECTORS * SECTOR, device), options).await;
        let recorder = Arc::new(Recorder { clock: AtomicU64::new(0), events: Default::default() });
        let mut tasks = Vec::new();
        for connection in 0..4u64 {
            let mut negotiation = Negotiation::over(served.pipe(2000)).await.unwrap();
            match connection % 3 {
                0 => negotiation.structured_replies().await.unwrap(),
                1 => negotiation.extended_headers().await.unwrap(),
                _ => {}
            }
            let client = negotiation.go(NAME).await.unwrap();
            tasks.extend((0..4).map(|part| {
                let task = connection * 4 + part + 1;
                tokio::spawn(work(client.clone(), recorder.clone(), task, seed * 100 + task))
            }));
        }
        for task in tasks {
            soon("a client", task).await.unwrap();
        }
        let last = served.client().await;
        let start = recorder.now();
        let bytes = soon("the last read", last.read(0, (SECTORS * SECTOR) as u32)).await.unwrap();
        recorder.note(0, start, values(&bytes));
        let events = recorder.events.lock().unwrap();
        for sector in 0..SECTORS {
            let own: Vec<Event> = events.iter().copied().filter(|event| event.sector == sector).collect();
            judged += own.len();
            assert!(is_explained(&own), "seed {seed}, sector {sector}: {own:?}");
        }
    }
    println!("{judged} accesses to sectors, each explained");
}
