//! The states that a power cut may leave of a recording, one by one.

#![allow(unreachable_pub, reason = "part of the tests that include it")]

use super::sim_disk::{Call, Change, Content};

/// One state that a crash may leave.
pub struct CrashState {
    pub content: Content,
    /// The crash cannot have been before this time: the last surviving call had begun.
    pub earliest: u64,
    /// Nor after this one: the next sync would have completed.
    pub latest: u64,
}

/// A write cut at the disk's sectors, which are written whole or not at all.
fn sectors(offset: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let first = (512 - offset as usize % 512).min(bytes.len());
    let (head, rest) = bytes.split_at(first);
    let rest =
        rest.chunks(512).enumerate().map(move |(number, sector)| (offset + (first + number * 512) as u64, sector));
    std::iter::once((offset, head)).chain(rest)
}

/// How many pending calls are enumerated by all their subsets; with more, by prefixes, single ones and samples.
const ALL_SUBSETS: usize = 8;
const SAMPLES: usize = 64;

/// Every crash state of a recording that began with `base` durable.
pub fn crash_states(base: &Content, calls: &[Call], end: u64, seed: u64, mut visit: impl FnMut(CrashState)) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut durable = base.clone();
    let mut durable_since = 0;
    let mut pending: Vec<&Call> = Vec::new();
    for call in calls {
        if call.change.is_some() {
            pending.push(call);
            continue;
        }
        visit_epoch(&durable, &pending, durable_since, call.ended, &mut random, &mut visit);
        let (covered, rest): (Vec<_>, Vec<_>) = pending.into_iter().partition(|change| change.ended < call.started);
        covered.iter().for_each(|call| call.change.iter().for_each(|change| durable.apply(change)));
        durable_since = call.ended;
        pending = rest;
    }
    visit_epoch(&durable, &pending, durable_since, end, &mut random, &mut visit);
}

fn visit_epoch(
    durable: &Content,
    pending: &[&Call],
    since: u64,
    latest: u64,
    random: &mut fastrand::Rng,
    visit: &mut impl FnMut(CrashState),
) {
    let count = pending.len();
    let mut emit = |kept: &dyn Fn(usize) -> bool, torn: Option<usize>, random: &mut fastrand::Rng| {
        let last = (0..count).rev().find(|index| kept(*index));
        let earliest = last.map_or(since, |last| pending[last].started).max(since);
        let mut content = durable.clone();
        for (index, call) in pending.iter().enumerate() {
            // What is durable by itself cannot be missing once something later has begun.
            let forced = call.durable && call.ended < earliest;
            let Some(change) = call.change.as_ref().filter(|_| kept(index) || forced) else { continue };
            match (change, torn == Some(index) && !forced) {
                (Change::Write { offset, bytes }, true) => {
                    for (offset, sector) in sectors(*offset, bytes).filter(|_| random.bool()) {
                        content.apply(&Change::Write { offset, bytes: sector.to_vec() });
                    }
                }
                _ => content.apply(change),
            }
        }
        // A call that is durable by itself bounds the crash's time, if it is missing or torn.
        let partial = |index| !kept(index) || torn == Some(index);
        let bound = pending
            .iter()
            .enumerate()
            .filter(|(index, call)| call.durable && call.ended >= earliest && partial(*index));
        let bound = bound.map(|(_, call)| call.ended).min();
        visit(CrashState { content, earliest, latest: bound.unwrap_or(latest).min(latest) });
    };
    for prefix in 0..=count {
        emit(&|index| index < prefix, None, random);
        if prefix > 0 {
            emit(&|index| index < prefix, Some(prefix - 1), random);
        }
    }
    if count <= ALL_SUBSETS {
        for set in 0u32..1 << count {
            emit(&|index| set >> index & 1 == 1, None, random);
        }
    } else {
        for chosen in 0..count {
            emit(&|index| index != chosen, None, random);
            emit(&|index| index == chosen, None, random);
        }
        for _ in 0..SAMPLES {
            let mask: Vec<bool> = (0..count).map(|_| random.bool()).collect();
            emit(&|index| mask[index], Some(random.usize(..count)), random);
        }
    }
}
