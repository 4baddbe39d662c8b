//! The real binary as the hub, with one VM and a fake node beside it: for tests that end the process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blockyard::node::fake::{Event, FakeConfig, FakeDisk, FakeNode, Faults, Source};
use serde_json::{Value, json};

use crate::rig::{self, change_id, content};
use crate::support::process::{ServeProcess, blockyard};

/// The real binary with one VM and a fake node beside it.
pub struct Child {
    pub folder: tempfile::TempDir,
    pub node: FakeNode,
    ports: std::ops::RangeInclusive<u16>,
    pub disks: Vec<(u32, Vec<u8>)>,
}

impl Child {
    pub async fn new(faults: Faults) -> Self {
        Self::with_disks(vec![(2000, content(1, 8 << 20)), (2016, content(2, (2 << 20) + 512))], faults).await
    }

    pub async fn with_disks(disks: Vec<(u32, Vec<u8>)>, faults: Faults) -> Self {
        Self::configured(disks, faults, rig::free_ports(), "").await
    }

    /// With more configuration, and these ports.
    pub async fn configured(
        disks: Vec<(u32, Vec<u8>)>,
        faults: Faults,
        ports: std::ops::RangeInclusive<u16>,
        more: &str,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = FakeConfig::new("http://127.0.0.1:1", fake_disks(&disks));
        config.request_bytes = 256 << 10;
        config.faults = faults;
        let node = FakeNode::start(config).await.unwrap();
        let toml = rig::configuration(&node.url(), folder.path(), &ports, more);
        let toml = toml.replace("{folder}", folder.path().to_str().unwrap());
        std::fs::write(folder.path().join("blockyard.toml"), toml).unwrap();
        std::fs::create_dir(folder.path().join("main")).unwrap();
        Self { folder, node, ports, disks }
    }

    pub fn start(&self) -> Running {
        self.start_as(blockyard())
    }

    pub fn start_as(&self, command: std::process::Command) -> Running {
        let config = self.folder.path().join("blockyard.toml");
        let process = ServeProcess::start_as(command, self.folder.path(), |command| {
            command.arg("--config").arg(&config);
        });
        let hub_url = process.url.clone();
        self.node.reconfigure(|config| config.hub_url = hub_url);
        let token = std::fs::read_to_string(self.folder.path().join("state/token")).unwrap();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Running { process, token: token.trim().to_owned(), http }
    }

    /// The next state of the VM, as [`rig::write`].
    pub fn write(&mut self, writes: &[(u32, usize, Vec<u8>)]) {
        rig::write(&self.node, &mut self.disks, writes);
    }

    pub fn repository(&self) -> PathBuf {
        self.folder.path().join("main")
    }

    /// Makes the VM and the repository and returns the VM's id.
    pub async fn furnish(&self, running: &Running) -> String {
        running.post("/repositories", &json!({"id": "main", "name": "main", "path": self.repository()})).await;
        running.add_vm("db-server", &self.disks).await
    }

    pub async fn paused(&self) {
        let paused = self.node.log().first(|event| (*event == Event::Paused).then_some(()));
        tokio::time::timeout(rig::DEADLINE, paused).await.expect("the client never paused");
    }

    pub fn expect_ports_free(&self) {
        for port in self.ports.clone() {
            let connected = std::net::TcpStream::connect(("127.0.0.1", port));
            assert!(connected.is_err(), "something listens on {port}");
        }
    }
}

/// The same disks as the node has them, without a past.
pub fn fake_disks(disks: &[(u32, Vec<u8>)]) -> BTreeMap<u32, FakeDisk> {
    let fake =
        |(key, bytes): &(u32, Vec<u8>)| (*key, FakeDisk::new(Source::Bytes(bytes.as_slice().into()), change_id(*key)));
    disks.iter().map(fake).collect()
}

pub struct Running {
    pub process: ServeProcess,
    pub token: String,
    pub http: reqwest::Client,
}

impl Running {
    pub async fn get(&self, path: &str) -> Value {
        let url = format!("{}/api/v1{path}", self.process.url);
        let answer = self.http.get(url).bearer_auth(&self.token).send().await.unwrap();
        assert!(answer.status().is_success(), "{path}: {}", answer.status());
        answer.json().await.unwrap()
    }

    pub async fn post(&self, path: &str, body: &Value) -> Value {
        let url = format!("{}/api/v1{path}", self.process.url);
        let answer = self.http.post(url).bearer_auth(&self.token).json(body).send().await.unwrap();
        let status = answer.status();
        let text = answer.text().await.unwrap();
        assert!(status.is_success(), "{path}: {status} {text}");
        serde_json::from_str(&text).unwrap()
    }

    pub async fn add_vm(&self, name: &str, disks: &[(u32, Vec<u8>)]) -> String {
        let mut vm = crate::support::vm_body(name);
        vm["credential"] = "main".into();
        vm["disks"] =
            rig::sizes(disks).iter().map(|(key, size)| json!({"device_key": key, "size_bytes": size})).collect();
        self.post("/vms", &vm).await["id"].as_str().unwrap().to_owned()
    }

    pub async fn back_up(&self, vm: &str) -> Value {
        let body = json!({"vm_context_id": vm, "repository_id": "main", "backup_type": "auto"});
        self.post("/backups/vm", &body).await
    }

    pub async fn end_of(&self, id: &str) -> Value {
        let wait = async {
            loop {
                let backup = self.get(&format!("/backups/{id}?wait=5")).await;
                if ["committed", "failed", "cancelled"].contains(&backup["state"].as_str().unwrap()) {
                    return backup;
                }
            }
        };
        tokio::time::timeout(rig::DEADLINE, wait).await.expect("the backup did not end")
    }
}

/// Changes the database behind the service's back.
pub async fn sqlite(database: &Path, statements: &str) {
    use sqlx::{ConnectOptions, Connection, Executor};
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(database).busy_timeout(rig::DEADLINE);
    let mut connection = options.connect().await.unwrap();
    connection.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(statements.to_owned()))).await.unwrap();
    connection.close().await.unwrap();
}

/// Asks the database for one number behind the service's back.
pub async fn sqlite_number(database: &Path, query: &str) -> i64 {
    use sqlx::{ConnectOptions, Connection};
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(database).busy_timeout(rig::DEADLINE);
    let mut connection = options.connect().await.unwrap();
    let number = sqlx::query_scalar(sqlx::AssertSqlSafe(query.to_owned())).fetch_one(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    number
}
