//! An image of a restore point as a read-only export.

use std::path::Path;
use std::sync::Arc;

use blockyard_qcow2::{Access, AsyncImage, Error, OpenOptions};

use crate::export::ImageExport;
use crate::export::signals::Signals;

/// Opens an image for reading and gives it a name.
pub(super) async fn open(image: &Path, name: &str) -> Result<ImageExport, Error> {
    let opened = AsyncImage::open(image.to_owned(), OpenOptions::new(Access::ReadOnly)).await?;
    Ok(ImageExport::new(name, opened, Access::ReadOnly, Arc::new(Signals::default())))
}
