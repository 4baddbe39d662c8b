//! A hub with one VM, one repository and a fake node, and the ways in which every test looks at them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use blockyard::node::fake::{Event, FakeConfig, FakeDisk, FakeNode, Faults, Source};
use blockyard::store::leases;
use serde_json::{Value, json};
use tempfile::TempDir;

pub use crate::nbd::Nbd;
use crate::support::{Answer, TestService, vm_body};

/// How long a condition may take to come true. Never a measure of speed: the machine may be busy.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// Ports that one test has for itself.
const PORTS: u16 = 16;

/// How a rig is made.
pub struct Plan {
    /// Device key and content of each disk.
    pub disks: Vec<(u32, Vec<u8>)>,
    /// More configuration.
    pub toml: String,
    /// What goes wrong.
    pub faults: Faults,
    /// The largest request of the client.
    pub request_bytes: usize,
    /// The ports of the hub.
    pub ports: RangeInclusive<u16>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            disks: vec![(2000, content(1, 5 << 20)), (2016, content(2, (3 << 20) + 512)), (16_000, content(3, 512))],
            toml: String::new(),
            faults: Faults::default(),
            request_bytes: 1 << 20,
            ports: free_ports(),
        }
    }
}

/// A hub, its node, and what they work on.
pub struct Rig {
    pub service: TestService,
    pub node: FakeNode,
    pub vm: String,
    pub repository: PathBuf,
    pub disks: Vec<(u32, Vec<u8>)>,
    pub ports: RangeInclusive<u16>,
}

/// Data that differs from byte to byte and disk to disk, with a hole in the middle.
pub fn content(seed: u8, length: usize) -> Vec<u8> {
    let mut state = u64::from(seed) | 1;
    let mut bytes = vec![0; length];
    let hole = length / 4..length / 2;
    for (index, byte) in bytes.iter_mut().enumerate() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if !hole.contains(&index) {
            *byte = (state >> 56) as u8;
        }
    }
    bytes
}

/// Ports that nobody holds now and no other test of this process is given.
pub fn free_ports() -> RangeInclusive<u16> {
    many_free_ports(PORTS)
}

/// The same, at least this many.
pub fn many_free_ports(count: u16) -> RangeInclusive<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Below the ports that the system hands out by itself; processes that run at once begin at different places.
    let begin = (std::process::id() % 64) as u16 * 128;
    loop {
        let first = 20_000 + (begin + NEXT.fetch_add(count, Ordering::Relaxed)) % 12_000;
        let range = first..=first + (count - 1);
        if range.clone().all(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()) {
            return range;
        }
    }
}

impl Rig {
    pub async fn new() -> Self {
        Self::with(Plan::default()).await
    }

    pub async fn faulty(faults: Faults) -> Self {
        Self::with(Plan { faults, ..Plan::default() }).await
    }

    pub async fn with(plan: Plan) -> Self {
        Self::in_folder(tempfile::tempdir().unwrap(), plan).await
    }

    pub async fn in_folder(folder: TempDir, plan: Plan) -> Self {
        let disks: BTreeMap<u32, FakeDisk> = plan
            .disks
            .iter()
            .map(|(key, bytes)| (*key, FakeDisk::new(Source::Bytes(Arc::from(bytes.as_slice())), change_id(*key))))
            .collect();
        let mut config = FakeConfig::new("http://127.0.0.1:1", disks);
        config.faults = plan.faults;
        config.request_bytes = plan.request_bytes;
        let node = FakeNode::start(config).await.unwrap();
        let toml = configuration(&node.url(), folder.path(), &plan.ports, &plan.toml);
        let service = TestService::start_in(folder, &toml).await;
        let hub_url = service.service.url();
        node.reconfigure(|config| config.hub_url = hub_url);
        let repository = service.add_repository("main").await;
        let vm = add_vm(&service, "db-server", &sizes(&plan.disks)).await;
        Self { service, node, vm, repository, disks: plan.disks, ports: plan.ports }
    }

    /// The next state of the VM: these bytes are written (device key, offset, data), and change tracking knows where.
    pub fn write(&mut self, writes: &[(u32, usize, Vec<u8>)]) {
        write(&self.node, &mut self.disks, writes);
    }

