//! The process cut at every call by which a commit makes something durable or visible, and what the next start makes of it.

use std::path::{Path, PathBuf};

use blockyard::node::fake::{Event, Faults, PausePoint};
use serde_json::json;

use crate::privileged::privileged;
use crate::process::{Child, sqlite};
use crate::rig::{self, id_of};

/// The calls at which a commit is cut: everything that makes files, names and rows durable or visible.
const STEPS: [&str; 5] = ["fdatasync", "fsync", "fchmod", "chmod", "renameat2"];

/// Kills a process when one of its threads makes its `number`-th call of this kind from now on, at this path only if one
/// is given.
pub fn kill_at(pid: u32, step: &str, path: Option<&Path>, number: usize) -> std::process::Child {
    inject(pid, step, path, &format!("signal=SIGKILL:when={number}"))
}

/// Does this to the calls of a kind that the threads of a process make from now on.
pub fn inject(pid: u32, step: &str, path: Option<&Path>, what: &str) -> std::process::Child {
    let pid = pid.to_string();
    let inject = format!("inject={step}:{what}");
    let watch = || {
        privileged("strace")
            .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={step}"), "-e", &inject, "-p", &pid])
            .args(path.iter().flat_map(|path| [Path::new("-P"), path]))
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("strace: install the package strace")
    };
    let threads = format!("/proc/{pid}/task");
    let untraced = || -> Vec<String> {
        let threads = std::fs::read_dir(&threads).unwrap();
        let status = threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")));
        // One that is busy may have been ended by what it was to be watched for; the kernel's own workers for io_uring are
        // among the threads and cannot be traced.
        let is_exempt = |status: &String| status.contains("State:\tZ") || status.starts_with("Name:\tiou-");
        let is_free = |status: &String| status.contains("TracerPid:\t0\n") && !is_exempt(status);
        status.map(Result::unwrap_or_default).filter(is_free).collect()
    };
    let mut tracer = watch();
    let deadline = std::time::Instant::now() + rig::DEADLINE;
    loop {
        // Looked at before the threads: one that ended because the process did leaves none.
        let gave_up = tracer.try_wait().unwrap();
        let free = untraced();
        if free.is_empty() {
            return tracer;
        }
        assert!(std::time::Instant::now() < deadline, "strace did not attach ({gave_up:?}): {}", free.join("\n"));
        if gave_up.is_some() {
            // A thread that ends while it is being attached to makes strace give up.
            tracer = watch();
        }
        std::thread::yield_now();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_at_every_step_of_commit_shows_the_old_or_the_new_point_never_a_mix() {
    let (mut failed, mut committed) = (0, 0);
    for step in STEPS {
        let mut killed = 0;
        for number in 1.. {
            match crash_at(step, number, |_| None).await {
                Crash::Never => break,
                Crash::Before => failed += 1,
                Crash::After => committed += 1,
            }
            killed += 1;
        }
        assert!(killed >= 1, "{step} is never called");
    }
    // What makes the rename durable comes right after it: calls on the folder of the VM, and on the repository.
    for folder in [vm_folder as fn(&Path) -> Option<PathBuf>, |repository| Some(repository.to_owned())] {
        match crash_at("fsync", 1, folder).await {
            Crash::After => committed += 1,
            Crash::Before | Crash::Never => panic!("the rename is not followed by a sync of its folders"),
        }
    }
    // At the least: manifest, modes, folder and rename before it, the two folders after it.
    assert!(failed >= 5 && committed >= 2, "{failed} crashes before the commit, {committed} after it");
}

/// The only folder of a VM in a repository.
fn vm_folder(repository: &Path) -> Option<PathBuf> {
    let mut folders =
        std::fs::read_dir(repository).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    folders.next()
}

/// Where a crash hit.
enum Crash {
    /// Nowhere: the commit was over before there were so many calls.
    Never,
    /// Before the restore point.
    Before,
    /// After it.
    After,
}

/// Cuts one commit and holds what the next start makes of it.
async fn crash_at(step: &str, number: usize, place: impl Fn(&Path) -> Option<PathBuf>) -> Crash {
    // Everything but the last disk's seal and the commit is done when the process is first watched.
    let child = Child::new(Faults { pause: Some(PausePoint::BeforeComplete(1)), ..Faults::default() }).await;
    let running = child.start();
    let vm = child.furnish(&running).await;
    let started = running.back_up(&vm).await;
    child.paused().await;
    let mut tracer = kill_at(running.process.id(), step, place(&child.repository()).as_deref(), number);
    child.node.resume();
    let ended = child.node.log().first(|event| match event {
        Event::Ended { error, .. } => Some(error.is_none()),
        _ => None,
    });
    let answered = tokio::time::timeout(rig::DEADLINE, ended).await.expect("the client never ended");
    running.process.signal_if_alive("KILL");
    running.process.wait();
    // With the process its tracer ends.
    tracer.wait().unwrap();

    let what = format!("{step} {number}");
    let running = child.start();
    let backup = running.get(&format!("/backups/{}", id_of(&started))).await;
    let points = running.get("/points").await["total"].clone();
    let folders = rig::backup_directories(&child.repository());
    let committed = backup["state"] == "committed";
    if committed {
        assert_eq!((&points, folders), (&json!(1), vec![id_of(&started).to_owned()]), "{what}");
        for (disk, (_, bytes)) in backup["disk_results"].as_array().unwrap().iter().zip(&child.disks) {
            rig::expect_image_equals(Path::new(disk["qcow2_path"].as_str().unwrap()), bytes);
        }
    } else {
        assert!(!answered, "{what}: what was answered with success is {}", backup["state"]);
        assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("service_restart")), "{what}");
        assert_eq!((&points, folders), (&json!(0), vec![]), "{what}");
    }
    match (answered, committed) {
        (true, _) => Crash::Never,
        (false, true) => Crash::After,
        (false, false) => Crash::Before,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_between_the_rename_and_its_record_rolls_forward() {
    let child = Child::new(Faults { pause: Some(PausePoint::BeforeComplete(1)), ..Faults::default() }).await;
    let running = child.start();
    let vm = child.furnish(&running).await;
    let started = running.back_up(&vm).await;
    child.paused().await;
    let database = child.folder.path().join("state/blockyard.db");
    let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON restore_points BEGIN SELECT RAISE(ABORT, 'no'); END;";
    sqlite(&database, refuse).await;
    child.node.resume();
    let renamed = async { while rig::backup_directories(&child.repository()) != [id_of(&started)] {} };
    tokio::time::timeout(rig::DEADLINE, renamed).await.expect("never renamed");
    running.process.signal("KILL");
    running.process.wait();
    sqlite(&database, "DROP TRIGGER refuse").await;
    let running = child.start();
    let backup = running.get(&format!("/backups/{}", id_of(&started))).await;
    assert_eq!((&backup["state"], &backup["result"]), (&json!("committed"), &json!("success")), "{backup:#}");
    assert_eq!(running.get("/points").await["total"], 1);
    for (disk, (_, bytes)) in backup["disk_results"].as_array().unwrap().iter().zip(&child.disks) {
        rig::expect_image_equals(Path::new(disk["qcow2_path"].as_str().unwrap()), bytes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_was_published_waits_for_a_repository_that_is_not_mounted_at_the_start() {
    let child = Child::new(Faults { pause: Some(PausePoint::BeforeComplete(1)), ..Faults::default() }).await;
    let running = child.start();
    let vm = child.furnish(&running).await;
    let started = running.back_up(&vm).await;
    child.paused().await;
    let database = child.folder.path().join("state/blockyard.db");
    let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON restore_points BEGIN SELECT RAISE(ABORT, 'no'); END;";
    sqlite(&database, refuse).await;
    child.node.resume();
    let renamed = async { while rig::backup_directories(&child.repository()) != [id_of(&started)] {} };
    tokio::time::timeout(rig::DEADLINE, renamed).await.expect("never renamed");
    running.process.signal("KILL");
    running.process.wait();
    sqlite(&database, "DROP TRIGGER refuse").await;

    let elsewhere = child.folder.path().join("unmounted");
    std::fs::rename(child.repository(), &elsewhere).unwrap();
    let running = child.start();
    let backup = running.get(&format!("/backups/{}", id_of(&started))).await;
    assert_eq!(backup["state"], "committing", "only the repository can tell: {backup:#}");
    running.process.signal("KILL");
    running.process.wait();

    std::fs::rename(&elsewhere, child.repository()).unwrap();
    let running = child.start();
    let backup = running.get(&format!("/backups/{}", id_of(&started))).await;
    assert_eq!((&backup["state"], &backup["result"]), (&json!("committed"), &json!("success")), "{backup:#}");
    assert_eq!(running.get("/points").await["total"], 1);
}
