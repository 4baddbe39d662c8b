//! A disk of a restore point as bytes: the whole of it, or one range.

use std::ops::Range;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_RANGE, RANGE,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::exports::{damage, point_id};
use super::extract::QueryParams;
use super::problem::{Code, Problem};
use crate::app::AppState;

/// What should be known of the point, as its export would say it.
const WARNING: HeaderName = HeaderName::from_static("x-blockyard-warning");

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(download_disk))
}

#[derive(Deserialize, IntoParams, ToSchema)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct RawQuery {
    /// Reads a point that is known to be damaged, as far as that is possible.
    #[serde(default)]
    accept_damage: bool,
}

/// The bytes of a disk as they were. A disk that cannot be read to its end breaks the connection before `Content-Length`.
#[utoipa::path(get, path = "/points/{id}/disks/{disk_id}/raw", tag = "restore",
    params(("id" = String, Path), ("disk_id" = u32, Path), RawQuery),
    responses(
        (status = 200, content_type = "application/octet-stream", description = "The whole disk"),
        (status = 206, content_type = "application/octet-stream", description = "The range that was asked for"),
    ))]
async fn download_disk(
    State(app): State<AppState>,
    Path((id, disk_id)): Path<(String, String)>,
    QueryParams(query): QueryParams<RawQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let point = point_id(&id)?;
    let no_disk = |_| Problem::new(Code::DiskNotInBackup, format!("The restore point {id} has no disk {disk_id}."));
    let number = disk_id.parse().map_err(no_disk)?;
    let disk = app.restores.raw(point, number, damage(query.accept_damage)).await?;
    let size = disk.size();
    let etag = disk.content_digest().and_then(|digest| HeaderValue::try_from(format!("\"{digest}\"")).ok());
    let wanted = headers.get(RANGE).filter(|_| is_unchanged(&headers, etag.as_ref()));
    let wanted = wanted.and_then(|value| value.to_str().ok()).and_then(|text| parse(text, size));
    let (status, range) = match wanted {
        None => (StatusCode::OK, 0..size),
        Some(Some(range)) => (StatusCode::PARTIAL_CONTENT, range),
        Some(None) => return Ok(unsatisfiable(size)),
    };
    let mut answer = HeaderMap::new();
    answer.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    answer.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    answer.insert(CONTENT_LENGTH, HeaderValue::from(range.end - range.start));
    let texts = [
        (CONTENT_DISPOSITION, Some(format!("attachment; filename=\"{}.raw\"", disk.name()))),
        (WARNING, disk.warnings().first().cloned()),
        (
            CONTENT_RANGE,
            (status == StatusCode::PARTIAL_CONTENT).then(|| format!("bytes {}-{}/{size}", range.start, range.end - 1)),
        ),
    ];
    // A text that no header can hold is a warning with characters of some other language in it; it is in the log as well.
    let texts = texts.into_iter().filter_map(|(name, text)| Some((name, HeaderValue::try_from(text?).ok()?)));
    answer.extend(texts.map(|(name, value)| (Some(name), value)));
    if let Some(etag) = etag {
        answer.insert(ETAG, etag);
    }
    Ok((status, answer, Body::from_stream(disk.stream(range))).into_response())
}

/// Whether a range may be served: `If-Range` names the content that the caller has the beginning of.
fn is_unchanged(headers: &HeaderMap, etag: Option<&HeaderValue>) -> bool {
    headers.get(IF_RANGE).is_none_or(|known| Some(known) == etag)
}

/// One range of bytes (RFC 9110, 14.1.2): nothing where the whole is to be served, because there is none, there are several, or
/// nobody could read it; `Some(None)` where it lies outside.
fn parse(text: &str, size: u64) -> Option<Option<Range<u64>>> {
    let (first, last) = text.strip_prefix("bytes=")?.trim().split_once('-')?;
    let number =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    if first.is_empty() {
        let length = number(last)?.min(size);
        return Some((length > 0).then(|| size - length..size));
    }
    let first = number(first)?;
    let last = if last.is_empty() { u64::MAX } else { number(last)? };
    if last < first {
        return None;
    }
    Some((first < size).then(|| first..last.saturating_add(1).min(size)))
}

fn unsatisfiable(size: u64) -> Response {
    let mut response = Problem::new(Code::RangeNotSatisfiable, format!("The disk has {size} bytes.")).into_response();
    if let Ok(value) = HeaderValue::try_from(format!("bytes */{size}")) {
        response.headers_mut().insert(CONTENT_RANGE, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_one_range_of_bytes_or_none() {
        assert_eq!(parse("bytes=0-0", 512), Some(Some(0..1)));
        assert_eq!(parse("bytes=500-", 512), Some(Some(500..512)));
        assert_eq!(parse("bytes=500-9999", 512), Some(Some(500..512)));
        assert_eq!(parse("bytes=-12", 512), Some(Some(500..512)));
        assert_eq!(parse("bytes=-9999", 512), Some(Some(0..512)));
        assert_eq!(parse("bytes=512-", 512), Some(None));
        assert_eq!(parse("bytes=-0", 512), Some(None));
        for whole in ["bytes=", "bytes=5-4", "bytes=0-1,3-4", "lines=0-1", "bytes=a-b", "bytes=-", "bytes=+1-2"] {
            assert_eq!(parse(whole, 512), None, "{whole}");
        }
        assert_eq!(parse(&format!("bytes=0-{}", u64::MAX), 512), Some(Some(0..512)));
    }
}
