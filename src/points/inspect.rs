//! A look at the files of one point: each is read once and held against what was recorded. Nothing is written here, and nothing
//! is concluded: that is `take`'s and `verify`'s business.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use blockyard_qcow2 as qcow2;

use super::digests::{DOCUMENT_BYTES_MAX, Digests, DigestsError, FileDigest, blocks_file_name};
use super::files::{self, HashError};
use super::finding::{Finding, Severity};
use super::leaves::Leaves;
use super::pace::{Reading, Stopped};
use crate::digest::Digest;
use crate::id::BackupId;
use crate::repository::layout::{self, DIGESTS, MANIFEST};
use crate::repository::manifest::Manifest;
use crate::store::points::PointDiskRow;

/// The longest manifest that is read: one of 64 disks, each in pieces of 64 KiB, takes a tenth of this.
pub(super) const MANIFEST_BYTES_MAX: u64 = 256 << 20;

/// One point with all that is recorded of it.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The point.
    pub id: BackupId,
    /// Its folder.
    pub folder: PathBuf,
    /// Its disks.
    pub disks: Vec<SubjectDisk>,
}

/// One disk of a point.
#[derive(Clone, Debug)]
pub struct SubjectDisk {
    /// What is recorded.
    pub row: PointDiskRow,
    /// The root over the disk in the point below, of the same size, where it is known.
    pub below: Option<Digest>,
}

impl SubjectDisk {
    /// BLAKE3 of the image, as it is recorded. One that a merge has made anew has none before it was read.
    pub fn digest(&self) -> Option<Digest> {
        self.row.digest.as_deref().and_then(|digest| digest.parse().ok())
    }

    /// The root over the disk, as it is recorded.
    pub fn content(&self) -> Option<Digest> {
        self.row.content_digest.as_deref().and_then(|digest| digest.parse().ok())
    }

    /// The name of its backing file.
    fn backing_name(&self) -> Option<String> {
        self.row.parent_id.as_ref().map(|parent| layout::backing_name(parent, &self.row.file))
    }
}

/// What is to be thought of `digests.json` and the files of leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// All of it is what was written.
    Sound,
    /// There is none, and nothing is recorded: nobody has read the point before.
    Absent,
    /// It must be written anew, and the records allow it.
    Stale,
    /// It must not be written: a newer version made it, or nothing proves the images.
    Kept,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// What is not as it was.
    pub findings: Vec<Finding>,
    /// What the manifest and the images hash to, as far as they could be read.
    pub files: Vec<FileDigest>,
    /// The state of what was derived from them.
    pub document: Document,
    /// The roots that a sound document has, by disk.
    pub roots: Vec<(u32, Digest)>,
    /// The manifest, when it could be read and says what is recorded.
    pub manifest: Option<Manifest>,
}

/// Reads every file of the point once.
///
/// # Errors
/// The service stops. All else is a finding.
pub fn inspect(subject: &Subject, reading: &Reading) -> Result<Inspection, Stopped> {
    let mut look = Look { subject, reading, findings: Vec::new(), files: Vec::new(), stale: false };
    if let Err(error) = files::identity(&subject.folder) {
        let finding = match error.kind() {
            io::ErrorKind::NotFound => {
                Finding::of_point(Severity::Missing, "folder_missing", "the folder is not there")
            }
            _ => Finding::of_point(Severity::Failed, "unreadable", format!("the folder cannot be read: {error}")),
        };
        let findings = vec![finding];
        return Ok(Inspection {
            findings,
            files: Vec::new(),
            document: Document::Kept,
            roots: Vec::new(),
            manifest: None,
        });
    }
    let document = look.document();
    for disk in &subject.disks {
        look.image(disk, document.as_ref().ok())?;
    }
    // Whether the document is of this state of the point is known once the images are.
    let trusted = document.as_ref().ok().filter(|_| !look.stale);
    let manifest = look.manifest(trusted)?;
    for disk in &subject.disks {
        look.leaves(disk, trusted);
    }
    Ok(Inspection { manifest, ..look.conclude(&document) })
}

