//! The backup: one request, and looking at it until it is over.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::DemoError;
use super::disks::DemoDisk;
use super::progress::Progress;
use super::stage::{REPOSITORY_ID, Stage, VM_NAME};
use crate::cli::CliError;
use crate::node::fake::{Event, FakeNode};

/// How often the backup is looked at: often enough for a bar to move, seldom enough to cost nothing.
const LOOK: Duration = Duration::from_millis(100);
/// The unit of `st_blocks`, whatever the file system's own is.
const BLOCK_BYTES: u64 = 512;

/// A restore point and how it came to be.
#[derive(Debug)]
pub(super) struct Copied {
    /// Its id.
    pub(super) backup_id: String,
    /// `success` or `warning`.
    pub(super) result: String,
    /// The folder of its images.
    pub(super) folder: PathBuf,
    /// From the request to the commit.
    pub(super) time: Duration,
    /// In the order of the VM.
    pub(super) disks: Vec<CopiedDisk>,
}

/// One disk of a restore point.
#[derive(Debug)]
pub(super) struct CopiedDisk {
    /// Its image.
    pub(super) image: PathBuf,
    /// Distinct bytes that the client wrote or zeroed, as the service measured them.
    pub(super) covered_bytes: u64,
    /// Bytes that the client wrote.
    pub(super) written_bytes: u64,
    /// What the image takes in its file system.
    pub(super) stored_bytes: u64,
    /// From the client's connection to its last byte.
    pub(super) time: Duration,
}

/// Backs the VM up.
///
/// # Errors
/// The service refused, the backup failed, or there is no restore point with all disks afterwards.
pub(super) async fn run(stage: &Stage, disks: &[DemoDisk], progress: &Progress) -> Result<Copied, CliError> {
    let client = stage.client();
    let body = json!({"vm_name": VM_NAME, "repository_id": REPOSITORY_ID, "backup_type": "full"});
    let begun = Instant::now();
    let started = client.post("/backups/vm", &body).await.map_err(DemoError::Api)?;
    let backup_id = text(&started, "backup_id")?;
    let mut timing = pin!(time_disks(stage.node(), disks.len()));
    let mut following = pin!(follow(stage, backup_id.clone(), progress));
    let (backup, times) = tokio::select! {
        times = &mut timing => (following.await?, times),
        // A committed backup means that the client has sent everything and noted it.
        backup = &mut following => (backup?, timing.await),
    };
    let time = begun.elapsed();
    let point = client.get(&format!("/points/{backup_id}"), &[]).await.map_err(DemoError::Api)?;
    let folder = PathBuf::from(text(&point, "path")?);
    let copied = (0..disks.len()).zip(times).map(|(index, time)| disk(index, time, &backup, &point, &folder));
    let disks = copied.collect::<Result<_, _>>()?;
    Ok(Copied { result: text(&backup, "result")?, backup_id, folder, time, disks })
}

/// Looks at the backup until it is over, and returns it when it is committed.
async fn follow(stage: &Stage, backup_id: String, progress: &Progress) -> Result<Value, DemoError> {
    loop {
        let backup = stage.client().get(&format!("/backups/{backup_id}"), &[]).await?;
        for (index, disk) in backup["disks"].as_array().into_iter().flatten().enumerate() {
            progress.set(index, disk["covered_bytes"].as_u64().unwrap_or(0));
        }
        let said = |field: &str| backup[field].as_str().unwrap_or("-").to_owned();
        match backup["state"].as_str() {
            Some("committed") => return Ok(backup),
            Some("failed" | "cancelled") => {
                let (state, code) = (said("state"), said("code"));
                let message = match client_error(stage.node()) {
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
fn client_error(node: &FakeNode) -> Option<String> {
    node.log().events().into_iter().find_map(|event| match event {
        Event::Ended { error, .. } => error,
        _ => None,
    })
}

/// How long the client took for each disk. It copies one after the other, in the order of the VM.
async fn time_disks(node: &FakeNode, count: usize) -> Vec<Duration> {
    let mut times = Vec::with_capacity(count);
    for index in 0..count {
        let this = |id: u32| (usize::try_from(id) == Ok(index)).then_some(());
        node.log().first(|event| if let Event::Connected { disk_id } = event { this(*disk_id) } else { None }).await;
        let begun = Instant::now();
        node.log().first(|event| if let Event::Copied { disk_id, .. } = event { this(*disk_id) } else { None }).await;
        times.push(begun.elapsed());
    }
    times
}

fn disk(index: usize, time: Duration, backup: &Value, point: &Value, folder: &Path) -> Result<CopiedDisk, DemoError> {
    let image = folder.join(text(&point["disks"][index], "file")?);
    let found =
        std::fs::metadata(&image).map_err(|source| DemoError::Serve { disk_id: index, source: Box::new(source) })?;
    let number = |field| backup["disks"][index][field].as_u64().ok_or(DemoError::Answer { what: field });
    Ok(CopiedDisk {
        image,
        covered_bytes: number("covered_bytes")?,
        written_bytes: number("written_bytes")?,
        stored_bytes: found.blocks() * BLOCK_BYTES,
        time,
    })
}

fn text(document: &Value, field: &'static str) -> Result<String, DemoError> {
    document[field].as_str().map(str::to_owned).ok_or(DemoError::Answer { what: field })
}
