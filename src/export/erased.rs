//! Whether a disk lost data: where it has zeroes and an older state of it has data, that data is read until some is found that is
//! none.
//!
//! Tables do not tell: a cluster that holds data has zeroes beside it, and whole clusters of zeroes may have come as data.

use blockyard_qcow2::{self as qcow2, AsyncImage, ExtentKind};

/// Extents of one look at the tables.
const EXTENTS_AT_ONCE: usize = 512;
/// Bytes read in one go.
const PIECE: u64 = 1 << 20;

/// What is known of the data that went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Erased {
    /// There was none: what is zero now was zero before.
    Nothing,
    /// The byte at this offset was not zero before.
    Something(u64),
    /// There is more to read than was allowed.
    Unknown,
}

/// Looks for something in `known` that is zero in `image`, and reads at most so many bytes for it.
///
/// # Errors
/// One of the images cannot be read.
pub async fn erased(image: &AsyncImage, known: &AsyncImage, bytes_max: u64) -> Result<Erased, qcow2::Error> {
    let end = image.size().min(known.size());
    let (mut position, mut left) = (0, bytes_max);
    while position < end {
        for extent in image.map(position, end - position, EXTENTS_AT_ONCE).await? {
            let next = (position + extent.length).min(end);
            if extent.kind != ExtentKind::Data {
                match read(known, position, next, &mut left).await? {
                    Erased::Nothing => {}
                    found => return Ok(found),
                }
            }
            position = next;
        }
    }
    Ok(Erased::Nothing)
}

/// The same for a range that is zero now.
async fn read(known: &AsyncImage, begin: u64, end: u64, left: &mut u64) -> Result<Erased, qcow2::Error> {
    let mut position = begin;
    while position < end {
        for extent in known.map(position, end - position, EXTENTS_AT_ONCE).await? {
            let next = (position + extent.length).min(end);
            while extent.kind == ExtentKind::Data && position < next {
                let length = PIECE.min(next - position);
                let Some(rest) = left.checked_sub(length) else { return Ok(Erased::Unknown) };
                *left = rest;
                let bytes = known.read(position, vec![0; usize::try_from(length).unwrap_or_default()]).await?;
                if let Some(index) = bytes.iter().position(|byte| *byte != 0) {
                    return Ok(Erased::Something(position + index as u64));
                }
                position += length;
            }
            position = next;
        }
    }
    Ok(Erased::Nothing)
}
