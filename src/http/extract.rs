//! What handlers take from a request, with problem documents for everything that does not fit.

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use serde::de::DeserializeOwned;
use serde_path_to_error::{Path, Segment};

use super::problem::{Code, Problem};

/// The bytes of a JSON body: content type and length are checked, the content is not. For handlers that need the bytes
/// themselves; the others take [`JsonBody`].
#[derive(Debug)]
pub struct JsonBytes(pub Bytes);

/// A JSON body as a `T`. Syntax errors are `invalid_json`, everything else `invalid_field` with a pointer.
#[derive(Debug)]
pub struct JsonBody<T>(pub T);

/// The query of the URL as a `T`; an unknown or malformed parameter is `invalid_field`.
#[derive(Debug)]
pub struct QueryParams<T>(pub T);

impl<S: Send + Sync> FromRequest<S> for JsonBytes {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        if !is_json(request.headers()) {
            // A browser sends other types across origins without asking; JSON it does not.
            return Err(Problem::new(Code::UnsupportedMediaType, "Send the body with Content-Type: application/json."));
        }
        match Bytes::from_request(request, state).await {
            Ok(bytes) => Ok(Self(bytes)),
            Err(rejection) if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => {
                Err(Problem::new(Code::BodyTooLarge, "The body is larger than server.body_limit_bytes."))
            }
            Err(_) => Err(Problem::new(Code::InvalidJson, "The body broke off.")),
        }
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let JsonBytes(bytes) = JsonBytes::from_request(request, state).await?;
        parse_json(&bytes).map(Self)
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for QueryParams<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(Problem::new(Code::InvalidField, rejection.body_text())),
        }
    }
}

/// `application/json` or `application/<x>+json`, whatever its parameters.
fn is_json(headers: &HeaderMap) -> bool {
    let essence =
        headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).and_then(|text| text.split(';').next());
    essence
        .map(|text| text.trim().to_ascii_lowercase())
        .is_some_and(|text| text == "application/json" || (text.starts_with("application/") && text.ends_with("+json")))
}

/// Parses a JSON body, with the problems of [`JsonBody`].
pub fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let pointer = pointer(error.path());
        describe(error.inner(), pointer)
    })?;
    deserializer.end().map_err(|error| describe(&error, String::new()))?;
    Ok(value)
}

fn describe(error: &serde_json::Error, mut pointer: String) -> Problem {
    if !error.is_data() {
        return Problem::new(Code::InvalidJson, error.to_string());
    }
    // serde names a missing field in its text only; the path ends at the object that lacks it.
    let text = error.to_string();
    if let Some(field) = text.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()) {
        pointer.push('/');
        pointer.push_str(&escape(field));
    }
    Problem::new(Code::InvalidField, text.clone()).with_error(pointer, text)
}

/// A path as a JSON pointer (RFC 6901).
fn pointer(path: &Path) -> String {
    let mut pointer = String::new();
    for segment in path {
        pointer.push('/');
        match segment {
            Segment::Seq { index } => pointer.push_str(&index.to_string()),
            Segment::Map { key } => pointer.push_str(&escape(key)),
            Segment::Enum { variant } => pointer.push_str(&escape(variant)),
            // What cannot be named ends the pointer at its parent.
            Segment::Unknown => {
                pointer.pop();
            }
        }
    }
    pointer
}

/// `~` and `/` inside one step of a JSON pointer.
fn escape(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[allow(dead_code, reason = "only its presence matters")]
        name: String,
        #[serde(default)]
        #[allow(dead_code, reason = "only its type matters")]
        tags: BTreeMap<String, String>,
        #[serde(default)]
        #[allow(dead_code, reason = "only its type matters")]
        sizes: Vec<u64>,
    }

    fn fault(body: &str) -> (Code, String) {
        let problem = parse_json::<Sample>(body.as_bytes()).unwrap_err();
        let code = problem.code();
        let document = serde_json::to_value(problem.into_document("/")).unwrap();
        (code, document["errors"][0]["pointer"].as_str().unwrap_or("none").to_owned())
    }

    #[test]
    fn pointers_lead_to_the_field_at_fault() {
        assert_eq!(fault(r#"{"name":"x","tags":["a"]}"#), (Code::InvalidField, "/tags".into()));
        assert_eq!(fault(r#"{"name":"x","tags":{"a/b":1}}"#), (Code::InvalidField, "/tags/a~1b".into()));
        assert_eq!(fault(r#"{"name":"x","sizes":[1,-2]}"#), (Code::InvalidField, "/sizes/1".into()));
        assert_eq!(fault(r#"{"tags":{}}"#), (Code::InvalidField, "/name".into()));
        assert_eq!(fault(r#"{"name":"x","colour":1}"#), (Code::InvalidField, "/colour".into()));
        assert_eq!(fault("[]").0, Code::InvalidField);
    }

    #[test]
    fn what_is_no_json_is_told_apart() {
        for body in ["", "{", "{\"name\":\"x\"} trailing", "{'name':1}", "\u{0}"] {
            assert_eq!(fault(body).0, Code::InvalidJson, "{body}");
        }
    }
}
