//! Errors as callers see them: problem documents of RFC 9457 with a stable code.
//!
//! A handler returns a [`Problem`]; what depends on the request (path, time, request id) is added on the way out by
//! `finish`, which also turns every plain error of the framework into a document. The codes are in `codes`. A detail is
//! for the caller: it never holds a secret, SQL or an internal path. What the log keeps is written where the error happens.

use std::collections::BTreeMap;

use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

pub use super::codes::Code;
use super::request_id::RequestId;
use crate::clock::UtcTime;
use crate::store::StoreError;

/// What a caller is told to wait after a 503 that names no time of its own. A guess: long enough for a port or a slot to
/// come free, short enough for a person.
const RETRY_AFTER_S: u64 = 10;

/// A refusal or failure on its way to the caller.
#[derive(Clone, Debug)]
pub struct Problem {
    code: Code,
    detail: String,
    errors: Vec<FieldError>,
    links: BTreeMap<String, String>,
    members: Map<String, Value>,
    retry_after_s: Option<u64>,
}

/// Marks a response whose body is the problem document already: one that is repeated as it was sent.
#[derive(Clone, Copy, Debug)]
pub struct Finished;

/// What is wrong with one field of the request.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FieldError {
    /// JSON pointer (RFC 6901) into the body; empty for the whole body.
    #[schema(example = "/disks/0/size_bytes")]
    pub pointer: String,
    /// What is wrong with it.
    pub detail: String,
}

/// The body of every answer that is no success.
#[derive(Serialize, ToSchema)]
pub struct ProblemDocument {
    /// Stable name of the kind of problem.
    #[serde(rename = "type")]
    #[schema(example = "urn:blockyard:problem:vm_not_found")]
    r#type: String,
    /// The kind of problem in words; the same for every occurrence.
    title: &'static str,
    /// The HTTP status.
    status: u16,
    /// This occurrence in words.
    detail: String,
    /// Path of the request.
    instance: String,
    /// Stable code, the last part of `type`.
    code: &'static str,
    /// Whether the same request may succeed later.
    retryable: bool,
    /// Where to look, by relation.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    links: BTreeMap<String, String>,
    /// Fields at fault.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<FieldError>,
    /// The title once more, where older callers look for it.
    error: &'static str,
    /// When it happened.
    #[schema(value_type = String, format = DateTime)]
    timestamp: UtcTime,
    /// Members of some codes, such as `backup_id`.
    #[serde(flatten)]
    members: Map<String, Value>,
}

impl Problem {
    /// A problem of the kind `code`; `detail` tells the caller what is the matter with this very request.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self {
            code,
            detail: detail.into(),
            errors: Vec::new(),
            links: BTreeMap::new(),
            members: Map::new(),
            retry_after_s: None,
        }
    }

    /// `invalid_field` for one field of the body.
    pub fn invalid_field(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        let (pointer, detail) = (pointer.into(), detail.into());
        Self::new(Code::InvalidField, format!("{pointer}: {detail}")).with_error(pointer, detail)
    }

    /// A failure of ours. The error goes to the log, with its sources; the caller learns the request id only.
    pub fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(error = %crate::telemetry::Chain(error), "a request failed inside the service");
        Self::new(Code::Internal, "The service failed. Its log has the reason under the request id.")
    }

    /// Names one more field at fault.
    #[must_use]
    pub fn with_error(mut self, pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        self.errors.push(FieldError { pointer: pointer.into(), detail: detail.into() });
        self
    }

    /// Adds a link, such as `active` to the job that is in the way.
    #[must_use]
    pub fn with_link(mut self, relation: &str, href: impl Into<String>) -> Self {
        self.links.insert(relation.to_owned(), href.into());
        self
    }

    /// Adds a member of its own, such as `backup_id`.
    #[must_use]
    pub fn with(mut self, member: &str, value: impl Into<Value>) -> Self {
        self.members.insert(member.to_owned(), value.into());
        self
    }

    /// Sets `Retry-After`, in seconds. A 503 has one in any case.
    #[must_use]
    pub fn with_retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }

    /// The kind of problem.
    pub fn code(&self) -> Code {
        self.code
    }

    /// The occurrence in words.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// The document as it is sent, for a request to the path `instance`.
    pub fn into_document(self, instance: &str) -> ProblemDocument {
        let entry = self.code.entry();
        ProblemDocument {
            r#type: format!("urn:blockyard:problem:{}", entry.name),
            title: entry.title,
            status: entry.status,
            detail: self.detail,
            instance: instance.to_owned(),
            code: entry.name,
            retryable: entry.retryable,
            links: self.links,
            errors: self.errors,
            error: entry.title,
            timestamp: UtcTime::now(),
            members: self.members,
        }
    }

    /// What a bare status of the framework means.
    fn of_status(status: StatusCode) -> Self {
        match status {
            StatusCode::NOT_FOUND => Self::new(Code::NotFound, "There is nothing at this path."),
            StatusCode::METHOD_NOT_ALLOWED => {
                Self::new(Code::MethodNotAllowed, "This path does not take this method; Allow names those it takes.")
            }
            StatusCode::PAYLOAD_TOO_LARGE => {
                Self::new(Code::BodyTooLarge, "The body is larger than server.body_limit_bytes.")
            }
            StatusCode::UNSUPPORTED_MEDIA_TYPE => {
                Self::new(Code::UnsupportedMediaType, "Send the body as application/json.")
            }
            status if status.is_client_error() => Self::new(Code::InvalidField, "The request cannot be read."),
            _ => Self::new(Code::Internal, "The service failed. Its log has the reason under the request id."),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.code.status().into_response();
        let retry_after =
            self.retry_after_s.or((self.code.status() == StatusCode::SERVICE_UNAVAILABLE).then_some(RETRY_AFTER_S));
        if let Some(seconds) = retry_after {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(self);
        response
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        Self::from_store(&error)
    }
}

impl Problem {
    /// What a failure of the database means for the caller.
    pub fn from_store(error: &StoreError) -> Self {
        match error {
            StoreError::Busy(_) => Self::new(Code::DatabaseBusy, "The database is busy with another request."),
            StoreError::Full(_) => {
                tracing::error!(error = %crate::telemetry::Chain(error), "the database has no space");
                Self::new(Code::InsufficientStorage, "The file system of the hub's state is full.")
            }
            _ => Self::internal(error),
        }
    }
}

/// Writes the body of every answer that is no success, whoever made it.
pub(super) async fn finish(request: Request, next: Next) -> Response {
    let instance = request.uri().path().to_owned();
    let request_id = request.extensions().get::<RequestId>().cloned();
    let mut response = next.run(request).await;
    let finished = response.extensions().get::<Finished>().is_some();
    if finished || !response.status().is_client_error() && !response.status().is_server_error() {
        return response;
    }
    let mut problem =
        response.extensions_mut().remove::<Problem>().unwrap_or_else(|| Problem::of_status(response.status()));
    if let Some(RequestId(id)) = request_id.filter(|_| problem.code == Code::Internal) {
        problem = problem.with("request_id", id);
    }
    let (mut parts, _) = response.into_parts();
    parts.status = problem.code.status();
    parts.headers.remove(CONTENT_LENGTH);
    parts.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    // A document of text, numbers and a map of text always serialises.
    let body = serde_json::to_vec(&problem.into_document(&instance)).unwrap_or_default();
    Response::from_parts(parts, body.into())
}
