//! Which restore points of a VM in a repository are kept, and why. Pure: no clock, no files, no database.
//!
//! The points go from the newest to the oldest by the order of their commits. A rule such as `keep_daily` keeps the newest
//! usable point of each of the last days that have one; days are counted only when they have. A point is usable when it is
//! committed, nothing is known against it, and the same holds for all below it. A damaged point never takes the place of a
//! usable one: a day with nothing else keeps its newest damaged point, and is not counted. Independently of all rules the
//! newest usable point stays, and so does what is protected, pinned or missing.
//!
//! What no rule keeps goes, when nothing builds upon it. When exactly one point that stays does, and both are usable, that one is
//! to be made anew without it; otherwise it stays as a parent.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::clock::UtcTime;
use crate::id::BackupId;
use crate::store::repositories::Retention;
use crate::words::point::{PointState, Trust};

/// A point, as far as the rules look at it.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The point.
    pub id: BackupId,
    /// When it was committed: names its hour, day, week, month and year, in UTC.
    pub committed_at: UtcTime,
    /// The order of commits: what "newest" means, whatever became of the clock.
    pub sequence: u64,
    /// Whether its files are there.
    pub state: PointState,
    /// What is known of its content.
    pub trust: Trust,
    /// Until when it may not be deleted.
    pub protected_until: Option<UtcTime>,
    /// The points directly below its disks.
    pub parents: BTreeSet<BackupId>,
    /// Jobs, exports and tasks that have pinned it.
    pub holders: Vec<String>,
    /// Whether an attempt to let it go has failed just now: it is not tried again.
    pub attempt: Attempt,
}

/// Whether a point was tried to be let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// Not yet.
    None,
    /// In vain.
    Failed,
}

/// What is to become of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It stays.
    Keep,
    /// It goes.
    Delete,
    /// It goes when the only point upon it has been made anew without it.
    Merge {
        /// That point.
        into: BackupId,
    },
}

/// Why a point stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The repository has no rules.
    NoRules,
    /// Among the newest.
    Last(u32),
    /// The newest of its hour, by year, month, day and hour.
    Hourly(String),
    /// The newest of its day.
    Daily(String),
    /// The newest of its ISO week.
    Weekly(String),
    /// The newest of its month.
    Monthly(String),
    /// The newest of its year.
    Yearly(String),
    /// No other is as new and can be restored from without a doubt.
    NewestUsable,
    /// It may not go yet.
    Protected(UtcTime),
    /// A job, an export or a task reads it.
    InUse(String),
    /// Its directory is not there; it may come back.
    Missing,
    /// This point, which stays, builds upon it.
    ParentOf(BackupId),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRules => f.write_str("no rules"),
            Self::Last(count) => write!(f, "last {count}"),
            Self::Hourly(hour) => write!(f, "hourly {hour}"),
            Self::Daily(day) => write!(f, "daily {day}"),
            Self::Weekly(week) => write!(f, "weekly {week}"),
            Self::Monthly(month) => write!(f, "monthly {month}"),
            Self::Yearly(year) => write!(f, "yearly {year}"),
            Self::NewestUsable => f.write_str("newest usable point"),
            Self::Protected(until) => write!(f, "protected until {until}"),
            Self::InUse(holder) => write!(f, "in use by {holder}"),
            Self::Missing => f.write_str("its directory is missing"),
            Self::ParentOf(child) => write!(f, "parent of {child}"),
        }
    }
}

/// What was decided about a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The point.
    pub id: BackupId,
    /// What is to become of it.
    pub decision: Decision,
    /// Everything that keeps it; nothing when it goes.
    pub reasons: Vec<Reason>,
}

impl Verdict {
    /// Who alone keeps the point by holding it: it would go if they did not.
    pub fn held_by(&self) -> Option<Vec<String>> {
        let mut holders = Vec::new();
        for reason in &self.reasons {
            match reason {
                Reason::InUse(holder) => holders.push(holder.clone()),
                Reason::ParentOf(_) => {}
                _ => return None,
            }
        }
        (!holders.is_empty()).then_some(holders)
    }
}

