//! `manifest.json`: everything about a restore point that its images do not say themselves, beside them, so that a
//! repository can be understood and imported without any database, and restored with `qemu-img` alone.
//!
//! Whoever reads one reads it here, but for a verification, which hashes its bytes as they are: anybody may have written it, so it is
//! bounded, must be a plain file, and no link is followed.
//! What it says of the files beside it is held against them in `directory` and `survey`.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::layout::MANIFEST;
use crate::clock::UtcTime;
use crate::digest::Digest;
use crate::export::coverage::Run;
use crate::export::received::ReceivedMarks;
use crate::id::{BackupId, RepositoryId, VmId};
use crate::words::{BackupType, RequestedType, TypeReason};

/// The format this version writes; a reader refuses a higher one.
pub const FORMAT: u32 = 1;
/// The longest manifest that is read, in bytes. A guess: a range of coverage takes some 60 bytes, and a disk with a million of them
/// apart is beyond anything seen.
pub const BYTES_MAX: u64 = 256 << 20;

/// One restore point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// How to restore without this program.
    pub readme: String,
    /// The version of this layout.
    pub format: u32,
    /// The id of the job and of the point.
    pub backup_id: BackupId,
    /// The repository it was written into.
    pub repository_id: RepositoryId,
    /// Whose disks these are.
    pub vm: ManifestVm,
    /// When the job was accepted.
    pub created_at: UtcTime,
    /// When all disks were sealed.
    pub committed_at: UtcTime,
    /// What the caller asked for.
    pub requested_type: RequestedType,
    /// What it became.
    pub backup_type: BackupType,
    /// The caller's own words.
    pub tags: BTreeMap<String, String>,
    /// The version of the service that wrote it.
    pub service_version: String,
    /// How often the images were made anew over what lay below their parents; they are the job's own at 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub generation: u32,
    /// The points that were absorbed by that, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub merged: Vec<BackupId>,
    /// BLAKE3 of the roots over what was received for the disks, 32 bytes each; older versions did not take them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received: Option<Digest>,
    /// In ascending order of number.
    pub disks: Vec<ManifestDisk>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn is_zero(generation: &u32) -> bool {
    *generation == 0
}

/// The VM as the inventory knew it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ManifestVm {
    /// Our id.
    pub id: VmId,
    /// The display name.
    pub name: String,
    /// The vCenter host.
    pub vcenter: String,
    /// The inventory path.
    pub path: String,
    /// The UUID, when the inventory knows it.
    pub uuid: Option<String>,
}

