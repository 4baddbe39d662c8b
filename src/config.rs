//! The configuration: every section and key with its type and default.
//!
//! Reading it (file, environment, unknown keys) is in `load`, the rules a value must keep are in `validate`. A key is here
//! only when something behaves differently by it; `docs/configuration.md` describes each one and a test holds the two equal.
//! An empty text means "not set" and is `None` in these types.

mod form;
mod load;
mod ports;
mod validate;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use form::{address, blank, networks};
pub use load::{ConfigError, Environment, Origin};
pub use ports::{PortRange, PortRangeError};

/// The whole configuration. Every section may be left out.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The process and its HTTP side.
    pub server: Server,
    /// Who may call.
    pub auth: Auth,
    /// Where the state is kept.
    pub database: Database,
    /// Nodes by name. `default` exists without being written.
    pub nodes: BTreeMap<String, Node>,
    /// vCenter logins by name.
    pub credentials: BTreeMap<String, Credential>,
    /// The listeners that the backup client writes to.
    pub nbd: Nbd,
    /// Limits of jobs.
    pub jobs: Jobs,
    /// Images and space.
    pub storage: Storage,
    /// Receivers of events by name.
    pub webhooks: BTreeMap<String, Webhook>,
    /// Exports of restore points.
    pub restore: Restore,
    /// What can be seen of the service.
    pub observability: Observability,
}

/// `[server]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Server {
    /// Address of the API. Loopback only; port 0 takes any free port.
    #[serde(with = "address")]
    pub bind: SocketAddr,
    /// A second address that serves the three callbacks and nothing else.
    #[serde(with = "blank")]
    pub callbacks_bind: Option<SocketAddr>,
    /// Database, lock file and token live here.
    pub state_dir: PathBuf,
    /// How long running jobs may go on after SIGTERM, in seconds.
    pub drain_s: u64,
    /// Longest request body, in bytes.
    pub body_limit_bytes: usize,
    /// Filter of the log lines, in the syntax of `tracing`'s env filter.
    pub log: String,
    /// Form of the log lines.
    pub log_format: LogFormat,
}

/// Form of the log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One readable line per fact.
    Text,
    /// One JSON object per line.
    Json,
}

/// `[auth]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Auth {
    /// Whether a bearer token is demanded.
    pub mode: AuthMode,
    /// File of the token; `<state_dir>/token` when not set. Made at the first start when it does not exist.
    #[serde(with = "blank")]
    pub token_file: Option<PathBuf>,
    /// File of a second token that may only read.
    #[serde(with = "blank")]
    pub read_token_file: Option<PathBuf>,
    /// Networks that callbacks may come from.
    #[serde(with = "networks")]
    pub callback_peers: Vec<IpNet>,
}

/// Whether a bearer token is demanded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AuthMode {
    /// On every route but the named ones.
    Token,
    /// Never; refused unless every bind address is loopback.
    Off,
}

/// `[database]`
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Database {
    /// `sqlite:<path>`; a file in `state_dir` when not set.
    #[serde(with = "blank")]
    pub url: Option<String>,
}

/// `[nodes.<name>]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Node {
    /// Base URL, without a slash at the end.
    pub url: String,
    /// Limit for the TCP connection, in seconds.
    pub connect_timeout_s: u64,
    /// Limit for the answer to a start call, in seconds; a discovery may take ten times as long.
    pub request_timeout_s: u64,
    /// Jobs at once through this node; 0 means no limit.
    pub max_running: u32,
    /// Ports for the jobs of this node; `nbd.port_range` when not set.
    #[serde(with = "blank")]
    pub port_range: Option<PortRange>,
    /// Whether a backup begins with a look at which disks the VM has.
    pub refresh_before_start: bool,
}

/// `[credentials.<name>]`: a login by reference. The password itself is read from its file when a job needs it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Credential {
    /// The vCenter it is for, as VMs name it.
    pub vcenter_host: String,
    /// Login name.
    pub username: String,
    /// File that holds the password.
    pub password_file: PathBuf,
    /// Where discovery looks for VMs; the first segment of a VM's inventory path when not set.
    #[serde(default, with = "blank")]
    pub datacenter: Option<String>,
}

