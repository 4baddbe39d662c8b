//! Verification: every image of a chain is read and held against what it was when it was read first.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::DemoError;
use super::copy::Point;
use super::hub::{Hub, text};

/// Seconds that one request waits for the end.
const WAIT_S: &str = "30";

/// What was found.
#[derive(Debug)]
pub(super) struct Verification {
    /// A point with all that it builds upon, the lowest first.
    pub(super) points: Vec<VerifiedPoint>,
    /// Bytes that were read.
    pub(super) read_bytes: u64,
    /// From the request to the end.
    pub(super) time: Duration,
    /// Whether these are the points that were expected, and every one is what it was.
    pub(super) sound: bool,
}

/// One point.
#[derive(Debug)]
pub(super) struct VerifiedPoint {
    /// Its id.
    pub(super) backup_id: String,
    /// What is known of it now: `verified`, `suspect` or `corrupt`.
    pub(super) trust: String,
    /// Why, when it is not verified.
    pub(super) reason: Option<String>,
    /// Files that were found to be other than they were, by their names in the point's folder.
    pub(super) files: Vec<String>,
}

/// Verifies the last of these points and all that it builds upon, which are the others.
///
/// # Errors
/// The hub refuses. Damage is no error.
pub(super) async fn run(hub: &Hub, chain: &[Point]) -> Result<Verification, DemoError> {
    let newest = chain.last().ok_or(DemoError::Answer { what: "a point" })?;
    let begun = Instant::now();
    let path = format!("/points/{}", newest.backup_id);
    let started = hub.client().post(&format!("{path}/verify"), &json!({})).await?;
    let verification = loop {
        let mut point = hub.client().get(&path, &[("wait", WAIT_S)]).await?;
        let verification = point["verification"].take();
        if verification["id"] == started["id"] && verification["state"] == "ended" {
            break verification;
        }
    };
    let mut points = Vec::new();
    for point in verification["points"].as_array().into_iter().flatten() {
        points.push(verified_point(hub, point).await?);
    }
    let read_bytes = verification["bytes_read"].as_u64().unwrap_or(0);
    let sound = points.len() == chain.len()
        && points.iter().zip(chain).all(|(found, made)| found.backup_id == made.backup_id && found.trust == "verified");
    Ok(Verification { sound, points, read_bytes, time: begun.elapsed() })
}

async fn verified_point(hub: &Hub, found: &Value) -> Result<VerifiedPoint, DemoError> {
    let id = text(found, "point_id")?;
    let point = hub.client().get(&format!("/points/{id}"), &[]).await?;
    let findings = found["findings"].as_array().into_iter().flatten();
    Ok(VerifiedPoint {
        backup_id: id,
        trust: text(&point, "trust")?,
        reason: point["trust_reason"].as_str().map(str::to_owned),
        files: findings.filter_map(|finding| finding["file"].as_str().map(str::to_owned)).collect(),
    })
}