/// Whether any rule is set: a count of 0 is none.
pub fn has_rules(rules: &Retention) -> bool {
    counts(rules).iter().any(|(count, _)| *count > 0)
}

type Period = fn(&Candidate, u32) -> Reason;

/// Each rule: how many periods it keeps, and the period of a point, named as the reason.
fn counts(rules: &Retention) -> [(u32, Period); 6] {
    [
        (rules.keep_last.unwrap_or(0), |_, count| Reason::Last(count)),
        (rules.keep_hourly.unwrap_or(0), |point, _| {
            let time = point.committed_at.calendar();
            Reason::Hourly(format!("{}T{:02}", time.date(), time.hour()))
        }),
        (rules.keep_daily.unwrap_or(0), |point, _| Reason::Daily(point.committed_at.calendar().date().to_string())),
        (rules.keep_weekly.unwrap_or(0), |point, _| {
            let week = point.committed_at.calendar().date().iso_week_date();
            Reason::Weekly(format!("{:04}-W{:02}", week.year(), week.week()))
        }),
        (rules.keep_monthly.unwrap_or(0), |point, _| {
            let date = point.committed_at.calendar().date();
            Reason::Monthly(format!("{:04}-{:02}", date.year(), date.month()))
        }),
        (rules.keep_yearly.unwrap_or(0), |point, _| {
            Reason::Yearly(format!("{:04}", point.committed_at.calendar().date().year()))
        }),
    ]
}

/// Decides about the points of one VM in one repository, newest first. Points that are being deleted have no verdict, but hold
/// what is below them; deleted ones do not belong here.
///
/// Applied in the order of the answer, every `Delete` finds a point that nothing builds upon, and every `Merge` one that only
/// `into` does.
pub fn decide(points: &[Candidate], rules: &Retention, now: UtcTime) -> Vec<Verdict> {
    let mut newest_first: Vec<&Candidate> = points.iter().collect();
    newest_first.sort_by_key(|point| std::cmp::Reverse(point.sequence));
    let usable = usable(&newest_first);
    let mut reasons: BTreeMap<&BackupId, Vec<Reason>> = BTreeMap::new();
    for point in &newest_first {
        reasons.insert(&point.id, forced(point, now));
    }
    if has_rules(rules) {
        for (count, period) in counts(rules) {
            for (id, reason) in chosen(&newest_first, &usable, count, period) {
                reasons.entry(id).or_default().insert(0, reason);
            }
        }
        if let Some(newest) = newest_first.iter().find(|point| usable.contains(&point.id)) {
            reasons.entry(&newest.id).or_default().push(Reason::NewestUsable);
        }
    } else {
        reasons.values_mut().for_each(|reasons| reasons.push(Reason::NoRules));
    }
    let mut forest = Forest::new(points);
    let mut decisions: BTreeMap<&BackupId, Decision> = BTreeMap::new();
    for point in &newest_first {
        let stays = point.state == PointState::Deleting || reasons.get(&point.id).is_some_and(|all| !all.is_empty());
        let decision = if stays { Decision::Keep } else { forest.let_go(point, &newest_first, &usable) };
        decisions.insert(&point.id, decision);
    }
    let of = |point: &&Candidate| point.state != PointState::Deleting;
    newest_first
        .iter()
        .filter(|point| of(point))
        .map(|point| {
            let decision = decisions.remove(&point.id).unwrap_or(Decision::Keep);
            let mut reasons = reasons.remove(&point.id).unwrap_or_default();
            if decision == Decision::Keep {
                reasons.extend(forest.children(&point.id).into_iter().map(Reason::ParentOf));
            }
            Verdict { id: point.id.clone(), decision, reasons }
        })
        .collect()
}

