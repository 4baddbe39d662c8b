//! What verification must not do: raise the trust in what was never committed, is going, or is damaged by all that is known; and
//! judge a folder by what lay in another one.

use std::fs;
use std::path::Path;

use blockyard::clock::UtcTime;
use blockyard::id::{BackupId, TaskId};
use blockyard::node::fake::{Faults, PausePoint};
use blockyard::points::scrub::Scrubbed;
use blockyard::points::take::Content;
use blockyard::points::verification::{Request, Scope};
use blockyard::store::{leases, points};
use blockyard::words::point::PointState;
use serde_json::{Value, json};

use crate::restore::set_point;
use crate::rig::{DEADLINE, Plan, Rig, backup_directories, id_of, published, tool};
use crate::verify::{AUTOMATIC, chain, findings, flip, plan, point, rig, verify, when};

const SET_TRUST: &str = "UPDATE restore_points SET trust = ? WHERE id = ?";

/// All ways to verify one point.
fn bodies() -> [Value; 3] {
    [json!({}), json!({"scope": "point"}), json!({"scope": "point", "content": true})]
}

/// Holds that there is nothing to be verified, neither by name nor by itself.
async fn expect_nothing_to_verify(rig: &Rig, id: &str) {
    for body in bodies() {
        let answer = rig.service.post(&format!("/api/v1/points/{id}/verify"), &body).await;
        answer.expect_problem(404, "point_not_found");
    }
    let points = &rig.service.service.app().points;
    let later = UtcTime::now().plus_seconds(1000 * 86_400);
    assert_eq!(points.scrub_next(later).await.unwrap(), Scrubbed::Nothing);
    assert_eq!(points.verify_next_new(later).await.unwrap(), Scrubbed::Nothing);
}

/// Changes the record of a point as another part of the service would.
async fn set_state(rig: &Rig, id: &str, state: PointState) {
    let mut transaction = rig.service.service.app().store.write().await.unwrap();
    points::set_state(&mut transaction, &id.parse().unwrap(), state).await.unwrap();
    transaction.commit().await.unwrap();
}

