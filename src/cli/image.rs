//! `blockyard image`: qcow2 images without a service, in the spirit of `qemu-img`.

use std::path::PathBuf;

use blockyard_qcow2::{self as qcow2, Backing, BackingFormat, CreateOptions};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::size::{Size, readable};
use super::{CliError, Exit, Output};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Create an empty image. An existing file is never overwritten.
    Create(Create),
    /// Show what an image says about itself, also one that is in use.
    Info(Info),
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// The file to create.
    image: PathBuf,
    /// Virtual size, such as 40G: a multiple of 512 bytes. Left out for an overlay: the size of what lies below.
    #[arg(long, required_unless_present = "backing")]
    size: Option<Size>,
    /// Cluster size: a power of two from 512 to 2M.
    #[arg(long, default_value = "64K")]
    cluster_size: Size,
    /// Make an overlay over this file. The name is stored as it is, relative to the folder of the new image.
    #[arg(long, value_name = "NAME")]
    backing: Option<String>,
    /// Format of the backing file; it is never guessed.
    #[arg(long, value_enum, default_value_t = Below::Qcow2)]
    backing_format: Below,
}

/// Formats that may lie below an overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Below {
    Qcow2,
    Raw,
}

#[derive(Debug, Args)]
pub(super) struct Info {
    /// The image.
    image: PathBuf,
}

pub(super) async fn run(command: Command, output: &Output) -> Result<Exit, CliError> {
    // Short work on local files: nothing else runs beside it in this process.
    match command {
        Command::Create(create) => run_create(&create, output),
        Command::Info(info) => run_info(&info, output),
    }
}

fn run_create(create: &Create, output: &Output) -> Result<Exit, CliError> {
    let backing = create.backing.as_ref().map(|name| {
        let format = match create.backing_format {
            Below::Qcow2 => BackingFormat::Qcow2,
            Below::Raw => BackingFormat::Raw,
        };
        Backing { name: name.clone(), format }
    });
    let below = backing.as_ref().map(|backing| qcow2::backing_size(backing, &create.image)).transpose()?;
    let options = CreateOptions {
        // More than 32 bits is more than any cluster size; the engine says which ones there are.
        cluster_size: u32::try_from(create.cluster_size.0).unwrap_or(u32::MAX),
        backing,
        ..CreateOptions::new(create.size.map(|size| size.0).or(below).unwrap_or(0))
    };
    qcow2::create(&create.image, &options)?;
    let document = json!({
        "image": create.image, "size_bytes": options.size, "cluster_bytes": options.cluster_size,
        "backing": create.backing,
    });
    output.done(&document, |_| format!("created {} ({})", create.image.display(), readable(options.size)))?;
    Ok(Exit::Ok)
}

fn run_info(info: &Info, output: &Output) -> Result<Exit, CliError> {
    let facts = qcow2::info(&info.image)?;
    let format = |format| match format {
        BackingFormat::Qcow2 => "qcow2",
        BackingFormat::Raw => "raw",
    };
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
        "backing_format": facts.backing.as_ref().map(|backing| format(backing.format)),
        "compression": if facts.zstd { "zstd" } else { "zlib" },
        "lazy_refcounts": facts.lazy_refcounts,
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
        format!("refcounts:     {} bits", facts["refcount_bits"]),
    ];
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