/// The points that can be restored from without a doubt: nothing is known against them, nor against anything below them.
fn usable(points: &[&Candidate]) -> BTreeSet<BackupId> {
    let sound = |point: &Candidate| {
        point.state == PointState::Committed && matches!(point.trust, Trust::Unverified | Trust::Verified)
    };
    let mut usable: BTreeSet<BackupId> =
        points.iter().filter(|point| sound(point)).map(|point| point.id.clone()).collect();
    // What lies on something unusable goes, and what lies on that, until nothing more does.
    loop {
        let fallen: Vec<BackupId> = points
            .iter()
            .filter(|point| usable.contains(&point.id) && !point.parents.is_subset(&usable))
            .map(|point| point.id.clone())
            .collect();
        if fallen.is_empty() {
            return usable;
        }
        fallen.iter().for_each(|id| {
            usable.remove(id);
        });
    }
}

/// What keeps a point whatever the rules are.
fn forced(point: &Candidate, now: UtcTime) -> Vec<Reason> {
    let mut reasons = Vec::new();
    if let Some(until) = point.protected_until.filter(|until| *until > now) {
        reasons.push(Reason::Protected(until));
    }
    reasons.extend(point.holders.iter().cloned().map(Reason::InUse));
    if point.state == PointState::Missing {
        reasons.push(Reason::Missing);
    }
    reasons
}

/// What one rule keeps: of each period its newest usable point, else its newest one; periods of the second kind are not counted.
fn chosen<'a>(
    newest_first: &[&'a Candidate],
    usable: &BTreeSet<BackupId>,
    count: u32,
    period: Period,
) -> Vec<(&'a BackupId, Reason)> {
    let committed = newest_first.iter().filter(|point| point.state == PointState::Committed);
    let mut periods: Vec<(String, &Candidate)> = Vec::new();
    for (position, point) in committed.enumerate() {
        let name = match period(point, count) {
            // Every point is a period of its own.
            Reason::Last(_) => position.to_string(),
            reason => reason.to_string(),
        };
        match periods.iter_mut().find(|(known, _)| *known == name) {
            Some((_, kept)) if !usable.contains(&kept.id) && usable.contains(&point.id) => *kept = point,
            Some(_) => {}
            None => periods.push((name, point)),
        }
    }
    periods.sort_by_key(|(_, kept)| std::cmp::Reverse(kept.sequence));
    let mut left = count;
    let mut chosen = Vec::new();
    for (_, kept) in periods {
        if left == 0 {
            break;
        }
        left -= u32::from(usable.contains(&kept.id));
        chosen.push((&kept.id, period(kept, count)));
    }
    chosen
}

/// Who builds upon whom, as it will be when everything that was decided so far is done.
struct Forest {
    parents: BTreeMap<BackupId, BTreeSet<BackupId>>,
}

impl Forest {
    fn new(points: &[Candidate]) -> Self {
        Self { parents: points.iter().map(|point| (point.id.clone(), point.parents.clone())).collect() }
    }

    fn children(&self, id: &BackupId) -> Vec<BackupId> {
        self.parents.iter().filter(|(_, parents)| parents.contains(id)).map(|(child, _)| child.clone()).collect()
    }

    /// Decides about a point that no rule keeps, when all newer ones are decided.
    fn let_go(&mut self, point: &Candidate, all: &[&Candidate], usable: &BTreeSet<BackupId>) -> Decision {
        let children = self.children(&point.id);
        let decision = match children.as_slice() {
            _ if point.attempt == Attempt::Failed => Decision::Keep,
            [] => Decision::Delete,
            [child] => {
                // Damage is not copied into a point that has none of its own; and what could not go itself takes nothing up.
                let fits = |id: &BackupId| {
                    usable.contains(id) && all.iter().any(|other| other.id == *id && other.attempt == Attempt::None)
                };
                if fits(&point.id) && fits(child) { Decision::Merge { into: child.clone() } } else { Decision::Keep }
            }
            _ => Decision::Keep,
        };
        if decision != Decision::Keep {
            let below = self.parents.remove(&point.id).unwrap_or_default();
            for child in children {
                if let Some(parents) = self.parents.get_mut(&child) {
                    parents.remove(&point.id);
                    parents.extend(below.iter().cloned());
                }
            }
        }
        decision
    }
}

#[cfg(test)]
mod tests;
