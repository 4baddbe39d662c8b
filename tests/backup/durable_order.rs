//! The order of file system calls that makes an answered completion survive a power cut: read off the calls of one whole
//! backup, and judged by a rule that knows nothing of the code.
//!
//! A write is covered by a sync only if it ended before that sync began. For each disk its image is synced after its last
//! write, then the row of its seal is, then it is answered. For the VM the manifest and the staged folder are synced, then
//! comes the rename, then the folders that hold the name are synced, then the row of the point, then the last answer.

use std::path::Path;

use blockyard::node::fake::Faults;
use serde_json::json;

use crate::process::Child;
use crate::rig::{self, id_of};
use crate::support::process::blockyard_under;

/// One call that succeeded, with the lines of the trace at which it began and ended.
#[derive(Clone, Debug)]
struct Call {
    name: String,
    arguments: String,
    begin: usize,
    end: usize,
}

impl Call {
    /// The path behind the descriptor that it is about.
    fn path(&self) -> &str {
        let inside = self.arguments.split_once('<').and_then(|(_, rest)| rest.split_once('>'));
        inside.map_or("", |(path, _)| path)
    }

    fn is_sync_of(&self, end: &str) -> bool {
        matches!(self.name.as_str(), "fsync" | "fdatasync") && self.path().ends_with(end)
    }

    fn is_write_to(&self, end: &str) -> bool {
        let writes = ["write", "writev", "pwrite64", "pwritev", "pwritev2", "ftruncate", "fallocate"];
        writes.contains(&self.name.as_str()) && self.path().ends_with(end)
    }
}

/// The calls of a trace by `strace -f -y`, with those put together that others came in between of.
fn parse(trace: &str) -> Vec<Call> {
    let mut begun: std::collections::HashMap<&str, Call> = std::collections::HashMap::new();
    let mut calls = Vec::new();
    for (line, text) in trace.lines().enumerate() {
        let Some((thread, text)) = text.split_once(' ') else { continue };
        let text = text.trim_start();
        if let Some(text) = text.strip_suffix("<unfinished ...>") {
            let Some((name, arguments)) = text.split_once('(') else { continue };
            let call = Call { name: name.to_owned(), arguments: arguments.to_owned(), begin: line, end: line };
            begun.insert(thread, call);
            continue;
        }
        let Some((text, result)) = text.rsplit_once(" = ") else { continue };
        let call = if text.starts_with("<... ") {
            begun.remove(thread).map(|call| Call { end: line, ..call })
        } else {
            text.split_once('(').map(|(name, arguments)| Call {
                name: name.to_owned(),
                arguments: arguments.to_owned(),
                begin: line,
                end: line,
            })
        };
        calls.extend(call.filter(|_| !result.starts_with('-')));
    }
    calls.sort_by_key(|call| call.begin);
    calls
}

/// The first call of a kind that begins when `after` is over.
fn next<'a>(calls: &'a [Call], after: usize, what: &str, is: impl Fn(&Call) -> bool) -> Result<&'a Call, String> {
    let found = calls.iter().filter(|call| call.begin > after && is(call)).min_by_key(|call| call.end);
    found.ok_or_else(|| format!("there is no {what} after line {after}"))
}

/// Something written to the log of the database and synced, all of it after a line.
fn next_row(calls: &[Call], after: usize, what: &str) -> Result<Call, String> {
    let written = next(calls, after, what, |call| call.is_write_to("blockyard.db-wal"))?;
    // Of one transaction, in one thread, in one go.
    next(calls, written.end, &format!("sync of {what}"), |call| call.is_sync_of("blockyard.db-wal")).cloned()
}

fn in_time(before: &Call, after: &Call, what: &str) -> Result<(), String> {
    if before.end < after.begin { Ok(()) } else { Err(format!("{what}: {before:?} is not before {after:?}")) }
}

