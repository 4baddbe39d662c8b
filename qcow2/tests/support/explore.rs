//! Many schedules of one piece of concurrent code, on both cores, each named by the seed of its batch.

#![allow(unreachable_pub, dead_code, reason = "part of the tests that include it")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

/// Schedules per seed: they share a scheduler, which learns from one how long the next will be.
const BATCH: usize = 10;

/// What the schedules came to.
#[derive(Debug, Default)]
pub struct Outcome {
    pub schedules: usize,
    /// What each schedule counted, added up.
    pub counted: usize,
    /// The seed of the batch, and what went wrong.
    pub fault: Option<(u64, String)>,
}

/// Runs `one(workload seed)` under at least `schedules` schedules; it returns a count, or what went wrong. `SEED` chooses one
/// batch. Stops soon after the first fault, which a panic and a deadlock are too.
pub fn explore(schedules: usize, one: impl Fn(u64) -> Result<usize, String> + Send + Sync + 'static) -> Outcome {
    let one = Arc::new(one);
    let seeds = match std::env::var("SEED") {
        Ok(seed) => seed.parse().map(|seed| seed..seed + 1).unwrap_or(0..1),
        Err(_) => 0..schedules.div_ceil(BATCH) as u64,
    };
    let next = AtomicU64::new(seeds.start);
    let (done, counted) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let fault: Mutex<Option<(u64, String)>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || fault.lock().is_ok_and(|fault| fault.is_some()) {
                        return;
                    }
                    let (ran, result) = batch(seed, &one, &counted);
                    done.fetch_add(ran, Ordering::Relaxed);
                    if let (Err(text), Ok(mut fault)) = (result, fault.lock()) {
                        fault.get_or_insert((seed, text));
                    }
                }
            });
        }
    });
    let fault = fault.into_inner().unwrap_or_default();
    Outcome { schedules: done.into_inner(), counted: counted.load(Ordering::Relaxed), fault }
}

fn batch(
    seed: u64,
    one: &Arc<impl Fn(u64) -> Result<usize, String> + Send + Sync + 'static>,
    counted: &Arc<AtomicUsize>,
) -> (usize, Result<(), String>) {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    config.failure_persistence = FailurePersistence::None;
    config.max_steps = MaxSteps::FailAfter(2_000_000);
    config.silence_warnings = true;
    let fault: Arc<Mutex<Option<String>>> = Arc::default();
    let ran = Arc::new(AtomicUsize::new(0));
    let (one, counted, found, number) = (one.clone(), counted.clone(), fault.clone(), ran.clone());
    let body = move || {
        let iteration = number.fetch_add(1, Ordering::Relaxed) as u64;
        if found.lock().is_ok_and(|fault| fault.is_some()) {
            return;
        }
        match one(seed * BATCH as u64 + iteration) {
            Ok(count) => {
                counted.fetch_add(count, Ordering::Relaxed);
            }
            Err(text) => {
                if let Ok(mut fault) = found.lock() {
                    fault.get_or_insert(format!("schedule {iteration}: {text}"));
                }
            }
        }
    };
    // A third of the seeds go to schedules with few switches, which find what needs a long stretch of one thread.
    let outcome = catch_unwind(AssertUnwindSafe(|| match seed % 3 {
        0 => Runner::new(PctScheduler::new_from_seed(seed, 4, BATCH), config).run(body),
        _ => Runner::new(RandomScheduler::new_from_seed(seed, BATCH), config).run(body),
    }));
    let text = fault.lock().ok().and_then(|mut fault| fault.take());
    let panicked = outcome.err().map(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
    });
    let result = text.or(panicked).map_or(Ok(()), Err);
    (ran.load(Ordering::Relaxed), result)
}
