//! `blockyard image create`: a new, empty image.

use std::path::PathBuf;

use blockyard_qcow2::{self as qcow2, Backing, CreateOptions, Error};
use clap::{Args, ValueEnum};
use serde_json::json;

use super::{Below, Format};
use crate::cli::image_error::ImageError;
use crate::cli::size::{Size, readable};
use crate::cli::{CliError, Exit, Output};

#[derive(Debug, Args)]
pub(in crate::cli) struct Create {
    /// The file to create.
    image: PathBuf,
    /// Virtual size, such as 40G: a multiple of 512 bytes. Left out for an overlay: the size of what lies below.
    #[arg(long, required_unless_present = "backing", allow_hyphen_values = true)]
    size: Option<Size>,
    /// Cluster size: a power of two from 512 to 2M.
    #[arg(long, default_value = "64K")]
    cluster_size: Size,
    /// Width of one refcount: 1, 2, 4, 8, 16, 32 or 64.
    #[arg(long, value_name = "N", default_value_t = 16)]
    refcount_bits: u32,
    /// How clusters are compressed, should any be.
    #[arg(long, value_enum, default_value_t = Compression::Zlib)]
    compression: Compression,
    /// Say that QEMU may postpone updates of the refcounts.
    #[arg(long)]
    lazy_refcounts: bool,
    /// What is made ready ahead of the first write.
    #[arg(long, value_enum, default_value_t = Preallocation::Off)]
    preallocation: Preallocation,
    /// Make an overlay over this file. The name is stored as it is, relative to the folder of the new image.
    #[arg(long, value_name = "NAME")]
    backing: Option<String>,
    /// Format of the backing file; it is never guessed.
    #[arg(long, value_enum, default_value_t = Format::Qcow2)]
    backing_format: Format,
    #[command(flatten)]
    below: Below,
}

/// Compression types by the names that QEMU has for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Compression {
    Zlib,
    Zstd,
}

/// What is made ready, by QEMU's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Preallocation {
    /// Nothing.
    Off,
    /// Every cluster has its place, which stays a hole.
    Metadata,
    /// As metadata, with the space reserved.
    Falloc,
    /// As metadata, with zeroes written.
    Full,
}

pub(super) fn run(create: &Create, output: &Output) -> Result<Exit, CliError> {
    let backing =
        create.backing.as_ref().map(|name| Backing { name: name.clone(), format: create.backing_format.into() });
    let (path, root) = create.below.paths(&create.image)?;
    let failed = |error| ImageError::of(&create.image, error);
    let below = backing.as_ref().map(|backing| qcow2::backing_size(backing, &path, root.as_deref()));
    let below = below.transpose().map_err(|error| match (&error, &create.backing) {
        (Error::Backing { .. }, _) | (_, None) => failed(error),
        (_, Some(name)) => ImageError::of(&create.image.with_file_name(name), error),
    })?;
    let options = CreateOptions {
        // More than 32 bits is more than any cluster size; the engine says which ones there are.
        cluster_size: u32::try_from(create.cluster_size.0).unwrap_or(u32::MAX),
        refcount_bits: create.refcount_bits,
        backing,
        compression: match create.compression {
            Compression::Zlib => qcow2::Compression::Deflate,
            Compression::Zstd => qcow2::Compression::Zstd,
        },
        lazy_refcounts: create.lazy_refcounts,
        preallocation: match create.preallocation {
            Preallocation::Off => qcow2::Preallocation::Off,
            Preallocation::Metadata => qcow2::Preallocation::Metadata,
            Preallocation::Falloc => qcow2::Preallocation::Falloc,
            Preallocation::Full => qcow2::Preallocation::Full,
        },
        ..CreateOptions::new(create.size.map(|size| size.0).or(below).unwrap_or(0))
    };
    qcow2::create(&path, &options).map_err(failed)?;
    let document = json!({
        "image": create.image, "size_bytes": options.size, "cluster_bytes": options.cluster_size,
        "backing": create.backing,
    });
    output.done(&document, |_| format!("created {} ({})", create.image.display(), readable(options.size)))?;
    Ok(Exit::Ok)
}
