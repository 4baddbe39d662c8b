//! `blockyard restore raw`: a disk as a file, or on an NBD server.

use std::path::PathBuf;
use std::time::Instant;

use blockyard_nbd::client::Uri;
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use serde_json::json;

use super::copy::{Copied, CopyError, copy};
use super::disk::{Disk, Target};
use super::error::RestoreCommandError;
use super::file::{Existing, RawFile, Unfinished};
use super::image::NewImage;
use super::remote::Remote;
use super::{Made, check_id};
use crate::cli::client::Client;
use crate::cli::image::work;
use crate::cli::serve::Stop;
use crate::cli::size::readable;
use crate::cli::{CliError, Exit, Output};

#[derive(Debug, Args)]
#[command(override_usage = "blockyard restore raw [OPTIONS] --disk <N> --output <TARGET> <POINT>")]
pub(in crate::cli) struct Raw {
    /// Id of the restore point.
    point: String,
    /// Number of the disk.
    #[arg(long, value_name = "N")]
    disk: u32,
    /// Format of the file.
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    format: Format,
    /// Replace a file that is there.
    #[arg(long)]
    force: bool,
    /// Restore from a point that is known to be damaged, as far as that is possible, and keep what was made.
    #[arg(long)]
    accept_damage: bool,
    /// Folder with the certificates for exports that encrypt (nbd.tls), as nbdcopy takes it.
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// The bytes of the disk, with holes where it has zeroes.
    Raw,
    /// One image without anything below it.
    Qcow2,
}

