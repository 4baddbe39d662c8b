//! The rules by example, and what holds for any points and any rules.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn id(number: usize) -> BackupId {
    format!("backup-{:026}", number).parse().unwrap()
}

fn at(text: &str) -> UtcTime {
    text.parse().unwrap()
}

fn now() -> UtcTime {
    at("2026-12-01T12:00:00Z")
}

fn point(number: usize, committed_at: &str, parent: Option<usize>) -> Candidate {
    Candidate {
        id: id(number),
        committed_at: at(committed_at),
        sequence: number as u64,
        state: PointState::Committed,
        trust: Trust::Unverified,
        protected_until: None,
        parents: parent.map(id).into_iter().collect(),
        holders: Vec::new(),
        attempt: Attempt::None,
    }
}

/// One full a day at 22:00, the last on 2026-11-30.
fn days(count: usize) -> Vec<Candidate> {
    let first = at("2026-11-30T22:00:00Z");
    (0..count)
        .map(|number| {
            let back = (count - 1 - number) as i64;
            let day = first.calendar().date().checked_sub(jiff::Span::new().days(back)).unwrap();
            point(number, &format!("{day}T22:00:00Z"), None)
        })
        .collect()
}

fn rules(json: &str) -> Retention {
    serde_json::from_str(json).unwrap()
}

fn reasons(verdicts: &[Verdict], number: usize) -> Vec<String> {
    let verdict = verdicts.iter().find(|verdict| verdict.id == id(number)).unwrap();
    verdict.reasons.iter().map(ToString::to_string).collect()
}

fn decision(verdicts: &[Verdict], number: usize) -> Decision {
    verdicts.iter().find(|verdict| verdict.id == id(number)).unwrap().decision.clone()
}

fn kept(verdicts: &[Verdict]) -> Vec<usize> {
    let numbers = verdicts.iter().filter(|verdict| verdict.decision == Decision::Keep);
    let mut kept: Vec<usize> = numbers.map(|verdict| verdict.id.as_str()[7..].parse().unwrap()).collect();
    kept.sort_unstable();
    kept
}

#[test]
fn nothing_set_keeps_everything_and_so_does_nothing_but_noughts() {
    for text in ["{}", r#"{"keep_last": 0, "keep_daily": 0}"#] {
        let verdicts = decide(&days(3), &rules(text), now());
        assert_eq!(kept(&verdicts), [0, 1, 2]);
        assert_eq!(reasons(&verdicts, 0), ["no rules"]);
    }
}

#[test]
fn every_rule_that_keeps_a_point_is_named() {
    let text =
        r#"{"keep_last": 2, "keep_hourly": 1, "keep_daily": 3, "keep_weekly": 2, "keep_monthly": 2, "keep_yearly": 1}"#;
    let verdicts = decide(&days(60), &rules(text), now());
    let mut newest = reasons(&verdicts, 59);
    newest.sort();
    assert_eq!(
        newest,
        [
            "daily 2026-11-30",
            "hourly 2026-11-30T22",
            "last 2",
            "monthly 2026-11",
            "newest usable point",
            "weekly 2026-W49",
            "yearly 2026"
        ]
    );
    let mut second = reasons(&verdicts, 58);
    second.sort();
    assert_eq!(second, ["daily 2026-11-29", "last 2", "weekly 2026-W48"]);
    assert_eq!(reasons(&verdicts, 57), ["daily 2026-11-28"]);
    // The last day of October.
    assert_eq!(reasons(&verdicts, 29), ["monthly 2026-10"]);
    assert_eq!(kept(&verdicts), [29, 57, 58, 59]);
}

