//! Retention: the oldest point has to go, and the one that builds upon it is made anew without it.

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::DemoError;
use super::copy::Point;
use super::hub::Hub;
use super::replica::KEEP_LAST;
use super::stage::REPOSITORY_ID;
use crate::cli::Output;
use crate::cli::client::ClientError;

/// What became of the oldest point.
#[derive(Debug)]
pub(super) struct Merge {
    /// The point that had to go.
    pub(super) removed: String,
    /// The point that took up what it held.
    pub(super) into: String,
    /// Whether just that has happened, and only that.
    pub(super) happened: bool,
    /// What the repository says, for people.
    pub(super) detail: String,
    /// Bytes of images that went.
    pub(super) freed_bytes: u64,
    /// From the request to its answer.
    pub(super) time: Duration,
}

/// Applies the rules of the repository to points of which `oldest` is the first and `next` the one upon it.
///
/// # Errors
/// The hub refuses. Points that are still there are none.
pub(super) async fn run(hub: &Hub, oldest: &Point, next: &Point, output: &Output) -> Result<Merge, DemoError> {
    output.note(&format!("copy of the repository: retention keeps the last {KEEP_LAST}"));
    let begun = Instant::now();
    let path = format!("/repositories/{REPOSITORY_ID}/prune?dry_run=false");
    let pruned = hub.client().post(&path, &json!({})).await?;
    let time = begun.elapsed();
    let (removed, into) = (oldest.backup_id.clone(), next.backup_id.clone());
    let went: Vec<&Value> =
        pruned["points"].as_array().into_iter().flatten().filter(|point| point["decision"] != "keep").collect();
    let merged =
        pruned["failed"] == 0 && went.len() == 1 && went[0]["point_id"] == removed && went[0]["merged_into"] == into;
    // Not what was said, but what there is.
    let point = hub.client().get(&format!("/points/{into}"), &[]).await?;
    let gone = match hub.client().get(&format!("/points/{removed}"), &[]).await {
        Ok(_) => false,
        Err(ClientError::Refused { status: StatusCode::NOT_FOUND, .. }) => true,
        Err(error) => return Err(error.into()),
    };
    let happened = merged && gone && point["backup_type"] == "full";
    let (from, to) = (oldest.number, next.number);
    let detail = if happened {
        format!("point {from} was merged into point {to}, which is a full now")
    } else {
        format!("point {from} was NOT merged into point {to}: the answer was {}", pruned["points"])
    };
    let freed_bytes = pruned["frees_bytes"].as_u64().unwrap_or(0);
    output.note(&detail);
    Ok(Merge { removed, into, happened, detail, freed_bytes, time })
}
