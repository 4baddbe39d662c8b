//! A merge cut at every call by which it makes something durable or visible, and what the next start makes of what is left.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use blockyard::id::BackupId;
use blockyard::points::merge::MergeError;
use blockyard::serve::Service;

use crate::crash::{inject, kill_at};
use crate::merge::{self, Disks, chain, commit, expect_whole, write_everywhere};
use crate::rig::{self, Rig, content, tool};
use crate::support::TestService;

/// The calls at which a merge is cut: everything that makes or removes files, names and rows.
const STEPS: [&str; 8] = ["mkdir", "linkat", "fdatasync", "fsync", "fchmod", "chmod", "renameat2", "unlinkat"];

/// A hub that was stopped, with a copy of everything that it had, to begin from again and again.
struct Stopped {
    folder: Option<tempfile::TempDir>,
    copy: tempfile::TempDir,
    rest: Option<Rest>,
    history: Vec<(BackupId, Disks)>,
}

/// The parts of a rig that outlive its hub.
pub struct Rest {
    node: blockyard::node::fake::FakeNode,
    vm: String,
    repository: PathBuf,
    disks: Disks,
    ports: std::ops::RangeInclusive<u16>,
}

impl Stopped {
    /// Four points; of the third, which is to be merged, one disk lies upon the second and one is a full.
    async fn new() -> Self {
        let mut rig = merge::rig().await;
        let mut history = chain(&mut rig, 2).await;
        let mut disks = rig.disks.clone();
        disks[1].1.extend(content(9, 1 << 20));
        rig.replace_disks(disks).await;
        for round in 2..4 {
            write_everywhere(&mut rig, round);
            history.push((commit(&rig).await, rig.disks.clone()));
        }
        let (folder, rest) = stop(rig).await;
        let copy = tempfile::tempdir().unwrap();
        for part in ["main", "state"] {
            tool("coreutils", "cp", &["-a", text(&folder.path().join(part)), text(copy.path())]);
        }
        Self { folder: Some(folder), copy, rest: Some(rest), history }
    }

    fn merged(&self) -> &BackupId {
        &self.history[2].0
    }

    fn folder(&self) -> &Path {
        self.folder.as_ref().unwrap().path()
    }

    /// `<vm-dir>/<id>` of the point that is merged.
    fn published(&self) -> PathBuf {
        let root = self.folder().join("main");
        let vm = std::fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.is_dir());
        vm.unwrap().join(self.merged().as_str())
    }

    fn merging(&self) -> PathBuf {
        self.published().with_extension("merging")
    }

    /// Everything is as it was when the hub was stopped.
    fn reset(&self) {
        for part in ["main", "state"] {
            std::fs::remove_dir_all(self.folder().join(part)).unwrap();
            tool("coreutils", "cp", &["-a", text(&self.copy.path().join(part)), text(self.folder())]);
        }
    }

    /// Starts the hub on what is there, holds that every point is whole and an incremental works, and stops it again.
    /// Says how often the merged point was made anew.
    async fn expect_recovers(&mut self, what: &str) -> u64 {
        let mut rig = start(self.folder.take().unwrap(), self.rest.take().unwrap()).await;
        expect_whole(&rig, &self.history, what).await;
        let generation = rig::manifest(&rig, self.merged().as_str()).await["generation"].as_u64().unwrap_or(0);
        write_everywhere(&mut rig, 5);
        let next = commit(&rig).await;
        let manifest = rig::manifest(&rig, next.as_str()).await;
        assert_eq!(manifest["disks"][0]["effective_type"], "incremental", "{what}");
        rig.expect_restorable(next.as_str()).await;
        let (folder, rest) = stop(rig).await;
        (self.folder, self.rest) = (Some(folder), Some(rest));
        generation
    }
}

pub async fn stop(rig: Rig) -> (tempfile::TempDir, Rest) {
    let Rig { service, node, vm, repository, disks, ports } = rig;
    (service.stop().await, Rest { node, vm, repository, disks, ports })
}