/// One disk of a point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ManifestDisk {
    /// Our number of it.
    pub disk_id: u32,
    /// VMware's.
    pub device_key: u32,
    /// The identity of the VMDK, when known.
    pub vmdk_uuid: Option<String>,
    /// Its path in the datastore, when known.
    pub vmdk_path: Option<String>,
    /// The size of the virtual disk in bytes.
    pub size_bytes: u64,
    /// The image, in the same directory.
    pub file: String,
    /// Its length in bytes.
    pub file_bytes: u64,
    /// Full or overlay.
    pub backup_type: BackupType,
    /// What was observed.
    pub effective_type: String,
    /// Why it has this type.
    pub reason: TypeReason,
    /// The state of the disk in change tracking that this image holds.
    pub change_id: Option<String>,
    /// The state its delta began at.
    pub from_change_id: Option<String>,
    /// The point its backing file belongs to.
    pub parent_id: Option<BackupId>,
    /// How many images a read may pass, this one included.
    pub chain_depth: u32,
    /// Bytes that were written, as measured by the server.
    pub written_bytes: u64,
    /// Bytes that were zeroed.
    pub zeroed_bytes: u64,
    /// Of that, in requests of 4 MiB and more, what was data in the last usable point; older versions did not count it.
    #[serde(default)]
    pub zeroed_over_data_bytes: u64,
    /// Bytes that were received and not stored, being equal to the parent's.
    pub identical_bytes: u64,
    /// The ranges that were written or zeroed: `[offset, length]` in ascending order.
    pub coverage: Vec<Run>,
    /// The digests of what came for them, taken as it came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received: Option<ReceivedMarks>,
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The file cannot be read.
    #[error("the manifest cannot be read: {0}")]
    Read(#[from] io::Error),
    /// In its place is a link, a folder or a special file.
    #[error("{MANIFEST} is a link or a special file")]
    NotPlain,
    /// It is too long to be one.
    #[error("the manifest has {0} bytes")]
    TooLong(u64),
    /// It is not what a manifest looks like.
    #[error("the manifest is not valid: {0}")]
    Invalid(#[from] serde_json::Error),
    /// It was written for another folder.
    #[error("the manifest is that of {found}")]
    OtherBackup {
        /// The backup that it names.
        found: BackupId,
    },
    /// An image beside it is another one than it tells of.
    #[error("{file} has not the length in the manifest")]
    OtherLength {
        /// The image.
        file: String,
    },
    /// A newer version of this program wrote it.
    #[error("the manifest has format {found}, this version reads up to {FORMAT}")]
    Newer {
        /// Its format.
        found: u32,
    },
}

impl Manifest {
    /// The line that tells a person in a hurry what to type.
    pub fn readme_for(disks: &[ManifestDisk]) -> String {
        let file = disks.first().map_or("disk-0.qcow2", |disk| disk.file.as_str());
        let below = if disks.iter().any(|disk| disk.parent_id.is_some()) {
            ". Incremental disks need the folders that they build upon beside this one: see parent_id, here and there"
        } else {
            ""
        };
        format!(
            "A restore point of Blockyard. Every disk is a qcow2 image that QEMU reads as it is: \
             qemu-img convert -f qcow2 -O raw {file} disk.raw{below}"
        )
    }

    /// The root over what was received for all disks; nothing where one of them has none.
    pub fn received_root(disks: &[ManifestDisk]) -> Option<Digest> {
        let roots: Option<Vec<&Digest>> =
            disks.iter().map(|disk| disk.received.as_ref().map(|received| &received.root)).collect();
        roots.map(Digest::over)
    }

    /// The bytes of the file.
    ///
    /// # Errors
    /// None in practice: all keys are strings.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// The manifest of a folder. Blocks.
    ///
    /// # Errors
    /// There is none, it cannot be read, or is no manifest of a version that is known.
    pub fn read(folder: &Path) -> Result<Self, ManifestError> {
        Self::decode(&bytes_of(folder)?)
    }

    /// How often the images of a folder were made anew. Only what the manifest says before its disks is read, and nothing else of it
    /// understood: a start asks this of every point. Blocks.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_generation(folder: &Path) -> Result<u32, ManifestError> {
        let mut head = Head::default();
        let mut is_read = false;
        let file = BufReader::new(open(folder)?);
        let read = AheadOfDisks { head: &mut head, is_read: &mut is_read }
            .deserialize(&mut serde_json::Deserializer::from_reader(file));
        match read {
            Err(error) if !is_read => Err(error.into()),
            _ if head.format > FORMAT => Err(ManifestError::Newer { found: head.format }),
            _ => Ok(head.generation),
        }
    }

    /// Reads the bytes of a file.
    ///
    /// # Errors
    /// Bytes that are no manifest, or one of a newer version.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        Head::decode(bytes)?;
        Ok(serde_json::from_slice(bytes)?)
    }
}

/// The bytes of the manifest in a folder.
fn bytes_of(folder: &Path) -> Result<Vec<u8>, ManifestError> {
    let mut bytes = Vec::new();
    open(folder)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The manifest in a folder, no more of it than any has.
fn open(folder: &Path) -> Result<io::Take<File>, ManifestError> {
    let path = folder.join(MANIFEST);
    // Not through a link, and not waiting for the other end of a pipe.
    if !fs::symlink_metadata(&path)?.is_file() {
        return Err(ManifestError::NotPlain);
    }
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).unwrap_or_default();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let facts = file.metadata()?;
    if !facts.is_file() {
        return Err(ManifestError::NotPlain);
    }
    if facts.len() > BYTES_MAX {
        return Err(ManifestError::TooLong(facts.len()));
    }
    Ok(file.take(BYTES_MAX))
}

/// What is read before the rest, which a newer version may write in another way.
#[derive(Default, Deserialize)]
struct Head {
    format: u32,
    #[serde(default)]
    generation: u32,
}

impl Head {
    fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let head: Self = serde_json::from_slice(bytes)?;
        if head.format > FORMAT { Err(ManifestError::Newer { found: head.format }) } else { Ok(head) }
    }
}

/// Reads a document up to its disks, which may be megabytes, and ends there with an error that is none.
struct AheadOfDisks<'a> {
    head: &'a mut Head,
    is_read: &'a mut bool,
}

