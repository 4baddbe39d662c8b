//! The states that a power cut may leave of a recording, one by one.
//!
//! Between two syncs: every prefix of the pending calls, every subset of few, else single ones dropped, single ones kept and
//! random subsets; one of the kept writes torn at 512 bytes or at 4 KiB; lengths that came without their data. What a failed
//! sync should have covered stays in doubt for good.

#![allow(unreachable_pub, dead_code, reason = "part of the tests that include it")]

use super::sim_disk::{Call, Change, Content};

/// One state that a crash may leave.
pub struct CrashState {
    pub content: Content,
    /// The crash cannot have been before this time: the last surviving call had begun.
    pub earliest: u64,
    /// Nor after this one: the next sync would have completed.
    pub latest: u64,
}

/// How many pending calls are enumerated by all their subsets; with more, by prefixes, single ones and samples.
const ALL_SUBSETS: usize = 8;
const SAMPLES: usize = 64;

/// What becomes of the pending calls.
struct Fate<'a> {
    kept: &'a dyn Fn(usize) -> bool,
    /// A kept write of which only some pieces arrive, and their size: 512 or 4096 bytes.
    torn: Option<(usize, u64)>,
    /// Writes that do not arrive have extended the file all the same.
    keeps_lengths: bool,
}

impl<'a> Fate<'a> {
    fn whole(kept: &'a dyn Fn(usize) -> bool) -> Self {
        Self { kept, torn: None, keeps_lengths: false }
    }
}

/// Every crash state of a recording that began with `base` durable.
pub fn crash_states(base: &Content, calls: &[Call], end: u64, seed: u64, mut visit: impl FnMut(CrashState)) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut epoch = Epoch { durable: base.clone(), since: 0, pending: Vec::new() };
    // What a failed sync gave up: no later one covers it.
    let mut in_doubt = 0;
    for call in calls {
        if call.change.is_some() {
            epoch.pending.push(call);
            continue;
        }
        epoch.visit(call.ended, &mut random, &mut visit);
        if call.has_failed {
            in_doubt = epoch.pending.len();
            continue;
        }
        let doubtful = epoch.pending[..in_doubt].to_vec();
        let (covered, rest): (Vec<_>, Vec<_>) =
            epoch.pending.split_off(in_doubt).into_iter().partition(|change| change.ended < call.started);
        covered.iter().for_each(|call| call.change.iter().for_each(|change| epoch.durable.apply(change)));
        epoch.since = call.ended;
        epoch.pending = [doubtful, rest].concat();
    }
    epoch.visit(end, &mut random, &mut visit);
}

/// The time between two syncs.
struct Epoch<'a> {
    durable: Content,
    since: u64,
    pending: Vec<&'a Call>,
}

impl Epoch<'_> {
    fn visit(&self, latest: u64, random: &mut fastrand::Rng, visit: &mut impl FnMut(CrashState)) {
        let count = self.pending.len();
        for prefix in 0..=count {
            let kept = &|index| index < prefix;
            visit(self.state(&Fate::whole(kept), latest, random));
            visit(self.state(&Fate { keeps_lengths: true, ..Fate::whole(kept) }, latest, random));
            if prefix > 0 {
                for size in [512, 4096] {
                    visit(self.state(&Fate { torn: Some((prefix - 1, size)), ..Fate::whole(kept) }, latest, random));
                }
            }
        }
        if count <= ALL_SUBSETS {
            for set in 0u32..1 << count {
                let kept = &|index| set >> index & 1 == 1;
                visit(self.state(&Fate::whole(kept), latest, random));
                if set != 0 {
                    let torn = Some((random.usize(..count), if random.bool() { 512 } else { 4096 }));
                    visit(self.state(&Fate { torn, ..Fate::whole(kept) }, latest, random));
                }
            }
            return;
        }
        for chosen in 0..count {
            visit(self.state(&Fate::whole(&|index| index != chosen), latest, random));
            visit(self.state(&Fate::whole(&|index| index == chosen), latest, random));
        }
        for _ in 0..SAMPLES {
            let mask: Vec<bool> = (0..count).map(|_| random.bool()).collect();
            let torn = Some((random.usize(..count), if random.bool() { 512 } else { 4096 }));
            let fate = Fate { kept: &|index| mask[index], torn, keeps_lengths: random.bool() };
            visit(self.state(&fate, latest, random));
        }
    }

    fn state(&self, fate: &Fate<'_>, latest: u64, random: &mut fastrand::Rng) -> CrashState {
        // Calls are listed by their ends, and overlap: the last one kept need not be the last that had begun.
        let begun =
            (0..self.pending.len()).filter(|index| (fate.kept)(*index)).map(|index| self.pending[index].started);
        let earliest = begun.max().unwrap_or(self.since).max(self.since);
        let mut content = self.durable.clone();
        let mut bound = latest;
        for (index, call) in self.pending.iter().enumerate() {
            // What is durable by itself cannot be missing once something later has begun.
            let is_forced = call.durable && call.ended < earliest;
            let torn = fate.torn.filter(|(torn, _)| *torn == index && !is_forced);
            let is_kept = (fate.kept)(index) || is_forced;
            // If it is missing or torn, it bounds the crash's time.
            if call.durable && !is_forced && (!is_kept || torn.is_some()) {
                bound = bound.min(call.ended);
            }
            match (&call.change, torn) {
                (Some(Change::Write { offset, bytes }), Some((_, size))) if is_kept => {
                    for (offset, piece) in pieces(*offset, bytes, size).filter(|_| random.bool()) {
                        content.apply(&Change::Write { offset, bytes: piece.to_vec() });
                    }
                }
                (Some(change), _) if is_kept => content.apply(change),
                (Some(Change::Write { offset, bytes }), _) if fate.keeps_lengths => {
                    let end = offset + bytes.len() as u64;
                    content.apply(&Change::Length(end.max(content.length())));
                }
                _ => {}
            }
        }
        CrashState { content, earliest, latest: bound }
    }
}

/// A write cut at multiples of `size`, between which the disk may stop.
fn pieces(offset: u64, bytes: &[u8], size: u64) -> impl Iterator<Item = (u64, &[u8])> {
    let first = ((size - offset % size) as usize).min(bytes.len());
    let (head, rest) = bytes.split_at(first);
    let size = size as usize;
    let rest =
        rest.chunks(size).enumerate().map(move |(number, piece)| (offset + (first + number * size) as u64, piece));
    std::iter::once((offset, head)).chain(rest)
}
