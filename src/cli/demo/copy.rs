//! A backup: one request, and looking at it until it is over.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::DemoError;
use super::content::Content;
use super::hub::{Image, text};
use super::progress::Progress;
use super::report;
use super::stage::{REPOSITORY_ID, Stage, VM_NAME};
use super::state::State;
use crate::cli::{CliError, Output};
use crate::node::fake::{Event, FakeNode};

/// How often the backup is looked at: often enough for a bar to move, seldom enough to cost nothing.
const LOOK: Duration = Duration::from_millis(100);

/// A restore point and how it came to be.
#[derive(Debug)]
pub(super) struct Point {
    /// 1 for the first.
    pub(super) number: usize,
    /// The disks as they were when it was made, in the order of the VM.
    pub(super) contents: Vec<Content>,
    /// Its id.
    pub(super) backup_id: String,
    /// `full` or `incremental`.
    pub(super) backup_type: String,
    /// `success` or `warning`.
    pub(super) result: String,
    /// From the request to the commit.
    pub(super) time: Duration,
    /// The disks as they were stored, in the same order.
    pub(super) disks: Vec<CopiedDisk>,
}

/// One disk of a restore point.
#[derive(Debug)]
pub(super) struct CopiedDisk {
    /// What it became by the bytes that came: `full`, `incremental` or `full_copy_into_overlay`.
    pub(super) effective_type: String,
    /// Distinct bytes that the client wrote or zeroed, as the service measured them.
    pub(super) covered_bytes: u64,
    /// Bytes that the client wrote.
    pub(super) written_bytes: u64,
    /// Its image.
    pub(super) image: Image,
}

impl Point {
    /// Bytes that were received for all disks, zeroes that were only named among them.
    pub(super) fn covered_bytes(&self) -> u64 {
        self.disks.iter().map(|disk| disk.covered_bytes).sum()
    }

    /// What the images of all disks take.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.disks.iter().map(|disk| disk.image.stored_bytes).sum()
    }
}

/// Makes a restore point of the VM in this state.
///
/// # Errors
/// A source cannot be read, the service refused, the backup failed, or there is no restore point with all disks afterwards.
pub(super) async fn run(stage: &Stage, state: &State, output: &Output) -> Result<Point, CliError> {
    let (number, requested) = (state.number(), if state.number() == 1 { "full" } else { "incremental" });
    stage.present(state);
    output.note(&format!("point {number}: hash of every disk"));
    let contents = state.contents().await?;
    output.note(&format!("point {number}: {requested} backup"));
    let progress = Progress::new("copy", &state.expected_bytes(), output);
    let client = stage.hub().client();
    let body = json!({"vm_name": VM_NAME, "repository_id": REPOSITORY_ID, "backup_type": requested});
    let begun = Instant::now();
    let started = client.post("/backups/vm", &body).await.map_err(DemoError::Api)?;
    let backup_id = text(&started, "backup_id")?;
    let backup = follow(stage, &backup_id, &progress).await?;
    let time = begun.elapsed();
    let images = stage.hub().images(&backup_id).await?;
    let disks = images.into_iter().enumerate().map(|(index, image)| disk(&backup["disks"][index], image));
    let point = Point {
        number,
        contents,
        disks: disks.collect::<Result<_, _>>()?,
        backup_type: text(&backup, "backup_type")?,
        result: text(&backup, "result")?,
        backup_id,
        time,
    };
    output.note(&report::backup(&point));
    Ok(point)
}

/// Looks at the backup until it is over, and returns it when it is committed.
async fn follow(stage: &Stage, backup_id: &str, progress: &Progress) -> Result<Value, DemoError> {
    loop {
        let backup = stage.hub().client().get(&format!("/backups/{backup_id}"), &[]).await?;
        for (index, disk) in backup["disks"].as_array().into_iter().flatten().enumerate() {
            progress.set(index, disk["covered_bytes"].as_u64().unwrap_or(0));
        }
        let said = |field: &str| backup[field].as_str().unwrap_or("-").to_owned();
        match backup["state"].as_str() {
            Some("committed") => return Ok(backup),
            Some("failed" | "cancelled") => {
                let (state, code) = (said("state"), said("code"));
                let message = match client_error(stage.node(), backup_id) {
                    Some(error) => format!("{}; the client said: {error}", said("error_message")),
                    None => said("error_message"),
                };
                return Err(DemoError::Backup { state, message, code });
            }
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Why the client gave up, if it did: the service sees only that it is gone.
fn client_error(node: &FakeNode, backup_id: &str) -> Option<String> {
    node.log().events().into_iter().find_map(|event| match event {
        Event::Ended { job_id, error } if job_id == backup_id => error,
        _ => None,
    })
}

fn disk(disk: &Value, image: Image) -> Result<CopiedDisk, DemoError> {
    let number = |field| disk[field].as_u64().ok_or(DemoError::Answer { what: field });
    Ok(CopiedDisk {
        effective_type: text(disk, "effective_type")?,
        covered_bytes: number("covered_bytes")?,
        written_bytes: number("written_bytes")?,
        image,
    })
}
