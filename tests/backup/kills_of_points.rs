//! The process killed while committed points are merged, deleted and verified, and what the next start makes of it.
//!
//! Each backup of one VM leaves a point too many, so that after its commit the newest point is read, the oldest two become
//! one, and one of them goes. The process dies at a moment of that, or in the start that clears up after such a death.
//! `SEED=` repeats a run, `SCALE=` multiplies it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use blockyard::id::BackupId;
use blockyard::node::fake::{Event, Faults, PausePoint};
use serde_json::{Value, json};

use crate::crash::kill_at;
use crate::kills::{Campaign, SIZES, listed, scale};
use crate::process::{Running, sqlite_number};
use crate::rig;
use crate::support::process::ServeProcess;

const KILLS: usize = 27;
/// Points that retention leaves.
const KEEP: usize = 3;
/// What is let alone after every so many kills: a backup with all that follows it.
const KILLS_IN_A_ROW: usize = 3;
/// What makes the work on points durable or visible or reads them, and up to which call of a kind the process may live.
const CALLS: [(&str, usize); 9] = [
    ("fdatasync", 60),
    ("fsync", 40),
    ("linkat", 4),
    ("mkdir", 3),
    ("openat", 300),
    ("pread64", 600),
    ("renameat2", 5),
    ("rename", 6),
    ("unlinkat", 24),
];
/// Names that come and go while points are worked on.
const SIGHTS: [&str; 6] =
    [".merging", ".merging/disk-2.qcow2", ".merging/manifest.json", ".deleting", ".new", ".blocks"];
/// How many looks at the repository there are for one at the records.
const LOOKS: usize = 20;
/// What there is yet to do to committed points, as a count of things; 0 when all is quiet.
const LEFT_TO_DO: &str = "SELECT (SELECT count(*) FROM leases) \
    + (SELECT count(*) FROM restore_points WHERE state = 'deleting') \
    + (SELECT max(0, count(*) - 3) FROM restore_points WHERE state = 'committed') \
    + (SELECT count(*) FROM restore_points WHERE state = 'committed' AND trust <> 'verified')";

