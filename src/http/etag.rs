//! Versions of a thing for `If-Match`: nobody overwrites what somebody else changed in between.

use axum::http::header::{ETAG, IF_MATCH};
use axum::http::{HeaderMap, HeaderName};

use super::problem::{Code, Problem};

/// The header that tells the version of an answer.
pub fn header(revision: i64) -> [(HeaderName, String); 1] {
    [(ETAG, format!("\"{revision}\""))]
}

/// Holds `If-Match` against the version that is there: absent is 428, another one is 412.
pub fn check(headers: &HeaderMap, revision: i64) -> Result<(), Problem> {
    let Some(wanted) = headers.get(IF_MATCH) else {
        return Err(Problem::new(
            Code::EtagRequired,
            "Send the ETag of the version that is to be replaced as If-Match; GET answers with it.",
        ));
    };
    let current = format!("\"{revision}\"");
    let matches =
        wanted.to_str().is_ok_and(|tags| tags.split(',').map(str::trim).any(|tag| tag == "*" || tag == current));
    if matches {
        return Ok(());
    }
    Err(Problem::new(Code::EtagMismatch, format!("The current version is {current}.")).with("etag", current))
}
