//! A repository that is full at any moment of a backup: its size grows page by page, and at each size a backup commits
//! right or fails as such.

use std::path::{Path, PathBuf};

use blockyard::node::fake::{Event, Faults};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::privileged::{Mounted, privileged};
use crate::rig::{self, Plan, Rig, content, id_of};

/// What file systems in memory count in.
const PAGE: u64 = 4096;
const FIRST: u32 = 2000;
const SECOND: u32 = 2016;
/// Clusters as small as a page, so that every page that is missing is another write that fails; and nothing is kept back.
const CONFIGURATION: &str = "[storage]\ncluster_bytes = 4096\nmin_free_bytes = 0\nfull_estimate_ratio = 0.01\n";

/// How the backups of one phase ended.
#[derive(Default)]
struct Tally {
    /// Refused before anything was done.
    refused: usize,
    /// Failed on their way.
    failed: usize,
}

/// Backs up at this size and one page more each time, until a backup commits.
async fn grow_until_committed(rig: &Rig, small: &Path, mut size: u64) -> (Value, Tally) {
    let mut tally = Tally::default();
    let before = digests(small);
    let published = rig::backup_directories(small).iter().filter(|name| !name.ends_with('/')).count();
    loop {
        resize(small, size);
        let start = json!({"vm_context_id": rig.vm, "repository_id": "small", "backup_type": "auto"});
        let calls = rig.node.log().calls().len();
        let answer = rig.service.post("/api/v1/backups/vm", &start).await;
        let what = format!("{size} bytes");
        if answer.status == 507 {
            // Too little even for the estimate, or for the folder and the empty images: nobody was called.
            answer.expect_problem(507, "insufficient_storage");
            assert_eq!(rig.node.log().calls().len(), calls, "{what}");
            tally.refused += 1;
        } else {
            let id = id_of(&answer.expect_status(200).json()).to_owned();
            let backup = rig.end_of(&id).await;
            if backup["state"] == "committed" {
                assert_eq!(backup["result"], "success", "{what}: {backup:#}");
                rig.expect_restorable(&id).await;
                return (backup, tally);
            }
            let ended = (&backup["state"], &backup["code"], &backup["result"]);
            assert_eq!(
                ended,
                (&json!("failed"), &json!("insufficient_storage"), &json!("failed")),
                "{what}: {backup:#}"
            );
            // Recorded once, by a database that lies elsewhere and can be written.
            assert_eq!(told(rig, &id, "job.state", "failed").await, 1, "{what}");
            assert_eq!(told(rig, &id, "alert", "snapshot_may_be_left").await, 1, "{what}");
            tally.failed += 1;
        }
        assert_eq!(digests(small), before, "{what}: own files are gone, and no older one has changed");
        rig.expect_nothing_left(0).await;
        assert_eq!(rig.points().await.len(), published, "{what}");
        client_ended(rig).await;
        size += PAGE;
        assert!(size < 4 << 20, "no size is enough");
    }
}

/// Gives a file system in memory another size in bytes.
fn resize(folder: &Path, bytes: u64) {
    let options = format!("remount,size={bytes}");
    let status = privileged("mount").args(["-o", &options]).arg(folder).status().unwrap();
    assert!(status.success(), "mount -o {options}");
}

/// How often an event of this kind holds this word.
async fn told(rig: &Rig, id: &str, kind: &str, word: &str) -> usize {
    let store = &rig.service.service.app().store;
    let events = blockyard::store::events::about(&mut store.read().await.unwrap(), id).await.unwrap();
    let names = |data: &Value| data.as_object().is_some_and(|data| data.values().any(|value| value == word));
    events.iter().filter(|(told, data)| told == kind && names(data)).count()
}

/// A client whose job is over finds out by itself; the next one begins when it has.
async fn client_ended(rig: &Rig) {
    let log = rig.node.log();
    let wait = async {
        loop {
            let events = log.events();
            let launched = events.iter().filter(|event| matches!(event, Event::Launched { .. })).count();
            if events.iter().filter(|event| matches!(event, Event::Ended { .. })).count() == launched {
                return;
            }
            log.first_after(events.len(), |_| Some(())).await;
        }
    };
    tokio::time::timeout(rig::DEADLINE, wait).await.expect("a client never ended");
}

/// Every file that a backup could have left or changed.
fn digests(repository: &Path) -> Vec<(PathBuf, [u8; 32])> {
    let mut found = Vec::new();
    let mut folders = vec![repository.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let digest = Sha256::digest(std::fs::read(&path).unwrap()).into();
                found.push((path, digest));
            }
        }
    }
    found.sort();
    found
}

/// How many bytes a file system counts as used.
fn used(folder: &Path) -> u64 {
    let found = rustix::fs::statvfs(folder).unwrap();
    (found.f_blocks - found.f_bfree) * found.f_frsize
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn enospc_at_every_write_of_a_backup_fails_it_cleanly_or_not_at_all() {
    let disks = vec![(FIRST, content(1, 96 << 10)), (SECOND, content(2, (40 << 10) + 512))];
    let plan = Plan { disks, toml: CONFIGURATION.to_owned(), request_bytes: 8 << 10, ..Plan::default() };
    let mut rig = Rig::with(plan).await;
    let small = rig.service.folder.path().join("small");
    let _mounted = Mounted::small(&small, "64k");
    let body = json!({"id": "small", "name": "small", "path": small});
    rig.service.post("/api/v1/repositories", &body).await.expect_status(201);

    // The repository gets its own two files at its first use.
    let start = json!({"vm_context_id": rig.vm, "repository_id": "small", "backup_type": "auto"});
    let started = rig.service.post("/api/v1/backups/vm", &start).await.expect_status(200).json();
    assert_eq!(rig.end_of(id_of(&started)).await["code"], "insufficient_storage");
    client_ended(&rig).await;

    let (full, fulls) = grow_until_committed(&rig, &small, used(&small)).await;
    assert_eq!(full["backup_type"], "full");
    rig.write(&[
        (FIRST, 0, content(3, 40 << 10)),
        (FIRST, 80 << 10, vec![0; 8 << 10]),
        (SECOND, 4096, content(4, 30 << 10)),
    ]);
    let (incremental, incrementals) = grow_until_committed(&rig, &small, used(&small)).await;
    assert_eq!(incremental["backup_type"], "incremental");
    // On top of that one, and now everything is in the way of nobody.
    rig.write(&[(SECOND, 0, content(5, 20 << 10))]);
    resize(&small, 16 << 20);
    let start = json!({"vm_context_id": rig.vm, "repository_id": "small", "backup_type": "incremental"});
    let started = rig.service.post("/api/v1/backups/vm", &start).await.expect_status(200).json();
    let last = rig.end_of(id_of(&started)).await;
    assert_eq!(last["state"], "committed", "{last:#}");
    rig.expect_restorable(id_of(&started)).await;
    assert_eq!(rig.points().await.len(), 3);
    rig.node.reconfigure(|config| config.faults = Faults::default());
    for (what, tally, least) in [("full", &fulls, 25), ("incremental", &incrementals, 15)] {
        println!("{what}: {} refused, {} failed, then one committed", tally.refused, tally.failed);
        assert!(tally.failed >= least, "{what}: only {} failed on their way", tally.failed);
    }
}