/// A document that cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lack {
    Absent,
    Damaged,
    Newer,
    Unreadable,
}

struct Look<'a> {
    subject: &'a Subject,
    reading: &'a Reading,
    findings: Vec<Finding>,
    files: Vec<FileDigest>,
    /// The document or a file of leaves is not that of these images.
    stale: bool,
}

impl Look<'_> {
    fn document(&mut self) -> Result<Digests, Lack> {
        let path = self.subject.folder.join(DIGESTS);
        let read = files::read(&path, DOCUMENT_BYTES_MAX);
        let decoded = match read {
            Ok(Some(bytes)) => Digests::decode(&bytes),
            Ok(None) => Err(DigestsError::TooLong(DOCUMENT_BYTES_MAX + 1)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Lack::Absent),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Err(DigestsError::Damaged),
            Err(error) => {
                self.findings.push(Finding::unreadable(DIGESTS, &error));
                return Err(Lack::Unreadable);
            }
        };
        match decoded {
            Ok(digests) if digests.point_id == self.subject.id => Ok(digests),
            Ok(digests) => {
                let detail = format!("it belongs to {}", digests.point_id);
                self.warn("digests_damaged", DIGESTS, detail);
                Err(Lack::Damaged)
            }
            Err(error @ DigestsError::Newer { .. }) => {
                self.warn("digests_newer", DIGESTS, error.to_string());
                Err(Lack::Newer)
            }
            Err(error) => {
                self.warn("digests_damaged", DIGESTS, error.to_string());
                Err(Lack::Damaged)
            }
        }
    }

    fn warn(&mut self, code: &'static str, file: &str, detail: impl Into<String>) {
        self.findings.push(Finding::of_file(Severity::Warning, code, file, detail));
    }

    fn damage(&mut self, code: &'static str, file: &str, detail: impl Into<String>) {
        self.findings.push(Finding::of_file(Severity::Corrupt, code, file, detail));
    }

    /// Hashes a file of the folder; nothing when it cannot be read, which is told.
    fn hash(&mut self, name: &str, bytes: Option<u64>) -> Result<Option<Digest>, Stopped> {
        let opened = files::open(&self.subject.folder.join(name)).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (length, mut file): (u64, File) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.findings.push(Finding::unreadable(name, &error));
                return Ok(None);
            }
        };
        if let Some(bytes) = bytes.filter(|bytes| *bytes != length) {
            self.damage("length_mismatch", name, format!("it has {length} bytes, {bytes} were committed"));
            return Ok(None);
        }
        match files::hash(&mut file, self.reading) {
            Ok(blake3) => {
                self.files.push(FileDigest { name: name.to_owned(), bytes: length, blake3 });
                Ok(Some(blake3))
            }
            Err(HashError::Stopped(stopped)) => Err(stopped),
            Err(HashError::Io(error)) => {
                self.findings.push(Finding::unreadable(name, &error));
                Ok(None)
            }
        }
    }

    fn image(&mut self, disk: &SubjectDisk, document: Option<&Digests>) -> Result<(), Stopped> {
        let name = &disk.row.file;
        let Some(found) = self.hash(name, Some(disk.row.file_bytes))? else { return Ok(()) };
        let written = document.map(|document| document.file(name).map(|file| file.blake3));
        match (disk.digest(), written) {
            (Some(recorded), written) if recorded == found => {
                // The images are proven by the records; a document that says something else is not theirs.
                self.stale |= written.is_some_and(|written| written != Some(found));
            }
            (Some(_), Some(Some(written))) if written == found => self.findings.push(Finding::of_file(
                Severity::Suspect,
                "digest_conflict",
                name,
                "the image is what digests.json says, and not what the database says",
            )),
            (Some(recorded), _) => self.damage("digest_mismatch", name, differs(&found, &recorded)),
            (None, Some(Some(written))) if written != found => {
                self.damage("digest_mismatch", name, differs(&found, &written));
            }
            (None, Some(None)) => self.findings.push(Finding::of_file(
                Severity::Suspect,
                "digest_missing",
                name,
                "digests.json does not name the image",
            )),
            (None, _) => {}
        }
        self.structure(disk);
        Ok(())
    }

    /// The tables of the image, its size, and what it builds upon.
    fn structure(&mut self, disk: &SubjectDisk) {
        let name = &disk.row.file;
        let path = self.subject.folder.join(name);
        let looked = qcow2::check(&path).and_then(|report| Ok((report, qcow2::info(&path)?)));
        let (report, info) = match looked {
            Ok(looked) => looked,
            Err(error) => return self.findings.push(Finding::of_image(name, &error)),
        };
        if !report.is_clean() {
            let first = report.details.first().map(String::as_str).unwrap_or_default();
            let detail = format!("{} errors and {} leaks; {first}", report.errors, report.leaks);
            self.damage("structure", name, detail);
        }
        if info.size != disk.row.size_bytes {
            let detail = format!("its disk has {} bytes, {} were committed", info.size, disk.row.size_bytes);
            self.damage("size_mismatch", name, detail);
        }
        let below = info.backing.map(|backing| backing.name);
        if below != disk.backing_name() {
            let or_none = |name: Option<String>| name.unwrap_or_else(|| "nothing".to_owned());
            let detail = format!("it builds upon {}, not upon {}", or_none(below), or_none(disk.backing_name()));
            self.damage("backing_mismatch", name, detail);
        }
    }

    fn manifest(&mut self, document: Option<&Digests>) -> Result<Option<Manifest>, Stopped> {
        let path = self.subject.folder.join(MANIFEST);
        let bytes = match files::read(&path, MANIFEST_BYTES_MAX) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => {
                self.damage("manifest", MANIFEST, "it is longer than any manifest");
                return Ok(None);
            }
            Err(error) => {
                let mut finding = Finding::unreadable(MANIFEST, &error);
                if finding.severity == Severity::Missing {
                    // The images are there: the point can be restored, and not be understood.
                    finding.severity = Severity::Corrupt;
                }
                self.findings.push(finding);
                return Ok(None);
            }
        };
        self.reading.expect(bytes.len() as u64);
        self.reading.read(bytes.len() as u64)?;
        self.reading.file();
        let found = Digest::of(&bytes);
        self.files.insert(0, FileDigest { name: MANIFEST.to_owned(), bytes: bytes.len() as u64, blake3: found });
        if let Some(written) = document.and_then(|document| document.file(MANIFEST))
            && written.blake3 != found
        {
            self.damage("digest_mismatch", MANIFEST, differs(&found, &written.blake3));
            return Ok(None);
        }
        match Manifest::decode(&bytes) {
            Ok(manifest) => {
                let defect = disagreement(&manifest, self.subject).or_else(|| defect(&manifest));
                if let Some(detail) = defect {
                    self.damage("manifest", MANIFEST, detail);
                    return Ok(None);
                }
                Ok(Some(manifest))
            }
            Err(error) => {
                self.damage("manifest", MANIFEST, error.to_string());
                Ok(None)
            }
        }
    }

    /// Whether the leaves of a disk are those of its root, and the document's root the recorded one.
    fn leaves(&mut self, disk: &SubjectDisk, document: Option<&Digests>) {
        let written = document.and_then(|document| document.disk(disk.row.disk_id)).map(|disk| disk.content);
        let Some(root) = disk.content().or(written) else {
            self.stale |= document.is_some();
            return;
        };
        if document.is_some() && written != Some(root) {
            self.warn(
                "digests_damaged",
                DIGESTS,
                format!("the content of disk {} is recorded differently", disk.row.disk_id),
            );
            self.stale = true;
        }
        let name = blocks_file_name(disk.row.disk_id);
        match Leaves::open(&self.subject.folder.join(&name), disk.row.size_bytes, &root) {
            Ok(Some(_)) => {}
            Ok(None) => {
                self.warn("leaves_damaged", &name, "it is not there, or not what was written");
                self.stale = true;
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                self.warn("leaves_damaged", &name, error.to_string());
                self.stale = true;
            }
            Err(error) => self.findings.push(Finding::unreadable(&name, &error)),
        }
    }

    fn conclude(mut self, document: &Result<Digests, Lack>) -> Inspection {
        let recorded = self.subject.disks.iter().all(|disk| disk.digest().is_some() && disk.content().is_some());
        let rooted = self.subject.disks.iter().all(|disk| disk.content().is_some());
        let nothing = self.subject.disks.iter().all(|disk| disk.digest().is_none() && disk.content().is_none());
        let state = match document {
            // The images are what it says, or what the database says: either proves them.
            Ok(_) if self.stale => Document::Stale,
            Ok(_) => Document::Sound,
            Err(Lack::Absent) if nothing => Document::Absent,
            // A merge leaves none: images that it made are proven by what they read as.
            Err(Lack::Absent) if rooted && !recorded => Document::Stale,
            Err(Lack::Absent) => {
                self.warn("digests_missing", DIGESTS, "the file is not there");
                if recorded { Document::Stale } else { Document::Kept }
            }
            Err(Lack::Damaged) if rooted => Document::Stale,
            Err(Lack::Damaged | Lack::Newer | Lack::Unreadable) => Document::Kept,
        };
        if self.stale && document.is_ok() && self.findings.is_empty() {
            self.warn("digests_stale", DIGESTS, "it tells of other images than those that are recorded");
        }
        let newer = matches!(document, Err(Lack::Newer | Lack::Unreadable));
        if state == Document::Kept && !(newer && rooted) {
            let detail = "nothing proves that the images are what was committed";
            self.findings.push(Finding::of_point(Severity::Suspect, "unproven", detail));
        }
        let disks = document.as_ref().map(|document| document.disks.as_slice()).unwrap_or_default();
        let roots = disks.iter().map(|disk| (disk.disk_id, disk.content)).collect();
        Inspection { findings: self.findings, files: self.files, document: state, roots, manifest: None }
    }
}