/// Judges the calls of the first backup of a VM with so many disks. Returns the syncs that its durability hangs on.
fn check(calls: &[Call], disks: usize, repository: &Path) -> Result<Vec<Call>, String> {
    let answer = |disk: usize| {
        let words = format!("disk {disk} sealed, ");
        next(calls, 0, "answer", |call| call.arguments.contains(&words) && !call.path().ends_with("-wal"))
    };
    let manifest_written = next(calls, 0, "manifest", |call| call.is_write_to(".partial/manifest.json"))?;
    let mut needed = Vec::new();
    for disk in 0..disks {
        let image = format!(".partial/disk-{disk}.qcow2");
        let writes = calls.iter().filter(|call| call.is_write_to(&image));
        let last = writes.map(|call| call.end).max().ok_or_else(|| format!("nothing was written to {image}"))?;
        let synced = next(calls, last, &image, |call| call.is_sync_of(&image))?;
        let row = next_row(calls, synced.end, "the row of the seal")?;
        in_time(&row, answer(disk)?, "the row of the seal and its answer")?;
        in_time(&row, manifest_written, "the row of the seal and the manifest")?;
        needed.extend([synced.clone(), row]);
    }
    let last_answer = answer(disks - 1)?;
    let manifest = calls.iter().filter(|call| call.is_write_to(".partial/manifest.json")).map(|call| call.end).max();
    let renamed =
        next(calls, 0, "rename", |call| call.name.starts_with("rename") && call.arguments.contains(".partial\""))?;
    let manifest =
        next(calls, manifest.unwrap_or(0), "the manifest", |call| call.is_sync_of(".partial/manifest.json"))?;
    let staged = next(calls, manifest_written.end, "the staged folder", |call| call.is_sync_of(".partial"))?;
    in_time(manifest, renamed, "the manifest and the rename")?;
    in_time(staged, renamed, "the staged folder and the rename")?;

    let of_the_vm = Path::new(staged.path()).parent().unwrap_or(Path::new("/"));
    let is_sync_of = |folder: &Path| {
        let folder = folder.to_str().unwrap().to_owned();
        move |call: &Call| call.name.ends_with("sync") && call.path() == folder
    };
    let made = next(calls, 0, "folder of the VM", |call| {
        call.name.starts_with("mkdir") && call.arguments.contains(&format!("\"{}\"", of_the_vm.display()))
    })?;
    let in_repository = next(calls, made.end, "sync of the repository", is_sync_of(repository))?;
    let in_vm = next(calls, renamed.end, "sync of the VM's folder", is_sync_of(of_the_vm))?;
    let row = next_row(calls, in_vm.end.max(in_repository.end), "the row of the point")?;
    in_time(&row, last_answer, "the row of the point and the last answer")?;
    needed.extend([manifest.clone(), staged.clone(), in_repository.clone(), in_vm.clone(), row]);
    Ok(needed)
}

#[tokio::test(flavor = "multi_thread")]
async fn power_cut_after_complete_answered_loses_nothing() {
    let child = Child::new(Faults::default()).await;
    let trace = child.folder.path().join("trace");
    let kinds = "trace=write,writev,pwrite64,pwritev,pwritev2,sendto,sendmsg,ftruncate,fallocate,fsync,fdatasync,\
                 rename,renameat,renameat2,mkdir,mkdirat,io_uring_setup";
    // Without the ring every write is a call; the order of the rest is the same.
    let no_ring = "inject=io_uring_setup:error=ENOSYS";
    let tracer = ["-D", "-f", "-q", "-y", "-s", "600", "-o", trace.to_str().unwrap(), "-e", kinds, "-e", no_ring];
    let running = child.start_as(blockyard_under("strace", &tracer));
    let vm = child.furnish(&running).await;
    let started = running.back_up(&vm).await;
    let backup = running.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], json!("committed"), "{backup:#}");
    let pid = running.process.id().to_string();
    running.process.signal("KILL");
    running.process.wait();
    let over = |trace: &str| trace.lines().any(|line| line.starts_with(&pid) && line.contains("+++ "));
    let read = async {
        loop {
            let text = String::from_utf8_lossy(&std::fs::read(&trace).unwrap()).into_owned();
            if over(&text) {
                return text;
            }
            tokio::task::yield_now().await;
        }
    };
    let text = tokio::time::timeout(rig::DEADLINE, read).await.expect("the trace never ended");
    let calls = parse(&text);
    let (disks, repository) = (child.disks.len(), child.repository());
    let needed = check(&calls, disks, &repository).unwrap();
    // For each disk its image and its row; manifest, staged folder, repository, folder of the VM, row.
    assert_eq!(needed.len(), 2 * disks + 5);

    // The rule sees every one that is left out. Some are followed by others that serve as well before anything depends on
    // them: a row by the next row, the repository's first sync by that with the rename, the manifest's by that of all files.
    for (role, left_out) in needed.iter().enumerate() {
        let path = left_out.path();
        let again = ["-wal", "manifest.json", repository.to_str().unwrap()].iter().any(|end| path.ends_with(end));
        let (mut calls, mut left_out) = (calls.clone(), left_out.clone());
        for _ in 0..3 {
            calls.retain(|call| call.begin != left_out.begin);
            match check(&calls, disks, &repository) {
                Err(_) => break,
                Ok(needed) if again => left_out = needed[role].clone(),
                Ok(_) => break,
            }
        }
        assert!(check(&calls, disks, &repository).is_err(), "nobody misses {left_out:?}");
    }
}

#[test]
fn calls_are_put_together_across_threads() {
    let trace = "7 pwrite64(9</a/disk-0.qcow2>, \"x = 1\", 5, 0 <unfinished ...>\n\
                 8 fdatasync(9</a/disk-0.qcow2>) = 0\n\
                 7 <... pwrite64 resumed>) = 5\n\
                 8 fsync(9</a/disk-0.qcow2>) = -1 EIO (Input/output error)\n\
                 7 +++ exited with 0 +++\n";
    let calls = parse(trace);
    let found: Vec<_> = calls.iter().map(|call| (call.name.as_str(), call.begin, call.end, call.path())).collect();
    assert_eq!(found, [("pwrite64", 0, 2, "/a/disk-0.qcow2"), ("fdatasync", 1, 1, "/a/disk-0.qcow2")]);
    assert!(calls[0].is_write_to("disk-0.qcow2") && calls[1].is_sync_of("disk-0.qcow2"));
}
