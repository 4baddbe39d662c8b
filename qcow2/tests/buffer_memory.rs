//! What payload buffers cost the process: what is on loan, and no more. A binary of its own, because it looks at the memory of
//! the whole process.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking and tells its figures")]

use std::sync::atomic::{AtomicUsize, Ordering};

use blockyard_qcow2::{Buffer, BufferPool};

const MIB: usize = 1 << 20;
const LENT: usize = 64 * MIB;
const KEPT: usize = 16 * MIB;
/// Threads, their stacks, the test itself, and what threads that were interrupted just then are giving back to the system.
const REST: usize = (24 + 32) * MIB;

/// Resident memory of this process in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

/// Sizes as requests have them: small ones, round ones, odd ones.
fn any_length(random: &mut fastrand::Rng) -> usize {
    match random.u8(..4) {
        0 => 4096,
        1 => 1 << random.u32(12..25),
        2 => random.usize(1..MIB),
        _ => 256 << 10,
    }
}

#[test]
fn buffers_of_changing_sizes_on_many_threads_cost_what_is_on_loan() {
    let pool = BufferPool::new(KEPT);
    let before = resident();
    let (lent, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    for round in 0..3 {
        std::thread::scope(|scope| {
            for thread in 0..32 {
                let (pool, lent, most) = (&pool, &lent, &most);
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(round * 100 + thread);
                    let mut mine: Vec<Buffer> = Vec::new();
                    for step in 0..400 {
                        let length = any_length(&mut random);
                        let bytes = Buffer::memory_for(length);
                        if lent.fetch_add(bytes, Ordering::SeqCst) + bytes <= LENT {
                            let mut buffer = pool.lend(length);
                            buffer.as_mut().fill(1);
                            mine.push(buffer);
                        } else {
                            lent.fetch_sub(bytes, Ordering::SeqCst);
                        }
                        if step % 16 == 0 {
                            most.fetch_max(resident(), Ordering::SeqCst);
                        }
                        if !mine.is_empty() && (mine.len() > 8 || random.bool()) {
                            let buffer = mine.swap_remove(random.usize(..mine.len()));
                            let bytes = buffer.memory_bytes();
                            drop(buffer);
                            lent.fetch_sub(bytes, Ordering::SeqCst);
                        }
                    }
                    for buffer in mine {
                        lent.fetch_sub(buffer.memory_bytes(), Ordering::SeqCst);
                    }
                });
            }
        });
        let after = resident();
        println!("round {round}: at most {} MiB, {} MiB afterwards", most.load(Ordering::SeqCst) / MIB, after / MIB);
        assert!(most.load(Ordering::SeqCst) <= before + LENT + REST, "{most:?} while at most {LENT} were on loan");
        assert!(after <= before + KEPT + REST, "{after} afterwards");
    }
}