    /// Gives the VM these disks, in the inventory and in the snapshot. What it had before keeps its past.
    pub async fn replace_disks(&mut self, disks: Vec<(u32, Vec<u8>)>) {
        self.disks = disks;
        let path = format!("/api/v1/vms/{}", self.vm);
        let etag = self.service.get(&path).await.header("etag").to_owned();
        let body = vm_with_disks("db-server", &sizes(&self.disks));
        self.service.put(&path, &etag, &body).await.expect_status(200);
        let disks = &self.disks;
        self.node.reconfigure(|config| {
            config.disks.retain(|key, _| disks.iter().any(|(kept, _)| kept == key));
            for (key, bytes) in disks {
                let source = Source::Bytes(Arc::from(bytes.as_slice()));
                let disk = config.disks.entry(*key).or_insert_with(|| FakeDisk::new(source.clone(), change_id(*key)));
                disk.source = source;
            }
        });
    }

    /// The body of a start request for the rig's VM.
    pub fn start_body(&self) -> Value {
        json!({"vm_context_id": self.vm, "repository_id": "main", "backup_type": "auto"})
    }

    /// Starts a backup of the rig's VM.
    pub async fn try_start(&self) -> Answer {
        self.service.post("/api/v1/backups/vm", &self.start_body()).await
    }

    /// Starts a backup that must be accepted, and returns the answer.
    pub async fn start(&self) -> Value {
        self.try_start().await.expect_status(200).json()
    }

    /// Starts a backup and waits for its end.
    pub async fn back_up(&self) -> Value {
        let started = self.start().await;
        self.end_of(id_of(&started)).await
    }

    /// The backup when it is over.
    pub async fn end_of(&self, id: &str) -> Value {
        self.when(id, |backup| ["committed", "failed", "cancelled"].contains(&backup["state"].as_str().unwrap())).await
    }

    /// The backup when it is in this state.
    pub async fn when_in(&self, id: &str, state: &str) -> Value {
        self.when(id, |backup| backup["state"] == state).await
    }

    /// The backup when a condition holds.
    pub async fn when(&self, id: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let wait = async {
            loop {
                let backup = self.backup(id).await;
                if holds(&backup) {
                    return backup;
                }
                let _ = self.service.get(&format!("/api/v1/backups/{id}?wait=1")).await;
            }
        };
        match tokio::time::timeout(DEADLINE, wait).await {
            Ok(backup) => backup,
            Err(_) => panic!("not in time: {:#}", self.backup(id).await),
        }
    }

    pub async fn backup(&self, id: &str) -> Value {
        self.service.get(&format!("/api/v1/backups/{id}")).await.expect_status(200).json()
    }

    pub async fn complete(&self, id: &str, disk_id: u32, change_id: &str) -> Answer {
        let body = json!({"change_id": change_id, "disk_id": disk_id, "bytes_transferred": 0});
        let path = format!("/api/v1/backups/{id}/complete");
        crate::support::send(self.service.request_without_token(reqwest::Method::POST, &path).json(&body)).await
    }

    pub async fn cancel(&self, id: &str) -> Answer {
        self.service.post(&format!("/api/v1/backups/{id}/cancel"), &json!({})).await
    }

    pub async fn points(&self) -> Vec<Value> {
        let answer = self.service.get("/api/v1/points").await.expect_status(200).json();
        answer["points"].as_array().unwrap().clone()
    }

    /// Waits for an event of the node or its client.
    pub async fn seen<T>(&self, matches: impl FnMut(&Event) -> Option<T>) -> T {
        tokio::time::timeout(DEADLINE, self.node.log().first(matches)).await.expect("the node never did it")
    }

    /// Waits until the client waits.
    pub async fn paused(&self) {
        self.seen(|event| (*event == Event::Paused).then_some(())).await;
    }

    /// Waits until the client is gone.
    pub async fn client_ended(&self) -> Option<String> {
        self.seen(|event| match event {
            Event::Ended { error, .. } => Some(error.clone()),
            _ => None,
        })
        .await
    }

