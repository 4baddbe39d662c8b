//! What a demo runs on: a real service on free ports, the stand-in for the node, and a VM and a repository that were added
//! through the REST API as anybody would add them.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::DemoError;
use super::disks::DemoDisk;
use super::folder::Folder;
use crate::cli::CliError;
use crate::cli::client::{Client, ClientError};
use crate::config::{Config, Credential, DEFAULT_NODE, Node, PortRange};
use crate::node::fake::{FakeConfig, FakeDisk, FakeNode, Source};
use crate::secret::Secret;
use crate::serve::Service;

/// The VM's name.
pub(super) const VM_NAME: &str = "demo-vm";
/// The repository's id.
pub(super) const REPOSITORY_ID: &str = "demo";
/// Name of the credential, as VM and configuration know it.
const CREDENTIAL: &str = "demo";
/// A name that is never resolved (RFC 2606).
const VCENTER: &str = "vcenter.demo.invalid";
/// The listeners' ports lie below those that systems hand out by themselves, from 32768 on.
const FIRST_PORT: u16 = 20_000;
const LAST_PORT: u16 = 32_767;
/// So many ports that some are free wherever the range begins; those of others are skipped.
const PORTS: u16 = 512;

/// A running demo. Dropped without [`Stage::stop`] it stops at once.
#[derive(Debug)]
pub(super) struct Stage {
    service: Service,
    node: FakeNode,
    client: Client,
    token_file: PathBuf,
}

impl Stage {
    /// Starts node and service and adds repository and VM.
    pub(super) async fn start(folder: &Folder, disks: &[DemoDisk]) -> Result<Self, CliError> {
        let fakes: BTreeMap<u32, FakeDisk> = disks.iter().map(|disk| (disk.device_key, fake(disk))).collect();
        // The service's address is known only after the node's.
        let node = FakeNode::start(FakeConfig::new("", fakes)).await.map_err(|source| DemoError::Node { source })?;
        let password_file = folder.password_file();
        write_private(&password_file, "there is no vCenter\n")
            .map_err(|source| DemoError::Make { path: password_file.clone(), source })?;
        let config = configuration(&node.url(), folder, &password_file);
        let token_file = config.token_file();
        let service = Service::start(config).await?;
        node.reconfigure(|fake| fake.hub_url = service.url());
        let token = Secret::read(&token_file).map_err(|error| DemoError::Api(error.into()))?;
        let client = Client::new(service.url(), Some(token)).map_err(DemoError::Api)?;
        let stage = Self { service, node, client, token_file };
        stage.register(folder, disks).await.map_err(DemoError::Api)?;
        Ok(stage)
    }

    async fn register(&self, folder: &Folder, disks: &[DemoDisk]) -> Result<(), ClientError> {
        let repository = json!({"id": REPOSITORY_ID, "name": "Demo", "path": folder.repository()});
        self.client.post("/repositories", &repository).await?;
        let disks: Vec<_> = disks
            .iter()
            .map(|disk| {
                let name = disk.path.file_name().unwrap_or_default().to_string_lossy();
                let vmdk_path = format!("[demo] {VM_NAME}/{name}");
                json!({"device_key": disk.device_key, "size_bytes": disk.size_bytes, "vmdk_path": vmdk_path})
            })
            .collect();
        let vm = json!({
            "name": VM_NAME, "vcenter_host": VCENTER, "path": format!("/Demo/vm/{VM_NAME}"), "credential": CREDENTIAL,
            "disks": disks,
        });
        self.client.post("/vms", &vm).await?;
        Ok(())
    }

    /// The REST API, with the token.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// The stand-in for the node.
    pub(super) fn node(&self) -> &FakeNode {
        &self.node
    }

    /// Base URL of the REST API.
    pub(super) fn url(&self) -> String {
        self.service.url()
    }

    /// The file that holds the token.
    pub(super) fn token_file(&self) -> &Path {
        &self.token_file
    }

    /// Ends the service in order, so that nothing writes into the folder any more.
    pub(super) async fn stop(self) {
        // Its clients go first: a job that waits for them would only use up its time.
        drop(self.node);
        self.service.stop().await;
    }
}

fn fake(disk: &DemoDisk) -> FakeDisk {
    let source = Source::File { path: disk.path.clone(), size_bytes: disk.size_bytes };
    FakeDisk::new(source, format!("52 de 6d 6f 00 00 {:04x}/1", disk.device_key))
}

/// As a real password file is: for its owner alone.
fn write_private(path: &Path, content: &str) -> std::io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content.as_bytes())
}

fn configuration(node_url: &str, folder: &Folder, password_file: &Path) -> Config {
    let mut config = Config::default();
    config.server.bind = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    config.server.state_dir = folder.state();
    config.server.drain_s = 1;
    config.nodes.insert(DEFAULT_NODE.to_owned(), Node { url: node_url.to_owned(), ..Node::default() });
    let credential = Credential {
        vcenter_host: VCENTER.to_owned(),
        username: "demo".to_owned(),
        password_file: password_file.to_owned(),
    };
    config.credentials.insert(CREDENTIAL.to_owned(), credential);
    config.nbd.port_range = port_range();
    // Nobody else's space is at stake: a demo may fill what there is.
    config.storage.min_free_bytes = 0;
    // The client is in this process: what it does not do soon, it will not do.
    config.jobs.first_contact_s = 30;
    config.jobs.reconnect_s = 5;
    config.jobs.idle_s = 30;
    config.jobs.stalled_s = 30;
    config
}

/// A range that begins anywhere, so that demos and tests side by side seldom look at the same ports; two that do still
/// work, because ports are taken by binding them.
fn port_range() -> PortRange {
    let mut random = [0; 2];
    // Without randomness all begin at the same place, which works as well.
    let _ = getrandom::fill(&mut random);
    let first = FIRST_PORT + u16::from_le_bytes(random) % (LAST_PORT - FIRST_PORT - PORTS);
    format!("{first}-{}", first + PORTS - 1).parse().unwrap_or(PortRange::DEFAULT)
}
