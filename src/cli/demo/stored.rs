//! An image of a restore point as a read-only export.

use std::path::Path;
use std::sync::Arc;

use blockyard_qcow2::{Access, AsyncImage, Error, OpenOptions};

use crate::export::ImageExport;
use crate::export::signals::Signals;

/// Opens an image for reading and gives it a name.
pub(super) async fn open(image: &Path, name: &str) -> Result<ImageExport, Error> {
    // What lies below is in the folders beside that of the point.
    let backing_root = image.parent().and_then(Path::parent).map(Path::to_owned);
    let options = OpenOptions { backing_root, ..OpenOptions::new(Access::ReadOnly) };
    let opened = AsyncImage::open(image.to_owned(), options).await?;
    Ok(ImageExport::new(name, opened, Access::ReadOnly, Arc::new(Signals::default())))
}