    /// Holds that nothing is left of jobs but these published directories: no port, listener, file, row or slot.
    #[track_caller]
    pub fn expect_nothing_left(&self, published: usize) -> impl Future<Output = ()> + '_ {
        let caller = std::panic::Location::caller();
        async move {
            let ports = self.service.get("/api/v1/ports").await.expect_status(200).json();
            assert_eq!(ports["leased"], 0, "{caller}: {ports}");
            for port in self.ports.clone() {
                let connected = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
                assert!(connected.is_err(), "{caller}: something listens on {port}");
            }
            let directories = backup_directories(&self.repository);
            assert_eq!(directories.len(), published, "{caller}: {directories:?}");
            assert!(
                directories.iter().all(|name| name.parse::<blockyard::id::BackupId>().is_ok()),
                "{caller}: {directories:?}"
            );
            let store = &self.service.service.app().store;
            let leases = leases::count(&mut store.read().await.unwrap()).await.unwrap();
            assert_eq!(leases, 0, "{caller}: leases in the database");
            assert!(self.service.service.app().backups.running().is_empty(), "{caller}: a job is running");
        }
    }

    /// The same, and that the VM can be backed up again when nothing goes wrong.
    #[track_caller]
    pub fn expect_nothing_left_and_a_backup_works(&self, published: usize) -> impl Future<Output = ()> + '_ {
        let left = self.expect_nothing_left(published);
        async move {
            left.await;
            self.node.reconfigure(|config| config.faults = Faults::default());
            let backup = self.back_up().await;
            assert_eq!(backup["state"], "committed", "{backup:#}");
            self.expect_nothing_left(published + 1).await;
        }
    }

    /// Compares every image of a point with the disks of the node, by QEMU's tools.
    pub async fn expect_restorable(&self, id: &str) {
        let point = self.service.get(&format!("/api/v1/points/{id}")).await.expect_status(200).json();
        let folder = PathBuf::from(point["path"].as_str().unwrap());
        assert_eq!(point["disks"].as_array().unwrap().len(), self.disks.len());
        for disk in point["disks"].as_array().unwrap() {
            let key = u32::try_from(disk["device_key"].as_u64().unwrap()).unwrap();
            let (_, bytes) = self.disks.iter().find(|(known, _)| *known == key).unwrap();
            let image = folder.join(disk["file"].as_str().unwrap());
            expect_image_equals(&image, bytes);
        }
    }
}

/// Brings disks to their next state, and the node's change tracking with them.
pub fn write(node: &FakeNode, disks: &mut [(u32, Vec<u8>)], writes: &[(u32, usize, Vec<u8>)]) {
    for (key, offset, data) in writes {
        let (_, bytes) = disks.iter_mut().find(|(known, _)| known == key).unwrap();
        bytes[*offset..offset + data.len()].copy_from_slice(data);
    }
    node.reconfigure(|config| {
        for (key, bytes) in disks {
            let disk = config.disks.get_mut(key).unwrap();
            disk.source = Source::Bytes(Arc::from(bytes.as_slice()));
            let now = next_change_id(&disk.change_id);
            disk.changes.insert(std::mem::replace(&mut disk.change_id, now), Vec::new());
            for (_, offset, data) in writes.iter().filter(|(written, ..)| written == key) {
                let range = (*offset as u64, data.len() as u64);
                disk.changes.values_mut().for_each(|ranges| ranges.push(range));
            }
        }
    });
}

/// The configuration of a rig's hub. Points are not verified by themselves: most tests want quiet after a commit.
pub fn configuration(node_url: &str, folder: &Path, ports: &RangeInclusive<u16>, more: &str) -> String {
    std::fs::write(folder.join("password"), "secret-of-the-vcenter\n").unwrap();
    let (first, last) = (ports.start(), ports.end());
    let base = format!(
        "[nodes.default]\nurl = \"{node_url}\"\n\
         [credentials.main]\nvcenter_host = \"vc.example\"\nusername = \"backup\"\npassword_file = \"{{folder}}/password\"\n\
         [nbd]\nport_range = \"{first}-{last}\"\n\
         [storage]\nverify_after_commit = false\n"
    );
    merge(&base, more)
}