/// When the process dies.
#[derive(Debug)]
enum Moment {
    /// At the n-th system call of a kind since just before the last disk was complete.
    Call(&'static str, usize),
    /// This long after a name that was not there has come up.
    Sight(&'static str, Duration),
}

impl Moment {
    /// Every kind in its turn.
    fn of(kill: usize, random: &mut fastrand::Rng) -> Self {
        if kill % 5 < 2 {
            let sight = SIGHTS[kill / 5 * 2 % SIGHTS.len() + kill % 5];
            Self::Sight(sight, Duration::from_micros(random.u64(0..20_000)))
        } else {
            let (call, most) = CALLS[(kill / 5 * 3 + kill % 5 - 2) % CALLS.len()];
            Self::Call(call, random.usize(1..=most))
        }
    }
}

/// All paths below the folders of VMs.
fn names(repository: &Path) -> Vec<String> {
    let mut names = Vec::new();
    // Whatever goes while it is looked at is not there.
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    for vm in entries(repository) {
        for point in entries(&vm) {
            names.extend(entries(&point).map(|file| file.to_string_lossy().into_owned()));
            names.push(point.to_string_lossy().into_owned());
        }
    }
    names
}

fn has_ended(running: &Running) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", running.process.id())).unwrap_or_default();
    !status.contains("State:") || status.contains("State:\tZ")
}

/// Waits until the process has died by itself, the sight is there, or nothing is left to do; whether it was the last.
async fn watch(campaign: &Campaign, running: &Running, sight: Option<(&str, usize)>) -> bool {
    let database = campaign.child.folder.path().join("state/blockyard.db");
    let wait = async {
        loop {
            for _ in 0..LOOKS {
                let seen = sight.is_some_and(|(sight, before)| count(campaign, sight) > before);
                if seen || has_ended(running) {
                    return false;
                }
                tokio::task::yield_now().await;
            }
            if sqlite_number(&database, LEFT_TO_DO).await == 0 {
                return true;
            }
        }
    };
    if let Ok(quiet) = tokio::time::timeout(rig::DEADLINE, wait).await {
        return quiet;
    }
    let log = ServeProcess::log(campaign.child.folder.path());
    let last = log.lines().rev().take(30).collect::<Vec<_>>();
    panic!("the work on the points never ended; the log from its end:\n{}", last.join("\n"));
}

fn count(campaign: &Campaign, sight: &str) -> usize {
    names(&campaign.child.repository()).iter().filter(|name| name.ends_with(sight)).count()
}

/// A backup after which the process dies at this moment; whether nothing was left to do by then.
async fn killed_after_commit(campaign: &mut Campaign, running: Running, moment: &Moment) -> bool {
    campaign.write();
    let log = campaign.child.node.log();
    let seen = log.count();
    campaign.child.node.reconfigure(|config| {
        config.faults = Faults { pause: Some(PausePoint::BeforeComplete(SIZES.len() - 1)), ..Faults::default() };
    });
    running.back_up(&campaign.vm).await;
    let paused = log.first_after(seen, |event| (*event == Event::Paused).then_some(()));
    tokio::time::timeout(rig::DEADLINE, paused).await.expect("the client never paused");
    let mut tracer = match moment {
        Moment::Call(call, number) => Some(kill_at(running.process.id(), call, None, *number)),
        Moment::Sight(..) => None,
    };
    let sight = match moment {
        Moment::Sight(sight, _) => Some((*sight, count(campaign, sight))),
        Moment::Call(..) => None,
    };
    campaign.child.node.resume();
    campaign.clients_ended().await;
    let quiet = watch(campaign, &running, sight).await;
    if let Moment::Sight(_, pause) = moment {
        tokio::time::sleep(*pause).await;
    }
    running.process.signal_if_alive("KILL");
    running.process.wait();
    if let Some(tracer) = &mut tracer {
        tracer.wait().unwrap();
    }
    campaign.note(seen);
    quiet
}

/// Holds that all points are whole, that records and folders say the same, and that a check finds nothing to say.
async fn expect_whole(campaign: &mut Campaign, running: &Running, what: &str) {
    // What a start clears up is gone when it is ready.
    for name in rig::backup_directories(&campaign.child.repository()) {
        assert!(name.parse::<BackupId>().is_ok(), "{what}: {name} is left");
    }
    let checked = running.post("/repositories/main/check", &json!({})).await;
    assert_eq!((&checked["result"], &checked["findings"]), (&json!("clean"), &json!([])), "{what}: {checked:#}");
    campaign.expect_consistent(running, what).await;
    for point in listed(running, "points").await.iter().skip(2) {
        campaign.expect_restores(point, what);
    }
}

/// A backup that is let alone, and everything that follows it: the newest points stay, and all are verified.
async fn let_alone(campaign: &mut Campaign, running: &Running, what: &str) {
    let mut expected = rig::backup_directories(&campaign.child.repository());
    campaign.back_up(running).await;
    expected.extend(campaign.history.keys().next_back().cloned());
    assert!(watch(campaign, running, None).await, "{what}: the service died by itself");
    let points = listed(running, "points").await;
    let ids: Vec<&str> = points.iter().rev().map(|point| point["id"].as_str().unwrap()).collect();
    assert_eq!(ids, expected[expected.len().saturating_sub(KEEP)..], "{what}: the newest stay, and nothing else");
    expect_whole(campaign, running, what).await;
}

async fn verify(running: &Running, point: &Value, what: &str) {
    let id = point["id"].as_str().unwrap();
    let begun = running.post(&format!("/points/{id}/verify"), &json!({"scope": "chain", "content": true})).await;
    let ended = async {
        loop {
            let now = running.get(&format!("/points/{id}?wait=5")).await["verification"].take();
            if now["id"] == begun["id"] && now["state"] == "ended" {
                return now;
            }
        }
    };
    let ended = tokio::time::timeout(rig::DEADLINE, ended).await.expect("the verification never ended");
    assert_eq!(ended["outcome"], "verified", "{what}: {ended:#}");
    let findings = ended["points"].as_array().unwrap().iter().flat_map(|point| point["findings"].as_array().unwrap());
    assert_eq!(findings.count(), 0, "{what}: {ended:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_while_points_are_merged_deleted_and_verified_leave_every_point_whole() {
    let (mut campaign, mut running, seed) = Campaign::new(KEEP).await;
    let url = format!("{}/api/v1/repositories/main", running.process.url);
    let rules = json!({"name": "main", "path": campaign.child.repository(), "retention": {"keep_last": KEEP}});
    let request = running.http.put(url).bearer_auth(&running.token).header("if-match", "*").json(&rules);
    assert!(request.send().await.unwrap().status().is_success());
    for _ in 0..KEEP {
        campaign.back_up(&running).await;
    }
    // What was lying about after the deaths, by name.
    let mut left: BTreeMap<&str, usize> = BTreeMap::new();
    let kills = KILLS * scale();
    for kill in 0..kills {
        let moment = Moment::of(kill, &mut campaign.random);
        let what = format!("SEED={seed}, kill {kill}, {moment:?}");
        if killed_after_commit(&mut campaign, running, &moment).await {
            *left.entry("nothing").or_default() += 1;
        }
        let names = names(&campaign.child.repository());
        for suffix in [".merging", ".deleting", ".new"] {
            *left.entry(suffix).or_default() += usize::from(names.iter().any(|name| name.ends_with(suffix)));
        }
        if campaign.random.u8(0..3) == 0 {
            campaign.killed_start();
        }
        running = campaign.child.start();
        expect_whole(&mut campaign, &running, &what).await;
        if kill % KILLS_IN_A_ROW == KILLS_IN_A_ROW - 1 {
            let_alone(&mut campaign, &running, &what).await;
        }
    }
    let_alone(&mut campaign, &running, "in the end").await;
    for point in listed(&running, "points").await {
        verify(&running, &point, "in the end").await;
    }
    println!("{kills} kills, after which there was left: {left:?}");
    // A deletion is over too soon to be met in every run; `retain` cuts it at each of its steps.
    assert!(left[".merging"] > 0, "{left:?}");
}
