//! `blockyard image check` and `repair`: whether an image is whole, and making it so.

use std::path::{Path, PathBuf};

use blockyard_qcow2::{self as qcow2, CheckReport};
use clap::Args;
use serde_json::{Value, json};

use crate::cli::below::check_writable;
use crate::cli::image_error::ImageError;
use crate::cli::size::readable;
use crate::cli::{CliError, Exit, Output};

#[derive(Debug, Args)]
pub(in crate::cli) struct Check {
    /// The image, which nobody may be writing to. What lies below is not looked at.
    image: PathBuf,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Repair {
    /// The image, which nobody may be using.
    image: PathBuf,
}

pub(super) fn run(check: &Check, output: &Output) -> Result<Exit, CliError> {
    let report = qcow2::check(&check.image).map_err(|error| ImageError::of(&check.image, error))?;
    output.answer(&document(&check.image, &report), |_| describe(&check.image, &report))?;
    Ok(exit(&report))
}

pub(super) fn run_repair(repair: &Repair, output: &Output) -> Result<Exit, CliError> {
    let image = &repair.image;
    check_writable(image)?;
    let failed = |error| ImageError::of(image, error);
    let before = qcow2::repair(image).map_err(failed)?;
    let after = qcow2::check(image).map_err(failed)?;
    let document = json!({
        "image": image, "repaired": !before.is_clean(), "before": document(image, &before),
        "after": document(image, &after),
    });
    output.done(&document, |_| {
        if before.is_clean() {
            return format!("{} is clean; nothing was changed", image.display());
        }
        // Refcounts are written at the close: before it, how many are wrong tells nothing.
        let mut found = if before.dirty {
            "it was not closed: refcounts made anew".to_owned()
        } else {
            format!("found {} errors, {} leaks", before.errors, before.leaks)
        };
        if before.corrupt {
            found.push_str(if after.corrupt {
                "; it is marked as corrupt"
            } else {
                "; the mark as corrupt was taken away"
            });
        }
        let now = if after.is_clean() { "is clean now" } else { "is still not clean" };
        format!("{found}\n{} {now}", image.display())
    })?;
    Ok(exit(&after))
}

/// As `qemu-img check` exits; what was not closed wants the same repair as leaks do, and what is marked as corrupt is
/// refused for writing as damage is.
fn exit(report: &CheckReport) -> Exit {
    match report {
        CheckReport { errors: 1.., .. } | CheckReport { corrupt: true, .. } => Exit::Usage,
        report if report.is_clean() => Exit::Ok,
        _ => Exit::Warnings,
    }
}

fn document(image: &Path, report: &CheckReport) -> Value {
    json!({
        "image": image,
        "format": "qcow2",
        "clean": report.is_clean(),
        "dirty": report.dirty,
        "corrupt": report.corrupt,
        "errors": report.errors,
        "leaks": report.leaks,
        "total_clusters": report.total_clusters,
        "allocated_clusters": report.allocated_clusters,
        "compressed_clusters": report.compressed_clusters,
        "fragmented_clusters": report.fragmented_clusters,
        "image_end_bytes": report.image_end,
        "details": report.details,
    })
}

fn describe(image: &Path, report: &CheckReport) -> String {
    let mut lines = vec![format!("image:         {}", image.display())];
    if report.dirty {
        lines.push("refcounts:     mean nothing until the image is repaired or closed".into());
    } else {
        lines.push(format!("errors:        {}", report.errors));
        lines.push(format!("leaks:         {} clusters", report.leaks));
    }
    lines.extend([
        format!("allocated:     {} of {} clusters", report.allocated_clusters, report.total_clusters),
        format!("compressed:    {} clusters", report.compressed_clusters),
        format!("fragmented:    {} clusters", report.fragmented_clusters),
        format!("end of image:  {} ({} bytes)", readable(report.image_end), report.image_end),
    ]);
    lines.extend(report.details.iter().map(|detail| format!("error:         {detail}")));
    lines.push(match report {
        report if report.is_clean() => "state:         clean".into(),
        CheckReport { dirty: true, .. } => {
            "state:         dirty: it was not closed; what was flushed is intact, and blockyard image repair, or the next \
             use that writes, sets the refcounts right"
                .into()
        }
        CheckReport { errors: 0, leaks: 0, .. } => "state:         nothing is wrong in its tables".into(),
        CheckReport { errors: 0, .. } => "state:         leaks cost space only; blockyard image repair gives it back".into(),
        _ => "state:         damaged; blockyard image repair sets right what can be known for certain".into(),
    });
    if report.corrupt {
        lines.push(
            "marked:        as corrupt; it is not written to until blockyard image repair takes the mark away".into(),
        );
    }
    lines.join("\n")
}
