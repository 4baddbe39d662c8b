//! Damage as an ageing disk does it: one bit of one image is another, and nothing else tells of it.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::DemoError;
use super::copy::Point;
use super::hub::Hub;
use super::verify::{self, Verification, VerifiedPoint};
use crate::cli::Output;

/// The bit that is flipped.
const BIT: u32 = 4;

/// A flipped bit, and what a verification made of it.
#[derive(Debug)]
pub(super) struct Damage {
    /// The image.
    pub(super) file: PathBuf,
    /// Offset in the file.
    pub(super) byte: u64,
    /// What is known of the points now.
    pub(super) verification: Verification,
    /// Whether the file was named, its point called corrupt, and everything above it suspect.
    pub(super) found: bool,
}

/// Flips a bit in an image of the lowest of these points and verifies the last, which builds upon the others.
///
/// # Errors
/// The image cannot be changed, or the hub refuses. Damage that is not found is none.
pub(super) async fn run(hub: &Hub, chain: &[Point], output: &Output) -> Result<Damage, DemoError> {
    let lower = chain.first().ok_or(DemoError::Answer { what: "a point" })?;
    let images = hub.images(&lower.backup_id).await?;
    let image = images.into_iter().next().ok_or(DemoError::Answer { what: "disks" })?.path;
    let byte = flip(&image).map_err(|source| DemoError::Image { path: image.clone(), source })?;
    let (number, name) = (lower.number, image.file_name().unwrap_or_default().display());
    output.note(&format!("copy of the repository: bit {BIT} of byte {byte} of point {number}'s {name} is flipped"));
    let verification = verify::run(hub, chain).await?;
    let found = is_found(&verification.points, &lower.backup_id, &image);
    Ok(Damage { file: image, byte, verification, found })
}

/// The file is named, its point is corrupt, and all above it are suspect.
fn is_found(points: &[VerifiedPoint], damaged: &str, image: &Path) -> bool {
    let Some((lowest, above)) = points.split_first() else { return false };
    lowest.backup_id == damaged
        && lowest.trust == "corrupt"
        && image.file_name().is_some_and(|name| lowest.files.iter().any(|file| Path::new(file) == name))
        && !above.is_empty()
        && above.iter().all(|point| point.trust == "suspect")
}

/// Flips a bit in the middle of a file that nobody may write, and leaves it so; the offset of its byte.
fn flip(path: &Path) -> io::Result<u64> {
    let before = fs::metadata(path)?;
    let byte = before.len() / 2;
    fs::set_permissions(path, Permissions::from_mode(0o640))?;
    let file = File::options().read(true).write(true).open(path)?;
    let mut bytes = [0];
    file.read_exact_at(&mut bytes, byte)?;
    file.write_all_at(&[bytes[0] ^ (1 << BIT)], byte)?;
    file.set_modified(before.modified()?)?;
    fs::set_permissions(path, before.permissions())?;
    Ok(byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(backup_id: &str, trust: &str, files: &[&str]) -> VerifiedPoint {
        let files = files.iter().map(|&file| file.to_owned()).collect();
        VerifiedPoint { backup_id: backup_id.to_owned(), trust: trust.to_owned(), reason: None, files }
    }

    #[test]
    fn only_the_right_file_in_a_corrupt_point_below_suspect_ones_counts_as_found() {
        let image = Path::new("/repository/vm/b/disk-0.qcow2");
        let found = |points: &[VerifiedPoint]| is_found(points, "b", image);
        assert!(found(&[point("b", "corrupt", &["disk-0.qcow2"]), point("c", "suspect", &[])]));
        assert!(!found(&[point("b", "verified", &[]), point("c", "verified", &[])]), "nothing was found");
        assert!(!found(&[point("b", "corrupt", &["disk-1.qcow2"]), point("c", "suspect", &[])]), "another file");
        assert!(!found(&[point("b", "corrupt", &["disk-0.qcow2"]), point("c", "verified", &[])]), "trusted above it");
        assert!(!found(&[point("c", "corrupt", &["disk-0.qcow2"]), point("b", "suspect", &[])]), "another point");
        assert!(!found(&[point("b", "corrupt", &["disk-0.qcow2"])]), "nothing above it was read");
        assert!(!found(&[]));
    }

    #[test]
    fn one_bit_differs_and_the_rights_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        fs::write(&path, [0; 9]).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o440)).unwrap();
        let before = fs::metadata(&path).unwrap();
        assert_eq!(flip(&path).unwrap(), 4);
        assert_eq!(fs::read(&path).unwrap(), [0, 0, 0, 0, 1 << BIT, 0, 0, 0, 0]);
        let after = fs::metadata(&path).unwrap();
        assert_eq!(after.permissions(), before.permissions());
        assert_eq!(after.modified().unwrap(), before.modified().unwrap());
    }
}