pub async fn start(folder: tempfile::TempDir, rest: Rest) -> Rig {
    let Rest { node, vm, repository, disks, ports } = rest;
    let toml = rig::configuration(&node.url(), folder.path(), &ports, "");
    let service = TestService::start_in(folder, &toml).await;
    let hub_url = service.service.url();
    node.reconfigure(|config| config.hub_url = hub_url);
    Rig { service, node, vm, repository, disks, ports }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A process of its own with a hub that merges one point when it is told to.
struct Merger {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Merger {
    /// Ready to begin.
    fn new(stopped: &Stopped) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let mut child = command
            .args(["--exact", "merge_crash::merges_one_point_when_its_environment_names_one", "--nocapture"])
            .env("MERGE_FOLDER", stopped.folder())
            .env("MERGE_POINT", stopped.merged().as_str())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        assert_eq!(said(&mut output).as_deref(), Some("ready"));
        Self { child, output }
    }

    /// Has it merge, and says what came of that; nothing when it was killed.
    fn merge(mut self) -> Option<String> {
        // One that was killed already does not listen.
        let _ = self.child.stdin.take().unwrap().write_all(b"go\n");
        let said = said(&mut self.output);
        self.child.wait().unwrap();
        said
    }
}

/// The next line that is for us; the harness of the tests says things too.
fn said(output: &mut impl BufRead) -> Option<String> {
    for line in output.lines() {
        if let Some(said) = line.unwrap().split("merger: ").nth(1) {
            return Some(said.to_owned());
        }
    }
    None
}

/// The other process. Without its environment there is nothing to do.
#[test]
fn merges_one_point_when_its_environment_names_one() {
    let (Ok(folder), Ok(point)) = (std::env::var("MERGE_FOLDER"), std::env::var("MERGE_POINT")) else { return };
    // The tracer counts the calls of each thread: all that wait for a file system are made by one.
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.enable_all().max_blocking_threads(1).build().unwrap();
    runtime.block_on(merge_when_told(&folder, &point));
}

async fn merge_when_told(folder: &str, point: &str) {
    let say = |what: &str| {
        let mut output = std::io::stdout().lock();
        writeln!(output, "merger: {what}").unwrap();
        output.flush().unwrap();
    };
    // A verification of its own would hold the point.
    let config = crate::support::config(Path::new(folder), "[storage]\nverify_after_commit = false\n");
    let service = Service::start(config).await.unwrap();
    say("ready");
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).unwrap();
    match service.app().points.merge(&point.parse().unwrap()).await {
        Ok(_) => say("merged"),
        Err(error) => say(&format!("{error}")),
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_is_killed_at_any_step_leaves_the_old_or_the_new_point_and_a_start_clears_up() {
    let mut stopped = Stopped::new().await;
    let (mut old, mut new) = (0, 0);
    for step in STEPS {
        let mut killed = 0;
        for number in 1.. {
            stopped.reset();
            let merger = Merger::new(&stopped);
            let mut tracer = kill_at(merger.child.id(), step, None, number);
            let said = merger.merge();
            tracer.wait().unwrap();
            let generation = stopped.expect_recovers(&format!("{step} {number}: {said:?}")).await;
            if said.is_some() {
                assert_eq!((said.as_deref(), generation), (Some("merged"), 1), "{step} {number}");
                break;
            }
            killed += 1;
            if generation == 0 { old += 1 } else { new += 1 }
        }
        assert!(killed >= 1, "{step} is never called");
    }
    assert!(old >= 10 && new >= 4, "{old} before the exchange, {new} after it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_that_cannot_exchange_folders_refuses_a_merge_before_any_work() {
    for error in ["EINVAL", "EOPNOTSUPP", "ENOSYS"] {
        let mut stopped = Stopped::new().await;
        let merger = Merger::new(&stopped);
        let mut tracer = inject(merger.child.id(), "renameat2", None, &format!("error={error}"));
        let said = merger.merge().unwrap();
        tracer.wait().unwrap();
        assert!(said.contains("cannot exchange two folders"), "{said}");
        assert!(!stopped.merging().exists());
        assert_eq!(stopped.expect_recovers(error).await, 0);
    }
}

/// Makes something of the folders of a hub that is stopped.
type Prepare = Box<dyn Fn(&Stopped)>;

/// The states that a power cut leaves of the removal of one folder, or of its making: any of its files may be missing.
async fn any_part_of(stopped: &mut Stopped, what: &str, generation: u64) {
    let files: Vec<PathBuf> =
        std::fs::read_dir(stopped.merging()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 3, "two images and the manifest");
    let kept = tempfile::tempdir().unwrap();
    for part in ["main", "state"] {
        tool("coreutils", "cp", &["-a", text(&stopped.folder().join(part)), text(kept.path())]);
    }
    for missing in 0..1 << files.len() {
        for part in ["main", "state"] {
            std::fs::remove_dir_all(stopped.folder().join(part)).unwrap();
            tool("coreutils", "cp", &["-a", text(&kept.path().join(part)), text(stopped.folder())]);
        }
        for (_, file) in files.iter().enumerate().filter(|(index, _)| missing & (1 << index) != 0) {
            std::fs::remove_file(file).unwrap();
        }
        assert_eq!(stopped.expect_recovers(&format!("{what}, without {missing:b}")).await, generation);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_part_of_what_a_merge_leaves_is_cleared_up_by_the_next_start() {
    let mut stopped = Stopped::new().await;
    // Everything is built and nothing exchanged; the exchange is refused when it comes, and so is the clearing up.
    let merger = Merger::new(&stopped);
    let mut tracer = kill_at(merger.child.id(), "renameat2", Some(&stopped.published()), 1);
    assert_eq!(merger.merge(), None);
    tracer.wait().unwrap();
    any_part_of(&mut stopped, "unfinished", 0).await;
    // Exchanged, and not recorded.
    stopped.reset();
    let merger = Merger::new(&stopped);
    let mut tracer = kill_at(merger.child.id(), "fsync", Some(stopped.published().parent().unwrap()), 2);
    assert_eq!(merger.merge(), None);
    tracer.wait().unwrap();
    any_part_of(&mut stopped, "exchanged", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_proven_to_be_the_rest_of_a_merge_is_left_alone() {
    let mut stopped = Stopped::new().await;
    let vm = stopped.published().parent().unwrap().to_owned();
    let unknown = vm.join(format!("{}.merging", BackupId::new()));
    let cases: [(&str, Prepare, PathBuf); 3] = [
        ("of an unknown point", Box::new(|_| ()), unknown),
        (
            "of a point whose folder is broken",
            Box::new(|stopped| std::fs::remove_file(stopped.published().join("manifest.json")).unwrap()),
            stopped.merging(),
        ),
        (
            "of the same generation",
            Box::new(|stopped| {
                tool(
                    "coreutils",
                    "cp",
                    &["-a", &format!("{}/.", text(&stopped.published())), text(&stopped.merging())],
                );
            }),
            stopped.merging(),
        ),
    ];
    for (what, prepare, left) in cases {
        stopped.reset();
        std::fs::create_dir(&left).unwrap();
        std::fs::write(left.join("precious"), b"mine").unwrap();
        prepare(&stopped);
        let is_known = left == stopped.merging();
        let rig = start(stopped.folder.take().unwrap(), stopped.rest.take().unwrap()).await;
        assert_eq!(std::fs::read(left.join("precious")).unwrap(), b"mine", "{what}");
        if is_known {
            let merged = rig.service.service.app().points.merge(stopped.merged()).await;
            let refused = matches!(merged, Err(MergeError::Leftover { .. } | MergeError::NotCommitted { .. }));
            assert!(refused, "{what}: {merged:?}");
            assert_eq!(std::fs::read(left.join("precious")).unwrap(), b"mine", "{what}");
        }
        let (folder, rest) = stop(rig).await;
        (stopped.folder, stopped.rest) = (Some(folder), Some(rest));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_older_than_a_merge_follows_the_files() {
    let mut stopped = Stopped::new().await;
    let merger = Merger::new(&stopped);
    assert_eq!(merger.merge().as_deref(), Some("merged"));
    let state = stopped.folder().join("state");
    std::fs::remove_dir_all(&state).unwrap();
    tool("coreutils", "cp", &["-a", text(&stopped.copy.path().join("state")), text(stopped.folder())]);
    assert_eq!(stopped.expect_recovers("an older database").await, 1);
}
