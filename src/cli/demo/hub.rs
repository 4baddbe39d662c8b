//! A real service of the demo's own, on free ports of loopback, and the REST API as anybody reaches it.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::DemoError;
use crate::cli::CliError;
use crate::cli::client::Client;
use crate::config::{Config, PortRange};
use crate::secret::Secret;
use crate::serve::Service;

/// The listeners' ports lie below those that systems hand out by themselves, from 32768 on.
const FIRST_PORT: u16 = 20_000;
const LAST_PORT: u16 = 32_767;
/// So many ports that some are free wherever the range begins; those of others are skipped.
const PORTS: u16 = 512;
/// The unit of `st_blocks`, whatever the file system's own is.
const BLOCK_BYTES: u64 = 512;

/// A running service. Dropped without [`Hub::stop`] it stops at once.
#[derive(Debug)]
pub(super) struct Hub {
    service: Service,
    client: Client,
    token_file: PathBuf,
}

impl Hub {
    /// Starts it with what a demo sets in any case, and more of the configuration.
    pub(super) async fn start(state_folder: PathBuf, configure: impl FnOnce(&mut Config)) -> Result<Self, CliError> {
        let mut config = Config::default();
        config.server.bind = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        config.server.state_dir = state_folder;
        config.server.drain_s = 1;
        config.nbd.port_range = port_range();
        config.restore.port_range = port_range();
        // Nobody else's space is at stake: a demo may fill what there is.
        config.storage.min_free_bytes = 0;
        configure(&mut config);
        let token_file = config.token_file();
        let service = Service::start(config).await?;
        let token = Secret::read(&token_file).map_err(|error| DemoError::Api(error.into()))?;
        let client = Client::new(service.url(), Some(token)).map_err(DemoError::Api)?;
        Ok(Self { service, client, token_file })
    }

    /// The REST API, with the token.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Base URL of the REST API.
    pub(super) fn url(&self) -> String {
        self.service.url()
    }

    /// The file that holds the token.
    pub(super) fn token_file(&self) -> &Path {
        &self.token_file
    }

    /// The images of a restore point, in the order of the VM.
    ///
    /// # Errors
    /// The service does not know the point, or an image is not where it says.
    pub(super) async fn images(&self, point_id: &str) -> Result<Vec<Image>, DemoError> {
        let point = self.client.get(&format!("/points/{point_id}"), &[]).await?;
        let folder = PathBuf::from(text(&point, "path")?);
        let disks = point["disks"].as_array().ok_or(DemoError::Answer { what: "disks" })?;
        let image = |disk: &Value| {
            let path = folder.join(text(disk, "file")?);
            let found = fs::metadata(&path).map_err(|source| DemoError::Image { path: path.clone(), source })?;
            Ok(Image { path, stored_bytes: found.blocks() * BLOCK_BYTES })
        };
        disks.iter().map(image).collect()
    }

    /// Ends it in order, so that nothing writes into its folders any more.
    pub(super) async fn stop(self) {
        self.service.stop().await;
    }
}

/// The image of one disk of a restore point.
#[derive(Clone, Debug)]
pub(super) struct Image {
    pub(super) path: PathBuf,
    /// What it takes in its file system.
    pub(super) stored_bytes: u64,
}

/// A text in an answer of the API.
pub(super) fn text(document: &Value, field: &'static str) -> Result<String, DemoError> {
    document[field].as_str().map(str::to_owned).ok_or(DemoError::Answer { what: field })
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