/// State and trust as they are recorded, and whether a verification was noted; also of a point that nobody is shown.
async fn recorded(rig: &Rig, id: &str) -> (PointState, String, bool) {
    let id: BackupId = id.parse().unwrap();
    let row = points::find(&mut rig.service.service.app().store.read().await.unwrap(), &id).await.unwrap().unwrap();
    (row.state, row.trust.to_string(), row.verified_at.is_some())
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_never_raises_an_uncommitted_backup() {
    of_a_job_that_runs_or_failed().await;
    of_a_point_that_is_going().await;
}

async fn of_a_job_that_runs_or_failed() {
    // While a job runs, its folder is staged.
    let faults = Faults { pause: Some(PausePoint::BeforeComplete(1)), ..Faults::default() };
    let toml = format!("{AUTOMATIC}[jobs]\nkeep_failed = \"quarantine\"\nreconnect_s = 1\n");
    let rig = Rig::with(Plan { faults, ..plan(&toml) }).await;
    let started = rig.start().await;
    rig.paused().await;
    let id = id_of(&started);
    assert_eq!(backup_directories(&rig.repository), [format!("{id}.partial")]);
    expect_nothing_to_verify(&rig, id).await;
    assert_eq!(rig.backup(id).await["facets"]["verify"], "pending");
    rig.cancel(id).await;
    let ended = rig.end_of(id).await;
    assert_eq!((&ended["state"], &ended["facets"]["verify"]), (&json!("cancelled"), &json!("off")));
    expect_nothing_to_verify(&rig, id).await;
    rig.node.resume();

    // Failed and kept, with all of its images and one of them sealed.
    rig.node.reconfigure(|config| {
        config.faults = Faults { die_after_bytes: Some(6 << 20), ..Faults::default() };
    });
    let failed = rig.back_up().await;
    let id = id_of(&failed);
    assert_eq!((&failed["state"], &failed["facets"]["verify"]), (&json!("failed"), &json!("off")), "{failed:#}");
    assert_eq!(backup_directories(&rig.repository), [format!("{id}.failed")]);
    expect_nothing_to_verify(&rig, id).await;
    rig.service.post("/api/v1/repositories/main/check", &json!({})).await.expect_status(200);
    expect_nothing_to_verify(&rig, id).await;
    assert!(rig.points().await.is_empty());
    assert_eq!(rig.backup(id).await["facets"]["verify"], "off");
}

async fn of_a_point_that_is_going() {
    let mut rig = rig("").await;
    let ids = chain(&mut rig, 1).await;
    let unverified = |state| (state, "unverified".to_owned(), false);
    for state in [PointState::Deleting, PointState::Deleted] {
        set_state(&rig, &ids[0], state).await;
        expect_nothing_to_verify(&rig, &ids[0]).await;
        assert_eq!(recorded(&rig, &ids[0]).await, unverified(state));
    }
    // Nor one that went while it was read: its files are whole, and it does not come back.
    for state in [PointState::Deleting, PointState::Deleted] {
        set_state(&rig, &ids[0], PointState::Committed).await;
        let held = rig.service.service.app().points.hold_verifications();
        let request = Request { scope: Scope::Chain, content: Content::Reread };
        let verification = rig.service.service.app().points.verify(&ids[0].parse().unwrap(), request).await.unwrap();
        while held.waiting() < 1 {
            tokio::task::yield_now().await;
        }
        set_state(&rig, &ids[0], state).await;
        drop(held);
        let ended = async {
            while verification.view().outcome.is_none() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, ended).await.expect("it does not end");
        assert_eq!(recorded(&rig, &ids[0]).await, unverified(state));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_never_raises_a_point_that_a_task_is_changing() {
    let mut rig = rig("").await;
    let ids = chain(&mut rig, 2).await;
    let app = rig.service.service.app();
    let task = TaskId::new();
    let mut transaction = app.store.write().await.unwrap();
    leases::pin_chain(&mut transaction, &ids[0].parse().unwrap(), task.as_str(), &app.boot_id).await.unwrap();
    transaction.commit().await.unwrap();
    for id in &ids {
        for body in bodies() {
            rig.service.post(&format!("/api/v1/points/{id}/verify"), &body).await.expect_problem(409, "point_in_use");
        }
        assert_eq!(point(&rig.service, id).await["trust"], "unverified");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_never_raises_what_is_suspect_or_corrupt_nor_anything_above_it() {
    for trust in ["suspect", "corrupt"] {
        let mut rig = rig("").await;
        let ids = chain(&mut rig, 3).await;
        // All files are sound; what is known of the middle one comes from elsewhere.
        set_point(&rig, SET_TRUST, trust, &ids[1]).await;
        for body in bodies() {
            let verification = verify(&rig.service, &ids[1], body).await;
            assert_eq!(verification["outcome"], trust, "{verification:#}");
            assert_eq!(point(&rig.service, &ids[1]).await["trust"], trust);
        }
        for before in ["unverified", "verified"] {
            set_point(&rig, SET_TRUST, before, &ids[2]).await;
            for body in bodies() {
                let verification = verify(&rig.service, &ids[2], body).await;
                let expected = if verification["points"].as_array().unwrap().len() > 1 { trust } else { "suspect" };
                assert_eq!(verification["outcome"], expected, "{verification:#}");
                assert_eq!(point(&rig.service, &ids[2]).await["trust"], "suspect");
            }
        }
        assert_eq!(point(&rig.service, &ids[0]).await["trust"], "verified", "it is none of their business");
    }
}

/// Puts another folder in the place of a point's, and returns where the old one went.
fn exchange(folder: &Path, other: &Path) {
    let (cwd, flags) = (rustix::fs::CWD, rustix::fs::RenameFlags::EXCHANGE);
    rustix::fs::renameat_with(cwd, folder, cwd, other, flags).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_read_of_a_folder_that_was_exchanged_meanwhile_is_forgotten_and_the_other_one_read() {
    let mut rig = rig("").await;
    let ids = chain(&mut rig, 1).await;
    let id = &ids[0];
    verify(&rig.service, id, json!({})).await;
    let folder = published(&rig, id).await;
    let other = folder.with_extension("merging");
    let copy = |from: &Path, to: &Path| tool("coreutils", "cp", &["-a", from.to_str().unwrap(), to.to_str().unwrap()]);
    copy(&folder, &other);
    // The one that is there at first is damaged where the first piece of it is.
    flip(&folder.join("disk-0.qcow2"), 8 * 200_000);
    let held = rig.service.service.app().points.hold_verifications();
    let begun = rig.service.post(&format!("/api/v1/points/{id}/verify"), &json!({})).await.expect_status(202).json();
    let reached = async {
        while held.waiting() < 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, reached).await.expect("nothing is read");
    exchange(&folder, &other);
    drop(held);
    let ended = when(&rig.service, id, |point| point["verification"]["state"] == "ended").await;
    let verification = &ended["verification"];
    assert_eq!(verification["id"], begun["id"]);
    assert_eq!((&verification["outcome"], &ended["trust"]), (&json!("verified"), &json!("verified")), "{ended:#}");
    assert!(findings(verification).is_empty(), "{ended:#}");
    // Read from the beginning: what it had of the first is on top.
    let once: u64 = ["disk-0.qcow2", "disk-1.qcow2", "manifest.json"]
        .iter()
        .map(|name| fs::metadata(folder.join(name)).unwrap().len())
        .sum();
    assert!(verification["bytes_read"].as_u64().unwrap() > once, "{ended:#}");
    // And it was the folder that made the difference.
    exchange(&folder, &other);
    assert_eq!(verify(&rig.service, id, json!({})).await["outcome"], "corrupt");
}
