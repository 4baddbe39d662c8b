//! `blockyard image flatten`: a chain as one new file.

use std::path::PathBuf;

use blockyard_qcow2::{self as qcow2, CreateOptions, Error, Target};
use clap::Args;
use serde_json::json;

use super::{Below, Format, disk, work};
use crate::cli::image_error::ImageError;
use crate::cli::size::{Size, readable};
use crate::cli::{CliError, Exit, Output};

#[derive(Debug, Args)]
pub(in crate::cli) struct Flatten {
    /// The image on top of the chain.
    image: PathBuf,
    /// The file to make.
    target: PathBuf,
    /// Format of the new file.
    #[arg(long, value_enum, default_value_t = Format::Qcow2)]
    format: Format,
    /// Cluster size of the new image: a power of two from 512 to 2M, 64K when left out.
    #[arg(long)]
    cluster_size: Option<Size>,
    #[command(flatten)]
    below: Below,
}

impl Flatten {
    fn form(&self) -> Result<Target, Error> {
        match (self.format, self.cluster_size) {
            (Format::Raw, Some(_)) => {
                Err(Error::InvalidOption { option: "cluster size", reason: "a raw file has no clusters".into() })
            }
            (Format::Raw, None) => Ok(Target::Raw),
            (Format::Qcow2, size) => {
                let standard = CreateOptions::new(0);
                // More than 32 bits is more than any cluster size; the engine says which ones there are.
                let given = size.map(|size| u32::try_from(size.0).unwrap_or(u32::MAX));
                Ok(Target::Qcow2(CreateOptions { cluster_size: given.unwrap_or(standard.cluster_size), ..standard }))
            }
        }
    }
}

pub(super) async fn run(flatten: Flatten, output: &Output) -> Result<Exit, CliError> {
    let (form, notes) = (flatten.form().map_err(ImageError::from)?, *output);
    let (image, target, format) = (flatten.image.clone(), flatten.target.clone(), flatten.format);
    let done = work::run("flatten", output, move |watch| {
        let disk = disk(&flatten.below, &flatten.image, Format::Qcow2, &notes)?;
        let done = qcow2::flatten(&disk, &flatten.target, &form, watch);
        Ok(done.map_err(|error| ImageError::of_flatten(&flatten.image, &flatten.target, error))?)
    })
    .await??;
    let document = json!({
        "image": image, "target": target, "format": format.as_str(), "size_bytes": done.size,
        "written_bytes": done.written,
    });
    output.done(&document, |_| {
        format!("made {} ({}, {} written)", target.display(), readable(done.size), readable(done.written))
    })?;
    Ok(Exit::Ok)
}
