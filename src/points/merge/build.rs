//! The folder `<id>.merging` with everything in it: images, proven to read as those of the point, and the manifest.

use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockyard_qcow2::{self as qcow2, Access, Backing, BackingFormat, CreateOptions, Disk, Image, OpenOptions};
use tokio::sync::watch;

use super::plan::{Plan, PlannedDisk};
use super::{MergeError, MergeProgress, UnderWay};
use crate::id::BackupId;
use crate::points::digests::blocks_file_name;
use crate::repository::manifest::{Manifest, ManifestDisk};
use crate::repository::{directory, layout, merging};
use crate::store::points::PointDiskRow;
use crate::words::BackupType;

/// Fills the folder, which is there and empty. Blocks for as long as it takes to read everything three times.
/// `room` tells how many bytes a copy may take; `left` is told how many the new images may still take.
pub(super) fn build(
    plan: &Plan,
    room: &dyn Fn() -> io::Result<u64>,
    stop: &AtomicBool,
    left: &AtomicU64,
    progress: &watch::Sender<UnderWay>,
) -> Result<Manifest, MergeError> {
    let published = directory::load(&plan.paths.published, &plan.point.id)?;
    let absorbed: Vec<Manifest> = plan
        .absorbed
        .iter()
        .map(|point| directory::load(&plan.paths.vm.join(point.id.as_str()), &point.id))
        .collect::<Result<_, _>>()?;
    let total_bytes = plan.disks.iter().filter(|disk| disk.parent.is_some()).map(|disk| 2 * disk.row.size_bytes).sum();
    let (mut before, mut after_this) = (0, plan.needed_bytes());
    let mut disks = Vec::with_capacity(plan.disks.len());
    for disk in &plan.disks {
        let disk_id = disk.row.disk_id;
        let known = published.disks.iter().find(|known| known.disk_id == disk_id);
        let known = known.ok_or_else(|| mismatch(plan, disk_id))?;
        // They are of the content, which stays what it is.
        let blocks = blocks_file_name(disk_id);
        if plan.paths.published.join(&blocks).exists() {
            merging::carry_over(&plan.paths, &blocks, room)?;
        }
        if disk.parent.is_none() {
            merging::carry_over(&plan.paths, &disk.row.file, room)?;
            disks.push(known.clone());
            continue;
        }
        after_this = after_this.saturating_sub(disk.needed_bytes());
        let image = plan.paths.merging.join(&disk.row.file);
        let mut tell = |done: u64| {
            let stored = directory::file_bytes(&image).unwrap_or_default();
            left.store(after_this.saturating_add(disk.needed_bytes().saturating_sub(stored)), Ordering::Relaxed);
            let done_bytes = before + done;
            let now = MergeProgress { done_bytes, total_bytes };
            progress.send_modify(|under_way| {
                under_way.insert(plan.point.id.clone(), now);
            });
            if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        make(plan, disk, &mut tell).map_err(|error| match error {
            MergeError::Image { source: qcow2::Error::Cancelled, .. } => MergeError::Stopping,
            error => error,
        })?;
        left.store(after_this, Ordering::Relaxed);
        disks.push(describe(plan, disk, known, &absorbed)?);
        before += 2 * disk.row.size_bytes;
    }
    let manifest = describe_all(published, absorbed, disks);
    merging::finish_merging(&plan.paths, &manifest.encode().map_err(io::Error::from)?)?;
    Ok(directory::load(&plan.paths.merging, &plan.point.id)?)
}

fn mismatch(plan: &Plan, disk_id: u32) -> MergeError {
    MergeError::Mismatch { point: plan.point.id.clone(), disk_id }
}

/// One image, made, checked and compared.
fn make(plan: &Plan, disk: &PlannedDisk, tell: &mut dyn FnMut(u64) -> ControlFlow<()>) -> Result<(), MergeError> {
    let PlannedDisk { row, parent, base } = disk;
    let disk_id = row.disk_id;
    let failed = |source| MergeError::Image { disk_id, source };
    let options = OpenOptions { backing_root: Some(plan.paths.vm.clone()), ..OpenOptions::new(Access::ReadOnly) };
    let source = Image::open(&plan.paths.published.join(&row.file), &options).map_err(failed)?;
    // The record says what may go; so the images must say the same before anything is built on it.
    let recorded =
        [parent, base].into_iter().flatten().map(|(id, row)| plan.paths.vm.join(id.as_str()).join(&row.file));
    let found: Vec<_> = source.chain().into_iter().skip(1).take(2).collect();
    if !recorded.eq(found) || source.size() != row.size_bytes {
        return Err(mismatch(plan, disk_id));
    }
    let backing = base
        .as_ref()
        .map(|(id, row)| Backing { name: layout::backing_name(id, &row.file), format: BackingFormat::Qcow2 });
    let cluster_size = u32::try_from(source.cluster_size()).map_err(|_| mismatch(plan, disk_id))?;
    let shape = CreateOptions { cluster_size, backing: backing.clone(), ..CreateOptions::new(row.size_bytes) };
    let path = plan.paths.merging.join(&row.file);
    qcow2::merge(&source, 2, &path, &shape, &options, &mut |now| tell(now.done)).map_err(failed)?;
    let info = qcow2::info(&path).map_err(failed)?;
    if info.size != row.size_bytes || info.backing != backing || info.dirty {
        return Err(mismatch(plan, disk_id));
    }
    // Opened anew, from what is in the file: what was copied is not what is believed.
    let made = Disk::open(&path, BackingFormat::Qcow2, &options).map_err(failed)?;
    let compared = qcow2::compare(&source.into(), &made, &mut |now| tell(row.size_bytes + now.done)).map_err(failed)?;
    match compared.difference {
        Some(difference) => Err(MergeError::Unequal { disk_id, offset: difference.offset }),
        None => Ok(()),
    }
}

/// What the manifest says of a disk that was made anew. What the job observed when the bytes came stays as it is.
fn describe(
    plan: &Plan,
    disk: &PlannedDisk,
    known: &ManifestDisk,
    absorbed: &[Manifest],
) -> Result<ManifestDisk, MergeError> {
    let below = disk.base.as_ref();
    // The delta of the image now begins where that of the parent did. Records of older versions do not have it.
    let of_parent = |(id, _): &(BackupId, PointDiskRow)| {
        let parent = absorbed.iter().find(|manifest| manifest.backup_id == *id)?;
        parent.disks.iter().find(|known| known.disk_id == disk.row.disk_id)?.from_change_id.clone()
    };
    Ok(ManifestDisk {
        file_bytes: directory::file_bytes(&plan.paths.merging.join(&disk.row.file))?,
        backup_type: if below.is_some() { BackupType::Incremental } else { BackupType::Full },
        from_change_id: below.and_then(|_| of_parent(disk.parent.as_ref()?)),
        parent_id: below.map(|(id, _)| id.clone()),
        chain_depth: below.map_or(1, |(_, row)| row.chain_depth + 1),
        ..known.clone()
    })
}

fn describe_all(published: Manifest, absorbed: Vec<Manifest>, disks: Vec<ManifestDisk>) -> Manifest {
    let is_incremental = disks.iter().any(|disk| disk.backup_type == BackupType::Incremental);
    let mut merged = published.merged;
    for manifest in absorbed {
        merged.extend(manifest.merged);
        merged.push(manifest.backup_id);
    }
    // The ids of a hub are in the order of their jobs.
    merged.sort();
    merged.dedup();
    Manifest {
        readme: Manifest::readme_for(&disks),
        backup_type: if is_incremental { BackupType::Incremental } else { BackupType::Full },
        service_version: env!("CARGO_PKG_VERSION").to_owned(),
        generation: published.generation.saturating_add(1),
        merged,
        disks,
        ..published
    }
}
