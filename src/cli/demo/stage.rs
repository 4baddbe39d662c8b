//! What a demo runs on: a service, the stand-in for the node, and a VM and a repository that were added through the REST
//! API as anybody would add them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::json;

use super::DemoError;
use super::disks::DemoDisk;
use super::folder::Folder;
use super::hub::Hub;
use super::state::State;
use crate::cli::CliError;
use crate::cli::client::ClientError;
use crate::config::{Config, Credential, DEFAULT_NODE, Node};
use crate::node::fake::{FakeConfig, FakeNode};

/// The VM's name.
pub(super) const VM_NAME: &str = "demo-vm";
/// The repository's id.
pub(super) const REPOSITORY_ID: &str = "demo";
/// Name of the credential, as VM and configuration know it.
const CREDENTIAL: &str = "demo";
/// A name that is never resolved (RFC 2606).
const VCENTER: &str = "vcenter.demo.invalid";

/// A running demo. Dropped without [`Stage::stop`] it stops at once.
#[derive(Debug)]
pub(super) struct Stage {
    hub: Hub,
    node: FakeNode,
}

impl Stage {
    /// Starts node and service and adds repository and VM.
    pub(super) async fn start(folder: &Folder, disks: &[DemoDisk]) -> Result<Self, CliError> {
        let snapshot = State::first(disks).snapshot();
        // The service's address is known only after the node's.
        let node = FakeNode::start(FakeConfig::new("", snapshot)).await.map_err(|source| DemoError::Node { source })?;
        let password_file = folder.password_file();
        write_private(&password_file, "there is no vCenter\n")
            .map_err(|source| DemoError::Make { path: password_file.clone(), source })?;
        if folder.is_kept() {
            write_configuration(folder)?;
        }
        let hub = Hub::start(folder.state(), |config| configure(config, &node.url(), &password_file)).await?;
        node.reconfigure(|fake| fake.hub_url = hub.url());
        let stage = Self { hub, node };
        stage.register(folder, disks).await.map_err(DemoError::Api)?;
        Ok(stage)
    }

    async fn register(&self, folder: &Folder, disks: &[DemoDisk]) -> Result<(), ClientError> {
        let repository = json!({"id": REPOSITORY_ID, "name": "Demo", "path": folder.repository()});
        self.hub.client().post("/repositories", &repository).await?;
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
        self.hub.client().post("/vms", &vm).await?;
        Ok(())
    }

    /// The next snapshot of the VM has this state.
    pub(super) fn present(&self, state: &State) {
        self.node.reconfigure(|fake| fake.disks = state.snapshot());
    }

    /// The service.
    pub(super) fn hub(&self) -> &Hub {
        &self.hub
    }

    /// The stand-in for the node.
    pub(super) fn node(&self) -> &FakeNode {
        &self.node
    }

    /// Ends node and service in order.
    pub(super) async fn stop(self) {
        // Its clients go first: a job that waits for them would only use up its time.
        drop(self.node);
        self.hub.stop().await;
    }
}

/// As a real password file is: for its owner alone.
fn write_private(path: &Path, content: &str) -> std::io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content.as_bytes())
}

/// The configuration by which `blockyard serve` runs on what is kept. There is no appliance then: it restores, and backs up nothing.
fn write_configuration(folder: &Folder) -> Result<(), DemoError> {
    let path = folder.configuration_file();
    let credential = json!({"vcenter_host": VCENTER, "username": "demo", "password_file": folder.password_file()});
    let server = json!({"state_dir": folder.state()});
    let written = toml::to_string(&json!({"server": server, "credentials": {CREDENTIAL: credential}}));
    written
        .map_err(std::io::Error::other)
        .and_then(|text| write_private(&path, &text))
        .map_err(|source| DemoError::Make { path, source })
}

fn configure(config: &mut Config, node_url: &str, password_file: &Path) {
    config.nodes.insert(DEFAULT_NODE.to_owned(), Node { url: node_url.to_owned(), ..Node::default() });
    let credential = Credential {
        vcenter_host: VCENTER.to_owned(),
        username: "demo".to_owned(),
        password_file: password_file.to_owned(),
        datacenter: None,
    };
    config.credentials.insert(CREDENTIAL.to_owned(), credential);
    // The client is in this process: what it does not do soon, it will not do.
    config.jobs.first_contact_s = 30;
    config.jobs.reconnect_s = 5;
    config.jobs.idle_s = 30;
    config.jobs.stalled_s = 30;
}
