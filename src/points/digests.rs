//! `digests.json`: what the files of a restore point, and the virtual disks in them, hashed to when they were first read after
//! the commit. Values and bytes only; `leaves` beside it reads disks, `inspect` compares.
//!
//! Everything in it can be computed again with `b3sum` and a few lines of Python; `docs/verification.md` has them. The document
//! protects itself: `document` is the BLAKE3 of the whole file with the 64 digits of that very field written as zeroes.

use serde::{Deserialize, Serialize};

use super::content::BLOCK_BYTES;
use crate::clock::UtcTime;
use crate::digest::{Digest, NoDigest};
use crate::id::BackupId;

/// The format this version writes; a reader refuses a higher one.
pub const FORMAT: u32 = 1;
/// The only algorithm of this format.
pub const ALGORITHM: &str = "blake3";
/// No document is longer: one of the most disks that a VM can have takes a tenth of this.
pub const DOCUMENT_BYTES_MAX: u64 = 1 << 20;
/// What stands in the place of the document's own digest while it is hashed.
const BLANK: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// The document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// The version of this layout.
    pub format: u32,
    /// Always `blake3`.
    pub algorithm: String,
    /// Whose files these are.
    pub point_id: BackupId,
    /// When they were read.
    pub taken_at: UtcTime,
    /// `manifest.json` and the images, in that order. The files of leaves are not here: [`DiskDigest::content`] is their digest.
    pub files: Vec<FileDigest>,
    /// The virtual disks, in ascending order of number.
    pub disks: Vec<DiskDigest>,
    /// BLAKE3 of the content roots of all disks, 32 bytes each, in this order.
    pub vm: Digest,
    /// BLAKE3 of the file with these digits written as zeroes.
    document: String,
}

/// One file of a point's folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of its bytes.
    pub blake3: Digest,
}

/// One virtual disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDigest {
    /// Our number of it.
    pub disk_id: u32,
    /// Its size.
    pub size_bytes: u64,
    /// The length of the blocks that it was hashed in; the last one may be shorter.
    pub block_bytes: u64,
    /// BLAKE3 of the digests of all blocks, 32 bytes each: of the bytes of `disk-<N>.blocks`.
    pub content: Digest,
}

/// Why a document cannot be believed.
#[derive(Debug, thiserror::Error)]
pub enum DigestsError {
    /// A newer version of this program wrote it.
    #[error("digests.json has format {found}, this version reads up to {FORMAT}")]
    Newer {
        /// Its format.
        found: u32,
    },
    /// It is not what such a document looks like.
    #[error("digests.json is not valid: {0}")]
    Invalid(#[from] serde_json::Error),
    /// It is longer than any.
    #[error("digests.json has {0} bytes, more than any such document")]
    TooLong(u64),
    /// It is not what was written.
    #[error("digests.json does not match its own digest")]
    Damaged,
    /// What it says cannot be.
    #[error("digests.json holds another algorithm or block length than its format has")]
    Foreign,
}

impl Digests {
    /// The document of these files and disks.
    pub fn new(point_id: BackupId, taken_at: UtcTime, files: Vec<FileDigest>, disks: Vec<DiskDigest>) -> Self {
        let vm = Digest::over(disks.iter().map(|disk| &disk.content));
        let (algorithm, document) = (ALGORITHM.to_owned(), BLANK.to_owned());
        Self { format: FORMAT, algorithm, point_id, taken_at, files, disks, vm, document }
    }

    /// The bytes of the file.
    ///
    /// # Errors
    /// None in practice: all keys are strings.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut sealed = Self { document: BLANK.to_owned(), ..self.clone() };
        sealed.document = Digest::of(&sealed.plain()?).to_string();
        sealed.plain()
    }

    fn plain(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Reads the bytes of a file.
    ///
    /// # Errors
    /// Bytes that are no document, one of a newer version, and one of which a single bit is not as it was written.
    pub fn decode(bytes: &[u8]) -> Result<Self, DigestsError> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let head: Head = serde_json::from_slice(bytes)?;
        if head.format > FORMAT {
            return Err(DigestsError::Newer { found: head.format });
        }
        let mut digests: Self = serde_json::from_slice(bytes)?;
        let written: Digest = digests.document.parse().map_err(|NoDigest| DigestsError::Damaged)?;
        let at = position(bytes, digests.document.as_bytes()).ok_or(DigestsError::Damaged)?;
        let mut hasher = blake3::Hasher::new();
        let (before, rest) = bytes.split_at(at);
        hasher.update(before).update(BLANK.as_bytes()).update(rest.get(BLANK.len()..).unwrap_or_default());
        if Digest::from(hasher.finalize()) != written {
            return Err(DigestsError::Damaged);
        }
        if digests.algorithm != ALGORITHM || digests.disks.iter().any(|disk| disk.block_bytes != BLOCK_BYTES) {
            return Err(DigestsError::Foreign);
        }
        digests.document = BLANK.to_owned();
        Ok(digests)
    }

    /// What it says of a file.
    pub fn file(&self, name: &str) -> Option<&FileDigest> {
        self.files.iter().find(|file| file.name == name)
    }

    /// What it says of a disk.
    pub fn disk(&self, disk_id: u32) -> Option<&DiskDigest> {
        self.disks.iter().find(|disk| disk.disk_id == disk_id)
    }
}

/// The last place of `part` in `bytes`.
fn position(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).rposition(|window| window == part)
}

/// The name of the file that holds the leaves of a disk, one after the other.
pub fn blocks_file_name(disk_id: u32) -> String {
    format!("disk-{disk_id}.blocks")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document() -> Digests {
        let files = vec![FileDigest { name: "manifest.json".into(), bytes: 2, blake3: Digest::of(b"{}") }];
        let (size_bytes, block_bytes) = (BLOCK_BYTES + 512, BLOCK_BYTES);
        let disks = vec![DiskDigest { disk_id: 0, size_bytes, block_bytes, content: Digest::of(b"leaves") }];
        let id = "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB".parse().unwrap();
        Digests::new(id, "2026-11-23T22:05:00Z".parse().unwrap(), files, disks)
    }

    #[test]
    fn reads_back_as_written_and_any_flipped_bit_is_refused() {
        let bytes = document().encode().unwrap();
        assert_eq!(Digests::decode(&bytes).unwrap(), document());
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Digests::decode(&damaged).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(Digests::decode(&bytes[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_newer_format_and_garbage_are_refused() {
        assert!(matches!(Digests::decode(br#"{"format": 2}"#), Err(DigestsError::Newer { found: 2 })));
        for garbage in [&b""[..], b"{", b"[]", br#"{"format": 1}"#, b"\xff\xff"] {
            assert!(matches!(Digests::decode(garbage), Err(DigestsError::Invalid(_))), "{garbage:?}");
        }
    }

    #[test]
    fn the_digest_of_the_document_is_that_of_the_file_with_its_digits_as_zeroes() {
        let text = String::from_utf8(document().encode().unwrap()).unwrap();
        let (_, rest) = text.split_once("\"document\": \"").unwrap();
        let digits = &rest[..64];
        assert_eq!(Digest::of(text.replace(digits, BLANK).as_bytes()).to_string(), digits);
    }
}