/// Adds keys to sections that may be there already.
fn merge(base: &str, more: &str) -> String {
    let mut table: toml::Table = toml::from_str(base).unwrap();
    let more: toml::Table = toml::from_str(more).unwrap();
    fn put(into: &mut toml::Table, from: toml::Table) {
        for (key, value) in from {
            match (into.get_mut(&key), value) {
                (Some(toml::Value::Table(old)), toml::Value::Table(new)) => put(old, new),
                (_, value) => {
                    into.insert(key, value);
                }
            }
        }
    }
    put(&mut table, more);
    toml::to_string(&table).unwrap()
}

/// Adds a VM that can be backed up.
pub async fn add_vm(service: &TestService, name: &str, disks: &[(u32, u64)]) -> String {
    let answer = service.post("/api/v1/vms", &vm_with_disks(name, disks)).await.expect_status(201);
    answer.json()["id"].as_str().unwrap().to_owned()
}

fn vm_with_disks(name: &str, disks: &[(u32, u64)]) -> Value {
    let mut body = vm_body(name);
    body["credential"] = "main".into();
    body["disks"] = disks.iter().map(|(key, size)| json!({"device_key": key, "size_bytes": size})).collect();
    body
}

pub fn sizes(disks: &[(u32, Vec<u8>)]) -> Vec<(u32, u64)> {
    disks.iter().map(|(key, bytes)| (*key, bytes.len() as u64)).collect()
}

/// The change id that the fake client sends for a disk.
pub fn change_id(device_key: u32) -> String {
    format!("52 c2 1f aa 00 3b {device_key:x}/5540")
}

/// The one after it in the same history.
fn next_change_id(change_id: &str) -> String {
    let (epoch, number) = change_id.split_once('/').unwrap();
    format!("{epoch}/{}", number.parse::<u64>().unwrap() + 1)
}

pub fn id_of(answer: &Value) -> &str {
    answer["backup_id"].as_str().unwrap()
}

/// The names of everything that jobs made in a repository: `<id>` or `<id>.<something>`. A folder of a VM without any of
/// them counts as `<vm-dir>/`. Things may come and go meanwhile.
pub fn backup_directories(repository: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(repository).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name == ".lock" || name == ".blockyard-repository.json" {
            continue;
        }
        let Ok(inside) = std::fs::read_dir(entry.path()) else { continue };
        let before = names.len();
        names.extend(inside.map(|entry| entry.unwrap().file_name().into_string().unwrap()));
        if names.len() == before {
            names.push(format!("{name}/"));
        }
    }
    names.sort();
    names
}

/// Holds that QEMU finds the image sound and its content equal to these bytes.
pub fn expect_image_equals(image: &Path, bytes: &[u8]) {
    let raw = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(raw.path(), bytes).unwrap();
    tool("qemu-utils", "qemu-img", &["check", "-f", "qcow2", image.to_str().unwrap()]);
    let (image, raw) = (image.to_str().unwrap(), raw.path().to_str().unwrap());
    tool("qemu-utils", "qemu-img", &["compare", "-f", "qcow2", "-F", "raw", image, raw]);
    let info: Value =
        serde_json::from_str(&tool("qemu-utils", "qemu-img", &["info", "--output=json", "-f", "qcow2", image]))
            .unwrap();
    assert_eq!(info["virtual-size"], bytes.len() as u64);
}

/// Runs a foreign tool that must succeed, and returns what it printed.
pub fn tool(package: &str, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; install the package {package}"));
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{printed}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    printed
}

/// Asks an export for its size through a whole handshake of another implementation.
pub fn expect_go(uri: &str) -> u64 {
    tool("libnbd-bin", "nbdinfo", &["--size", uri]).trim().parse().unwrap()
}

/// The folder of a point.
pub async fn published(rig: &Rig, id: &str) -> PathBuf {
    let point = rig.service.get(&format!("/api/v1/points/{id}")).await.expect_status(200).json();
    PathBuf::from(point["path"].as_str().unwrap())
}

/// The manifest of a point.
pub async fn manifest(rig: &Rig, id: &str) -> Value {
    let path = published(rig, id).await.join("manifest.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}
