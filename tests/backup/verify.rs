//! Digests and verification: what is found, what follows from it, and what it never does.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use blockyard::clock::UtcTime;
use blockyard::points::scrub::Scrubbed;
use blockyard::points::verification::Outcome;
use blockyard::store::leases::{self, LeaseKind};
use blockyard::store::{Store, events, points};
use serde_json::{Value, json};

use crate::cli::cli;
use crate::rig::{DEADLINE, Plan, Rig, content, id_of, published};
use crate::support::TestService;

const FIRST: u32 = 2000;
const SECOND: u32 = 2016;
const MIB: usize = 1 << 20;
pub const AUTOMATIC: &str = "[storage]\nverify_after_commit = true\n";

pub fn plan(toml: &str) -> Plan {
    let disks = vec![(FIRST, content(1, 5 * MIB)), (SECOND, content(2, 2 * MIB + 512))];
    Plan { disks, toml: toml.to_owned(), ..Plan::default() }
}

pub async fn rig(toml: &str) -> Rig {
    Rig::with(plan(toml)).await
}

/// Makes a chain of so many points, each with a change in the second block of the first disk.
pub async fn chain(rig: &mut Rig, points: u8) -> Vec<String> {
    let mut ids = Vec::new();
    for round in 0..points {
        if round > 0 {
            rig.write(&[(FIRST, MIB + 512 * usize::from(round), content(round, 70_000))]);
        }
        let backup = rig.back_up().await;
        assert_eq!(backup["state"], "committed", "{backup:#}");
        ids.push(id_of(&backup).to_owned());
    }
    ids
}

pub async fn point(service: &TestService, id: &str) -> Value {
    service.get(&format!("/api/v1/points/{id}")).await.expect_status(200).json()
}

