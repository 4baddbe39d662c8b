//! The whole product without VMware: the real service against a fake node, one backup, every disk read back and compared.
//!
//! What runs here is what runs in production ([`Service`]); only the node is a stand-in. The demo talks to the service
//! the way any caller does, over its REST API and over NBD. It prints nothing: the command line does, from the
//! [`Progress`] and the [`Report`] it is given.

mod api;
pub mod disks;
mod restore;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use crate::config::{Config, Credential, DEFAULT_NODE, Node};
use crate::id::new_ulid;
use crate::node::fake::{Event, FakeConfig, FakeDisk, FakeNode, Source};
use crate::serve::{Service, StartError};
use api::Api;

/// The VM that is backed up.
pub const VM_NAME: &str = "demo-vm";
/// The repository it is backed up to.
pub const REPOSITORY: &str = "demo";
/// How often the progress is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// VMware's number of the first disk of the first controller.
const FIRST_DEVICE_KEY: u32 = 2000;
/// A demo shares its disk with whoever tries it; the default reserve is for servers.
const MIN_FREE_BYTES: u64 = 64 << 20;

/// What is to be shown.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where state and repository go; made when missing, and empty otherwise.
    pub folder: PathBuf,
    /// Disks to back up, raw or qcow2; three are generated when there are none.
    pub disks: Vec<PathBuf>,
}

/// How far a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Its number.
    pub disk_id: u32,
    /// Its size.
    pub size_bytes: u64,
    /// How much of it the hub has.
    pub covered_bytes: u64,
    /// Where it is.
    pub state: String,
}

/// What became of it all.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The restore point.
    pub backup_id: String,
    /// Its folder.
    pub path: PathBuf,
    /// Every disk of it.
    pub disks: Vec<DiskReport>,
}

/// One disk, before and after.
#[derive(Clone, Debug, Serialize)]
pub struct DiskReport {
    /// Its number.
    pub disk_id: u32,
    /// What it is a copy of.
    pub source: String,
    /// Bytes the backup client read.
    pub read_bytes: u64,
    /// Bytes its image takes on disk.
    pub stored_bytes: u64,
    /// How long the copy took.
    pub seconds: f64,
    /// SHA-256 of the source.
    pub source_sha256: String,
    /// SHA-256 of what came back over NBD.
    pub restored_sha256: String,
    /// Whether they are the same.
    pub equal: bool,
}

impl Report {
    /// Whether every disk came back as it was, and there is one.
    pub fn all_equal(&self) -> bool {
        !self.disks.is_empty() && self.disks.iter().all(|disk| disk.equal)
    }
}

/// Why the demo could not be shown.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The folder is in use.
    #[error("{} is not empty: name a folder of its own", .0.display())]
    NotEmpty(PathBuf),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A disk is no image that can be read.
    #[error("{} cannot be used as a disk: {reason}", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The fake node cannot be started.
    #[error("the fake node cannot be started: {0}")]
    Node(io::Error),
    /// The service cannot be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The service did not do what it was asked for.
    #[error("{request}: {reason}")]
    Api {
        /// What was asked.
        request: String,
        /// What it said.
        reason: String,
    },
    /// The backup did not succeed.
    #[error("the backup ended as {state}: {reason}")]
    Backup {
        /// Its last state.
        state: String,
        /// Why.
        reason: String,
    },
    /// A disk could not be read back.
    #[error("disk {disk_id} cannot be read back: {reason}")]
    Restore {
        /// Which one.
        disk_id: u32,
        /// Why.
        reason: String,
    },
}

/// The demo on its stage: service and node are running.
#[derive(Debug)]
pub struct Demo {
    service: Service,
    node: FakeNode,
    api: Api,
    config: Config,
    disks: Vec<DemoDisk>,
}

/// One disk of the pretended VM.
#[derive(Clone, Debug)]
struct DemoDisk {
    name: String,
    device_key: u32,
    source: Source,
}

