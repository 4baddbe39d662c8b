//! Reading the virtual disks of a point: their content roots are taken at the first verification, written with the digests of
//! the files, and compared when that is asked for.

use std::io;
use std::path::Path;

use blockyard_qcow2 as qcow2;

use super::content::BLOCK_BYTES;
use super::digests::{Digests, DiskDigest, blocks_file_name};
use super::files::{self, Beside};
use super::finding::{Finding, Severity, worst};
use super::inspect::{Document, Inspection, Subject, SubjectDisk, inspect};
use super::leaves::{self, Leaves, LeavesError};
use super::pace::{Reading, Stopped};
use super::witness::Witness;
use crate::clock::UtcTime;
use crate::digest::Digest;
use crate::repository::layout::DIGESTS;
use crate::repository::manifest::Manifest;

/// Memory for the tables of the chain while a disk is read from its beginning to its end.
const CACHE_BYTES: usize = 16 << 20;

/// Whether the virtual disks are read although their roots are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// They are not: their images are what was committed, or are not.
    Known,
    /// They are, and compared.
    Reread,
}

/// What became of one look at a point.
#[derive(Clone, Debug, Default)]
pub struct Examined {
    /// What was found.
    pub findings: Vec<Finding>,
    /// What is to be recorded: disk, digest of the image, content root. Empty unless all of it is known and sound.
    pub digests: Vec<(u32, Digest, Digest)>,
    /// How many bytes of the disks were held against what was received for them; nothing where no disk was read.
    pub compared_bytes: Option<u64>,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum ExamineError {
    /// The service stops.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// The folder was exchanged for another while it was read, so that nothing of what was found can be said of either.
    #[error("the folder of the point was exchanged meanwhile")]
    Exchanged,
}

/// Inspects a point, takes what was never taken, and writes anew what was derived from sound images and is not sound itself.
///
/// # Errors
/// The service stops, or the folder was exchanged. All else is a finding.
pub fn examine(subject: &Subject, content: Content, reading: &Reading) -> Result<Examined, ExamineError> {
    let before = files::identity(&subject.folder).ok();
    let inspection = inspect(subject, reading)?;
    let examined = take(subject, inspection, content, reading)?;
    if files::identity(&subject.folder).ok() != before {
        return Err(ExamineError::Exchanged);
    }
    Ok(examined)
}

fn take(subject: &Subject, inspection: Inspection, content: Content, reading: &Reading) -> Result<Examined, Stopped> {
    let Inspection { mut findings, files, document, roots, manifest } = inspection;
    if worst(&findings).is_some_and(|worst| worst.severity > Severity::Warning) {
        return Ok(Examined { findings, ..Examined::default() });
    }
    let known = |disk: &SubjectDisk| {
        let written = roots.iter().find(|(disk_id, _)| *disk_id == disk.row.disk_id).map(|(_, root)| *root);
        disk.content().or(written)
    };
    let writes = matches!(document, Document::Absent | Document::Stale);
    // A root is taken on trust only for an image that is proven to be the one that it was taken of.
    let proven = |disk: &SubjectDisk| document == Document::Sound || disk.digest().is_some();
    let mut disks = Vec::with_capacity(subject.disks.len());
    let mut compared_bytes = None;
    for disk in &subject.disks {
        let root = match (known(disk), content) {
            (Some(root), Content::Known) if !writes && proven(disk) => root,
            (expected, _) => match read_disk(subject, disk, manifest.as_ref(), expected, content, writes, reading)? {
                Ok(read) => {
                    *compared_bytes.get_or_insert(0) += read.compared_bytes;
                    read.root
                }
                Err(finding) => {
                    findings.push(finding);
                    continue;
                }
            },
        };
        let (disk_id, size_bytes) = (disk.row.disk_id, disk.row.size_bytes);
        disks.push(DiskDigest { disk_id, size_bytes, block_bytes: BLOCK_BYTES, content: root });
    }
    if disks.len() < subject.disks.len() {
        return Ok(Examined { findings, ..Examined::default() });
    }
    let digests = disks
        .iter()
        .zip(&subject.disks)
        .filter_map(|(disk, recorded)| {
            let image = files.iter().find(|file| file.name == recorded.row.file)?;
            Some((disk.disk_id, image.blake3, disk.content))
        })
        .collect();
    if writes {
        let written = Digests::new(subject.id.clone(), UtcTime::now(), files, disks);
        let written = written.encode().map_err(io::Error::from);
        if let Err(error) = written.and_then(|bytes| files::replace(&subject.folder, DIGESTS, &bytes)) {
            findings.push(unwritten(DIGESTS, &error));
            return Ok(Examined { findings, ..Examined::default() });
        }
    }
    Ok(Examined { findings, digests, compared_bytes })
}

/// Images that are sound in a folder that cannot be written: nothing is wrong with the point, but its digests are not kept.
fn unwritten(file: &str, error: &io::Error) -> Finding {
    Finding::of_file(Severity::Failed, "not_written", file, format!("it cannot be written: {error}"))
}

/// One disk that was read.
struct ReadDisk {
    root: Digest,
    /// Bytes that were held against what was received for them.
    compared_bytes: u64,
}

/// The root over a disk, which must be the expected one, and its leaves in their file where they are to be written.
fn read_disk(
    subject: &Subject,
    disk: &SubjectDisk,
    manifest: Option<&Manifest>,
    expected: Option<Digest>,
    content: Content,
    writes: bool,
    reading: &Reading,
) -> Result<Result<ReadDisk, Finding>, Stopped> {
    let (file, name) = (&disk.row.file, blocks_file_name(disk.row.disk_id));
    let options = qcow2::OpenOptions {
        backing_root: subject.folder.parent().map(Path::to_owned),
        cache_bytes: CACHE_BYTES,
        ..qcow2::OpenOptions::new(qcow2::Access::ReadOnly)
    };
    let image = match qcow2::Image::open(&subject.folder.join(file), &options) {
        Ok(image) => image,
        Err(error) => return Ok(Err(through_chain(file, &error))),
    };
    if image.size() != disk.row.size_bytes {
        let detail = format!("the disk has {} bytes, {} were committed", image.size(), disk.row.size_bytes);
        return Ok(Err(Finding::of_file(Severity::Corrupt, "size_mismatch", file, detail)));
    }
    reading.expect(image.size());
    let below = if content == Content::Reread { None } else { parents_leaves(subject, disk) };
    let told = manifest.and_then(|manifest| manifest.disks.iter().find(|told| told.disk_id == disk.row.disk_id));
    let mut witness = told.and_then(Witness::new);
    let computed = if writes {
        write_leaves(&image, below, witness.as_mut(), subject, &name, expected, reading)
    } else {
        leaves::compute(&image, below, witness.as_mut(), &mut io::sink(), reading)
    };
    let root = match computed {
        Ok(root) => root,
        Err(LeavesError::Stopped(stopped)) => return Err(stopped),
        Err(LeavesError::Image(error)) => return Ok(Err(through_chain(file, &error))),
        Err(LeavesError::Io(error)) => return Ok(Err(unwritten(&name, &error))),
    };
    let testimony = witness.as_ref().map(Witness::testimony).unwrap_or_default();
    reading.compared(testimony.compared_bytes);
    if let Some((offset, length)) = testimony.differs {
        let detail = format!("what it holds in the {length} bytes at offset {offset} is not what was received");
        // What was received and not stored, being equal to the parent's, or zero over what was zero, is read from below.
        let severity = if disk.row.parent_id.is_none() { Severity::Corrupt } else { Severity::Suspect };
        return Ok(Err(Finding::of_file(severity, "received_mismatch", file, detail)));
    }
    Ok(match expected.filter(|expected| *expected != root) {
        Some(expected) => {
            let differs = format!("the disk hashes to {root}, not to {expected}");
            let (severity, detail) = match (disk.digest(), &disk.row.parent_id) {
                (Some(_), _) => (Severity::Suspect, format!("{differs}, although the image is what was committed")),
                (None, Some(_)) => (Severity::Suspect, format!("{differs}: it, or what it builds upon, was changed")),
                // Made anew by a merge, and nothing else can be to blame.
                (None, None) => (Severity::Corrupt, differs),
            };
            Err(Finding::of_file(severity, "content_mismatch", file, detail))
        }
        None => Ok(ReadDisk { root, compared_bytes: testimony.compared_bytes }),
    })
}

/// The leaves of the parent's disk, where they are what was written. Without them the whole disk is read.
fn parents_leaves(subject: &Subject, disk: &SubjectDisk) -> Option<Leaves> {
    let (parent, root) = (disk.row.parent_id.as_ref()?, disk.below?);
    let path = subject.folder.parent()?.join(parent.as_str()).join(blocks_file_name(disk.row.disk_id));
    Leaves::open(&path, disk.row.size_bytes, &root).ok().flatten()
}

/// Writes the leaves beside their file, and gives them its name unless they have another root than they should, or are of something
/// else than was received.
fn write_leaves(
    image: &qcow2::Image,
    below: Option<Leaves>,
    mut witness: Option<&mut Witness<'_>>,
    subject: &Subject,
    name: &str,
    expected: Option<Digest>,
    reading: &Reading,
) -> Result<Digest, LeavesError> {
    let mut file = Beside::create(&subject.folder, name)?;
    let root = leaves::compute(image, below, witness.as_deref_mut(), &mut file, reading)?;
    let is_received = witness.is_none_or(|witness| witness.testimony().differs.is_none());
    if is_received && expected.is_none_or(|expected| expected == root) {
        file.publish(&subject.folder, name)?;
    }
    Ok(root)
}

/// The image itself was found sound: what cannot be read lies below it, and is judged when that is verified.
fn through_chain(file: &str, error: &qcow2::Error) -> Finding {
    let found = Finding::of_image(file, error);
    let (severity, code) = match found.severity {
        Severity::Corrupt => (Severity::Suspect, "chain_damaged"),
        // Not this point's file: it is the one below that is missing.
        Severity::Missing => (Severity::Failed, "chain_missing"),
        severity => (severity, found.code),
    };
    Finding { severity, code, ..found }
}
