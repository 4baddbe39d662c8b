//! The client of the node (SNA): one call that starts a backup client, the question whether it did, and in [`discover`] which
//! disks a VM has.
//!
//! The start call is not idempotent and nothing can be stopped once it was sent, so everything here serves one question:
//! may the caller undo? Each call has a connection of its own; there is no redirect, no proxy and no retry, and every way
//! the call can end is sorted by what it proves. What to do about it is the job's business.

use std::sync::Arc;
use std::time::Duration;

use serde::{Serialize, Serializer};
use tokio::sync::Semaphore;

use crate::secret::Secret;

pub mod discover;
pub mod discovered;
pub mod fake;

/// How much of an answer is read; the real one has a few hundred bytes.
const ANSWER_MAX_BYTES: usize = 64 * 1024;
/// How much of a refusal is told to the caller.
const REFUSAL_MAX_CHARS: usize = 500;

/// The body of the start call. The node requires every field.
#[derive(Clone, Debug, Serialize)]
pub struct StartRequest {
    /// Our backup id; its prefix tells the client what to do.
    pub job_id: String,
    /// The display name of the VM.
    pub vm_name: String,
    /// The vCenter.
    pub vcenter_host: String,
    /// Its user.
    pub vcenter_user: String,
    /// Its password.
    #[serde(serialize_with = "exposed")]
    pub vcenter_password: Secret,
    /// The inventory path; its last segment is the name the client asks change ids by.
    pub vm_path: String,
    /// Ignored by current nodes, read by old ones.
    pub nbd_host: String,
    /// `<device key>:nbd://<host>:<port>/<export>` for every disk, joined by commas; `nbds` where TLS is required.
    pub nbd_targets: String,
    /// `full` or `incremental`.
    pub backup_type: String,
    /// That of the lowest incremental disk; empty for a full.
    pub previous_change_id: String,
}

/// The one place where a password leaves the process.
fn exposed<S: Serializer>(secret: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(secret.expose())
}

/// What the start call proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartOutcome {
    /// The node launched a client, or says so.
    Accepted {
        /// Its answer could not be read as the JSON it should be.
        malformed: bool,
    },
    /// The node answered that it did not.
    Rejected {
        /// The HTTP status.
        status: u16,
        /// What it said, without secrets.
        text: String,
    },
    /// No byte of the call left this machine.
    Unreachable {
        /// Why.
        text: String,
    },
    /// It may or may not have launched a client.
    Ambiguous {
        /// What happened.
        text: String,
    },
}

/// Whether the node knows a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKnown {
    /// It does: the client was launched.
    Yes,
    /// It does not, or could not be asked: proves nothing yet.
    NotYet,
}

/// The node cannot be called at all.
#[derive(Debug, thiserror::Error)]
#[error("the HTTP client for node {url} cannot be made: {source}")]
pub struct NodeClientError {
    /// The configured address.
    pub url: String,
    /// What is wrong with it.
    pub source: reqwest::Error,
}

/// One node.
#[derive(Clone, Debug)]
pub struct NodeClient {
    base: String,
    http: reqwest::Client,
    /// How long a discovery may take.
    discover_limit: Duration,
    /// Who may read the answer to a discovery.
    answers: Arc<Semaphore>,
}

