//! `x-request-id`: taken from the caller or made here, sent back, and in every log line of the request.

use std::time::Instant;

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

/// Name of the header, in both directions.
pub const HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// Longest id taken from a caller. A guess: a UUID has 36 characters, a trace context 55.
const MAX_LENGTH: usize = 128;

/// Id of the request that is being served.
#[derive(Clone, Debug)]
pub struct RequestId(pub String);

impl RequestId {
    /// The caller's id when it is short and harmless in a log line, else a new one.
    fn of(request: &Request) -> Self {
        let harmless = |id: &&str| !id.is_empty() && id.len() <= MAX_LENGTH && id.bytes().all(|b| b.is_ascii_graphic());
        let given = request.headers().get(HEADER).and_then(|value| value.to_str().ok()).filter(harmless);
        Self(given.map_or_else(|| crate::id::new_ulid().to_string(), str::to_owned))
    }
}

/// Gives the request its id and logs how it ended.
pub(super) async fn attach(mut request: Request, next: Next) -> Response {
    let id = RequestId::of(&request);
    let span = tracing::info_span!("request", request_id = %id.0);
    let started = Instant::now();
    // The path only: a query may hold names that are nobody's business.
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    request.extensions_mut().insert(id.clone());
    async move {
        let mut response = next.run(request).await;
        let status = response.status().as_u16();
        let milliseconds = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        // Probes come every few seconds for ever, and so do those of `blockyard restore export`.
        let is_probe = method == Method::GET && matches!(path.as_str(), "/health" | "/readyz" | "/api/v1/exports");
        if response.status().is_success() && is_probe {
            tracing::debug!(%method, path, status, milliseconds, "answered");
        } else {
            tracing::info!(%method, path, status, milliseconds, "answered");
        }
        if let Ok(value) = HeaderValue::from_str(&id.0) {
            response.headers_mut().insert(HEADER, value);
        }
        response
    }
    .instrument(span)
    .await
}
