//! `blockyard image grow`: a larger disk.

use std::path::PathBuf;

use blockyard_qcow2::{Access, Image};
use clap::Args;
use serde_json::json;

use super::Below;
use crate::cli::image_error::ImageError;
use crate::cli::size::{Size, readable};
use crate::cli::{CliError, Exit, Output};

#[derive(Debug, Args)]
pub(in crate::cli) struct Grow {
    /// The image, which nobody may be using.
    image: PathBuf,
    /// New virtual size, such as 80G: a multiple of 512 bytes, not below the present one. What is new reads as zeroes.
    #[arg(long, allow_hyphen_values = true)]
    size: Size,
    #[command(flatten)]
    below: Below,
}

pub(super) fn run(grow: &Grow, output: &Output) -> Result<Exit, CliError> {
    let (path, options) = grow.below.options(&grow.image, Access::ReadWrite)?;
    let failed = |error| ImageError::of(&grow.image, error);
    let image = Image::open(&path, &options).map_err(failed)?;
    let before = image.size();
    let grown = image.grow(grow.size.0);
    // Closed in any case: a refusal must not leave an image that has to be repaired.
    image.close().map_err(failed)?;
    grown.map_err(failed)?;
    let document = json!({"image": grow.image, "size_bytes": grow.size.0, "size_bytes_before": before});
    output.done(&document, |_| {
        format!("{} has {} now ({} before)", grow.image.display(), readable(grow.size.0), readable(before))
    })?;
    Ok(Exit::Ok)
}
