//! The process killed at random moments of its work, again and again in one folder, and what the next start makes of it.
//!
//! One VM goes full, incremental, incremental … while the process dies under it: with a given number of bytes received,
//! after a given answer, or at the n-th system call of a kind, often while older points are being verified. The source states are kept by backup id, so that every
//! point that is ever listed can be held to be what it was taken from. `SEED=` repeats a run, `SCALE=` multiplies it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use blockyard::node::fake::{Event, Faults, PausePoint};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::crash::kill_at;
use crate::process::{Child, Running, sqlite_number};
use crate::rig::{self, content, id_of, tool};
use crate::support::process::blockyard_under;

const KILLS: usize = 60;
/// Every such start is itself killed once before it may end.
const KILLED_STARTS: usize = 4;
const MIB: usize = 1 << 20;
/// The disks by device key.
pub const SIZES: [(u32, usize); 3] = [(2000, 4 * MIB), (2016, 5 * MIB + 512), (16_000, 4 * MIB)];
/// What makes names, rows and bytes durable or visible while a job runs.
const CALLS: [&str; 9] =
    ["pwrite64", "pwritev", "fdatasync", "fsync", "ftruncate", "fallocate", "openat", "renameat2", "accept4"];
/// The same of a start that finds something to clear up.
const CALLS_OF_A_START: [&str; 6] = ["pwrite64", "fdatasync", "fsync", "unlinkat", "renameat2", "openat"];

/// When the process dies.
#[derive(Debug)]
enum Moment {
    /// This long after so many bytes of the VM were received.
    Bytes(u64, Duration),
    /// This long after the n-th thing that happens to the node and its client.
    Happening(usize, Duration),
    /// At the n-th system call of a kind once the client is at a point; from the start request on where there is none.
    Call(Option<PausePoint>, &'static str, usize),
}

impl Moment {
    fn any(random: &mut fastrand::Rng, bytes: u64) -> Self {
        let pause = Duration::from_micros(random.u64(0..3000));
        match random.u8(0..10) {
            0..3 => Self::Bytes(random.u64(0..bytes), pause),
            3..6 => Self::Happening(random.usize(1..23), pause),
            _ => {
                let point = match random.u8(0..8) {
                    0 => None,
                    1 => Some(PausePoint::BeforeConnect(random.usize(0..3))),
                    2 => Some(PausePoint::Connected(random.usize(0..3))),
                    3 | 4 => Some(PausePoint::AfterBytes(random.u64(0..bytes))),
                    _ => Some(PausePoint::BeforeComplete(random.usize(0..3))),
                };
                Self::Call(point, CALLS[random.usize(0..CALLS.len())], random.usize(1..8))
            }
        }
    }

    fn pause(&self) -> Option<PausePoint> {
        match self {
            Self::Bytes(bytes, _) => Some(PausePoint::AfterBytes(*bytes)),
            Self::Happening(..) => None,
            Self::Call(point, ..) => *point,
        }
    }
}

/// Digests of the disks by number, as one state of the VM has them.
pub type State = Vec<[u8; 32]>;

/// The VM with its past.
pub struct Campaign {
    pub child: Child,
    pub vm: String,
    pub random: fastrand::Rng,
    /// How many of the newest points retention leaves, where there is any.
    keep: usize,
    /// The state that each backup was taken from.
    pub history: BTreeMap<String, State>,
    /// Bytes that the next incremental has to send.
    pending: u64,
    /// Length and time of the last change of every published image that was ever seen, by how often it was made anew.
    images: BTreeMap<(std::path::PathBuf, u64), (u64, std::time::SystemTime)>,
    /// Backups whose last completion was answered.
    promised: Vec<String>,
}

impl Campaign {
    /// A VM with a repository in which so many points stay, and the seed that repeats the run.
    pub async fn new(keep: usize) -> (Self, Running, u64) {
        let seed = number("SEED").unwrap_or_else(|| fastrand::u64(..));
        println!("SEED={seed} repeats this run");
        let disks = SIZES.iter().map(|&(key, size)| (key, content(key as u8, size))).collect();
        let toml = "[storage]\nverify_after_commit = true\n";
        let child = Child::configured(disks, Faults::default(), rig::free_ports(), toml).await;
        child.node.reconfigure(|config| config.request_bytes = 128 << 10);
        let running = child.start();
        let vm = child.furnish(&running).await;
        let random = fastrand::Rng::with_seed(seed);
        let (history, images, promised) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        (Self { child, vm, random, keep, history, pending: 0, images, promised }, running, seed)
    }