impl Demo {
    /// Makes the disks, starts node and service, and registers VM and repository.
    ///
    /// # Errors
    /// A folder or disk that cannot be used, or a service that does not start.
    pub async fn set_up(options: &Options) -> Result<Self, DemoError> {
        let folder = stage(&options.folder)?;
        let disks = demo_disks(options, &folder).await?;
        let fakes: BTreeMap<u32, FakeDisk> = disks
            .iter()
            .map(|disk| {
                let change_id = format!("52 c2 1f aa {:x}/1", disk.device_key);
                (disk.device_key, FakeDisk { source: disk.source.clone(), change_id })
            })
            .collect();
        // Where the hub is becomes known when it runs; nobody calls the node before that.
        let node = FakeNode::start(FakeConfig::new("http://127.0.0.1:0", fakes)).await.map_err(DemoError::Node)?;
        let config = configuration(&folder, &node.url())?;
        let service = Service::start(config.clone()).await?;
        let hub_url = service.url();
        node.reconfigure(|config| config.hub_url = hub_url);
        let api = Api::new(service.url(), &config.token_file())?;
        let demo = Self { service, node, api, config, disks };
        demo.register(&folder).await?;
        Ok(demo)
    }

    /// Where the service answers.
    pub fn url(&self) -> String {
        self.service.url()
    }

    /// The file that holds its token.
    pub fn token_file(&self) -> PathBuf {
        self.config.token_file()
    }

    /// Backs the VM up, reads every disk of the restore point back, and compares.
    ///
    /// # Errors
    /// Anything that ends without a restore point, or with one that cannot be read. Differences are no error.
    pub async fn run(&self, mut progress: impl FnMut(&[Progress])) -> Result<Report, DemoError> {
        let body = json!({"vm_name": VM_NAME, "repository_id": REPOSITORY, "backup_type": "full"});
        let started = self.api.post("/backups/vm", &body).await?;
        let backup_id = text(&started, "backup_id");
        let backup = loop {
            let backup = self.api.get(&format!("/backups/{backup_id}")).await?;
            progress(&progress_of(&backup));
            match backup["state"].as_str() {
                Some("committed") => break backup,
                Some("failed" | "cancelled") | None => {
                    let reason = text(&backup, "error_message");
                    return Err(DemoError::Backup { state: text(&backup, "state"), reason });
                }
                Some(_) => tokio::time::sleep(LOOK_AGAIN).await,
            }
        };
        let point = self.api.get(&format!("/points/{backup_id}")).await?;
        let path = PathBuf::from(text(&point, "path"));
        let mut disks = Vec::new();
        for (disk, found) in self.disks.iter().zip(list(&point, "disks")) {
            disks.push(self.compare(disk, &path, found).await?);
        }
        debug_assert_eq!(list(&backup, "disks").len(), disks.len(), "every disk is compared");
        Ok(Report { backup_id, path, disks })
    }

    /// Stops service and node.
    pub async fn take_down(self) {
        self.service.stop().await;
        drop(self.node);
    }

    async fn register(&self, folder: &Path) -> Result<(), DemoError> {
        let repository = folder.join("repository");
        let body = json!({"id": REPOSITORY, "name": "Demo", "path": repository});
        self.api.post("/repositories", &body).await?;
        let disks: Vec<Value> = self
            .disks
            .iter()
            .map(|disk| json!({"device_key": disk.device_key, "size_bytes": disk.source.size_bytes(), "vmdk_path": disk.name}))
            .collect();
        let body = json!({
            "name": VM_NAME, "vcenter_host": "vcenter.example", "path": format!("/Demo/vm/{VM_NAME}"),
            "credential": "demo", "disks": disks,
        });
        self.api.post("/vms", &body).await?;
        Ok(())
    }

    async fn compare(&self, disk: &DemoDisk, folder: &Path, found: &Value) -> Result<DiskReport, DemoError> {
        let disk_id = found["disk_id"].as_u64().and_then(|number| u32::try_from(number).ok()).unwrap_or(0);
        let image = folder.join(text(found, "file"));
        let (read_bytes, took) = self.copied(disk_id);
        let source_sha256 = restore::hash_source(&disk.source)
            .await
            .map_err(|source| DemoError::File { path: PathBuf::from(&disk.name), source })?;
        let restored_sha256 = restore::hash_over_nbd(&image, disk_id, &self.config.nbd).await?;
        Ok(DiskReport {
            disk_id,
            source: disk.name.clone(),
            read_bytes,
            stored_bytes: disks::occupied_bytes(&image).map_err(|source| DemoError::File { path: image, source })?,
            seconds: took.as_secs_f64(),
            equal: source_sha256 == restored_sha256,
            source_sha256,
            restored_sha256,
        })
    }