/// `[nbd]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Nbd {
    /// Address of the listeners. Loopback only.
    pub bind: IpAddr,
    /// Ports of the listeners, one per disk.
    pub port_range: PortRange,
    /// Host that the backup client is told.
    pub advertise_host: String,
    /// Added to a port before the backup client is told.
    pub advertise_port_offset: i32,
    /// How exports are named.
    pub export_names: ExportNames,
    /// Whether a listener names its export to who asks for a list.
    pub list_exports: bool,
    /// Connections per export; one more is refused with an error.
    pub max_connections_per_export: u32,
    /// From the connection to the start of transmission, in seconds; no limit afterwards.
    pub handshake_timeout_s: u64,
    /// Payload in memory over all listeners, in bytes.
    pub memory_budget_bytes: u64,
    /// Whether the listeners speak TLS.
    pub tls: TlsMode,
    /// Their certificate, with those that lead to a root, as a PEM file.
    #[serde(with = "blank")]
    pub cert_file: Option<PathBuf>,
    /// Its private key, as a PEM file.
    #[serde(with = "blank")]
    pub key_file: Option<PathBuf>,
    /// The roots of client certificates, as a PEM file; with it a client must show one.
    #[serde(with = "blank")]
    pub client_ca_file: Option<PathBuf>,
    /// Subjects of client certificates that are accepted; all when empty.
    pub allow_subjects: Vec<String>,
}

/// Whether the listeners speak TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TlsMode {
    /// They do not.
    Off,
    /// With clients that ask for it.
    On,
    /// With everybody.
    Required,
}

/// How exports are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportNames {
    /// `{vm_name}-disk{N}`
    Plain,
    /// `{vm_name}-{26 random characters}-disk{N}`
    Unguessable,
}

/// `[jobs]`: limits of a job, in seconds where the name ends in `_s`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Jobs {
    /// A start request is answered at the latest after this.
    pub answer_within_s: u64,
    /// Binding ports and creating images.
    pub prepare_s: u64,
    /// First sign of life of a client whose start the node did not confirm.
    pub start_grace_s: u64,
    /// First sign of life of a client whose start the node confirmed, before an alert is raised.
    pub first_contact_warn_s: u64,
    /// First sign of life of a client whose start the node confirmed.
    pub first_contact_s: u64,
    /// Silence after which a job counts as stalled.
    pub idle_s: u64,
    /// How long a stalled job may stay so.
    pub stalled_s: u64,
    /// How long a disk that was being written may be without a connection.
    pub reconnect_s: u64,
    /// Sealing, plus one second per GiB allocated.
    pub seal_s: u64,
    /// Cancelling, before sockets are cut.
    pub cancel_s: u64,
    /// Jobs at once.
    pub max_running: u32,
    /// What becomes of the staged data of a job that failed.
    pub keep_failed: KeepFailed,
    /// How long the answer to an `Idempotency-Key` is kept.
    pub idempotency_ttl_s: u64,
    /// Whether a client that asks for the change id of disk 0 is taken to mean the disk it copies next.
    pub predict_next_disk: bool,
}

/// What becomes of the staged data of a job that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeepFailed {
    /// It is removed.
    Remove,
    /// It is put aside for people to look at.
    Quarantine,
}

/// `[storage]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Storage {
    /// Cluster size of new images, in bytes.
    pub cluster_bytes: u32,
    /// Space of a repository that jobs leave free, in bytes.
    pub min_free_bytes: u64,
    /// Share of a disk's size that a first full backup is expected to store.
    pub full_estimate_ratio: f64,
    /// What happens to a full backup that did not receive every byte.
    pub coverage_full: CoverageFull,
    /// How many images a chain may have; the next backup is a full.
    pub max_chain_depth: u32,
    /// Whether an incremental leaves out what reads the same from its parent.
    pub drop_identical: bool,
    /// Whether the files of a point are read back soon after its commit.
    pub verify_after_commit: bool,
    /// Days after which a point is verified again; 0: never.
    pub scrub_interval_days: u32,
}

/// What happens to a full backup that did not receive every byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CoverageFull {
    /// It fails.
    Require,
    /// It commits with a warning.
    Warn,
}

/// `[webhooks.<name>]`: where events are delivered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Webhook {
    /// Address that events are POSTed to.
    pub url: String,
    /// File that holds the secret that they are signed with.
    pub secret_file: PathBuf,
    /// Kinds of events; all when empty.
    #[serde(default)]
    pub events: Vec<String>,
}

/// `[restore]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Restore {
    /// Address of the exports. Loopback only, unless they are encrypted.
    pub bind: IpAddr,
    /// Ports of the exports, one each.
    pub port_range: PortRange,
    /// How long an export lives without traffic, in seconds.
    pub ttl_s: u64,
    /// The largest file of an overlay, in bytes; beyond it its client meets a full disk.
    pub overlay_limit_bytes: u64,
}

/// `[observability]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Observability {
    /// Whether `/metrics` is served without a token.
    pub metrics_public: bool,
    /// Days after which events are removed; 0 keeps them for ever.
    pub events_keep_days: u64,
}

