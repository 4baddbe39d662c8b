//! What the server process holds: memory and descriptors.

use std::time::{Duration, Instant};

use crate::process::DEADLINE;

/// What the server may hold beside its budget, by its contract; and what may stay of it when all is over.
pub const BESIDE: u64 = 64 << 20;

/// Resident memory now and at its highest, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    pub now: u64,
    pub peak: u64,
}

pub fn memory(process: u32) -> Memory {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    };
    Memory { now: field("VmRSS:"), peak: field("VmHWM:") }
}

/// The descriptor that an image keeps from its first write to its close: its queue of writes.
const RING: usize = 1;

/// Open descriptors.
pub fn descriptors(process: u32) -> usize {
    std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().count()
}

pub fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// Waits until a condition holds.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What the server held before a load, and its way back there.
#[derive(Clone, Copy, Debug)]
pub struct Before {
    process: u32,
    memory: Memory,
    descriptors: usize,
}

impl Before {
    pub fn of(process: u32) -> Self {
        Self { process, memory: memory(process), descriptors: descriptors(process) }
    }

    /// Waits until descriptors are as before, and memory is within `slack` bytes of it.
    pub async fn comes_back(&self, slack: u64, name: &str) {
        let Self { process, .. } = *self;
        until("the descriptors are closed", || descriptors(process) <= self.descriptors + RING).await;
        let bound = self.memory.now + slack;
        let deadline = Instant::now() + DEADLINE;
        while memory(process).now > bound && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let after = memory(process);
        println!(
            "{name}: descriptors {} -> {}, resident {} -> {} (highest {})",
            self.descriptors,
            descriptors(process),
            mib(self.memory.now),
            mib(after.now),
            mib(after.peak),
        );
        assert!(after.now <= bound, "memory did not come back");
    }
}