impl NodeClient {
    /// A client for the node at `base` (`http://host:port`).
    ///
    /// # Errors
    /// The HTTP client cannot be made.
    pub fn new(base: &str, connect_timeout: Duration, request_timeout: Duration) -> Result<Self, NodeClientError> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .pool_max_idle_per_host(0)
            .connect_timeout(connect_timeout)
            // The request's time begins when the connection stands, so that running out of time while connecting is
            // always seen as what it is: nothing was sent.
            .timeout(connect_timeout.saturating_add(request_timeout))
            .build()
            .map_err(|source| NodeClientError { url: base.to_owned(), source })?;
        let discover_limit =
            connect_timeout.saturating_add(request_timeout.saturating_mul(discover::LIMIT_IN_REQUESTS));
        let answers = Arc::new(Semaphore::new(discover::ANSWERS_AT_ONCE));
        Ok(Self { base: base.trim_end_matches('/').to_owned(), http, discover_limit, answers })
    }

    /// Asks the node to start a backup client, once.
    ///
    /// # Cancellation
    /// Dropping the future closes the connection and proves nothing about what the node did.
    pub async fn start(&self, request: &StartRequest) -> StartOutcome {
        let body = match serde_json::to_vec(request) {
            Ok(body) => body,
            Err(error) => return StartOutcome::Unreachable { text: error.to_string() },
        };
        let sent = self
            .http
            .post(format!("{}/api/v1/backup/start", self.base))
            .header(reqwest::header::CONTENT_TYPE, "application/json")
            .header(reqwest::header::CONNECTION, "close")
            .body(body)
            .send()
            .await;
        match sent {
            Ok(answer) => judge(answer, &request.vcenter_password).await,
            Err(error) if error.is_connect() || error.is_builder() => {
                StartOutcome::Unreachable { text: causes(&error) }
            }
            Err(error) => StartOutcome::Ambiguous { text: causes(&error) },
        }
    }

    /// Whether the node knows the job by now.
    pub async fn status(&self, job_id: &str) -> JobKnown {
        let url = format!("{}/api/v1/status/{job_id}", self.base);
        match self.http.get(url).header(reqwest::header::CONNECTION, "close").send().await {
            Ok(answer) if answer.status() == reqwest::StatusCode::OK => JobKnown::Yes,
            Ok(_) | Err(_) => JobKnown::NotYet,
        }
    }
}

async fn judge(answer: reqwest::Response, password: &Secret) -> StartOutcome {
    let status = answer.status();
    match status.as_u16() {
        200..=299 => {}
        // A gateway on the way gave up waiting for the node; the node may have the call.
        code @ (502..=504) => return StartOutcome::Ambiguous { text: format!("a gateway answered {code}") },
        code => {
            let body = read_bounded(answer).await.unwrap_or_default();
            return StartOutcome::Rejected { status: code, text: printable(&body, password) };
        }
    }
    let Some(body) = read_bounded(answer).await else {
        return StartOutcome::Accepted { malformed: true };
    };
    match serde_json::from_slice::<serde_json::Value>(&body) {
        Ok(value) if value.get("status").and_then(|word| word.as_str()) == Some("failed") => {
            let message = value.get("message").and_then(|text| text.as_str()).unwrap_or("no message");
            StartOutcome::Rejected { status: status.as_u16(), text: printable(message.as_bytes(), password) }
        }
        Ok(value) => StartOutcome::Accepted { malformed: !value.is_object() },
        Err(_) => StartOutcome::Accepted { malformed: true },
    }
}

/// The body, or nothing when it does not end in time, breaks off, or is far too long.
async fn read_bounded(mut answer: reqwest::Response) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.ok()? {
        if body.len() + chunk.len() > ANSWER_MAX_BYTES {
            return None;
        }
        body.extend_from_slice(&chunk);
    }
    Some(body)
}

/// A node's words as one line for a problem document: bounded, and without the password should the node echo it.
fn printable(body: &[u8], password: &Secret) -> String {
    let mut text = String::from_utf8_lossy(body).into_owned();
    if !password.expose().is_empty() {
        text = text.replace(password.expose(), "[secret]");
    }
    text.chars()
        .map(|character| if character.is_control() { ' ' } else { character })
        .take(REFUSAL_MAX_CHARS)
        .collect::<String>()
        .trim()
        .to_owned()
}

/// An error and its causes in one line, without the address, which is internal.
fn causes(error: &reqwest::Error) -> String {
    let mut text = if error.is_timeout() { "timed out".to_owned() } else { "connection failed".to_owned() };
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_one_bounded_line_without_the_password() {
        let text = printable(b"login failed\nfor admin / hunter2\x07", &Secret::from("hunter2".to_owned()));
        assert_eq!(text, "login failed for admin / [secret]");
        assert_eq!(printable(&[b'x'; 10_000], &Secret::from(String::new())).len(), REFUSAL_MAX_CHARS);
    }

    #[test]
    fn a_secret_does_not_print() {
        let request = StartRequest {
            job_id: "backup-1".into(),
            vm_name: "db".into(),
            vcenter_host: "vc".into(),
            vcenter_user: "admin".into(),
            vcenter_password: Secret::from("hunter2".to_owned()),
            vm_path: "/DC/vm/db".into(),
            nbd_host: "127.0.0.1".into(),
            nbd_targets: String::new(),
            backup_type: "full".into(),
            previous_change_id: String::new(),
        };
        assert!(!format!("{request:?}").contains("hunter2"));
        assert!(serde_json::to_string(&request).unwrap().contains("hunter2"));
    }
}