#[test]
fn periods_without_points_are_not_counted() {
    let points = [
        point(0, "2024-01-01T00:00:00Z", None),
        point(1, "2025-06-01T00:00:00Z", None),
        point(2, "2025-06-01T23:59:59Z", None),
        point(3, "2026-11-30T00:00:00Z", None),
    ];
    let verdicts = decide(&points, &rules(r#"{"keep_daily": 3}"#), now());
    assert_eq!(kept(&verdicts), [0, 2, 3], "the newest of each of three days that have one");
}

#[test]
fn weeks_are_those_of_iso_8601_and_cross_the_year() {
    let points = [point(0, "2026-12-31T10:00:00Z", None), point(1, "2027-01-02T10:00:00Z", None)];
    let verdicts = decide(&points, &rules(r#"{"keep_weekly": 5}"#), at("2027-02-01T00:00:00Z"));
    assert_eq!(kept(&verdicts), [1], "Thursday and Saturday of one week");
    assert_eq!(reasons(&verdicts, 1)[0], "weekly 2026-W53");
}

#[test]
fn a_damaged_point_takes_no_slot_from_a_usable_one() {
    let mut points = days(6);
    points[5].trust = Trust::Corrupt;
    points[4].trust = Trust::Suspect;
    let verdicts = decide(&points, &rules(r#"{"keep_last": 2}"#), now());
    assert_eq!(kept(&verdicts), [2, 3, 4, 5], "two usable ones, and the damaged ones above them to be looked at");
    assert_eq!(reasons(&verdicts, 3), ["last 2", "newest usable point"]);
    // Of one day the usable point is kept, though the damaged one is newer.
    points.push(Candidate { trust: Trust::Corrupt, ..point(6, "2026-11-28T23:00:00Z", None) });
    points.push(point(7, "2026-11-28T22:30:00Z", None));
    let verdicts = decide(&points, &rules(r#"{"keep_daily": 1}"#), now());
    assert_eq!(kept(&verdicts), [7], "{verdicts:?}");
}

#[test]
fn a_point_upon_a_missing_or_damaged_one_is_not_the_newest_usable() {
    for spoil in [(|point: &mut Candidate| point.state = PointState::Missing) as fn(&mut Candidate), |point| {
        point.trust = Trust::Corrupt
    }] {
        let mut points = vec![
            point(0, "2026-11-27T22:00:00Z", None),
            point(1, "2026-11-28T22:00:00Z", None),
            point(2, "2026-11-29T22:00:00Z", Some(1)),
            point(3, "2026-11-30T22:00:00Z", Some(2)),
        ];
        spoil(&mut points[1]);
        let verdicts = decide(&points, &rules(r#"{"keep_last": 1}"#), now());
        assert_eq!(reasons(&verdicts, 0), ["last 1", "newest usable point"]);
        assert_eq!(kept(&verdicts), [0, 1, 2, 3]);
    }
}

#[test]
fn protected_pinned_and_missing_points_stay_without_a_rule() {
    let mut points = days(6);
    points[0].protected_until = Some(at("2027-01-01T00:00:00Z"));
    points[1].holders = vec!["export-1".to_owned(), "task-2".to_owned()];
    points[2].state = PointState::Missing;
    points[3].protected_until = Some(at("2026-11-30T23:00:00Z"));
    let verdicts = decide(&points, &rules(r#"{"keep_last": 1}"#), now());
    assert_eq!(kept(&verdicts), [0, 1, 2, 5], "a protection that is over protects nothing");
    assert_eq!(reasons(&verdicts, 0), ["protected until 2027-01-01T00:00:00.000Z"]);
    assert_eq!(reasons(&verdicts, 1), ["in use by export-1", "in use by task-2"]);
    assert_eq!(reasons(&verdicts, 2), ["its directory is missing"]);
}

#[test]
fn a_chain_below_a_kept_point_is_merged_into_it_from_the_top() {
    let points = [
        point(0, "2026-11-27T22:00:00Z", None),
        point(1, "2026-11-28T22:00:00Z", Some(0)),
        point(2, "2026-11-29T22:00:00Z", Some(1)),
        point(3, "2026-11-30T22:00:00Z", Some(2)),
    ];
    let verdicts = decide(&points, &rules(r#"{"keep_last": 1}"#), now());
    let order: Vec<&BackupId> = verdicts.iter().map(|verdict| &verdict.id).collect();
    assert_eq!(order, [&id(3), &id(2), &id(1), &id(0)]);
    for number in 0..3 {
        assert_eq!(decision(&verdicts, number), Decision::Merge { into: id(3) });
    }
    assert_eq!(reasons(&verdicts, 3), ["last 1", "newest usable point"]);
}

#[test]
fn a_point_that_two_others_need_or_that_cannot_be_merged_stays_as_a_parent() {
    let mut points = vec![
        point(0, "2026-11-27T22:00:00Z", None),
        point(1, "2026-11-28T22:00:00Z", Some(0)),
        point(2, "2026-11-29T22:00:00Z", Some(0)),
    ];
    let two = rules(r#"{"keep_last": 2}"#);
    assert_eq!(
        reasons(&decide(&points, &two, now()), 0),
        [format!("parent of {}", id(1)), format!("parent of {}", id(2))]
    );
    // One of them goes: the other can be made anew.
    let one = rules(r#"{"keep_last": 1}"#);
    let verdicts = decide(&points, &one, now());
    assert_eq!((decision(&verdicts, 1), decision(&verdicts, 0)), (Decision::Delete, Decision::Merge { into: id(2) }));
    points[0].attempt = Attempt::Failed;
    let verdicts = decide(&points, &one, now());
    assert_eq!((decision(&verdicts, 0), reasons(&verdicts, 0)), (Decision::Keep, vec![format!("parent of {}", id(2))]));
    points[0].attempt = Attempt::None;
    points[2].trust = Trust::Suspect;
    points[2].holders = vec!["export-1".to_owned()];
    points.push(point(3, "2026-11-30T22:00:00Z", None));
    assert_eq!(kept(&decide(&points, &one, now())), [0, 2, 3], "nothing is merged into a damaged point");
    points[2].state = PointState::Deleting;
    let verdicts = decide(&points, &one, now());
    assert_eq!(reasons(&verdicts, 0), [format!("parent of {}", id(2))], "what is being deleted still lies on it");
    assert_eq!(verdicts.len(), 3, "and has no verdict itself");
}

/// Points over about three years, often several on a day, upon each other in any way that chains can be.
fn any_points() -> impl Strategy<Value = Vec<Candidate>> {
    let one = (0_u32..26_000, 0_usize..5, 0_u8..12, 0_u8..8, any::<bool>());
    proptest::collection::vec(one, 0..25).prop_map(|drawn| {
        let mut hours: Vec<u32> = drawn.iter().map(|(hour, ..)| *hour).collect();
        hours.sort_unstable();
        let mut points = Vec::new();
        for (number, ((_, back, state, kept, sorted), hour)) in drawn.into_iter().zip(hours).enumerate() {
            // Now and then a clock that was set back.
            let hour = if sorted || number % 7 != 0 { hour } else { hour / 2 };
            let committed_at = at("2024-01-01T00:30:00Z").plus_seconds(u64::from(hour) * 3600);
            let mut point =
                point(number, &committed_at.to_string(), (back > 0 && back <= number).then(|| number - back));
            match state {
                0 => point.state = PointState::Missing,
                1 => point.trust = Trust::Corrupt,
                2 => point.trust = Trust::Suspect,
                3 | 4 => point.trust = Trust::Verified,
                _ => {}
            }
            match kept {
                0 => point.protected_until = Some(at("2027-01-01T00:00:00Z")),
                1 => point.holders.push("export-1".to_owned()),
                2 => point.protected_until = Some(at("2025-01-01T00:00:00Z")),
                _ => {}
            }
            points.push(point);
        }
        points
    })
}

fn any_rules() -> impl Strategy<Value = Retention> {
    let count = || proptest::option::weighted(0.5, 0_u32..6);
    (count(), count(), count(), count(), count(), count()).prop_map(|(last, hourly, daily, weekly, monthly, yearly)| {
        Retention {
            keep_last: last,
            keep_hourly: hourly,
            keep_daily: daily,
            keep_weekly: weekly,
            keep_monthly: monthly,
            keep_yearly: yearly,
        }
    })
}

fn gone(verdicts: &[Verdict]) -> BTreeSet<BackupId> {
    verdicts.iter().filter(|verdict| verdict.decision != Decision::Keep).map(|verdict| verdict.id.clone()).collect()
}

/// Does what was decided, and holds that each step is allowed when its turn comes.
fn apply(points: &[Candidate], verdicts: &[Verdict]) -> Vec<Candidate> {
    let mut left: BTreeMap<BackupId, Candidate> =
        points.iter().map(|point| (point.id.clone(), point.clone())).collect();
    for verdict in verdicts {
        let children: Vec<BackupId> =
            left.values().filter(|point| point.parents.contains(&verdict.id)).map(|point| point.id.clone()).collect();
        match &verdict.decision {
            Decision::Keep => continue,
            Decision::Delete => assert!(children.is_empty(), "{} is built upon by {children:?}", verdict.id),
            Decision::Merge { into } => {
                assert_eq!(children.as_slice(), std::slice::from_ref(into));
                let below = left[&verdict.id].parents.clone();
                let child = left.get_mut(into).unwrap();
                child.parents.remove(&verdict.id);
                child.parents.extend(below);
            }
        }
        left.remove(&verdict.id);
    }
    left.into_values().collect()
}

proptest! {
    #[test]
    fn prune_never_removes_an_ancestor_of_a_kept_point(points in any_points(), rules in any_rules()) {
        let left = apply(&points, &decide(&points, &rules, now()));
        let there: BTreeSet<&BackupId> = left.iter().map(|point| &point.id).collect();
        for point in &left {
            prop_assert!(point.parents.iter().all(|parent| there.contains(parent)), "{} lost a parent", point.id);
        }
    }

    #[test]
    fn a_second_prune_removes_nothing_more(points in any_points(), rules in any_rules()) {
        let left = apply(&points, &decide(&points, &rules, now()));
        prop_assert_eq!(gone(&decide(&left, &rules, now())), BTreeSet::new());
    }

    #[test]
    fn more_retention_never_removes_more(points in any_points(), rules in any_rules(), more in any_rules()) {
        prop_assume!(has_rules(&rules));
        let sum = |one: Option<u32>, other: Option<u32>| Some(one.unwrap_or(0) + other.unwrap_or(0));
        let more = Retention {
            keep_last: sum(rules.keep_last, more.keep_last),
            keep_hourly: sum(rules.keep_hourly, more.keep_hourly),
            keep_daily: sum(rules.keep_daily, more.keep_daily),
            keep_weekly: sum(rules.keep_weekly, more.keep_weekly),
            keep_monthly: sum(rules.keep_monthly, more.keep_monthly),
            keep_yearly: sum(rules.keep_yearly, more.keep_yearly),
        };
        prop_assert!(gone(&decide(&points, &more, now())).is_subset(&gone(&decide(&points, &rules, now()))));
    }

    #[test]
    fn what_is_protected_pinned_or_missing_and_the_newest_usable_point_are_always_kept(
        points in any_points(), rules in any_rules(),
    ) {
        let verdicts = decide(&points, &rules, now());
        let gone = gone(&verdicts);
        for point in &points {
            let forced = point.protected_until.is_some_and(|until| until > now())
                || !point.holders.is_empty() || point.state == PointState::Missing;
            prop_assert!(!forced || !gone.contains(&point.id));
        }
        let all: Vec<&Candidate> = points.iter().collect();
        let usable = usable(&all);
        if let Some(newest) = points.iter().rev().find(|point| usable.contains(&point.id)) {
            prop_assert!(!gone.contains(&newest.id));
        }
        for verdict in &verdicts {
            prop_assert_eq!(verdict.reasons.is_empty(), verdict.decision != Decision::Keep);
        }
    }

    #[test]
    fn every_usable_period_that_a_rule_promises_is_there(points in any_points(), count in 1_u32..6) {
        let rules = Retention { keep_daily: Some(count), ..Retention::default() };
        let all: Vec<&Candidate> = points.iter().collect();
        let usable = usable(&all);
        let days = |ids: &BTreeSet<BackupId>| -> usize {
            let usable = points.iter().filter(|point| usable.contains(&point.id) && ids.contains(&point.id));
            usable.map(|point| point.committed_at.calendar().date()).collect::<BTreeSet<_>>().len()
        };
        let before: BTreeSet<BackupId> = points.iter().map(|point| point.id.clone()).collect();
        let gone = gone(&decide(&points, &rules, now()));
        let after: BTreeSet<BackupId> = before.difference(&gone).cloned().collect();
        prop_assert!(days(&after) >= days(&before).min(count as usize));
    }
}