    /// Brings every disk to its next state: some data, at times some of it zeroes.
    pub fn write(&mut self) {
        let mut writes = Vec::new();
        for (key, size) in SIZES {
            for _ in 0..self.random.usize(1..4) {
                let length = self.random.usize(1..400) * 512;
                let offset = self.random.usize(0..=(size - length) / 512) * 512;
                let zeroes = self.random.u8(0..4) == 0;
                let data = if zeroes { vec![0; length] } else { content(self.random.u8(..), length) };
                self.pending += length as u64;
                writes.push((key, offset, data));
            }
        }
        self.child.write(&writes);
    }

    fn state(&self) -> State {
        self.child.disks.iter().map(|(_, bytes)| Sha256::digest(bytes).into()).collect()
    }

    /// Notes what the jobs that the node was called for since `seen` are backups of.
    pub fn note(&mut self, seen: usize) {
        let state = self.state();
        for event in self.child.node.log().events().into_iter().skip(seen) {
            match event {
                Event::Called(call) => {
                    self.history.insert(call.job_id, state.clone());
                }
                Event::Ended { job_id, error: None } => self.promised.push(job_id),
                _ => {}
            }
        }
    }

    /// A backup that must succeed.
    pub async fn back_up(&mut self, running: &Running) {
        self.write();
        let seen = self.child.node.log().count();
        self.child.node.reconfigure(|config| config.faults = Faults::default());
        let started = running.back_up(&self.vm).await;
        let backup = running.end_of(id_of(&started)).await;
        assert_eq!((&backup["state"], &backup["result"]), (&json!("committed"), &json!("success")), "{backup:#}");
        self.clients_ended().await;
        self.note(seen);
        self.pending = 0;
    }

    /// Waits until every client that was ever launched is gone.
    pub async fn clients_ended(&self) {
        let log = self.child.node.log();
        let wait = async {
            loop {
                let events = log.events();
                let ended = |job: &str| {
                    events.iter().any(|event| matches!(event, Event::Ended { job_id, .. } if job_id == job))
                };
                let gone = |event: &Event| !matches!(event, Event::Launched { job_id } if !ended(job_id));
                if events.iter().all(gone) {
                    return;
                }
                log.first_after(events.len(), |_| Some(())).await;
            }
        };
        tokio::time::timeout(rig::DEADLINE, wait).await.expect("a client never ended");
    }

    /// A backup under which the process dies at this moment.
    async fn killed(&mut self, running: Running, moment: &Moment, full: bool) {
        let seen = self.child.node.log().count();
        self.child.node.reconfigure(|config| {
            config.faults = Faults { pause: moment.pause(), ..Faults::default() };
        });
        let mut tracer = match moment {
            Moment::Call(None, call, number) => Some(kill_at(running.process.id(), call, None, *number)),
            _ => None,
        };
        let body = json!({
            "vm_context_id": self.vm, "repository_id": "main", "backup_type": if full { "full" } else { "auto" },
        });
        let request = running.http.post(format!("{}/api/v1/backups/vm", running.process.url));
        // What it answers is of no interest, but that the process may die before it does.
        let start = tokio::spawn(request.bearer_auth(&running.token).json(&body).send());
        let cut_off = async {
            if start.await.is_ok_and(|answer| answer.is_ok()) {
                std::future::pending::<()>().await;
            }
        };
        let reached = tokio::time::timeout(rig::DEADLINE, async {
            tokio::select! {
                paused = self.reached(seen, moment) => paused,
                () = cut_off => false,
            }
        });
        let paused = reached.await.expect("the client got nowhere");
        if let (true, Moment::Call(Some(_), call, number)) = (paused, moment) {
            tracer = Some(kill_at(running.process.id(), call, None, *number));
        }
        if paused {
            self.child.node.resume();
        }
        match moment {
            Moment::Bytes(_, pause) | Moment::Happening(_, pause) => tokio::time::sleep(*pause).await,
            // By itself, or it does not call so often.
            Moment::Call(..) => self.clients_ended().await,
        }
        running.process.signal_if_alive("KILL");
        running.process.wait();
        if let Some(mut tracer) = tracer {
            tracer.wait().unwrap();
        }
        // The client, if there is one, finds nobody any more.
        self.clients_ended().await;
        self.note(seen);
    }

