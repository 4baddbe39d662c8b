//! What the fuzz targets do with their bytes, so that an ordinary test can do the same with the corpus. A finding is a
//! panic; a typed error never is one.
#![allow(dead_code, reason = "each target uses one function")]
#![allow(unreachable_pub, clippy::unwrap_used, reason = "a finding is a panic")]

use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use blockyard_qcow2::storage::MemoryStorage;
use blockyard_qcow2::{
    Access, Backing, BackingFormat, CreateOptions, Durability, Error, Image, Layer, Result, ZeroMode, check_on,
    create_on, info_on, repair_on,
};

/// How far an image may grow: far enough for a close, too little for a mistake to go unnoticed.
const DISK_BYTES: u64 = 64 << 20;
const CACHE_BYTES: usize = 1 << 20;

fn file(bytes: &[u8]) -> Arc<MemoryStorage> {
    Arc::new(MemoryStorage::with_content(bytes.to_vec(), DISK_BYTES))
}

/// A raw layer of 100,000 bytes, for images that name a backing file.
fn below() -> Layer {
    let storage = MemoryStorage::with_content(vec![0xb5; 100_000], DISK_BYTES);
    Layer::Raw { size: 100_000, storage: Arc::new(storage) }
}

fn open(file: &Arc<MemoryStorage>, access: Access) -> Result<Image> {
    Image::open_on(file.clone(), access, Some(below()), CACHE_BYTES)
}

/// Header, extensions and backing name: a typed error or the facts.
pub fn header(bytes: &[u8]) {
    if let Ok(facts) = info_on(&*file(bytes)) {
        assert!((2..=3).contains(&facts.version) && facts.cluster_size.is_power_of_two());
        assert!(facts.size <= i64::MAX as u64 && facts.refcount_bits <= 64);
    }
}

/// The bytes at both ends of the disk and of its first extents, as far as they can be read.
fn sample(image: &Image) -> Vec<Option<Vec<u8>>> {
    let read = |offset: u64, length: u64| {
        let mut buffer = vec![0x77; length.min(image.size() - offset) as usize];
        image.read(offset, &mut buffer).ok().map(|()| buffer)
    };
    let mut samples = vec![read(0, 65_536), read(image.size() - image.size().min(4096), 4096)];
    let extents = image.map(0, image.size(), 100).unwrap_or_default();
    let mut end = 0;
    for extent in extents {
        assert_eq!(extent.offset, end, "extents have no gaps");
        assert!(extent.length > 0, "no extent is empty");
        end += extent.length;
        samples.push(read(extent.offset, 512));
    }
    assert!(end <= image.size());
    samples
}

/// Reading never changes the file; what can be opened for writing takes changes, keeps them, and is clean when closed.
pub fn open_and_read(bytes: &[u8]) {
    let image_file = file(bytes);
    if let Ok(image) = open(&image_file, Access::ReadOnly) {
        sample(&image);
        image.close().unwrap();
    }
    let opened = open(&image_file, Access::ReadWrite);
    assert!(image_file.content() == bytes, "opening and reading changed the file");
    let Ok(image) = opened else { return };
    let at = image.size() / 2;
    let length = 5000.min(image.size() - at) as usize;
    let changed = image
        .write(at, &vec![0xab; length], Durability::OnFlush)
        .and_then(|()| image.flush())
        .and_then(|()| image.zero(0, 1000.min(at), ZeroMode::Unmap, Durability::BeforeReply));
    let closed = image.close();
    assert_protected(bytes, &image_file.content());
    if changed.is_err() || closed.is_err() {
        return;
    }
    let report = check_on(&*image_file).unwrap();
    assert!(report.is_clean(), "{report:?}");
    let image = open(&image_file, Access::ReadOnly).unwrap();
    let mut buffer = vec![0; length];
    image.read(at, &mut buffer).unwrap();
    assert!(buffer.iter().all(|byte| *byte == 0xab), "a write was lost");
}

/// Magic, version, cluster_bits, size and the L1 fields never change unasked.
fn assert_protected(before: &[u8], after: &[u8]) {
    for range in [0..8, 20..32, 36..48] {
        assert_eq!(before.get(range.clone()), after.get(range.clone()), "header bytes {range:?} changed");
    }
}