impl Format {
    fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Where the disk goes.
struct Destination {
    target: Box<dyn Target>,
    /// None for an NBD server.
    file: Option<Unfinished>,
}

/// What is told in the end.
struct Report {
    size_bytes: u64,
    copied: Copied,
    /// Whether the point has a digest, which was compared.
    compared_with_point: bool,
    /// Whether the service had something to say of the point.
    warned: bool,
}

/// What is to be done, and into what: a file to make, or the export of an NBD server.
struct Restore {
    raw: Raw,
    target: String,
}

pub(super) async fn run(raw: Raw, target: String, output: &Output) -> Result<Exit, CliError> {
    check_id(&raw.point)?;
    let is_remote = is_uri(&target);
    if is_remote && raw.format == Format::Qcow2 {
        return Err(RestoreCommandError::FormatOverNbd.into());
    }
    let existing = if raw.force { Existing::Replace } else { Existing::Refuse };
    // Before the service is troubled.
    let file = if is_remote { None } else { Some(Unfinished::begin(target.as_ref(), existing)?) };
    // Listened for before anything is made: what a signal interrupts is also cleared away.
    let mut stop = Stop::new()?;
    let client = Client::from_environment()?;
    let begun = Instant::now();
    let task = Restore { raw, target };
    let restored = Box::pin(restore(&task, file, &client, &mut stop, output)).await?;
    let Some(report) = restored else { return Ok(Exit::Interrupted) };
    let seconds = begun.elapsed().as_secs_f64();
    let Restore { raw, target } = &task;
    let document = json!({
        "point_id": raw.point, "disk_id": raw.disk, "target": target, "format": raw.format.as_str(),
        "bytes": report.size_bytes, "written_bytes": report.copied.written_bytes, "seconds": seconds,
        "digest": report.copied.digest.to_string(), "compared_with_point": report.compared_with_point,
    });
    output.done(&document, |_| {
        let against =
            if report.compared_with_point { "as it was backed up" } else { "the point has no digest to compare" };
        format!(
            "restored {target} ({}, {} written, content digest {}, {against})",
            readable(report.size_bytes),
            readable(report.copied.written_bytes),
            report.copied.digest,
        )
    })?;
    Ok(if report.warned { Exit::Warnings } else { Exit::Ok })
}

fn is_uri(target: &str) -> bool {
    ["nbd://", "nbds://", "nbd+unix://", "nbds+unix://"].iter().any(|scheme| target.starts_with(scheme))
}

/// From the export to the finished target; nothing if it was interrupted. Whatever happens, the export is ended, and a file that
/// is not finished removed.
async fn restore(
    task: &Restore,
    file: Option<Unfinished>,
    client: &Client,
    stop: &mut Stop,
    output: &Output,
) -> Result<Option<Report>, CliError> {
    let point = client.get(&format!("/points/{}", task.raw.point), &[]).await?;
    let disks = point["disks"].as_array().into_iter().flatten();
    let disk = disks.into_iter().find(|disk| disk["disk_id"] == task.raw.disk);
    let expected = disk.and_then(|disk| disk["content_digest"].as_str()).map(str::to_owned);
    let body = json!({"disk_id": task.raw.disk, "mode": "read-only", "accept_damage": task.raw.accept_damage});
    let made = Made::make(client, &task.raw.point, &body).await?;
    made.warnings().for_each(|warning| output.note(&format!("warning: {warning}")));
    let warned = made.warnings().next().is_some();
    let restoring = async {
        let source = connect(task, made.text("uri")).await?;
        let size_bytes = source.size();
        let Destination { target, file } = destination(task, file, size_bytes).await?;
        let bar = work::bar_on_terminal("restore", output);
        let copied = run_copy(&source, Some(&*target), size_bytes, bar.as_ref()).await;
        source.disconnect().await;
        Ok::<_, RestoreCommandError>((copied.map_err(failed)?, target, file, size_bytes))
    };
    let copied = tokio::select! {
        copied = restoring => Some(copied),
        () = stop.wait() => None,
    };
    // Before the copy is read back, which is none of the service's business any more.
    made.end(client).await;
    let Some(copied) = copied else { return Ok(None) };
    let (copied, target, file, size_bytes) = copied?;
    let differs = expected.as_ref().filter(|expected| **expected != copied.digest.to_string());
    let differs = differs.map(|expected| RestoreCommandError::NotThePoint {
        found: copied.digest.to_string(),
        expected: expected.clone(),
    });
    // Whoever takes a damaged disk as it is gets it, and is told what it is.
    if differs.is_none() || task.raw.accept_damage {
        tokio::select! {
            finished = finish(task, target, file, size_bytes, copied, output) => finished?,
            () = stop.wait() => return Ok(None),
        }
    }
    match differs {
        Some(error) => {
            if task.raw.accept_damage {
                output.note(&format!("{} was made and kept, as --accept-damage wants it", task.target));
            }
            Err(error.into())
        }
        None => Ok(Some(Report { size_bytes, copied, compared_with_point: expected.is_some(), warned })),
    }
}

async fn connect(task: &Restore, text: &str) -> Result<Remote, RestoreCommandError> {
    let mut uri: Uri = text.parse()?;
    if let (Some(tls), Some(folder)) = (&mut uri.tls, &task.raw.tls_certificates) {
        tls.certificates.get_or_insert_with(|| folder.clone());
    }
    Remote::connect(&uri, text).await
}

async fn destination(
    task: &Restore,
    file: Option<Unfinished>,
    size_bytes: u64,
) -> Result<Destination, RestoreCommandError> {
    let Some(file) = file else {
        let remote = connect(task, &task.target).await?;
        let uri = task.target.clone();
        if remote.is_read_only() {
            return Err(RestoreCommandError::TargetReadOnly { uri });
        }
        if remote.size() < size_bytes {
            return Err(RestoreCommandError::TargetTooSmall { uri, target_bytes: remote.size(), size_bytes });
        }
        return Ok(Destination { target: Box::new(remote), file: None });
    };
    let made: Result<Box<dyn Target>, _> = match task.raw.format {
        Format::Raw => RawFile::create(file.partial(), size_bytes)
            .map(|file| Box::new(file) as Box<dyn Target>)
            .map_err(super::disk::DiskError::new),
        Format::Qcow2 => {
            NewImage::create(file.partial(), size_bytes).await.map(|image| Box::new(image) as Box<dyn Target>)
        }
    };
    match made {
        Ok(target) => Ok(Destination { target, file: Some(file) }),
        Err(source) => Err(RestoreCommandError::Make { target: task.target.clone(), source }),
    }
}

/// Makes the target durable, reads it back from there, and gives a file its name.
async fn finish(
    task: &Restore,
    target: Box<dyn Target>,
    file: Option<Unfinished>,
    size_bytes: u64,
    copied: Copied,
    output: &Output,
) -> Result<(), RestoreCommandError> {
    let stored = target.finish().await;
    let stored = stored.map_err(|source| RestoreCommandError::Make { target: task.target.clone(), source })?;
    let bar = work::bar_on_terminal("read back", output);
    let found = run_copy(&*stored, None, size_bytes, bar.as_ref()).await.map_err(|error| match error {
        CopyError::Read(offset, source) | CopyError::Write(offset, source) => {
            RestoreCommandError::ReadBack { offset, source }
        }
    })?;
    if found.digest != copied.digest {
        let (found, expected) = (found.digest.to_string(), copied.digest.to_string());
        return Err(RestoreCommandError::NotTheCopy { found, expected });
    }
    drop((stored, target));
    file.map_or(Ok(()), Unfinished::finish)
}

async fn run_copy(
    source: &dyn Disk,
    target: Option<&dyn Target>,
    size_bytes: u64,
    bar: Option<&ProgressBar>,
) -> Result<Copied, CopyError> {
    let bar = bar.inspect(|bar| bar.set_length(size_bytes));
    copy(source, target, size_bytes, |bytes| {
        if let Some(bar) = bar {
            bar.set_position(bytes);
        }
    })
    .await
}

fn failed(error: CopyError) -> RestoreCommandError {
    match error {
        CopyError::Read(offset, source) => RestoreCommandError::Read { offset, source },
        CopyError::Write(offset, source) => RestoreCommandError::Write { offset, source },
    }
}
