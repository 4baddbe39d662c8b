//! A point absorbs its parents: what it is afterwards, who may go on meanwhile, and what is refused without a trace.

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use blockyard::id::{BackupId, TaskId};
use blockyard::node::fake::{Faults, PausePoint};
use blockyard::points::merge::{MergeError, Merged};
use blockyard::store::{events, leases, points};
use blockyard_qcow2 as qcow2;
use serde_json::{Value, json};

use crate::privileged::Mounted;
use crate::process::sqlite;
use crate::rig::{self, Plan, Rig, content, expect_image_equals, id_of, manifest, published, tool};

/// The disks by device key.
const FIRST: u32 = 2000;
const SECOND: u32 = 2016;
const MIB: usize = 1 << 20;

/// The content of all disks as one point should have it.
pub type Disks = Vec<(u32, Vec<u8>)>;

pub async fn rig() -> Rig {
    with(|_| {}).await
}

async fn with(change: impl FnOnce(&mut Plan)) -> Rig {
    let disks = vec![(FIRST, content(1, 3 * MIB)), (SECOND, content(2, MIB + 512))];
    let mut plan = Plan { disks, ..Plan::default() };
    change(&mut plan);
    Rig::with(plan).await
}

/// Writes to every disk, another content each time, and zeroes over data.
pub fn write_everywhere(rig: &mut Rig, round: u8) {
    let at = usize::from(round) * 3 * 512;
    rig.write(&[
        (FIRST, at, content(round, 100 << 10)),
        (FIRST, 2 * MIB + at, vec![0; 192 << 10]),
        (SECOND, MIB - 512, content(round, 1024)),
    ]);
}

/// A full and so many incrementals, each with what its disks were.
pub async fn chain(rig: &mut Rig, points: u8) -> Vec<(BackupId, Disks)> {
    let mut history = Vec::new();
    for round in 0..points {
        if round > 0 {
            write_everywhere(rig, round);
        }
        history.push((commit(rig).await, rig.disks.clone()));
    }
    history
}

/// Makes a backup that must succeed.
pub async fn commit(rig: &Rig) -> BackupId {
    let backup = rig.back_up().await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    id_of(&backup).parse().unwrap()
}

pub async fn merge(rig: &Rig, id: &BackupId) -> Result<Merged, MergeError> {
    rig.service.service.app().points.merge(id).await
}

/// Holds that every point restores, by QEMU through its chain, that records, manifests and images tell the same, and that
/// nothing is left beside the points.
pub async fn expect_whole(rig: &Rig, history: &[(BackupId, Disks)], what: &str) {
    let app = rig.service.service.app();
    let mut connection = app.store.read().await.unwrap();
    for (id, disks) in history {
        let folder = published(rig, id.as_str()).await;
        let manifest = manifest(rig, id.as_str()).await;
        let rows = points::disks(&mut connection, id).await.unwrap();
        for ((row, said), (_, bytes)) in rows.iter().zip(manifest["disks"].as_array().unwrap()).zip(disks) {
            let image = folder.join(&row.file);
            expect_image_equals(&image, bytes);
            let parent = row.parent_id.as_ref().map(ToString::to_string);
            assert_eq!(json!(parent), said["parent_id"], "{what} {id}");
            assert_eq!(
                (json!(row.file_bytes), json!(row.change_id)),
                (said["file_bytes"].clone(), said["change_id"].clone())
            );
            assert_eq!(json!(row.from_change_id), said["from_change_id"], "{what} {id}");
            assert_eq!(std::fs::metadata(&image).unwrap().len(), row.file_bytes, "{what} {id}");
            assert_eq!(std::fs::metadata(&image).unwrap().permissions().mode() & 0o7777, 0o440);
            let chain = backing_chain(&image);
            assert_eq!(chain.len(), row.chain_depth as usize, "{what} {id}: {chain:?}");
            let below = parent.map(|parent| format!("../{parent}/{}", row.file));
            assert_eq!(chain[0]["backing-filename"].as_str().map(str::to_owned), below, "{what} {id}");
        }
    }
    let folders = rig::backup_directories(&rig.repository);
    assert_eq!(folders, history.iter().map(|(id, _)| id.to_string()).collect::<Vec<_>>(), "{what}");
    assert_eq!(leases::count(&mut connection).await.unwrap(), 0, "{what}: pins are left");
}

