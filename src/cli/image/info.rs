//! `blockyard image info`: the facts of the header.

use std::path::PathBuf;

use blockyard_qcow2 as qcow2;
use clap::Args;
use serde_json::{Value, json};

use super::Format;
use crate::cli::image_error::ImageError;
use crate::cli::size::readable;
use crate::cli::{CliError, Exit, Output};

#[derive(Debug, Args)]
pub(in crate::cli) struct Info {
    /// The image.
    image: PathBuf,
}

pub(super) fn run(info: &Info, output: &Output) -> Result<Exit, CliError> {
    let facts = qcow2::info(&info.image).map_err(|error| ImageError::of(&info.image, error))?;
    let document = json!({
        "image": info.image,
        "format": "qcow2",
        "version": facts.version,
        "size_bytes": facts.size,
        "cluster_bytes": facts.cluster_size,
        "refcount_bits": facts.refcount_bits,
        "file_bytes": facts.file_length,
        "disk_bytes": facts.disk_bytes,
        "backing": facts.backing.as_ref().map(|backing| &backing.name),
        "backing_format": facts.backing.as_ref().map(|backing| Format::from(backing.format).as_str()),
        "compression": if facts.zstd { "zstd" } else { "zlib" },
        "lazy_refcounts": facts.lazy_refcounts,
        "extended_l2": facts.extended_l2,
        "snapshots": facts.snapshots,
        "dirty": facts.dirty,
        "corrupt": facts.corrupt,
    });
    output.answer(&document, describe)?;
    Ok(Exit::Ok)
}

/// One fact a line, in the order in which people ask.
fn describe(facts: &Value) -> String {
    let bytes = |name: &str| {
        let bytes = facts[name].as_u64().unwrap_or(0);
        format!("{} ({bytes} bytes)", readable(bytes))
    };
    let mut lines = vec![
        format!("image:         {}", facts["image"].as_str().unwrap_or_default()),
        format!("format:        qcow2 version {}", facts["version"]),
        format!("virtual size:  {}", bytes("size_bytes")),
        format!("on disk:       {}", bytes("disk_bytes")),
        format!("cluster size:  {}", bytes("cluster_bytes")),
        format!(
            "refcounts:     {} bits{}",
            facts["refcount_bits"],
            if facts["lazy_refcounts"] == true { ", lazy" } else { "" }
        ),
    ];
    // What every other image has is not told.
    if facts["compression"] == "zstd" {
        lines.push("compression:   zstd".into());
    }
    if facts["extended_l2"] == true {
        lines.push("L2 entries:    extended (subclusters); the image is read only here".into());
    }
    if let (Some(name), Some(format)) = (facts["backing"].as_str(), facts["backing_format"].as_str()) {
        lines.push(format!("backing file:  {name} ({format})"));
    }
    if facts["snapshots"].as_u64().is_some_and(|snapshots| snapshots > 0) {
        lines.push(format!("snapshots:     {}", facts["snapshots"]));
    }
    if facts["dirty"] == true {
        lines.push("state:         dirty: in use, or not closed; what was flushed is intact".into());
    }
    if facts["corrupt"] == true {
        lines.push("state:         marked as corrupt".into());
    }
    lines.join("\n")
}
