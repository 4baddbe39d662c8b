//! `blockyard image map`: which layer holds each part of the disk.

use std::path::PathBuf;

use blockyard_qcow2::{Access, Extent, ExtentKind, Image};
use clap::Args;
use serde_json::{Value, json};

use super::{Below, NOT_CLOSED};
use crate::cli::image_error::ImageError;
use crate::cli::table;
use crate::cli::{CliError, Exit, Output};

#[derive(Debug, Args)]
pub(in crate::cli) struct Map {
    /// The image.
    image: PathBuf,
    #[command(flatten)]
    below: Below,
}

pub(super) fn run(map: &Map, output: &Output) -> Result<Exit, CliError> {
    let (path, options) = map.below.options(&map.image, Access::ReadOnly)?;
    let failed = |error| ImageError::of(&map.image, error);
    let image = Image::open(&path, &options).map_err(failed)?;
    if image.is_dirty() {
        output.note(NOT_CLOSED);
    }
    let files = image.chain();
    let extents = image.map_all().map_err(failed)?;
    let rows: Vec<Value> = extents.iter().map(|extent| row(extent, &files)).collect();
    output.answer(&Value::Array(rows), describe)?;
    Ok(Exit::Ok)
}

/// The fields of `qemu-img map`, whose depth counts from 0 for this image, and two of ours.
fn row(extent: &Extent, files: &[PathBuf]) -> Value {
    let depth = extent.depth.checked_sub(1);
    let kind = match extent.kind {
        ExtentKind::Data => "data",
        ExtentKind::ZeroAllocated => "zero-allocated",
        ExtentKind::Zero => "zero",
    };
    json!({
        "start": extent.offset,
        "length": extent.length,
        "depth": depth,
        "present": depth.is_some(),
        "zero": extent.kind != ExtentKind::Data,
        "data": extent.kind == ExtentKind::Data,
        "kind": kind,
        "file": depth.and_then(|depth| files.get(depth as usize)),
    })
}

fn describe(document: &Value) -> String {
    let text = |value: &Value| match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        value => value.to_string(),
    };
    let fields = ["start", "length", "kind", "depth", "file"];
    let rows: Vec<Vec<String>> = document
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default()
        .iter()
        .map(|row| fields.iter().map(|field| text(&row[field])).collect())
        .collect();
    table::render(&["offset", "length", "kind", "depth", "file"], &rows)
}