    /// What the client says of its copy of a disk, the newest one.
    fn copied(&self, disk_id: u32) -> (u64, Duration) {
        let copied = self.node.log().events().into_iter().rev().find_map(|event| match event {
            Event::Copied { disk_id: copied, bytes, took } if copied == disk_id => Some((bytes, took)),
            _ => None,
        });
        copied.unwrap_or_default()
    }
}

/// The folder with what is needed in it.
fn stage(folder: &Path) -> Result<PathBuf, DemoError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| DemoError::File { path, source }
    };
    std::fs::create_dir_all(folder).map_err(failed(folder))?;
    let folder = folder.canonicalize().map_err(failed(folder))?;
    if std::fs::read_dir(&folder).map_err(failed(&folder))?.next().is_some() {
        return Err(DemoError::NotEmpty(folder));
    }
    let repository = folder.join("repository");
    std::fs::create_dir(&repository).map_err(failed(&repository))?;
    Ok(folder)
}

/// The given disks, or three generated ones.
async fn demo_disks(options: &Options, folder: &Path) -> Result<Vec<DemoDisk>, DemoError> {
    let mut paths = options.disks.clone();
    if paths.is_empty() {
        let folder = folder.join("disks");
        let made = tokio::task::spawn_blocking({
            let folder = folder.clone();
            move || disks::generate(&folder)
        });
        paths = made
            .await
            .map_err(io::Error::other)
            .and_then(|made| made)
            .map_err(|source| DemoError::File { path: folder, source })?;
    }
    let mut demo_disks = Vec::with_capacity(paths.len());
    for (device_key, path) in (FIRST_DEVICE_KEY..).zip(paths) {
        let source = Source::open(&path).await.map_err(|error| DemoError::Disk {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        if source.size_bytes() == 0 {
            return Err(DemoError::Disk { path, reason: "it is empty".to_owned() });
        }
        demo_disks.push(DemoDisk { name: path.display().to_string(), device_key, source });
    }
    Ok(demo_disks)
}

/// The configuration of the real service, with everything that would be outside turned to the stage.
fn configuration(folder: &Path, node_url: &str) -> Result<Config, DemoError> {
    let state_dir = folder.join("state");
    let password_file = folder.join("password");
    std::fs::write(&password_file, new_ulid().to_string())
        .map_err(|source| DemoError::File { path: password_file.clone(), source })?;
    let mut config = Config::default();
    config.server.bind = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    config.server.state_dir = state_dir;
    config.server.log = "error".to_owned();
    config.nodes.insert(DEFAULT_NODE.to_owned(), Node { url: node_url.to_owned(), ..Node::default() });
    let credential =
        Credential { vcenter_host: "vcenter.example".to_owned(), username: "demo".to_owned(), password_file };
    config.credentials.insert("demo".to_owned(), credential);
    config.storage.min_free_bytes = MIN_FREE_BYTES;
    Ok(config)
}

fn progress_of(backup: &Value) -> Vec<Progress> {
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    list(backup, "disks")
        .iter()
        .map(|disk| Progress {
            disk_id: u32::try_from(number(&disk["disk_id"])).unwrap_or(0),
            size_bytes: number(&disk["size_bytes"]),
            covered_bytes: number(&disk["covered_bytes"]),
            state: text(disk, "state"),
        })
        .collect()
}

fn text(value: &Value, field: &str) -> String {
    value[field].as_str().unwrap_or_default().to_owned()
}

fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value[field].as_array().map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(equal: bool) -> DiskReport {
        DiskReport {
            disk_id: 0,
            source: "disk".into(),
            read_bytes: 512,
            stored_bytes: 512,
            seconds: 0.1,
            source_sha256: "a".into(),
            restored_sha256: if equal { "a" } else { "b" }.into(),
            equal,
        }
    }

    #[test]
    fn one_difference_or_no_disk_at_all_is_no_success() {
        let report = |disks| Report { backup_id: "backup-1".into(), path: "/".into(), disks };
        assert!(report(vec![disk(true), disk(true)]).all_equal());
        assert!(!report(vec![disk(true), disk(false)]).all_equal());
        assert!(!report(vec![]).all_equal());
    }
}