impl Default for Restore {
    fn default() -> Self {
        Self {
            bind: Ipv4Addr::LOCALHOST.into(),
            port_range: PortRange::RESTORE_DEFAULT,
            ttl_s: 3600,
            overlay_limit_bytes: 100 << 30,
        }
    }
}

/// Name of the node that exists without being written.
pub const DEFAULT_NODE: &str = "default";

impl Config {
    /// The file that holds the bearer token.
    pub fn token_file(&self) -> PathBuf {
        self.auth.token_file.clone().unwrap_or_else(|| self.server.state_dir.join("token"))
    }

    /// The database file.
    pub fn database_file(&self) -> PathBuf {
        match self.database.url.as_deref().map(|url| url.strip_prefix("sqlite:").unwrap_or(url)) {
            // `sqlite:///var/x` is the URL form of the absolute path /var/x.
            Some(path) => PathBuf::from(path.strip_prefix("//").unwrap_or(path)),
            None => self.server.state_dir.join("blockyard.db"),
        }
    }

    /// The ports of all ranges: of the nodes and of `[restore]`.
    pub fn all_ports(&self) -> BTreeSet<u16> {
        let jobs = self.nodes.values().map(|node| self.port_range(node));
        jobs.chain([self.restore.port_range]).flat_map(PortRange::ports).collect()
    }

    /// The ports for jobs through `node`.
    pub fn port_range(&self, node: &Node) -> PortRange {
        node.port_range.unwrap_or(self.nbd.port_range)
    }
}

impl Nbd {
    /// What the backup client is told of a disk: `<device key>:nbd://<host>:<port>/<export>`. `nbds` instead if it must encrypt;
    /// a client that may is not asked to, since it may not know how.
    pub fn target(&self, device_key: u32, advertised_port: u16, export: &str) -> String {
        let scheme = if self.tls == TlsMode::Required { "nbds" } else { "nbd" };
        format!("{device_key}:{scheme}://{}:{advertised_port}/{export}", self.advertise_host)
    }
}

impl Default for Server {
    fn default() -> Self {
        Self {
            bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 8082)),
            callbacks_bind: None,
            state_dir: PathBuf::from("/var/lib/blockyard"),
            drain_s: 30,
            body_limit_bytes: 1 << 20,
            log: "info".to_owned(),
            log_format: LogFormat::Text,
        }
    }
}

impl Default for Auth {
    fn default() -> Self {
        let loopback_v4 = ipnet::Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8);
        let loopback_v6 = ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128);
        Self {
            mode: AuthMode::Token,
            token_file: None,
            read_token_file: None,
            callback_peers: vec![loopback_v4.into(), loopback_v6.into()],
        }
    }
}

impl Default for Node {
    fn default() -> Self {
        Self {
            url: "http://127.0.0.1:9081".to_owned(),
            connect_timeout_s: 5,
            request_timeout_s: 30,
            max_running: 0,
            port_range: None,
            refresh_before_start: false,
        }
    }
}

impl Default for Nbd {
    fn default() -> Self {
        Self {
            bind: Ipv4Addr::LOCALHOST.into(),
            port_range: PortRange::DEFAULT,
            advertise_host: "127.0.0.1".to_owned(),
            advertise_port_offset: 0,
            export_names: ExportNames::Plain,
            list_exports: false,
            max_connections_per_export: 16,
            handshake_timeout_s: 10,
            memory_budget_bytes: 256 << 20,
            tls: TlsMode::Off,
            cert_file: None,
            key_file: None,
            client_ca_file: None,
            allow_subjects: Vec::new(),
        }
    }
}

impl Default for Jobs {
    fn default() -> Self {
        Self {
            answer_within_s: 10,
            prepare_s: 60,
            start_grace_s: 300,
            first_contact_warn_s: 120,
            first_contact_s: 1800,
            idle_s: 300,
            stalled_s: 1800,
            reconnect_s: 60,
            seal_s: 600,
            cancel_s: 60,
            max_running: 50,
            keep_failed: KeepFailed::Remove,
            idempotency_ttl_s: 86_400,
            predict_next_disk: true,
        }
    }
}

impl Default for Observability {
    fn default() -> Self {
        Self { metrics_public: false, events_keep_days: 30 }
    }
}

impl Default for Storage {
    fn default() -> Self {
        Self {
            cluster_bytes: 65_536,
            min_free_bytes: 1 << 30,
            full_estimate_ratio: 0.5,
            coverage_full: CoverageFull::Require,
            max_chain_depth: 32,
            drop_identical: true,
            verify_after_commit: true,
            scrub_interval_days: 30,
        }
    }
}