/// A check changes nothing; a repair that succeeds leaves a clean image with the same content, one that refuses the same
/// bytes.
pub fn check_and_repair(bytes: &[u8]) {
    let image_file = file(bytes);
    let checked = check_on(&*image_file);
    assert!(image_file.content() == bytes, "a check changed the file");
    let content = |file: &Arc<MemoryStorage>| open(file, Access::ReadOnly).map(|image| sample(&image));
    let before = content(&image_file);
    match repair_on(&*image_file) {
        Ok(report) => {
            assert_eq!(report, checked.unwrap(), "a repair reports what a check finds");
            let again = check_on(&*image_file).unwrap();
            assert!(again.is_clean(), "not clean after a repair: {again:?}, before: {report:?}");
            assert_protected(bytes, &image_file.content());
            let after = content(&image_file);
            match (before, after) {
                (Ok(before), Ok(after)) => assert!(before == after, "a repair changed the content"),
                // The header cannot be opened with or without the repair (a backing format that is unknown).
                (before, after) => assert_eq!(before.is_ok(), after.is_ok()),
            }
        }
        Err(Error::Io { .. }) => {}
        Err(_) => assert!(image_file.content() == bytes, "a refused repair changed the file"),
    }
}

#[derive(Debug, Arbitrary)]
struct Plan {
    cluster_bits: u8,
    refcount_order: u8,
    sectors: u16,
    has_backing: bool,
    operations: Vec<Operation>,
}

#[derive(Debug, Arbitrary)]
enum Operation {
    Write { at: u16, length: u16, byte: u8, durable: bool },
    Zero { at: u16, length: u16, keep: bool },
    Discard { at: u16, length: u16 },
    Read { at: u16, length: u16 },
    Map,
    Flush,
    Close,
    Crash,
}

/// Any sequence of operations reads as an array of bytes would; every close leaves a clean image.
pub fn operations(bytes: &[u8]) {
    let Ok(plan) = Plan::arbitrary_take_rest(Unstructured::new(bytes)) else { return };
    let size = u64::from(plan.sectors % 2048) * 512;
    let options = CreateOptions {
        cluster_size: 512 << (plan.cluster_bits % 8),
        refcount_bits: 1 << (plan.refcount_order % 7),
        backing: plan.has_backing.then(|| Backing { name: "below".into(), format: BackingFormat::Raw }),
        ..CreateOptions::new(size)
    };
    let image_file = file(&[]);
    create_on(&*image_file, &options).unwrap();
    let mut model = vec![0; size as usize];
    if plan.has_backing {
        let inside = model.len().min(100_000);
        model[..inside].fill(0xb5);
    }
    let mut image = open(&image_file, Access::ReadWrite).unwrap();
    for operation in plan.operations.iter().take(64) {
        run(operation, &mut image, &image_file, &mut model);
    }
    let mut disk = vec![0; model.len()];
    image.read(0, &mut disk).unwrap();
    assert!(disk == model, "the disk differs from the model");
    image.close().unwrap();
    assert!(check_on(&*image_file).unwrap().is_clean());
}

fn run(operation: &Operation, image: &mut Image, file: &Arc<MemoryStorage>, model: &mut [u8]) {
    let size = model.len() as u64;
    // Sixteen-bit numbers over a megabyte: every offset can be hit, short lengths more often.
    let place = |at: u16, length: u16| {
        let at = (u64::from(at) * 17).min(size);
        (at, u64::from(length).pow(2).div_ceil(4096).min(size - at))
    };
    match *operation {
        Operation::Write { at, length, byte, durable } => {
            let (at, length) = place(at, length);
            let durability = if durable { Durability::BeforeReply } else { Durability::OnFlush };
            image.write(at, &vec![byte; length as usize], durability).unwrap();
            model[at as usize..(at + length) as usize].fill(byte);
        }
        Operation::Zero { at, length, keep } => {
            let (at, length) = place(at, length);
            let mode = if keep { ZeroMode::Keep } else { ZeroMode::Unmap };
            image.zero(at, length, mode, Durability::OnFlush).unwrap();
            model[at as usize..(at + length) as usize].fill(0);
        }
        Operation::Discard { at, length } => {
            let (at, length) = place(at, length);
            image.discard(at, length, Durability::OnFlush).unwrap();
            let cluster = image.cluster_size();
            let start = at.next_multiple_of(cluster);
            let end = if at + length == size { size } else { (at + length) / cluster * cluster };
            if start < end {
                model[start as usize..end as usize].fill(0);
            }
        }
        Operation::Read { at, length } => {
            let (at, length) = place(at, length);
            let mut buffer = vec![0; length as usize];
            image.read(at, &mut buffer).unwrap();
            assert!(buffer == model[at as usize..(at + length) as usize], "bytes {at}+{length} differ");
        }
        Operation::Map => {
            let extents = image.map(0, size, usize::MAX).unwrap();
            assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), size);
        }
        Operation::Flush => image.flush().unwrap(),
        Operation::Close => {
            image.close().unwrap();
            let report = check_on(&**file).unwrap();
            assert!(report.is_clean(), "{report:?}");
            *image = open(file, Access::ReadWrite).unwrap();
        }
        Operation::Crash => {
            // Memory keeps what it was given: after a flush nothing may be missing, without a close.
            image.flush().unwrap();
            *image = open(file, Access::ReadWrite).unwrap();
        }
    }
}