impl<'de> DeserializeSeed<'de> for AheadOfDisks<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for AheadOfDisks<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a manifest")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "format" => self.head.format = map.next_value()?,
                "generation" => self.head.generation = map.next_value()?,
                "disks" => {
                    *self.is_read = true;
                    return Err(A::Error::custom("the disks are not asked for"));
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
impl ManifestDisk {
    /// The disk of a full of so many bytes, written once.
    pub(crate) fn sample(size_bytes: u64) -> Self {
        Self {
            disk_id: 0,
            device_key: 2000,
            vmdk_uuid: None,
            vmdk_path: Some("[ds1] db/db.vmdk".into()),
            size_bytes,
            file: "disk-0.qcow2".into(),
            file_bytes: 196_608,
            backup_type: BackupType::Full,
            effective_type: "full".into(),
            reason: TypeReason::FirstBackup,
            change_id: Some("52 c2/1".into()),
            from_change_id: None,
            parent_id: None,
            chain_depth: 1,
            written_bytes: size_bytes,
            zeroed_bytes: 0,
            zeroed_over_data_bytes: 0,
            identical_bytes: 0,
            coverage: vec![(0, size_bytes)],
            received: Some(crate::export::received::Received::new(size_bytes).marks(&[(0, size_bytes)])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let disks = vec![ManifestDisk::sample(1024)];
        Manifest {
            readme: Manifest::readme_for(&disks),
            format: FORMAT,
            backup_id: "backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB".parse().unwrap(),
            repository_id: "repo-1".parse().unwrap(),
            vm: ManifestVm {
                id: "vm-01JC0A7K2E5H8M3P6R9T1V4X7Z".parse().unwrap(),
                name: "db".into(),
                vcenter: "vc".into(),
                path: "/DC/vm/db".into(),
                uuid: None,
            },
            created_at: "2026-11-23T22:00:00Z".parse().unwrap(),
            committed_at: "2026-11-23T22:05:00Z".parse().unwrap(),
            requested_type: RequestedType::Auto,
            backup_type: BackupType::Full,
            tags: BTreeMap::new(),
            service_version: "0.1.0".into(),
            generation: 2,
            merged: vec!["backup-01JD8Z3M6Q9V4T2R7XK5N0WCHA".parse().unwrap()],
            received: Manifest::received_root(&disks),
            disks,
        }
    }

    #[test]
    fn reads_back_as_written_and_names_the_command() {
        let bytes = manifest().encode().unwrap();
        assert_eq!(Manifest::decode(&bytes).unwrap(), manifest());
        assert!(String::from_utf8(bytes).unwrap().contains("qemu-img convert -f qcow2 -O raw disk-0.qcow2"));
    }

    #[test]
    fn a_point_that_was_never_merged_does_not_speak_of_it() {
        let mut never = manifest();
        (never.generation, never.merged) = (0, Vec::new());
        let text = String::from_utf8(never.encode().unwrap()).unwrap();
        assert!(!text.contains("generation") && !text.contains("merged"), "{text}");
        assert_eq!(Manifest::decode(text.as_bytes()).unwrap(), never);
    }

    #[test]
    fn a_folder_is_read_only_when_its_manifest_is_a_plain_file_of_a_bounded_length() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(MANIFEST);
        assert!(matches!(Manifest::read(root.path()), Err(ManifestError::Read(_))));
        std::os::unix::fs::symlink("elsewhere.json", &path).unwrap();
        fs::write(root.path().join("elsewhere.json"), manifest().encode().unwrap()).unwrap();
        assert!(matches!(Manifest::read(root.path()), Err(ManifestError::NotPlain)));
        fs::remove_file(&path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR).unwrap();
        assert!(matches!(Manifest::read(root.path()), Err(ManifestError::NotPlain)));
        fs::remove_file(&path).unwrap();
        File::create(&path).unwrap().set_len(BYTES_MAX + 1).unwrap();
        assert!(matches!(Manifest::read(root.path()), Err(ManifestError::TooLong(_))));
        fs::write(&path, manifest().encode().unwrap()).unwrap();
        assert_eq!(Manifest::read(root.path()).unwrap(), manifest());
        assert_eq!(Manifest::read_generation(root.path()).unwrap(), 2);
        // What follows the generation is not looked at.
        let text = String::from_utf8(manifest().encode().unwrap()).unwrap();
        let (head, _) = text.split_once("\"disks\":").unwrap();
        fs::write(&path, format!("{head}\"disks\": damaged")).unwrap();
        assert_eq!(Manifest::read_generation(root.path()).unwrap(), 2);
        for (text, newer) in [("{\"format\": 2, \"disks\": []}", true), ("{\"format\": ", false), ("[]", false)] {
            fs::write(&path, text).unwrap();
            let error = Manifest::read_generation(root.path()).unwrap_err();
            assert_eq!(matches!(error, ManifestError::Newer { found: 2 }), newer, "{text}");
        }
    }

    #[test]
    fn a_newer_format_and_garbage_are_refused() {
        assert!(matches!(Manifest::decode(br#"{"format": 2}"#), Err(ManifestError::Newer { found: 2 })));
        assert!(matches!(Manifest::decode(b"{"), Err(ManifestError::Invalid(_))));
        assert!(matches!(Manifest::decode(br#"{"format": 1}"#), Err(ManifestError::Invalid(_))));
    }
}
