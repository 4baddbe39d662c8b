//! `blockyard doctor`: what a folder has for images, how they will be written there, and why; without configuration or service.
//!
//! [`mount`] is what lies below the folder, [`probe`] what it can do, [`measure`] how fast images are written there, and
//! [`report`] what is printed.

mod error;
mod measure;
mod mount;
mod probe;
mod report;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;

use super::serve::Stop;
use super::size::{Size, SizeError};
use super::{CliError, Exit, Output};
pub(super) use error::DoctorError;
use report::Report;

const MIB: u64 = 1 << 20;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The folder where images will lie.
    #[arg(long, value_name = "DIR")]
    disk: PathBuf,
    /// Most space that is taken to find out how fast images are written: whole MiB, at least 1M. It is never more than a quarter
    /// of the free space, nor does it take much longer than ten seconds.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = measured)]
    size: Size,
}

fn measured(text: &str) -> Result<Size, String> {
    let Size(bytes) = text.parse().map_err(|error: SizeError| error.to_string())?;
    if bytes >= MIB && bytes.is_multiple_of(MIB) {
        Ok(Size(bytes))
    } else {
        Err("must be whole MiB, such as 64M".into())
    }
}

pub(super) async fn run(arguments: Arguments, output: &Output) -> Result<Exit, CliError> {
    // Listened for before anything is made: what a signal interrupts is also cleared away.
    let mut stop = Stop::new()?;
    let is_over = Arc::new(AtomicBool::new(false));
    output.note(&format!("examining {}", arguments.disk.display()));
    let asked = Arc::clone(&is_over);
    let mut task = tokio::task::spawn_blocking(move || examine(&arguments.disk, arguments.size.0, &asked));
    let report = loop {
        tokio::select! {
            done = &mut task => break done.unwrap_or(Err(DoctorError::Panicked))?,
            () = stop.wait() => is_over.store(true, Ordering::Relaxed),
        }
    };
    output.answer(&report.document(), |_| report.text())?;
    Ok(Exit::Ok)
}

fn examine(folder: &Path, bytes: u64, is_over: &AtomicBool) -> Result<Report, DoctorError> {
    let mount = mount::below(folder)?;
    let support = probe::probe(folder)?;
    let speed = measure::measure(folder, bytes.min(mount.free_bytes / 4), is_over)?;
    Ok(Report { folder: folder.to_owned(), mount, support, speed })
}
