//! One event over the wire: a signed POST, and what became of it.

use std::error::Error;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use reqwest::StatusCode;
use reqwest::header::{CONTENT_TYPE, USER_AGENT};
use sha2::Sha256;

use crate::clock::UtcTime;
use crate::secret::Secret;
use crate::store::events::EventRow;

/// How long a receiver may take, from the connection to the end of its answer's head.
const LIMIT: Duration = Duration::from_secs(10);

/// What became of a POST.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A status of 200 to 299.
    Accepted,
    /// The receiver does not want this event as it is, or is not where the configuration says.
    Refused {
        /// The status: a redirect, which is not followed, or 400 to 499.
        status: u16,
    },
    /// The receiver is gone or in trouble.
    Unreachable {
        /// What happened, without the address, which may hold what nobody should read.
        reason: String,
    },
}

/// Where events go to, and the secret that they are signed with.
pub struct Delivery {
    url: String,
    secret: Secret,
    http: reqwest::Client,
}

impl Delivery {
    /// A receiver.
    ///
    /// # Errors
    /// The HTTP client cannot be made.
    pub fn new(url: &str, secret: Secret) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .no_proxy()
            // Events and their signature go to whom the operator named and to nobody else.
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .timeout(LIMIT)
            .build()?;
        Ok(Self { url: url.to_owned(), secret, http })
    }

    /// Sends an event once.
    pub async fn send(&self, event: &EventRow) -> Outcome {
        let mut body = event.told();
        body["kind"] = event.kind.as_str().into();
        let body = body.to_string();
        let timestamp = UtcTime::now().unix_seconds().to_string();
        let sent = self
            .http
            .post(&self.url)
            .header(CONTENT_TYPE, "application/json")
            .header(USER_AGENT, concat!("blockyard/", env!("CARGO_PKG_VERSION")))
            .header("Blockyard-Event", &event.kind)
            .header("Blockyard-Delivery", event.sequence)
            .header("Blockyard-Signature", signature(&self.secret, &timestamp, &body))
            .header("Blockyard-Timestamp", timestamp)
            .body(body)
            .send()
            .await;
        match sent.map(|answer| answer.status()) {
            Ok(status) if status.is_success() => Outcome::Accepted,
            Ok(status) if passes(status) => Outcome::Unreachable { reason: format!("it answered {status}") },
            Ok(status) => Outcome::Refused { status: status.as_u16() },
            Err(error) => {
                let error = error.without_url();
                let cause = error.source().map(|source| format!(": {source}")).unwrap_or_default();
                Outcome::Unreachable { reason: format!("{error}{cause}") }
            }
        }
    }
}

/// Whether a status tells of trouble that passes by itself.
fn passes(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
}

/// HMAC-SHA256 over the time, a full stop and the body. The time is in it so that a receiver can refuse what was recorded and is
/// sent again.
fn signature(secret: &Secret, timestamp: &str, body: &str) -> String {
    let mut text = "sha256=".to_owned();
    // A key of any length will do.
    if let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret.expose().as_bytes()) {
        for part in [timestamp, ".", body] {
            mac.update(part.as_bytes());
        }
        for byte in mac.finalize().into_bytes() {
            text.push_str(&format!("{byte:02x}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_that_of_other_implementations() {
        // printf '1700000000.{"seq":1}' | openssl dgst -sha256 -hmac correct-horse
        let secret = Secret::from("correct-horse".to_owned());
        let signed = signature(&secret, "1700000000", "{\"seq\":1}");
        assert_eq!(signed, "sha256=dcca220a19ee4212391e47607c8aa42cc074521efe111cba8d0bf8278dc59b25");
        assert_ne!(signed, signature(&secret, "1700000001", "{\"seq\":1}"));
    }

    #[test]
    fn trouble_that_passes_is_told_from_a_refusal() {
        for status in [408, 429, 500, 503] {
            assert!(passes(StatusCode::from_u16(status).unwrap()), "{status}");
        }
        for status in [301, 307, 400, 401, 404, 410] {
            assert!(!passes(StatusCode::from_u16(status).unwrap()), "{status}");
        }
    }
}