fn backing_chain(image: &Path) -> Vec<Value> {
    let arguments = ["info", "--backing-chain", "--output=json", "-f", "qcow2", image.to_str().unwrap()];
    serde_json::from_str(&tool("qemu-utils", "qemu-img", &arguments)).unwrap()
}

/// Everything in a repository with its inode, length, modification time and content.
fn everything(folder: &Path) -> Vec<(PathBuf, u64, i64, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(everything(&path));
        } else {
            let facts = std::fs::metadata(&path).unwrap();
            found.push((path.clone(), facts.ino(), facts.mtime_nsec(), std::fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_and_its_incremental_become_a_full_of_the_same_identity_and_content() {
    let mut rig = rig().await;
    let history = chain(&mut rig, 2).await;
    let (full, child) = (&history[0].0, &history[1].0);
    let before = manifest(&rig, child.as_str()).await;
    let done = merge(&rig, child).await.unwrap();
    assert_eq!((&done.point, &done.absorbed, done.generation), (child, &vec![full.clone()], 1));
    expect_whole(&rig, &history, "").await;
    let after = manifest(&rig, child.as_str()).await;
    assert_eq!((&after["generation"], &after["merged"]), (&json!(1), &json!([full])));
    assert_eq!((&after["backup_id"], &after["committed_at"]), (&before["backup_id"], &before["committed_at"]));
    assert_eq!(after["backup_type"], "full");
    for (now, was) in after["disks"].as_array().unwrap().iter().zip(before["disks"].as_array().unwrap()) {
        assert_eq!(
            (&now["backup_type"], &now["chain_depth"], &now["parent_id"]),
            (&json!("full"), &json!(1), &Value::Null)
        );
        for kept in ["disk_id", "device_key", "change_id", "effective_type", "reason", "coverage", "size_bytes", "file"]
        {
            assert_eq!(now[kept], was[kept], "{kept}");
        }
    }
    // Nothing needs the old full any more.
    std::fs::remove_dir_all(published(&rig, full.as_str()).await).unwrap();
    rig.expect_restorable(child.as_str()).await;
    let told = events::about(&mut rig.service.service.app().store.read().await.unwrap(), child.as_str()).await.unwrap();
    let told: Vec<_> = told.into_iter().filter(|(kind, _)| kind == "point.merged").map(|(_, data)| data).collect();
    let expected = json!({"point_id": child, "generation": 1, "merged": [full], "parents": [null, null]});
    assert_eq!(told, [expected]);
    assert!(matches!(merge(&rig, child).await, Err(MergeError::NoParent(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_in_the_middle_of_a_chain_moves_onto_its_grandparent_and_all_above_it_get_shorter() {
    let mut rig = rig().await;
    let mut history = chain(&mut rig, 4).await;
    let below = manifest(&rig, history[1].0.as_str()).await;
    let done = merge(&rig, &history[2].0).await.unwrap();
    assert_eq!(done.absorbed, [history[1].0.clone()]);
    let after = manifest(&rig, history[2].0.as_str()).await;
    assert_eq!(after["backup_type"], "incremental");
    for (disk, absorbed) in after["disks"].as_array().unwrap().iter().zip(below["disks"].as_array().unwrap()) {
        assert_eq!((&disk["parent_id"], &disk["chain_depth"]), (&json!(history[0].0), &json!(2)));
        assert_eq!(disk["from_change_id"], absorbed["from_change_id"]);
    }
    expect_whole(&rig, &history, "").await;
    // Again, now onto nothing; what was absorbed is remembered.
    let done = merge(&rig, &history[2].0).await.unwrap();
    assert_eq!((done.generation, done.absorbed), (2, vec![history[0].0.clone()]));
    let after = manifest(&rig, history[2].0.as_str()).await;
    assert_eq!(after["merged"], json!([history[0].0, history[1].0]));
    expect_whole(&rig, &history, "").await;
    write_everywhere(&mut rig, 4);
    history.push((commit(&rig).await, rig.disks.clone()));
    expect_whole(&rig, &history, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_without_a_parent_are_carried_over_as_the_same_file_and_new_ones_too() {
    let mut rig = rig().await;
    let mut history = chain(&mut rig, 1).await;
    // The second grows, so it is a full; a third is new.
    let mut disks = rig.disks.clone();
    disks[1].1.extend(content(9, MIB));
    disks.push((16_000, content(3, MIB / 2)));
    rig.replace_disks(disks).await;
    write_everywhere(&mut rig, 1);
    history.push((commit(&rig).await, rig.disks.clone()));
    let child = history[1].0.clone();
    let folder = published(&rig, child.as_str()).await;
    std::fs::write(folder.join("disk-0.blocks"), b"of the content").unwrap();
    std::fs::write(folder.join("digests.json"), b"of the files").unwrap();
    let inode = |file: &str| std::fs::metadata(folder.join(file)).unwrap().ino();
    let before = [inode("disk-0.qcow2"), inode("disk-1.qcow2"), inode("disk-2.qcow2")];
    {
        let database = rig.service.folder.path().join("state/blockyard.db");
        sqlite(&database, &format!("UPDATE point_disks SET digest = 'd', content_digest = 'c' WHERE point_id = '{child}'; \
            UPDATE restore_points SET trust = 'verified', verified_at = '2026-11-23T22:00:00.000Z' WHERE id = '{child}';")).await;
    }
    merge(&rig, &child).await.unwrap();
    assert_ne!(inode("disk-0.qcow2"), before[0]);
    assert_eq!([inode("disk-1.qcow2"), inode("disk-2.qcow2")], before[1..]);
    assert_eq!(std::fs::read(folder.join("disk-0.blocks")).unwrap(), b"of the content");
    assert!(!folder.join("digests.json").exists(), "digests of files that are not there any more");
    let mut connection = rig.service.service.app().store.read().await.unwrap();
    let rows = points::disks(&mut connection, &child).await.unwrap();
    let digests: Vec<_> = rows.iter().map(|row| (row.digest.as_deref(), row.content_digest.as_deref())).collect();
    assert_eq!(digests, [(None, Some("c")), (Some("d"), Some("c")), (Some("d"), Some("c"))]);
    let point = points::find(&mut connection, &child).await.unwrap().unwrap();
    assert_eq!((point.trust.as_str(), point.verified_at), ("unverified", None));
    drop(connection);
    expect_whole(&rig, &history, "").await;
    write_everywhere(&mut rig, 2);
    history.push((commit(&rig).await, rig.disks.clone()));
    expect_whole(&rig, &history, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_image_of_a_descendant_reads_right_before_during_and_after_a_merge() {
    let mut rig = rig().await;
    let history = chain(&mut rig, 4).await;
    let (id, disks) = &history[3];
    let image = published(&rig, id.as_str()).await.join("disk-0.qcow2");
    let options = qcow2::OpenOptions {
        backing_root: image.parent().unwrap().parent().map(Path::to_owned),
        ..qcow2::OpenOptions::new(qcow2::Access::ReadOnly)
    };
    let open = qcow2::Image::open(&image, &options).unwrap();
    let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let reader = {
        let (stop, rounds, bytes) = (Arc::clone(&stop), Arc::clone(&rounds), disks[0].1.clone());
        std::thread::spawn(move || {
            let mut read = vec![0; bytes.len()];
            while !stop.load(Ordering::Relaxed) {
                open.read(0, &mut read).unwrap();
                assert!(read == bytes, "an open image reads something else");
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let read_more = || {
        let seen = rounds.load(Ordering::Relaxed);
        while rounds.load(Ordering::Relaxed) < seen + 2 && !reader.is_finished() {
            std::thread::yield_now();
        }
    };
    read_more();
    let watch = rig.service.service.app().points.watch_merges();
    merge(&rig, &history[2].0).await.unwrap();
    assert!(watch.borrow().is_empty(), "nothing is under way");
    // The old files are gone by name; whoever has them open keeps them.
    std::fs::remove_dir_all(published(&rig, history[1].0.as_str()).await).unwrap();
    read_more();
    stop.store(true, Ordering::Relaxed);
    reader.join().unwrap();
    // And opened anew it reads the same through the new files.
    expect_image_equals(&image, &disks[0].1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_backup_upon_a_point_that_is_merged_commits_and_restores() {
    let mut rig = rig().await;
    let mut history = chain(&mut rig, 3).await;
    write_everywhere(&mut rig, 3);
    rig.node.reconfigure(|config| config.faults.pause = Some(PausePoint::AfterBytes(64 << 10)));
    let started = rig.start().await;
    rig.paused().await;
    // The job pins the whole chain; that does not stop the merge.
    merge(&rig, &history[2].0).await.unwrap();
    merge(&rig, &history[2].0).await.unwrap();
    rig.node.resume();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    rig.node.reconfigure(|config| config.faults = Faults::default());
    history.push((id_of(&backup).parse().unwrap(), rig.disks.clone()));
    // Its chain is as deep as it is now, not as it was when it began.
    expect_whole(&rig, &history, "").await;
    write_everywhere(&mut rig, 4);
    history.push((commit(&rig).await, rig.disks.clone()));
    expect_whole(&rig, &history, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_incremental_begins_at_the_change_id_of_the_merged_point() {
    let mut rig = rig().await;
    let mut history = chain(&mut rig, 2).await;
    merge(&rig, &history[1].0).await.unwrap();
    let below = manifest(&rig, history[1].0.as_str()).await;
    write_everywhere(&mut rig, 2);
    history.push((commit(&rig).await, rig.disks.clone()));
    let next = manifest(&rig, history[2].0.as_str()).await;
    for (disk, below) in next["disks"].as_array().unwrap().iter().zip(below["disks"].as_array().unwrap()) {
        assert_eq!((&disk["parent_id"], &disk["from_change_id"]), (&json!(history[1].0), &below["change_id"]));
        assert_eq!((&disk["effective_type"], &disk["chain_depth"]), (&json!("incremental"), &json!(2)));
    }
    expect_whole(&rig, &history, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_of_what_may_be_wrong_or_is_in_use_by_a_task_is_refused_and_changes_nothing() {
    let mut rig = rig().await;
    let history = chain(&mut rig, 3).await;
    let child = &history[2].0;
    let before = everything(&rig.repository);
    let database = rig.service.folder.path().join("state/blockyard.db");
    for trust in ["suspect", "corrupt"] {
        for (id, _) in &history[1..] {
            sqlite(&database, &format!("UPDATE restore_points SET trust = '{trust}' WHERE id = '{id}'")).await;
            let refused = merge(&rig, child).await;
            assert!(matches!(&refused, Err(MergeError::Untrusted { point, .. }) if point == id), "{refused:?}");
            sqlite(&database, &format!("UPDATE restore_points SET trust = 'unverified' WHERE id = '{id}'")).await;
        }
    }
    for (id, _) in &history {
        sqlite(&database, &format!("UPDATE restore_points SET state = 'missing' WHERE id = '{id}'")).await;
        let refused = merge(&rig, child).await;
        assert!(matches!(&refused, Err(MergeError::NotCommitted { point, .. }) if point == id), "{refused:?}");
        sqlite(&database, &format!("UPDATE restore_points SET state = 'committed' WHERE id = '{id}'")).await;
    }
    let app = rig.service.service.app();
    for (id, _) in &history[1..] {
        let task = TaskId::new();
        let mut transaction = app.store.write().await.unwrap();
        leases::pin_chain(&mut transaction, id, task.as_str(), &app.boot_id).await.unwrap();
        transaction.commit().await.unwrap();
        let refused = merge(&rig, child).await;
        assert!(matches!(&refused, Err(MergeError::Busy { holder, .. }) if holder == task.as_str()), "{refused:?}");
        let mut transaction = app.store.write().await.unwrap();
        leases::release_all(&mut transaction, task.as_str()).await.unwrap();
        transaction.commit().await.unwrap();
    }
    assert!(matches!(merge(&rig, &BackupId::new()).await, Err(MergeError::NotFound(_))));
    assert!(matches!(merge(&rig, &history[0].0).await, Err(MergeError::NoParent(_))));
    // A record that names another chain than the images do.
    sqlite(&database, &format!("UPDATE point_disks SET parent_id = '{}' WHERE point_id = '{child}'", history[0].0))
        .await;
    let refused = merge(&rig, child).await;
    assert!(matches!(&refused, Err(MergeError::Mismatch { disk_id: 0, .. })), "{refused:?}");
    sqlite(&database, &format!("UPDATE point_disks SET parent_id = '{}' WHERE point_id = '{child}'", history[1].0))
        .await;
    assert!(everything(&rig.repository) == before, "something was changed");
    expect_whole(&rig, &history, "").await;
    merge(&rig, child).await.unwrap();
    expect_whole(&rig, &history, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_cannot_be_read_ends_the_merge_and_nothing_changes() {
    let mut rig = rig().await;
    let history = chain(&mut rig, 2).await;
    // An entry of the full's first L2 table points between two clusters.
    let image = published(&rig, history[0].0.as_str()).await.join("disk-0.qcow2");
    std::fs::set_permissions(&image, PermissionsExt::from_mode(0o640)).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let entry = (number(number(40)) & 0x00ff_ffff_ffff_fe00) + 8 * 40;
    let sound = number(entry);
    file.write_all_at(&(sound | 0x200).to_be_bytes(), entry).unwrap();
    let before = everything(&rig.repository);
    let failed = merge(&rig, &history[1].0).await;
    assert!(
        matches!(&failed, Err(MergeError::Image { disk_id: 0, source: qcow2::Error::Unreadable { .. } })),
        "{failed:?}"
    );
    assert!(everything(&rig.repository) == before, "something was changed");
    file.write_all_at(&sound.to_be_bytes(), entry).unwrap();
    std::fs::set_permissions(&image, PermissionsExt::from_mode(0o440)).unwrap();
    merge(&rig, &history[1].0).await.unwrap();
    expect_whole(&rig, &history, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_without_room_refuses_a_merge_or_ends_it_and_nothing_changes() {
    let folder = tempfile::tempdir().unwrap();
    let mounted = Mounted::small(&folder.path().join("main-is-small"), "6m");
    let plan = Plan {
        disks: vec![(FIRST, content(1, 3 * MIB)), (SECOND, content(2, MIB + 512))],
        toml: "[storage]\nmin_free_bytes = 0\nfull_estimate_ratio = 0.1\n".to_owned(),
        ..Plan::default()
    };
    let mut rig = Rig::in_folder(folder, plan).await;
    let small = rig.service.folder.path().join("main-is-small");
    rig.service
        .post("/api/v1/repositories", &json!({"id": "small", "name": "small", "path": small}))
        .await
        .expect_status(201);
    let mut ids: Vec<BackupId> = Vec::new();
    for round in 0..2 {
        write_everywhere(&mut rig, round);
        let mut body = rig.start_body();
        body["repository_id"] = "small".into();
        let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
        let backup = rig.end_of(id_of(&started)).await;
        assert_eq!(backup["state"], "committed", "{backup:#}");
        ids.push(id_of(&backup).parse().unwrap());
    }
    let before = everything(&small);
    let refused = merge(&rig, &ids[1]).await;
    assert!(matches!(&refused, Err(MergeError::InsufficientStorage { .. })), "{refused:?}");
    // With a record that promises less it is found on the way.
    let database = rig.service.folder.path().join("state/blockyard.db");
    sqlite(&database, "UPDATE point_disks SET file_bytes = file_bytes / 100").await;
    let failed = merge(&rig, &ids[1]).await;
    assert!(matches!(&failed, Err(MergeError::StorageFull(_))), "{failed:?}");
    assert!(everything(&small) == before, "something was changed");
    rig.expect_restorable(ids[1].as_str()).await;
    drop(mounted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_leaves_what_a_running_merge_still_needs() {
    let mut rig = with(|plan| plan.disks = vec![(FIRST, content(1, 24 * MIB)), (SECOND, content(2, 2 * MIB))]).await;
    let history = chain(&mut rig, 2).await;
    let app = Arc::clone(rig.service.service.app());
    let main = "main".parse().unwrap();
    // A merge speaks for as much as both images have, and for less and less of it.
    let (merged, needed) = (Arc::new(AtomicBool::new(false)), {
        let mut connection = app.store.read().await.unwrap();
        let mut bytes = 0;
        for (id, _) in &history {
            bytes += points::disks(&mut connection, id).await.unwrap().iter().map(|disk| disk.file_bytes).sum::<u64>();
        }
        bytes
    });
    let watching = std::thread::spawn({
        let (repositories, merged) = (app.repositories.clone(), Arc::clone(&merged));
        move || {
            let mut seen = std::collections::BTreeSet::new();
            while !merged.load(Ordering::Relaxed) {
                seen.insert(repositories.spoken_for(&"main".parse().unwrap()));
            }
            seen
        }
    });
    merge(&rig, &history[1].0).await.unwrap();
    merged.store(true, Ordering::Relaxed);
    let seen = watching.join().unwrap();
    assert_eq!(seen.last(), Some(&needed), "{seen:?}");
    assert!(seen.iter().any(|left| (1..needed).contains(left)), "{seen:?}");
    assert_eq!(app.repositories.spoken_for(&main), 0);
    // What is spoken for is not free, whoever spoke.
    let spoken = app.repositories.promise(&main, u64::MAX / 2);
    let problem = rig.try_start().await.expect_problem(507, "insufficient_storage");
    assert_eq!(problem["free_bytes"], 0, "{problem:#}");
    drop(spoken);
    assert_eq!(rig.back_up().await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_leaves_what_a_running_backup_was_promised() {
    let folder = tempfile::tempdir().unwrap();
    let small = folder.path().join("main-is-small");
    let mounted = Mounted::small(&small, "11m");
    let plan = Plan {
        disks: vec![(FIRST, content(1, 3 * MIB)), (SECOND, content(2, MIB + 512))],
        toml: "[storage]\nmin_free_bytes = 0\nfull_estimate_ratio = 1.0\n".to_owned(),
        ..Plan::default()
    };
    let mut rig = Rig::in_folder(folder, plan).await;
    rig.service
        .post("/api/v1/repositories", &json!({"id": "small", "name": "small", "path": small}))
        .await
        .expect_status(201);
    rig.repository = small;
    let mut body = rig.start_body();
    body["repository_id"] = "small".into();
    let mut history: Vec<(BackupId, Disks)> = Vec::new();
    for round in 0..2 {
        write_everywhere(&mut rig, round);
        let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
        let backup = rig.end_of(id_of(&started)).await;
        assert_eq!(backup["state"], "committed", "{backup:#}");
        history.push((id_of(&backup).parse().unwrap(), rig.disks.clone()));
    }
    rig.node.reconfigure(|config| config.faults.pause = Some(PausePoint::AfterBytes(64 << 10)));
    body["backup_type"] = "full".into();
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    rig.paused().await;
    // There is room for either, not for both.
    let refused = merge(&rig, &history[1].0).await;
    assert!(matches!(&refused, Err(MergeError::InsufficientStorage { .. })), "{refused:?}");
    rig.cancel(id_of(&started)).await;
    rig.node.resume();
    rig.end_of(id_of(&started)).await;
    merge(&rig, &history[1].0).await.unwrap();
    expect_whole(&rig, &history, "").await;
    drop(mounted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_stops_ends_a_merge_and_leaves_no_folder() {
    let mut rig = with(|plan| plan.disks = vec![(FIRST, content(1, 64 * MIB))]).await;
    let full = commit(&rig).await;
    rig.write(&[(FIRST, 0, content(2, MIB))]);
    let child = commit(&rig).await;
    let points = rig.service.service.app().points.clone();
    let mut watch = points.watch_merges();
    let merging = tokio::spawn({
        let (points, child) = (points.clone(), child.clone());
        async move { points.merge(&child).await }
    });
    watch.wait_for(|now| now.values().any(|now| now.done_bytes > 0)).await.unwrap();
    points.drain_merges().await;
    let stopped = merging.await.unwrap();
    assert!(matches!(&stopped, Err(MergeError::Stopping)), "{stopped:?}");
    assert_eq!(rig::backup_directories(&rig.repository), [full.to_string(), child.to_string()]);
    assert!(matches!(points.merge(&child).await, Err(MergeError::Stopping)));
    let history = [(child, rig.disks.clone())];
    expect_image_equals(&published(&rig, history[0].0.as_str()).await.join("disk-0.qcow2"), &history[0].1[0].1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_fails_after_the_exchange_is_tried_again_until_it_succeeds() {
    let mut rig = rig().await;
    let history = chain(&mut rig, 3).await;
    let database = rig.service.folder.path().join("state/blockyard.db");
    let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON events WHEN NEW.kind = 'point.merged' BEGIN SELECT RAISE(ABORT, 'no'); END;";
    sqlite(&database, refuse).await;
    let points = rig.service.service.app().points.clone();
    let child = history[1].0.clone();
    let merging = tokio::spawn(async move { points.merge(&child).await });
    let exchanged = async {
        while manifest(&rig, history[1].0.as_str()).await["generation"] != 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(rig::DEADLINE, exchanged).await.expect("never exchanged");
    // The old record with the new files restores as well: the files decide.
    expect_image_equals(&published(&rig, history[2].0.as_str()).await.join("disk-0.qcow2"), &history[2].1[0].1);
    assert!(!merging.is_finished());
    // Nothing of the chain, as it was and as it is, may go before the end.
    let app = rig.service.service.app();
    for (id, _) in &history[..2] {
        let holders = leases::holders(&mut app.store.read().await.unwrap(), id).await.unwrap();
        assert!(matches!(&holders[..], [task] if task.starts_with("task-")), "{id}: {holders:?}");
    }
    sqlite(&database, "DROP TRIGGER refuse").await;
    merging.await.unwrap().unwrap();
    expect_whole(&rig, &history, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn merges_take_turns() {
    let mut rig = rig().await;
    let history = chain(&mut rig, 5).await;
    let (one, other) = tokio::join!(merge(&rig, &history[1].0), merge(&rig, &history[3].0));
    assert_eq!((one.unwrap().generation, other.unwrap().generation), (1, 1));
    expect_whole(&rig, &history, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_reads_differently_is_thrown_away_with_an_alert() {
    let mut rig = with(|plan| plan.disks = vec![(FIRST, content(1, 64 * MIB))]).await;
    let full = commit(&rig).await;
    rig.write(&[(FIRST, 0, content(2, MIB))]);
    let child = commit(&rig).await;
    let folder = published(&rig, child.as_str()).await;
    // The last cluster of the full, where the file has it.
    let image = published(&rig, full.as_str()).await.join("disk-0.qcow2");
    let (bytes, wanted) = (std::fs::read(&image).unwrap(), &rig.disks[0].1[64 * MIB - 65536..]);
    let at = bytes.chunks(65536).position(|cluster| cluster == wanted).unwrap() as u64 * 65536;
    std::fs::set_permissions(&image, PermissionsExt::from_mode(0o640)).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
    let made = folder.with_extension("merging").join("disk-0.qcow2");
    let damage = std::thread::spawn(move || {
        // It has this name when everything is copied; comparing comes to the end of the disk last.
        let deadline = std::time::Instant::now() + rig::DEADLINE;
        while !made.exists() {
            assert!(std::time::Instant::now() < deadline, "nothing was copied");
            std::thread::yield_now();
        }
        file.write_all_at(&[!bytes[at as usize]], at).unwrap();
    });
    let before = std::fs::metadata(&folder).unwrap().ino();
    let failed = merge(&rig, &child).await;
    damage.join().unwrap();
    let offset = 64 * MIB as u64 - 65536;
    assert!(matches!(&failed, Err(MergeError::Unequal { disk_id: 0, offset: at }) if *at == offset), "{failed:?}");
    assert_eq!(std::fs::metadata(&folder).unwrap().ino(), before);
    assert!(!folder.with_extension("merging").exists());
    let mut connection = rig.service.service.app().store.read().await.unwrap();
    let told = events::about(&mut connection, child.as_str()).await.unwrap();
    assert!(told.iter().any(|(kind, data)| kind == "alert" && data["alert"] == "merge_unequal"), "{told:?}");
    assert_eq!(points::find(&mut connection, &child).await.unwrap().unwrap().trust.as_str(), "unverified");
}
