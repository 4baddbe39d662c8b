//! What the tests of the service share: a real service in this process on free ports and in its own folder, and a small
//! client for its API.
#![allow(dead_code, unreachable_pub, reason = "every test binary uses its own part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;

use blockyard::config::{Config, Environment};
use blockyard::serve::{Service, StartError};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

pub mod certificates;
pub mod process;

/// A running service with its token. Dropped, it stops at once and its folder goes.
pub struct TestService {
    pub service: Service,
    pub token: String,
    /// `state/` of the service; tests put repositories and files beside it.
    pub folder: TempDir,
}

/// What a request brought.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no JSON in {self:?}"))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no header {name} in {self:?}")).to_str().unwrap()
    }

    /// Holds the answer to be a problem document of this status and code, with every member it must have.
    #[track_caller]
    pub fn expect_problem(&self, status: u16, code: &str) -> Value {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        assert_eq!(self.header("content-type"), "application/problem+json", "{self:?}");
        let body = self.json();
        assert_eq!(body["code"], code, "{body}");
        assert_eq!(body["type"], format!("urn:blockyard:problem:{code}"), "{body}");
        assert_eq!(body["status"], status, "{body}");
        assert_eq!(body["title"], body["error"], "{body}");
        for member in ["title", "detail", "instance", "timestamp"] {
            assert!(body[member].as_str().is_some_and(|text| !text.is_empty()), "{member} in {body}");
        }
        assert!(body["retryable"].is_boolean(), "{body}");
        body
    }

    /// The same, with the JSON pointer to the one field at fault.
    #[track_caller]
    pub fn expect_fault(&self, status: u16, code: &str, pointer: &str) -> Value {
        let body = self.expect_problem(status, code);
        assert_eq!(body["errors"][0]["pointer"], pointer, "{body}");
        body
    }

    #[track_caller]
    pub fn expect_status(self, status: u16) -> Self {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        self
    }
}

/// A configuration for one test: ports of the system's choice, state in `folder`. `toml` is added at the end.
pub fn config(folder: &Path, toml: &str) -> Config {
    let state = folder.join("state");
    let variables =
        [("BLOCKYARD__SERVER__BIND", "127.0.0.1:0"), ("BLOCKYARD__SERVER__STATE_DIR", state.to_str().unwrap())];
    let environment: Environment = variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    Config::from_toml(toml, Path::new("test.toml"), &environment).unwrap()
}

/// Starts a service. The lock on its folder may outlive the service that stopped before by a moment: a program that another test
/// of this process is starting has all open files until it runs.
async fn start_unless_in_use(config: Config) -> Service {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        match Service::start(config.clone()).await {
            Err(StartError::StateInUse { .. }) if std::time::Instant::now() < deadline => {
                tokio::task::yield_now().await
            }
            started => return started.unwrap(),
        }
    }
}

impl TestService {
    pub async fn start() -> Self {
        Self::start_with("").await
    }

    /// Starts a service with more configuration. `{folder}` in it stands for the test's folder.
    pub async fn start_with(toml: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::start_in(folder, toml).await
    }

    pub async fn start_in(folder: TempDir, toml: &str) -> Self {
        let toml = toml.replace("{folder}", folder.path().to_str().unwrap());
        let config = config(folder.path(), &toml);
        let token_file = config.token_file();
        let service = start_unless_in_use(config).await;
        let token = std::fs::read_to_string(token_file).unwrap_or_default().trim().to_owned();
        Self { service, token, folder }
    }

    /// Stops the service in order and keeps the folder for a next start.
    pub async fn stop(self) -> TempDir {
        self.service.stop().await;
        self.folder
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.service.url())
    }

    /// A request with the token; `path` begins with a slash.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.request_without_token(method, path).bearer_auth(&self.token)
    }

    pub fn request_without_token(&self, method: Method, path: &str) -> RequestBuilder {
        let client = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).no_proxy().build().unwrap();
        client.request(method, self.url(path))
    }

    pub async fn get(&self, path: &str) -> Answer {
        send(self.request(Method::GET, path)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        send(self.request(Method::POST, path).json(body)).await
    }

    pub async fn put(&self, path: &str, etag: &str, body: &Value) -> Answer {
        send(self.request(Method::PUT, path).header("if-match", etag).json(body)).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        send(self.request(Method::DELETE, path)).await
    }

    /// Adds a VM with these disks (device key, size in bytes) and answers with its id.
    pub async fn add_vm(&self, name: &str, disks: &[(u32, u64)]) -> String {
        let disks: Vec<Value> =
            disks.iter().map(|(key, size)| json!({"device_key": key, "size_bytes": size})).collect();
        let mut body = vm_body(name);
        body["disks"] = disks.into();
        let answer = self.post("/api/v1/vms", &body).await.expect_status(201);
        answer.json()["id"].as_str().unwrap().to_owned()
    }

    /// Makes a folder and adds it as a repository with this id.
    pub async fn add_repository(&self, id: &str) -> std::path::PathBuf {
        let path = self.folder.path().join(id);
        std::fs::create_dir(&path).unwrap();
        let body = json!({"id": id, "name": id, "path": path});
        self.post("/api/v1/repositories", &body).await.expect_status(201);
        path
    }
}

/// A VM without disks, at a path made from its name.
pub fn vm_body(name: &str) -> Value {
    json!({"name": name, "vcenter_host": "vc.example", "path": format!("/DC1/vm/{name}"), "disks": []})
}

pub async fn send(request: RequestBuilder) -> Answer {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status(), response.headers().clone());
    Answer { status, headers, text: response.text().await.unwrap() }
}
