//! `blockyard image compare`: whether two disks hold the same bytes.

use std::path::PathBuf;

use blockyard_qcow2::{self as qcow2, Comparison, Difference};
use clap::Args;
use serde_json::{Value, json};

use super::{Below, Format, disk, work};
use crate::cli::image_error::ImageError;
use crate::cli::size::readable;
use crate::cli::{CliError, Exit, Output};

#[derive(Debug, Args)]
pub(in crate::cli) struct Compare {
    /// The first disk.
    first: PathBuf,
    /// The second disk.
    second: PathBuf,
    /// Format of the first disk; it is never guessed.
    #[arg(long, value_enum, default_value_t = Format::Qcow2)]
    format: Format,
    /// Format of the second disk.
    #[arg(long, value_enum, default_value_t = Format::Qcow2)]
    other_format: Format,
    #[command(flatten)]
    below: Below,
}

pub(super) async fn run(compare: Compare, output: &Output) -> Result<Exit, CliError> {
    let names = (compare.first.clone(), compare.second.clone());
    let notes = *output;
    let compared = work::run("compare", output, move |watch| {
        let first = disk(&compare.below, &compare.first, compare.format, &notes)?;
        let second = disk(&compare.below, &compare.second, compare.other_format, &notes)?;
        let compared = qcow2::compare(&first, &second, watch);
        Ok(compared.map_err(|error| ImageError::of_either(&compare.first, &compare.second, error))?)
    })
    .await?;
    let Comparison { sizes, difference } = compared.map_err(|error| CliError::NotCompared(Box::new(error)))?;
    let document = json!({
        "first": names.0, "second": names.1, "equal": difference.is_none(),
        "first_size_bytes": sizes.0, "second_size_bytes": sizes.1,
        "difference": difference.map(|difference| json!({
            "offset": difference.offset, "first": difference.first, "second": difference.second,
        })),
    });
    let text = |_: &Value| match difference {
        None if sizes.0 == sizes.1 => format!("the disks are equal ({})", readable(sizes.0)),
        None => format!(
            "the disks are equal but for their sizes ({} and {} bytes): the longer one ends in zeroes",
            sizes.0, sizes.1
        ),
        Some(Difference { offset, first, second }) => {
            format!("the disks differ at byte {offset}: {} and {}", value(first), value(second))
        }
    };
    output.answer(&document, text)?;
    Ok(if difference.is_none() { Exit::Ok } else { Exit::Failed })
}

fn value(byte: Option<u8>) -> String {
    byte.map_or_else(|| "the end of the disk".to_owned(), |byte| format!("{byte:#04x}"))
}
