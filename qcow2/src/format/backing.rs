//! The backing file as a header names it: a name in the first cluster and a format in an extension. Whether such a file may
//! be opened is decided elsewhere (`crate::backing`).

use crate::error::{Error, Result};

pub(super) const NAME_MAX: usize = 1023;

/// How the bytes of a backing file are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingFormat {
    /// A qcow2 image.
    Qcow2,
    /// The bytes of the disk themselves.
    Raw,
}

impl BackingFormat {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// The backing file as the header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name, relative to the folder of the image that holds it; at most 1023 bytes.
    pub name: String,
    /// Never guessed from the file's content.
    pub format: BackingFormat,
}

/// The name at `at`, `None` for an image without a backing file.
pub(super) fn backing_name(bytes: &[u8], at: u64, length: u32, cluster_size: u64) -> Result<Option<String>> {
    if at == 0 {
        return Ok(None);
    }
    let corrupt = |rule| Err(Error::corrupt("backing file name", at, u64::from(length), rule));
    if length as usize > NAME_MAX || at.checked_add(u64::from(length)).is_none_or(|end| end > cluster_size) {
        return corrupt("must be at most 1023 bytes, inside the first cluster");
    }
    let Some(name) = bytes.get(at as usize..at as usize + length as usize) else {
        return corrupt("must be inside the file");
    };
    match str::from_utf8(name) {
        Ok(name) if !name.is_empty() && !name.contains('\0') => Ok(Some(name.to_owned())),
        _ => corrupt("must be text without NUL"),
    }
}

/// A name with its format as the extension says it.
pub(super) fn backing(name: String, format: Option<&[u8]>) -> Result<Backing> {
    let format = match format {
        Some(b"qcow2") => BackingFormat::Qcow2,
        Some(b"raw") => BackingFormat::Raw,
        Some(other) => {
            let reason = format!("unsupported format '{}'", String::from_utf8_lossy(other));
            return Err(Error::Backing { name, reason });
        }
        None => {
            let reason = "the image does not say which format it has, and formats are never guessed".into();
            return Err(Error::Backing { name, reason });
        }
    };
    Ok(Backing { name, format })
}
