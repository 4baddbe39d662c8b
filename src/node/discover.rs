//! The question which disks a VM has. The node asks vCenter, which takes it about 15 seconds for 100 VMs.
//!
//! Nothing at the node changes by it, so unlike a start it may be given up at any time. What the answer says is read in
//! [`super::discovered`].

use std::time::Duration;

use serde::Serialize;

use super::discovered::{self, AnswerError, DiscoveredDisk, Wanted};
use super::{NodeClient, causes, exposed, printable};
use crate::secret::Secret;

/// How many times `request_timeout_s` a discovery may take: 300 seconds by default, enough for 2000 VMs.
pub(super) const LIMIT_IN_REQUESTS: u32 = 10;
/// How much of an answer is read: 8 KiB of each of the 2000 VMs that the time is enough for.
const ANSWER_MAX_BYTES: usize = 16 << 20;
/// How many answers of one node are in memory at once. The others wait, at their own expense, with theirs unread.
pub(super) const ANSWERS_AT_ONCE: usize = 4;

/// The body of the question.
#[derive(Clone, Debug, Serialize)]
pub struct DiscoverRequest {
    /// The vCenter.
    pub vcenter: String,
    /// Its user.
    pub username: String,
    /// Its password.
    #[serde(serialize_with = "exposed")]
    pub password: Secret,
    /// The datacenter whose VMs are looked at.
    pub datacenter: String,
    /// A name that cuts the answer short. Whether a VM is the wanted one is judged by the answer alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
}

/// Why it is not known which disks the VM has.
#[derive(Debug, thiserror::Error)]
pub enum DiscoverError {
    /// The connection was not made, or broke off before the answer was whole.
    #[error("the node cannot be reached: {text}")]
    Unreachable {
        /// Why.
        text: String,
    },
    /// The answer was not whole in time.
    #[error("the node did not answer within {} s", limit.as_secs_f64().ceil())]
    TimedOut {
        /// How long that was.
        limit: Duration,
    },
    /// An answer that is no success.
    #[error("the node answered {status}: {text}")]
    Rejected {
        /// The HTTP status.
        status: u16,
        /// What it said, without secrets.
        text: String,
    },
    /// An answer of more than 16 MiB.
    #[error("the node's answer has more than {ANSWER_MAX_BYTES} bytes")]
    TooLong,
    /// An answer that does not say which disks the VM has.
    #[error(transparent)]
    Answer(#[from] AnswerError),
    /// Reading the answer ended by a panic.
    #[error("reading the node's answer ended by a panic")]
    Panicked,
}

impl NodeClient {
    /// Asks once which disks a VM has: at least one, each with a key, a size and a path as a disk may have them, in the order
    /// of the answer. `within` shortens the time that the configuration gives.
    ///
    /// # Cancellation
    /// Dropping the future closes the connection; nothing has changed.
    ///
    /// # Errors
    /// No usable answer, or one without the VM.
    pub async fn discover(
        &self,
        request: &DiscoverRequest,
        wanted: Wanted,
        within: Option<Duration>,
    ) -> Result<Vec<DiscoveredDisk>, DiscoverError> {
        let limit = within.map_or(self.discover_limit, |within| within.min(self.discover_limit));
        let asked = tokio::time::timeout(limit, self.ask(request, wanted)).await;
        asked.unwrap_or(Err(DiscoverError::TimedOut { limit }))
    }

    async fn ask(&self, request: &DiscoverRequest, wanted: Wanted) -> Result<Vec<DiscoveredDisk>, DiscoverError> {
        let unreachable = |error: reqwest::Error| DiscoverError::Unreachable { text: causes(&error) };
        let password = &request.password;
        let mut answer = self
            .http
            .post(format!("{}/api/v1/discover", self.base))
            .header(reqwest::header::CONNECTION, "close")
            // That of the client is meant for other calls; the caller's clock runs.
            .timeout(Duration::MAX)
            .json(request)
            .send()
            .await
            .map_err(unreachable)?;
        let status = answer.status();
        if !status.is_success() {
            let body = super::read_bounded(answer).await.unwrap_or_default();
            return Err(DiscoverError::Rejected { status: status.as_u16(), text: printable(&body, password) });
        }
        // Nobody closes the semaphore.
        let _turn = self.answers.acquire().await;
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(unreachable)? {
            if body.len() + chunk.len() > ANSWER_MAX_BYTES {
                return Err(DiscoverError::TooLong);
            }
            body.extend_from_slice(&chunk);
        }
        let read = tokio::task::spawn_blocking(move || discovered::disks(&body, &wanted)).await;
        let disks = read.map_err(|_| DiscoverError::Panicked)?;
        // A node that echoes what it was sent does so in what is told of its answer, too.
        Ok(disks.map_err(|error| error.map_texts(|text| printable(text.as_bytes(), password)))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_holds_its_secret_on_the_wire_only() {
        let request = DiscoverRequest {
            vcenter: "vc".into(),
            username: "admin".into(),
            password: Secret::from("hunter2".to_owned()),
            datacenter: "DC1".into(),
            filter: None,
        };
        assert!(!format!("{request:?}").contains("hunter2"));
        assert_eq!(
            serde_json::to_string(&request).unwrap(),
            r#"{"vcenter":"vc","username":"admin","password":"hunter2","datacenter":"DC1"}"#
        );
    }
}
