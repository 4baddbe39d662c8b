//! How fast images are written in a folder: one is written by the engine, in a file without a name.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockyard_qcow2::storage::{FileStorage, Mode};
use blockyard_qcow2::{Access, CreateOptions, Durability, Image, OpenOptions, create_on};

use super::{DoctorError, MIB};

const SEQUENTIAL_BYTES: usize = 1 << 20;
const RANDOM_BYTES: usize = 4096;
/// At most so many small writes: they are for the rate, not for the disk.
const RANDOM_WRITES: u64 = 16384;
/// Of each kind of write. Nothing is begun after it.
const TIME: Duration = Duration::from_secs(4);
/// A flush ends each batch. A batch is twice the one before as long as they take less than this, so that neither flushes
/// are the most of it on a quick disk, nor a slow one is asked for more than can be waited for.
const BATCH_TIME: Duration = Duration::from_millis(250);

/// How images are written, and how fast.
#[derive(Debug)]
pub(super) struct Speed {
    pub(super) mode: Mode,
    pub(super) sequential: Rate,
    pub(super) random: Rate,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    pub(super) bytes: u64,
    /// From the first write to the end of the last flush.
    pub(super) time: Duration,
}

impl Rate {
    #[allow(clippy::cast_precision_loss, reason = "shown with one decimal")]
    pub(super) fn mib_per_s(self) -> f64 {
        self.bytes as f64 / MIB as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

/// Writes an image of at most `bytes`, in order, and then blocks all over it.
pub(super) fn measure(folder: &Path, bytes: u64, is_over: &AtomicBool) -> Result<Speed, DoctorError> {
    let failed = || DoctorError::image(folder);
    let file = tempfile::tempfile_in(folder).map_err(DoctorError::step(folder, "making a file"))?;
    // As opening an image by its path does, whose clusters have whole pages.
    let storage = Arc::new(FileStorage::with_direct_access(file));
    let pieces = (bytes / MIB).max(1);
    create_on(&*storage, &CreateOptions::new(pieces * MIB)).map_err(failed())?;
    let image = Image::open_on_with(storage.clone(), None, &OpenOptions::new(Access::ReadWrite)).map_err(failed())?;
    let data = noise(SEQUENTIAL_BYTES);
    let run = |count, data, offset: &dyn Fn(u64) -> u64| batches(folder, &image, count, data, offset, is_over);
    let sequential = run(pieces, &data, &|number| number * MIB)?;
    // Where there is data: these writes go to places that the image has already.
    let blocks = sequential.bytes / RANDOM_BYTES as u64;
    // A prime: no block comes up twice, and with a quarter of them next to none has a neighbour to be merged with.
    let scattered = |number: u64| number * 2_654_435_761 % blocks * RANDOM_BYTES as u64;
    let random = run(RANDOM_WRITES.min(blocks / 4), data.get(..RANDOM_BYTES).unwrap_or_default(), &scattered)?;
    image.close().map_err(failed())?;
    Ok(Speed { mode: storage.mode(), sequential, random })
}

/// Writes `data` `count` times, or until the time is up, and flushes.
fn batches(
    folder: &Path,
    image: &Image,
    count: u64,
    data: &[u8],
    offset: &dyn Fn(u64) -> u64,
    is_over: &AtomicBool,
) -> Result<Rate, DoctorError> {
    let begin = Instant::now();
    let (mut done, mut batch) = (0, 8);
    while done < count && begin.elapsed() < TIME {
        let start = Instant::now();
        let end = count.min(done + batch);
        while done < end && begin.elapsed() < TIME {
            if is_over.load(Ordering::Relaxed) {
                return Err(DoctorError::Interrupted);
            }
            image.write(offset(done), data, Durability::OnFlush).map_err(DoctorError::image(folder))?;
            done += 1;
        }
        image.flush().map_err(DoctorError::image(folder))?;
        if start.elapsed() < BATCH_TIME {
            batch *= 2;
        }
    }
    Ok(Rate { bytes: done * data.len() as u64, time: begin.elapsed() })
}

/// Bytes that no file system can make smaller.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}
