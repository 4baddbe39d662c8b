//! What the guest did to each sector and when, and which values that allows: after a crash, and to a reader.

#![allow(unreachable_pub, dead_code, reason = "part of the tests that include it")]

/// What a sector holds: zeroes, the mark of one write in one sector, or something that nobody wrote there.
pub type Value = u64;

pub const ZEROES: Value = 0;
pub const GARBAGE: Value = u64::MAX;
pub const SECTOR: usize = 512;

/// The mark of write number `id` (from 1 on) in a guest sector.
pub fn mark(id: u64, sector: usize) -> Value {
    id << 32 | (sector as u64 + 1)
}

pub fn sector_of(value: Value) -> Vec<u8> {
    value.to_le_bytes().repeat(SECTOR / 8)
}

pub fn value_of(bytes: &[u8]) -> Value {
    let (words, _) = bytes.as_chunks::<8>();
    match words.split_first() {
        Some((first, rest)) if rest.iter().all(|word| word == first) => Value::from_le_bytes(*first),
        _ => GARBAGE,
    }
}

/// A write, zero or discard.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    pub issued: u64,
    pub replied: u64,
    pub first_sector: usize,
    pub sectors: usize,
    /// The number of a write; `None`: zeroes.
    pub id: Option<u64>,
    pub durable: bool,
}

impl Event {
    pub fn value(&self, sector: usize) -> Value {
        self.id.map_or(ZEROES, |id| mark(id, sector))
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Flush {
    pub issued: u64,
    pub replied: u64,
}

#[derive(Clone, Debug)]
pub struct Read {
    pub issued: u64,
    pub replied: u64,
    pub first_sector: usize,
    pub values: Vec<Value>,
}

/// Everything that was asked of one image, by all threads.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// By guest sector.
    pub initial: Vec<Value>,
    pub events: Vec<Event>,
    pub flushes: Vec<Flush>,
    pub reads: Vec<Read>,
}

/// The events of each sector.
pub struct Index<'a> {
    history: &'a History,
    by_sector: Vec<Vec<Event>>,
}

impl<'a> Index<'a> {
    pub fn new(history: &'a History) -> Self {
        let mut by_sector = vec![Vec::new(); history.initial.len()];
        for event in &history.events {
            by_sector[event.first_sector..][..event.sectors].iter_mut().for_each(|list| list.push(*event));
        }
        Self { history, by_sector }
    }

    /// Whether nothing ever happened to a sector.
    pub fn is_quiet(&self, sector: usize) -> bool {
        self.by_sector[sector].is_empty()
    }

    /// Whether a sector may read as `value` after a crash at `time`. `covered`: [`Index::covered`] of that time.
    pub fn allows_after_crash(&self, sector: usize, value: Value, time: u64, covered: u64) -> bool {
        let is_durable = |event: &&Event| event.replied < covered || (event.durable && event.replied <= time);
        // Whatever was answered before the newest durable change was asked for is gone.
        let barrier = self.by_sector[sector].iter().filter(is_durable).map(|event| event.issued).max();
        self.allows(sector, value, time, barrier)
    }

    /// The issue time of the newest flush that was answered by then: changes answered before it are durable.
    pub fn covered(&self, time: u64) -> u64 {
        let flushes = self.history.flushes.iter().filter(|flush| flush.replied <= time);
        flushes.map(|flush| flush.issued).max().unwrap_or(0)
    }

    fn allows(&self, sector: usize, value: Value, issued_by: u64, barrier: Option<u64>) -> bool {
        (barrier.is_none() && value == self.history.initial[sector])
            || self.by_sector[sector].iter().any(|event| {
                event.issued <= issued_by
                    && barrier.is_none_or(|barrier| event.replied >= barrier)
                    && event.value(sector) == value
            })
    }

    /// The first read that no order of the operations explains.
    pub fn fault_of_reads(&self) -> Option<String> {
        self.history.reads.iter().find_map(|read| {
            read.values.iter().enumerate().find_map(|(index, value)| {
                let sector = read.first_sector + index;
                let before = self.by_sector[sector].iter().filter(|event| event.replied < read.issued);
                let barrier = before.map(|event| event.issued).max();
                let legal = self.allows(sector, *value, read.replied, barrier);
                (!legal).then(|| format!("sector {sector} was read as {value:#x} at {}..{}", read.issued, read.replied))
            })
        })
    }
}