/// The point when a condition holds.
pub async fn when(service: &TestService, id: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let wait = async {
        loop {
            let point = service.get(&format!("/api/v1/points/{id}?wait=1")).await.expect_status(200).json();
            if holds(&point) {
                return point;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, wait).await.expect("not in time")
}

/// Verifies a point and waits for the end.
pub async fn verify(service: &TestService, id: &str, body: Value) -> Value {
    let begun = service.post(&format!("/api/v1/points/{id}/verify"), &body).await.expect_status(202).json();
    let ended = |point: &Value| {
        assert_eq!(point["verification"]["id"], begun["id"], "{point:#}");
        point["verification"]["state"] == "ended"
    };
    when(service, id, ended).await["verification"].take()
}

pub fn findings(verification: &Value) -> Vec<&str> {
    let points = verification["points"].as_array().unwrap();
    points.iter().flat_map(|p| p["findings"].as_array().unwrap()).map(|f| f["code"].as_str().unwrap()).collect()
}

pub fn flip(path: &Path, bit: u64) {
    fs::set_permissions(path, Permissions::from_mode(0o640)).unwrap();
    let mut bytes = fs::read(path).unwrap();
    bytes[usize::try_from(bit / 8).unwrap()] ^= 1 << (bit % 8);
    fs::write(path, bytes).unwrap();
}

/// Waits until every point is verified, and all is quiet.
async fn all_verified(rig: &Rig, ids: &[String]) {
    for id in ids {
        when(&rig.service, id, |point| point["trust"] == "verified").await;
    }
}

/// The content root by its formula, from the bytes of a disk.
fn root(disk: &[u8]) -> (Vec<u8>, String) {
    let leaves: Vec<u8> = disk.chunks(MIB).flat_map(|block| *blake3::hash(block).as_bytes()).collect();
    let root = blake3::hash(&leaves).to_hex().to_string();
    (leaves, root)
}

#[tokio::test(flavor = "multi_thread")]
async fn digests_are_what_their_formulas_say_for_fulls_and_incrementals() {
    let mut rig = rig(AUTOMATIC).await;
    for round in 0..3 {
        if round > 0 {
            // Over a border of blocks, a hole where data was, and the short last block.
            rig.write(&[(FIRST, 3 * MIB - 700, content(round, 1400)), (FIRST, MIB, vec![0; 2 * 65_536])]);
            rig.write(&[(SECOND, 2 * MIB, content(round, 512))]);
        }
        let id = id_of(&rig.back_up().await).to_owned();
        let point = when(&rig.service, &id, |point| point["trust"] == "verified").await;
        let folder = PathBuf::from(point["path"].as_str().unwrap());
        let document: Value = serde_json::from_slice(&fs::read(folder.join("digests.json")).unwrap()).unwrap();
        let mut roots = Vec::new();
        for (index, (_, bytes)) in rig.disks.iter().enumerate() {
            let (leaves, root) = root(bytes);
            assert_eq!(fs::read(folder.join(format!("disk-{index}.blocks"))).unwrap(), leaves, "round {round}");
            assert_eq!(point["disks"][index]["content_digest"], root);
            assert_eq!(document["disks"][index]["content"], root);
            let image = blake3::hash(&fs::read(folder.join(format!("disk-{index}.qcow2"))).unwrap());
            assert_eq!(point["disks"][index]["digest"], image.to_hex().to_string());
            roots.extend(*blake3::hash(&leaves).as_bytes());
        }
        assert_eq!(document["vm"], blake3::hash(&roots).to_hex().to_string());
        let names: Vec<&str> =
            document["files"].as_array().unwrap().iter().map(|file| file["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["manifest.json", "disk-0.qcow2", "disk-1.qcow2"]);
        let mode = |name: &str| fs::metadata(folder.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("digests.json"), mode("disk-0.blocks")), (0o440, 0o440));
        rig.expect_restorable(&id).await;
        // The virtual disks again, through their chains.
        let verification = verify(&rig.service, &id, json!({"content": true})).await;
        assert_eq!(
            (&verification["outcome"], findings(&verification).len()),
            (&json!("verified"), 0),
            "{verification:#}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incremental_takes_over_the_leaves_of_what_it_does_not_touch() {
    let mut rig = rig("").await;
    let ids = chain(&mut rig, 2).await;
    for id in &ids {
        verify(&rig.service, id, json!({"scope": "point"})).await;
    }
    let point = point(&rig.service, &ids[1]).await;
    let files: u64 = point["disks"].as_array().unwrap().iter().map(|disk| disk["file_bytes"].as_u64().unwrap()).sum();
    let folder = published(&rig, &ids[1]).await;
    let manifest = fs::metadata(folder.join("manifest.json")).unwrap().len();
    let read = point["verification"]["bytes_read"].as_u64().unwrap();
    assert_eq!(read - files - manifest, MIB as u64, "one block was touched: {point:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_of_a_deep_chain_reads_each_image_once() {
    let mut rig = rig(AUTOMATIC).await;
    let ids = chain(&mut rig, 6).await;
    all_verified(&rig, &ids).await;
    let mut bytes = 0;
    for id in &ids {
        let folder = published(&rig, id).await;
        for name in ["disk-0.qcow2", "disk-1.qcow2", "manifest.json"] {
            bytes += fs::metadata(folder.join(name)).unwrap().len();
        }
    }
    let verification = verify(&rig.service, ids.last().unwrap(), json!({})).await;
    assert_eq!((&verification["files"], &verification["bytes_read"]), (&json!(18), &json!(bytes)), "{verification:#}");
    let read: Vec<&str> =
        verification["points"].as_array().unwrap().iter().map(|point| point["point_id"].as_str().unwrap()).collect();
    assert_eq!(read, ids, "the lowest first");
    rig.expect_nothing_left(6).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_flipped_bit_is_found_by_verify_and_ends_the_chain() {
    let mut rig = rig(AUTOMATIC).await;
    let ids = chain(&mut rig, 4).await;
    all_verified(&rig, &ids).await;
    let image = published(&rig, &ids[1]).await.join("disk-0.qcow2");
    flip(&image, fs::metadata(&image).unwrap().len() * 8 - 8 * 4000);
    // What is above it is not read, and suspect all the same.
    let verification = verify(&rig.service, &ids[1], json!({})).await;
    assert_eq!(verification["outcome"], "corrupt", "{verification:#}");
    assert!(findings(&verification).contains(&"digest_mismatch"), "{verification:#}");
    let trust = |id: &str| {
        let service = &rig.service;
        let id = id.to_owned();
        async move { point(service, &id).await }
    };
    assert_eq!(trust(&ids[0]).await["trust"], "verified");
    let corrupt = trust(&ids[1]).await;
    assert_eq!(corrupt["trust"], "corrupt");
    assert!(corrupt["trust_reason"].as_str().unwrap().starts_with("digest_mismatch: disk-0.qcow2"), "{corrupt:#}");
    for id in &ids[2..] {
        let suspect = trust(id).await;
        assert_eq!(suspect["trust"], "suspect");
        assert!(suspect["trust_reason"].as_str().unwrap().contains(&ids[1]), "{suspect:#}");
    }
    let store = &rig.service.service.app().store;
    let told = events::about(&mut store.read().await.unwrap(), &ids[1]).await.unwrap();
    let (_, change) = told.iter().rfind(|(kind, _)| kind == "point.trust").unwrap();
    assert_eq!((&change["from"], &change["to"]), (&json!("verified"), &json!("corrupt")));
    assert!(told.iter().any(|(kind, data)| kind == "alert" && data["alert"] == "point_damaged"), "{told:?}");

    // A check reads no content, and tells what is known.
    let check = rig.service.post("/api/v1/repositories/main/check", &json!({})).await.expect_status(200).json();
    let kinds = check["findings"].as_array().unwrap().iter().map(|finding| finding["kind"].as_str().unwrap());
    assert_eq!(kinds.collect::<Vec<&str>>(), ["damaged", "damaged", "damaged"], "{check:#}");
    assert_eq!((&check["result"], &check["intact"]), (&json!("damaged"), &json!(1)));

    // Corrupt is final, and what is above stays suspect, also when the bit is as it was: what was found is told again.
    flip(&image, fs::metadata(&image).unwrap().len() * 8 - 8 * 4000);
    let again = verify(&rig.service, &ids[2], json!({})).await;
    assert_eq!(again["outcome"], "corrupt");
    let [sound, damaged, above] = [0, 1, 2].map(|index| &again["points"][index]["findings"]);
    assert_eq!(sound, &json!([]));
    assert_eq!(
        (&damaged[0]["severity"], &damaged[0]["code"]),
        (&json!("corrupt"), &json!("found_before")),
        "{again:#}"
    );
    assert_eq!(damaged[0]["detail"], corrupt["trust_reason"]);
    assert_eq!(above[0]["code"], "built_upon", "what is found now as well is told once: {again:#}");
    assert!(above[1].is_null(), "{again:#}");
    assert_eq!(verify(&rig.service, &ids[2], json!({"scope": "point"})).await["outcome"], "suspect");
    assert_eq!(trust(&ids[1]).await["trust"], "corrupt");

    rig.write(&[(FIRST, 0, content(9, 512))]);
    let started = rig.start().await;
    assert_eq!(started["backup_type"], "full", "{started:#}");
    assert_eq!(started["disk_results"][0]["reason"], "parent_suspect", "{started:#}");
    let next = rig.end_of(id_of(&started)).await;
    assert_eq!(next["state"], "committed");
    when(&rig.service, id_of(&next), |point| point["trust"] == "verified").await;

    // The newest point itself.
    let image = published(&rig, id_of(&next)).await.join("disk-1.qcow2");
    flip(&image, 8 * 70_000);
    assert_eq!(verify(&rig.service, id_of(&next), json!({})).await["outcome"], "corrupt");
    let started = rig.start().await;
    assert_eq!(started["disk_results"][0]["reason"], "parent_corrupt", "{started:#}");
    assert_eq!(rig.end_of(id_of(&started)).await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn hung_verify_does_not_hold_the_vm_slot() {
    let rig = rig(AUTOMATIC).await;
    let held = rig.service.service.app().points.hold_verifications();
    let first = rig.back_up().await;
    assert_eq!(first["state"], "committed");
    rig.when(id_of(&first), |backup| backup["facets"]["verify"] == "running").await;
    let second = rig.back_up().await;
    assert_eq!((&second["state"], &second["facets"]["verify"]), (&json!("committed"), &json!("pending")), "{second:#}");
    assert_eq!(point(&rig.service, id_of(&first)).await["trust"], "unverified");
    drop(held);
    for backup in [&first, &second] {
        rig.when(id_of(backup), |backup| backup["facets"]["verify"] == "verified").await;
    }
    rig.expect_nothing_left(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn points_are_verified_after_their_commit_only_where_that_is_asked_for() {
    let rig = rig("").await;
    let backup = rig.back_up().await;
    assert_eq!(backup["facets"]["verify"], "off");
    let point = point(&rig.service, id_of(&backup)).await;
    assert_eq!((&point["trust"], &point["verification"]), (&json!("unverified"), &Value::Null));
    assert!(!published(&rig, id_of(&backup)).await.join("digests.json").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_a_verification_and_the_next_start_takes_it_up_again() {
    let rig = rig(AUTOMATIC).await;
    // Kept beyond the stop: the file system still hangs when the service wants to go.
    let held = rig.service.service.app().points.hold_verifications();
    let id = id_of(&rig.back_up().await).to_owned();
    rig.when(&id, |backup| backup["facets"]["verify"] == "running").await;
    let Rig { service, node, ports, .. } = rig;
    let folder = tokio::time::timeout(DEADLINE, service.stop()).await.expect("the stop hangs");
    drop(held);
    let store = Store::open(&folder.path().join("state/blockyard.db")).await.unwrap();
    assert_eq!(leases::count(&mut store.read().await.unwrap()).await.unwrap(), 0, "given back before the end");
    store.close().await;
    let toml = crate::rig::configuration(&node.url(), folder.path(), &ports, AUTOMATIC);
    let service = TestService::start_in(folder, &toml).await;
    let verified = when(&service, &id, |point| point["trust"] == "verified").await;
    assert!(verified["verified_at"].is_string() && verified["disks"][0]["digest"].is_string(), "{verified:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_point_that_was_not_read_for_longest_is_scrubbed_first() {
    let mut rig = rig("[storage]\nscrub_interval_days = 7\n").await;
    let ids = chain(&mut rig, 3).await;
    let points = &rig.service.service.app().points;
    let in_days = |days: u64| UtcTime::now().plus_seconds(days * 86_400);
    assert_eq!(points.scrub_next(in_days(6)).await.unwrap(), Scrubbed::Nothing);
    // The second was read by hand: the others have waited longer.
    verify(&rig.service, &ids[1], json!({"scope": "point"})).await;
    for id in [&ids[0], &ids[2], &ids[1]] {
        let id = id.parse().unwrap();
        assert_eq!(points.scrub_next(in_days(8)).await.unwrap(), Scrubbed::Point(id, Outcome::Verified));
    }
    // Now the first one is the oldest again.
    assert_eq!(
        points.scrub_next(in_days(8)).await.unwrap(),
        Scrubbed::Point(ids[0].parse().unwrap(), Outcome::Verified)
    );
    assert_eq!(points.scrub_next(in_days(6)).await.unwrap(), Scrubbed::Nothing);
    rig.expect_nothing_left(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_scrubbed_with_an_interval_of_zero() {
    let rig = rig("[storage]\nscrub_interval_days = 0\n").await;
    rig.back_up().await;
    let later = UtcTime::now().plus_seconds(1000 * 86_400);
    assert_eq!(rig.service.service.app().points.scrub_next(later).await.unwrap(), Scrubbed::Nothing);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_that_another_task_works_on_is_refused_and_readers_share_it() {
    let mut rig = rig("").await;
    let ids = chain(&mut rig, 2).await;
    let app = rig.service.service.app();
    let merge = blockyard::id::TaskId::new();
    let mut transaction = app.store.write().await.unwrap();
    leases::take(&mut transaction, LeaseKind::Pin, &ids[0], merge.as_str(), &app.boot_id).await.unwrap().unwrap();
    transaction.commit().await.unwrap();
    // Below the one that is asked for.
    let refused = rig.service.post(&format!("/api/v1/points/{}/verify", ids[1]), &json!({})).await;
    refused.expect_problem(409, "point_in_use");
    let mut transaction = app.store.write().await.unwrap();
    leases::release_all(&mut transaction, merge.as_str()).await.unwrap();
    transaction.commit().await.unwrap();

    let held = app.points.hold_verifications();
    let path = |id: &str| format!("/api/v1/points/{id}/verify");
    let first = rig.service.post(&path(&ids[1]), &json!({})).await.expect_status(202).json();
    let second = rig.service.post(&path(&ids[0]), &json!({})).await.expect_status(202).json();
    let again = rig.service.post(&path(&ids[1]), &json!({})).await.expect_status(202).json();
    assert_eq!(first["id"], again["id"]);
    assert_ne!(first["id"], second["id"]);
    assert_eq!(rig.backup(&ids[0]).await["facets"]["verify"], "running", "as part of the chain");
    drop(held);
    for id in &ids {
        when(&rig.service, id, |point| point["verification"]["outcome"] == "verified").await;
    }
    rig.expect_nothing_left(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_derived_is_written_anew_when_the_database_proves_the_images() {
    let mut rig = rig(AUTOMATIC).await;
    let ids = chain(&mut rig, 2).await;
    all_verified(&rig, &ids).await;
    let folder = published(&rig, &ids[1]).await;
    let files = ["digests.json", "disk-0.blocks", "disk-1.blocks"].map(|name| folder.join(name));
    let sound = files.clone().map(|path| fs::read(path).unwrap());
    for (path, code) in files.iter().zip(["digests_damaged", "leaves_damaged", "leaves_damaged"]) {
        flip(path, 77);
        let verification = verify(&rig.service, &ids[1], json!({"scope": "point"})).await;
        assert_eq!(verification["outcome"], "verified", "{verification:#}");
        assert_eq!(findings(&verification), [code]);
        // As a crash leaves it that came while it was written.
        fs::remove_file(path).unwrap();
        let beside = path.with_file_name(format!("{}.new", path.file_name().unwrap().to_str().unwrap()));
        fs::write(&beside, b"half").unwrap();
        fs::set_permissions(&beside, Permissions::from_mode(0o440)).unwrap();
        let verification = verify(&rig.service, &ids[1], json!({"scope": "point"})).await;
        assert_eq!(verification["outcome"], "verified", "{verification:#}");
        assert_eq!(findings(&verification).len(), 1, "{verification:#}");
        let verification = verify(&rig.service, &ids[1], json!({"scope": "point"})).await;
        assert_eq!(findings(&verification).len(), 0, "{verification:#}");
        assert!(!beside.exists());
    }
    assert_eq!(files[1..].iter().map(|path| fs::read(path).unwrap()).collect::<Vec<_>>(), sound[1..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_gone_make_a_point_missing_and_a_repository_that_is_gone_nothing() {
    let rig = rig("").await;
    let id = id_of(&rig.back_up().await).to_owned();
    let away = rig.repository.with_extension("unmounted");
    fs::rename(&rig.repository, &away).unwrap();
    fs::create_dir(&rig.repository).unwrap();
    let verification = verify(&rig.service, &id, json!({})).await;
    assert_eq!((&verification["outcome"], findings(&verification)), (&json!("failed"), vec!["repository_unavailable"]));
    let unchanged = point(&rig.service, &id).await;
    assert_eq!((&unchanged["state"], &unchanged["trust"]), (&json!("committed"), &json!("unverified")));
    fs::remove_dir(&rig.repository).unwrap();
    fs::rename(&away, &rig.repository).unwrap();

    let folder = published(&rig, &id).await;
    let aside = folder.with_extension("aside");
    fs::rename(&folder, &aside).unwrap();
    assert_eq!(verify(&rig.service, &id, json!({})).await["outcome"], "missing");
    assert_eq!(point(&rig.service, &id).await["state"], "missing");
    fs::rename(&aside, &folder).unwrap();
    assert_eq!(verify(&rig.service, &id, json!({})).await["outcome"], "verified");
    assert_eq!(point(&rig.service, &id).await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_read_changes_no_trust_and_is_told() {
    let rig = rig(AUTOMATIC).await;
    let id = id_of(&rig.back_up().await).to_owned();
    all_verified(&rig, std::slice::from_ref(&id)).await;
    let before = point(&rig.service, &id).await;
    let image = published(&rig, &id).await.join("disk-0.qcow2");
    let aside = image.with_extension("aside");
    fs::rename(&image, &aside).unwrap();
    // An error of the file system that root gets too.
    std::os::unix::fs::symlink("disk-0.qcow2", &image).unwrap();
    let verification = verify(&rig.service, &id, json!({})).await;
    assert_eq!((&verification["outcome"], findings(&verification)), (&json!("failed"), vec!["unreadable"]));
    let after = point(&rig.service, &id).await;
    for field in ["state", "trust", "trust_reason", "verified_at"] {
        assert_eq!(after[field], before[field], "{field}");
    }
    fs::remove_file(&image).unwrap();
    fs::rename(&aside, &image).unwrap();
    assert_eq!(verify(&rig.service, &id, json!({})).await["outcome"], "verified");
    let page = rig.service.get("/metrics").await.expect_status(200).text;
    for line in ["blockyard_verifications_total{state=\"failed\"} 1", "blockyard_points{state=\"verified\"} 1"] {
        assert!(page.contains(line), "{line} in {page}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn points_are_compared_by_their_digests_without_reading_an_image() {
    let mut rig = rig("").await;
    let ids = chain(&mut rig, 2).await;
    let compare = |first: &str, second: &str| format!("/api/v1/points/{first}/compare?with={second}");
    let unknown = rig.service.get(&compare(&ids[0], &ids[1])).await.expect_status(200).json();
    assert_eq!((&unknown["status"], &unknown["disks"][1]["status"]), (&json!("unknown"), &json!("unknown")));
    for id in &ids {
        verify(&rig.service, id, json!({"scope": "point"})).await;
    }
    for id in &ids {
        let folder = published(&rig, id).await;
        for image in ["disk-0.qcow2", "disk-1.qcow2"] {
            fs::rename(folder.join(image), folder.join(image).with_extension("away")).unwrap();
        }
    }
    let compared = rig.service.get(&compare(&ids[0], &ids[1])).await.expect_status(200).json();
    assert_eq!(compared["status"], "different");
    let disks: Vec<(&Value, &Value)> =
        compared["disks"].as_array().unwrap().iter().map(|disk| (&disk["status"], &disk["differing_bytes"])).collect();
    assert_eq!(disks, [(&json!("different"), &json!(MIB)), (&json!("equal"), &json!(0))]);
    let same = rig.service.get(&compare(&ids[1], &ids[1])).await.expect_status(200).json();
    assert_eq!(same["status"], "equal");
    let other = "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB";
    rig.service.get(&compare(&ids[0], other)).await.expect_problem(404, "point_not_found");
    rig.service.get(&format!("/api/v1/points/{}/compare", ids[0])).await.expect_problem(400, "invalid_field");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_with_digests_that_neither_disk_nor_database_can_prove_is_not_trusted() {
    let rig = rig(AUTOMATIC).await;
    let id = id_of(&rig.back_up().await).to_owned();
    all_verified(&rig, std::slice::from_ref(&id)).await;
    // As in a repository whose database was lost: the document is all there is.
    let app = rig.service.service.app();
    let parsed = id.parse().unwrap();
    let rows = points::disks(&mut app.store.read().await.unwrap(), &parsed).await.unwrap();
    let forget = || async {
        let mut transaction = app.store.write().await.unwrap();
        for row in &rows {
            blockyard::store::trust::set_digests(&mut transaction, &parsed, row.disk_id, None).await.unwrap();
        }
        transaction.commit().await.unwrap();
    };
    forget().await;
    assert_eq!(verify(&rig.service, &id, json!({})).await["outcome"], "verified");
    assert_eq!(points::disks(&mut app.store.read().await.unwrap(), &parsed).await.unwrap(), rows, "recorded again");
    forget().await;
    flip(&published(&rig, &id).await.join("digests.json"), 1000);
    let verification = verify(&rig.service, &id, json!({})).await;
    assert_eq!(verification["outcome"], "suspect", "{verification:#}");
    assert_eq!(point(&rig.service, &id).await["trust"], "suspect");
}

/// Makes a point anew without its parent; how its disks are recorded then.
async fn merge(rig: &Rig, id: &str) -> Vec<points::PointDiskRow> {
    let app = rig.service.service.app();
    app.points.merge(&id.parse().unwrap()).await.unwrap();
    points::disks(&mut app.store.read().await.unwrap(), &id.parse().unwrap()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merged_point_is_read_anew_and_held_to_the_content_that_was_known_of_it() {
    let mut rig = rig("").await;
    let ids = chain(&mut rig, 3).await;
    verify(&rig.service, &ids[2], json!({})).await;
    let app = rig.service.service.app();
    // First an incremental upon the grandparent, then a full.
    for generation in 1..3 {
        let merged = merge(&rig, &ids[2]).await;
        let recorded = point(&rig.service, &ids[2]).await;
        assert_eq!(recorded["trust"], "unverified", "{recorded:#}");
        for (disk, (_, bytes)) in merged.iter().zip(&rig.disks) {
            assert_eq!((&disk.digest, &disk.content_digest), (&None, &Some(root(bytes).1)), "{generation}");
        }
        let folder = published(&rig, &ids[2]).await;
        assert!(!folder.join("digests.json").exists(), "nobody has read the new images");
        let verification = verify(&rig.service, &ids[2], json!({"scope": "point"})).await;
        assert_eq!(verification["outcome"], "verified", "{verification:#}");
        assert!(findings(&verification).is_empty(), "{verification:#}");
        let images: u64 = merged.iter().map(|disk| disk.file_bytes).sum();
        // An incremental takes over what it does not touch from the point below, a full has nobody to take it from.
        let disks: u64 = if generation == 1 { MIB as u64 } else { merged.iter().map(|disk| disk.size_bytes).sum() };
        let manifest = fs::metadata(folder.join("manifest.json")).unwrap().len();
        assert_eq!(verification["bytes_read"], images + disks + manifest, "{verification:#}");
        let verified = point(&rig.service, &ids[2]).await;
        assert_eq!(verified["trust"], "verified");
        let rows = points::disks(&mut app.store.read().await.unwrap(), &ids[2].parse().unwrap()).await.unwrap();
        for (disk, (_, bytes)) in rows.iter().zip(&rig.disks) {
            let image = blake3::hash(&fs::read(folder.join(&disk.file)).unwrap()).to_hex().to_string();
            assert_eq!((&disk.digest, &disk.content_digest), (&Some(image), &Some(root(bytes).1)), "{generation}");
        }
        assert!(folder.join("digests.json").exists());
        // From now on by the digests of the files.
        let again = verify(&rig.service, &ids[2], json!({"scope": "point"})).await;
        assert_eq!((&again["outcome"], &again["bytes_read"]), (&json!("verified"), &json!(images + manifest)));
    }
    rig.expect_restorable(&ids[2]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn points_above_a_merged_one_are_verified_as_before() {
    let mut rig = rig("").await;
    let ids = chain(&mut rig, 4).await;
    verify(&rig.service, &ids[3], json!({})).await;
    merge(&rig, &ids[1]).await;
    let top = point(&rig.service, &ids[3]).await;
    assert_eq!((&top["trust"], &top["disks"][0]["chain_depth"]), (&json!("verified"), &json!(3)), "{top:#}");
    for body in [json!({}), json!({"scope": "point", "content": true})] {
        let verification = verify(&rig.service, &ids[3], body).await;
        assert_eq!(verification["outcome"], "verified", "{verification:#}");
        assert!(findings(&verification).is_empty(), "{verification:#}");
    }
    for id in &ids {
        assert_eq!(point(&rig.service, id).await["trust"], "verified");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_that_is_being_made_anew_is_verified_when_that_is_done() {
    let rig = rig(AUTOMATIC).await;
    let app = rig.service.service.app();
    let held = app.points.hold_verifications();
    let id = id_of(&rig.back_up().await).to_owned();
    let other = id_of(&rig.back_up().await).to_owned();
    when(&rig.service, &id, |point| point["verification"]["state"] == "running").await;
    // What is next in turn is in the hands of a task, as a merge is.
    let merge = blockyard::id::TaskId::new();
    let mut transaction = app.store.write().await.unwrap();
    leases::take(&mut transaction, LeaseKind::Pin, &other, merge.as_str(), &app.boot_id).await.unwrap().unwrap();
    transaction.commit().await.unwrap();
    drop(held);
    when(&rig.service, &id, |point| point["trust"] == "verified").await;
    let now = UtcTime::now();
    assert_eq!(app.points.verify_next_new(now).await.unwrap(), Scrubbed::Nothing);
    assert_eq!(rig.backup(&other).await["facets"]["verify"], "pending");
    let mut transaction = app.store.write().await.unwrap();
    leases::release_all(&mut transaction, merge.as_str()).await.unwrap();
    transaction.commit().await.unwrap();
    when(&rig.service, &other, |point| point["trust"] == "verified").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bit_that_flipped_in_a_merged_image_before_anybody_read_it_is_found_by_its_content() {
    for (length, outcome) in [(2, "corrupt"), (3, "suspect")] {
        let mut rig = rig("").await;
        let ids = chain(&mut rig, length).await;
        let last = ids.last().unwrap();
        verify(&rig.service, last, json!({})).await;
        merge(&rig, last).await;
        // In data, where no table shows it.
        let image = published(&rig, last).await.join("disk-0.qcow2");
        let data = &rig.disks[0].1[MIB + 65_536..][..512];
        let bytes = fs::read(&image).unwrap();
        let at = bytes.windows(512).position(|window| window == data).expect("the image holds what was written");
        flip(&image, 8 * at as u64 + 100);
        let verification = verify(&rig.service, last, json!({})).await;
        assert_eq!(verification["outcome"], outcome, "{verification:#}");
        assert_eq!(findings(&verification), ["content_mismatch"], "{verification:#}");
        let folder = published(&rig, last).await;
        assert!(!folder.join("digests.json").exists(), "what is wrong is not proven from now on");
        // The same bit again is the image that was made; trust does not rise by itself.
        flip(&image, 8 * at as u64 + 100);
        assert_eq!(verify(&rig.service, last, json!({})).await["outcome"], outcome);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_that_was_made_anew_and_what_stands_upon_it_are_verified_again() {
    let mut rig = rig("").await;
    let ids = chain(&mut rig, 3).await;
    assert_eq!(verify(&rig.service, &ids[2], json!({})).await["outcome"], "verified");
    rig.service.service.app().points.merge(&ids[1].parse().unwrap()).await.unwrap();
    assert_eq!(point(&rig.service, &ids[1]).await["trust"], "unverified");
    // The new images are read for the first time, and must hold the content that is recorded.
    let verification = verify(&rig.service, &ids[2], json!({})).await;
    assert_eq!(verification["outcome"], "verified", "{verification:#}");
    assert_eq!(verification["points"].as_array().unwrap().len(), 2, "{verification:#}");
    assert!(findings(&verification).is_empty(), "{verification:#}");
    flip(&published(&rig, &ids[1]).await.join("disk-0.qcow2"), 8 << 20);
    assert_eq!(verify(&rig.service, &ids[2], json!({})).await["outcome"], "corrupt");
    assert_eq!(point(&rig.service, &ids[1]).await["trust"], "corrupt");
    assert_eq!(point(&rig.service, &ids[2]).await["trust"], "suspect");
}

#[tokio::test(flavor = "multi_thread")]
async fn points_are_verified_and_compared_by_command() {
    let mut rig = rig("").await;
    let ids = chain(&mut rig, 2).await;
    let (code, text) = cli(&rig, &["point", "compare", &ids[0], &ids[1]]).await;
    assert!(code == 3 && text.contains("unknown"), "{code} {text}");
    let (code, text) = cli(&rig, &["point", "verify", &ids[1], "--content"]).await;
    assert!(code == 0 && text.contains("verified") && ids.iter().all(|id| text.contains(id)), "{code} {text}");
    assert!(text.contains("(2 points, ") && text.contains("compared with what was received)"), "{text}");
    let (code, text) = cli(&rig, &["point", "verify", &ids[0]]).await;
    assert!(
        code == 0 && text.contains("(1 point, ") && text.contains(" read)"),
        "of a repeat only what it did: {text}"
    );
    let (code, text) = cli(&rig, &["point", "compare", &ids[0], &ids[1]]).await;
    assert!(code == 1 && text.contains("different") && text.contains("equal"), "{code} {text}");
    let (code, _) = cli(&rig, &["point", "compare", &ids[0], &ids[0]]).await;
    assert_eq!(code, 0);
    let folder = published(&rig, &ids[1]).await;
    flip(&folder.join("digests.json"), 100);
    let (code, text) = cli(&rig, &["point", "verify", &ids[1], "--point-only"]).await;
    assert!(code == 3 && text.contains("digests_damaged") && !text.contains(&ids[0]), "{code} {text}");
    flip(&folder.join("disk-0.qcow2"), 100);
    let (code, text) = cli(&rig, &["point", "verify", &ids[1]]).await;
    assert!(code == 6 && text.contains("digest_mismatch") && text.contains("disk-0.qcow2"), "{code} {text}");
    let (code, text) = cli(&rig, &["--output", "json", "point", "verify", &ids[1]]).await;
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &document["outcome"], &document["points_total"]), (6, &json!("corrupt"), &json!(2)));
    let (code, text) = cli(&rig, &["point", "show", &ids[1]]).await;
    let digest = point(&rig.service, &ids[1]).await["disks"][0]["digest"].as_str().unwrap().to_owned();
    assert!(code == 0 && text.contains("digest_mismatch") && text.contains(&digest), "{text}");
    let (code, _) = cli(&rig, &["point", "verify", "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB"]).await;
    assert_eq!(code, 4);
}

/// `SEED=` repeats a run, `SCALE=` multiplies it.
#[allow(clippy::print_stdout, reason = "the seed of a run that fails")]
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_flipped_bits_are_all_found() {
    let number = |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let seed = number("SEED", u64::from(std::process::id()));
    println!("SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let disks = vec![(FIRST, content(1, 300 << 10)), (SECOND, content(2, 200 << 10))];
    let mut rig = Rig::with(Plan { disks, ..plan(AUTOMATIC) }).await;
    let mut ids = vec![id_of(&rig.back_up().await).to_owned()];
    rig.write(&[(FIRST, 4096, content(3, 70_000)), (SECOND, 512, content(4, 512))]);
    ids.push(id_of(&rig.back_up().await).to_owned());
    all_verified(&rig, &ids).await;
    let mut files = Vec::new();
    for id in &ids {
        for entry in fs::read_dir(published(&rig, id).await).unwrap() {
            files.push((id.parse().unwrap(), entry.unwrap().path()));
        }
    }
    assert_eq!(files.len(), 12, "{files:?}");
    let points = &rig.service.service.app().points;
    for id in &ids {
        assert_eq!(points.inspect(&id.parse().unwrap()).await.unwrap().findings, [], "nothing is wrong yet");
    }
    let mut found = BTreeMap::new();
    for round in 0..1000 * number("SCALE", 1) {
        let (id, path) = &files[random.usize(..files.len())];
        let length = fs::metadata(path).unwrap().len();
        // Half of the flips in images are among the tables at their beginning.
        let end = if random.bool() { length } else { length.min(6 * 65_536) };
        let bit = random.u64(..end * 8);
        flip(path, bit);
        let inspection = points.inspect(id).await.unwrap();
        let first = inspection.findings.first();
        let finding = first.unwrap_or_else(|| panic!("SEED={seed}, round {round}: bit {bit} of {}", path.display()));
        *found.entry(finding.code).or_insert(0u64) += 1;
        flip(path, bit);
    }
    println!("{found:?}");
    for id in &ids {
        assert_eq!(points.inspect(&id.parse().unwrap()).await.unwrap().findings, [], "all is as it was");
    }
}