    /// Waits until the client is where the moment begins; true when it waits there.
    async fn reached(&self, seen: usize, moment: &Moment) -> bool {
        let log = self.child.node.log();
        let over = log.first_after(seen, |event| match event {
            Event::Paused => Some(true),
            Event::Ended { .. } => Some(false),
            _ => None,
        });
        let happened = match moment {
            Moment::Happening(number, _) => seen + number - 1,
            _ => usize::MAX,
        };
        tokio::select! {
            paused = over => paused,
            () = log.first_after(happened, |_| Some(())) => false,
        }
    }

    /// A start that dies while it clears up, or just after.
    pub fn killed_start(&mut self) {
        let call = CALLS_OF_A_START[self.random.usize(0..CALLS_OF_A_START.len())];
        let inject = format!("inject={call}:signal=SIGKILL:when={}", self.random.usize(1..30));
        let folder = self.child.folder.path();
        // The tracer is a grandchild: the child is the service.
        let trace = format!("trace={call}");
        let tracer = ["-D", "-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject];
        let mut child = blockyard_under("strace", &tracer)
            .args(["serve", "--config"])
            .arg(folder.join("blockyard.toml"))
            .env("BLOCKYARD__SERVER__BIND", "127.0.0.1:0")
            .env("BLOCKYARD__SERVER__STATE_DIR", folder.join("state"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("strace: install the package strace");
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let _ = child.kill();
        child.wait().unwrap();
    }

    /// Holds that rows, files, points and ports say the same, and nothing is left of what died.
    pub async fn expect_consistent(&mut self, running: &Running, what: &str) {
        for backup in listed(running, "backups").await {
            let state = backup["state"].as_str().unwrap();
            assert!(["committed", "failed", "cancelled"].contains(&state), "{what}: {backup:#}");
        }
        assert_eq!(running.get("/ports").await["leased"], 0, "{what}");
        self.child.expect_ports_free();
        let database = self.child.folder.path().join("state/blockyard.db");
        // A verification may go on where one was cut; it gives its pins back.
        let free = async { while sqlite_number(&database, "SELECT count(*) FROM leases").await != 0 {} };
        tokio::time::timeout(rig::DEADLINE, free).await.unwrap_or_else(|_| panic!("{what}: leases"));

        let points = listed(running, "points").await;
        let mut ids: Vec<&str> = points.iter().map(|point| point["id"].as_str().unwrap()).collect();
        ids.sort_unstable();
        assert_eq!(rig::backup_directories(&self.child.repository()), ids, "{what}: files against rows");
        for promised in &self.promised {
            let newer = ids.iter().filter(|id| **id > promised.as_str()).count();
            let is_there = ids.contains(&promised.as_str()) || newer >= self.keep;
            assert!(is_there, "{what}: {promised} was answered with success and is gone");
        }
        for point in &points {
            let id = point["id"].as_str().unwrap();
            assert_eq!(point["state"], "committed", "{what}: {point:#}");
            let sound = ["unverified", "verified"].iter().any(|trust| point["trust"] == *trust);
            assert!(sound, "{what}: nothing was damaged: {point:#}");
            assert_eq!(point["disks"].as_array().unwrap().len(), SIZES.len(), "{what}: {point:#}");
            assert!(self.history.contains_key(id), "{what}: {id} is a backup of nothing");
            let folder = Path::new(point["path"].as_str().unwrap());
            let manifest: Value =
                serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).unwrap()).unwrap();
            for disk in 0..SIZES.len() {
                let image = folder.join(format!("disk-{disk}.qcow2"));
                let found = std::fs::metadata(&image).unwrap();
                let found = (found.len(), found.modified().unwrap());
                let generation = manifest["generation"].as_u64().unwrap_or(0);
                let known = self.images.entry((image, generation)).or_insert(found);
                assert_eq!(*known, found, "{what}: an image of {id} was written after it was published");
            }
        }
        // Newest first; all the others are looked at in the end.
        for point in points.iter().take(2) {
            self.expect_restores(point, what);
        }
    }

    /// Holds that all disks of a point read, through their chains, as the VM was when it was taken.
    pub fn expect_restores(&self, point: &Value, what: &str) {
        let id = point["id"].as_str().unwrap();
        for (disk, expected) in self.history[id].iter().enumerate() {
            let image = Path::new(point["path"].as_str().unwrap()).join(format!("disk-{disk}.qcow2"));
            let raw = tempfile::NamedTempFile::new().unwrap();
            let (from, to) = (image.to_str().unwrap(), raw.path().to_str().unwrap());
            tool("qemu-utils", "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", from, to]);
            let found: [u8; 32] = Sha256::digest(std::fs::read(raw.path()).unwrap()).into();
            assert_eq!(found, *expected, "{what}: disk {disk} of {id} is not what it was taken from");
        }
    }
}

/// Everything that a list has, over its pages.
pub async fn listed(running: &Running, noun: &str) -> Vec<Value> {
    let (mut all, mut token) = (Vec::new(), String::new());
    loop {
        let mut page = running.get(&format!("/{noun}?limit=1000{token}")).await;
        all.append(page[noun].as_array_mut().unwrap());
        match page["next_page_token"].as_str() {
            Some(next) => token = format!("&page_token={next}"),
            None => return all,
        }
    }
}

/// How many times as long the run is to be.
pub fn scale() -> usize {
    usize::try_from(number("SCALE").unwrap_or(1)).unwrap()
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_kills_at_random_moments_leave_every_point_whole_and_nothing_else() {
    let (mut campaign, mut running, seed) = Campaign::new(usize::MAX).await;
    let kills = KILLS * scale();
    let (mut lost, mut survived) = (0, 0);
    for kill in 0..kills {
        campaign.write();
        // Now and then a full in the middle of a chain; the very first backup is one in any case.
        let full = kill == 0 || campaign.random.u8(0..10) == 0;
        let total = SIZES.iter().map(|(_, size)| *size as u64).sum();
        let moment = Moment::any(&mut campaign.random, if full { total } else { campaign.pending });
        let what = format!("SEED={seed}, kill {kill}, {}, {moment:?}", if full { "full" } else { "incremental" });
        let before = campaign.history.len();
        campaign.killed(running, &moment, full).await;
        if kill % KILLED_STARTS == 0 {
            campaign.killed_start();
        }
        running = campaign.child.start();
        campaign.expect_consistent(&running, &what).await;
        let points = listed(&running, "points").await;
        match points
            .first()
            .is_some_and(|point| campaign.history.keys().nth(before).is_some_and(|id| point["id"] == **id))
        {
            true => survived += 1,
            false => lost += 1,
        }
        campaign.back_up(&running).await;
    }
    campaign.expect_consistent(&running, "in the end").await;
    let points = listed(&running, "points").await;
    for point in &points {
        campaign.expect_restores(point, "in the end");
        for disk in 0..SIZES.len() {
            let image = Path::new(point["path"].as_str().unwrap()).join(format!("disk-{disk}.qcow2"));
            tool("qemu-utils", "qemu-img", &["check", "-f", "qcow2", image.to_str().unwrap()]);
        }
    }
    println!("{kills} kills: {survived} backups were there afterwards, {lost} were not; {} points", points.len());
    assert_eq!(points.len(), kills + survived, "every backup that was let alone is there");
    assert!(lost > kills / 2 && points.iter().any(|point| point["backup_type"] == "incremental"));
}