fn differs(found: &Digest, expected: &Digest) -> String {
    format!("it hashes to {found}, not to {expected}")
}

/// What a manifest says otherwise than the records.
fn disagreement(manifest: &Manifest, subject: &Subject) -> Option<String> {
    if manifest.backup_id != subject.id {
        return Some(format!("it belongs to {}", manifest.backup_id));
    }
    if manifest.disks.len() != subject.disks.len() {
        return Some(format!("it has {} disks, {} are recorded", manifest.disks.len(), subject.disks.len()));
    }
    for (told, SubjectDisk { row, .. }) in manifest.disks.iter().zip(&subject.disks) {
        // Not the depth of its chain: a merge below makes that less, and a manifest tells how it was at the commit.
        let agrees = (told.disk_id, told.device_key, told.size_bytes, told.file_bytes)
            == (row.disk_id, row.device_key, row.size_bytes, row.file_bytes)
            && told.file == row.file
            && told.backup_type == row.backup_type
            && told.parent_id == row.parent_id
            && told.change_id == row.change_id;
        if !agrees {
            return Some(format!("what it says of disk {} is not what is recorded", told.disk_id));
        }
    }
    None
}

/// What cannot be true of any manifest.
fn defect(manifest: &Manifest) -> Option<String> {
    let of_disks = manifest.disks.iter().find_map(|disk| {
        let defect = disk.received.as_ref()?.defect(disk.size_bytes, &disk.coverage)?;
        Some(format!("disk {}: {defect}", disk.disk_id))
    });
    let root_differs = manifest.received != Manifest::received_root(&manifest.disks);
    of_disks.or_else(|| root_differs.then(|| "the roots of its disks do not have the root of the VM".to_owned()))
}

/// How many bytes a look at a point reads, at most: for the progress.
pub fn bytes(subject: &Subject) -> u64 {
    subject.disks.iter().map(|disk| disk.row.file_bytes).fold(0, u64::saturating_add)
}

/// Whether the repository of a point is where it should be: a folder that is not mounted must not look like one that lost
/// its points.
pub fn repository_is_there(repository: &Path) -> bool {
    repository.join(crate::repository::lock::MARKER_FILE).exists()
}
