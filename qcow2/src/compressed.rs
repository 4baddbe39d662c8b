//! Compressed clusters: from the bytes in the file to one whole cluster, with memory bounded whatever those bytes say, and
//! back. Where compressed bytes go is not decided here (`packing`).

use std::io::Read;

use flate2::{Compress, FlushCompress, Status};

use crate::error::{Error, Result};
use crate::geometry::SECTOR;
use crate::sync::{Arc, Mutex, lock};

/// Decoded clusters kept per image, and the bytes they may have together if they are more than one: neighbouring small
/// reads of one cluster decode it once.
const KEEP: usize = 8;
const KEEP_BYTES: usize = 2 << 20;
/// Largest window that a zstd frame may ask for: 8 MiB, four times the largest cluster.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;
/// Window of the deflate streams that we write: what QEMU reads with.
const DEFLATE_WINDOW_BITS: u8 = 12;

/// How much work goes into making compressed clusters small. The kind of compression is the image's, fixed when it was
/// created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CompressionLevel {
    /// Keeps up with fast disks: deflate 1, zstd 1.
    Fast,
    /// What the compressors themselves recommend: deflate 6, zstd 3.
    Balanced,
    /// For images that are written once and kept: deflate 9, zstd 12.
    Small,
}

/// How the clusters of an image are compressed: one type for the whole image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// zlib's method without its header; every reader of the format knows it.
    Deflate,
    /// Faster, and needs QEMU 5.1 or later.
    Zstd,
}

impl Compression {
    /// From the header field, whose range was checked when it was decoded.
    pub(crate) fn from_header(compression_type: u8) -> Self {
        if compression_type == 1 { Self::Zstd } else { Self::Deflate }
    }

    /// Decodes exactly one cluster; what follows the stream in its last sector is ignored.
    fn inflate(self, payload: &[u8], cluster: &mut [u8]) -> std::io::Result<()> {
        match self {
            Self::Deflate => flate2::read::DeflateDecoder::new(payload).read_exact(cluster),
            Self::Zstd => {
                // Several frames may make up one cluster; reading goes on from one to the next.
                let mut decoder = zstd::stream::read::Decoder::with_buffer(payload)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                decoder.read_exact(cluster)
            }
        }
    }
}

/// Makes compressed clusters, one after the other, with memory that is used again.
pub(crate) struct Compressor {
    engine: Engine,
    output: Vec<u8>,
}

enum Engine {
    Deflate(Compress),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    /// For clusters of `cluster_size` bytes.
    pub(crate) fn new(compression: Compression, level: CompressionLevel, cluster_size: u64) -> std::io::Result<Self> {
        let (deflate, zstd) = match level {
            CompressionLevel::Fast => (1, 1),
            CompressionLevel::Balanced => (6, 3),
            CompressionLevel::Small => (9, 12),
        };
        let engine = match compression {
            Compression::Deflate => {
                let level = flate2::Compression::new(deflate);
                Engine::Deflate(Compress::new_with_window_bits(level, false, DEFLATE_WINDOW_BITS))
            }
            Compression::Zstd => Engine::Zstd(zstd::bulk::Compressor::new(zstd)?),
        };
        // A sector less than the cluster at least, or compressing it gains nothing.
        Ok(Self { engine, output: vec![0; (cluster_size - SECTOR) as usize] })
    }

    /// The compressed bytes of one whole cluster, `None` when they would not save a sector.
    pub(crate) fn compress(&mut self, cluster: &[u8]) -> Option<&[u8]> {
        let length = match &mut self.engine {
            Engine::Deflate(stream) => {
                stream.reset();
                match stream.compress(cluster, &mut self.output, FlushCompress::Finish) {
                    Ok(Status::StreamEnd) => stream.total_out() as usize,
                    _ => return None,
                }
            }
            // The error is that the output is full; whatever else it were, storing the cluster as it is would be right.
            Engine::Zstd(frame) => frame.compress_to_buffer(cluster, &mut self.output[..]).ok()?,
        };
        self.output.get(..length).filter(|bytes| !bytes.is_empty())
    }
}

/// The clusters decoded last, by the host offset of their compressed bytes. Never stale: compressed bytes are not
/// overwritten, and their space is not reused within a session.
#[derive(Debug, Default)]
pub(crate) struct Inflated {
    recent: Mutex<Vec<(u64, Arc<[u8]>)>>,
}

impl Inflated {
    /// The cluster whose compressed bytes begin at `host`, decoded by `load` if it is not at hand.
    pub(crate) fn cluster(&self, host: u64, load: impl FnOnce() -> Result<Vec<u8>>) -> Result<Arc<[u8]>> {
        if let Some((_, cluster)) = lock(&self.recent).iter().find(|(at, _)| *at == host) {
            return Ok(cluster.clone());
        }
        let cluster: Arc<[u8]> = load()?.into();
        let mut recent = lock(&self.recent);
        recent.truncate((KEEP_BYTES / cluster.len().max(1)).clamp(1, KEEP) - 1);
        recent.insert(0, (host, cluster.clone()));
        Ok(cluster)
    }
}

/// Decodes the compressed bytes found at `host` into one cluster.
pub(crate) fn inflate(compression: Compression, payload: &[u8], cluster_size: u64, host: u64) -> Result<Vec<u8>> {
    let mut cluster = vec![0; cluster_size as usize];
    compression.inflate(payload, &mut cluster).map_err(|_| {
        let rule = "must decompress to exactly one cluster";
        Error::corrupt("compressed cluster", host, payload.len() as u64, rule)
    })?;
    Ok(cluster)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clusters that tempt a compressor to look far back: blocks of noise repeated at every distance, runs, and text.
    fn tempting(cluster_size: usize) -> Vec<Vec<u8>> {
        let mut random = fastrand::Rng::with_seed(5);
        let mut clusters: Vec<Vec<u8>> = vec![vec![0; cluster_size], vec![0xa5; cluster_size]];
        for distance in [300, 3_800, 4_095, 4_096, 4_097, 5_000, 20_000, 40_000] {
            let block: Vec<u8> = (0..distance).map(|_| random.u8(..)).collect();
            let mut cluster = block.repeat(cluster_size.div_ceil(distance));
            cluster.truncate(cluster_size);
            // Half of it repeats at once, so that the stream becomes smaller than the cluster with any window.
            cluster[cluster_size / 2..].fill(7);
            clusters.push(cluster);
        }
        clusters
    }

    #[test]
    fn what_is_compressed_is_smaller_and_comes_back_whatever_the_level() {
        for compression in [Compression::Deflate, Compression::Zstd] {
            for level in [CompressionLevel::Fast, CompressionLevel::Balanced, CompressionLevel::Small] {
                for cluster_size in [1024, 4096, 65_536] {
                    let mut compressor = Compressor::new(compression, level, cluster_size as u64).unwrap();
                    for cluster in tempting(cluster_size) {
                        let Some(bytes) = compressor.compress(&cluster) else { continue };
                        assert!(bytes.len() + 512 <= cluster_size);
                        let mut back = vec![1; cluster_size];
                        compression.inflate(bytes, &mut back).unwrap();
                        assert!(back == cluster, "{compression:?} {level:?} {cluster_size}");
                    }
                    assert!(compressor.compress(&vec![0; cluster_size]).is_some(), "zeroes are compressible");
                }
            }
        }
    }

    #[test]
    fn a_decoder_with_a_window_of_4_kib_reads_our_deflate_streams() {
        let mut streams = 0;
        for level in [CompressionLevel::Fast, CompressionLevel::Balanced, CompressionLevel::Small] {
            for cluster_size in [65_536, 512 << 10] {
                let mut compressor = Compressor::new(Compression::Deflate, level, cluster_size as u64).unwrap();
                for cluster in tempting(cluster_size) {
                    let Some(bytes) = compressor.compress(&cluster) else { continue };
                    streams += 1;
                    // In pieces, so that the decoder has nothing but its window to look back into.
                    let mut decoder = flate2::Decompress::new_with_window_bits(false, DEFLATE_WINDOW_BITS);
                    let mut back = Vec::new();
                    while back.len() < cluster_size {
                        let mut piece = [0; 256];
                        let (taken, made) = (decoder.total_in() as usize, decoder.total_out());
                        decoder.decompress(&bytes[taken..], &mut piece, flate2::FlushDecompress::None).unwrap();
                        assert!(decoder.total_out() > made, "the stream ends early");
                        back.extend_from_slice(&piece[..(decoder.total_out() - made) as usize]);
                    }
                    assert!(back == cluster, "{level:?} {cluster_size}");
                }
            }
        }
        assert!(streams > 50, "{streams} streams");
    }

    #[test]
    fn a_zstd_cluster_may_have_several_frames_but_no_huge_window() {
        let cluster = tempting(65_536).pop().unwrap();
        let frame = |bytes: &[u8], window_log| {
            // Streamed, so that the frame states its window and not the size of its content.
            let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(window_log).unwrap();
            std::io::Write::write_all(&mut encoder, bytes).unwrap();
            encoder.finish().unwrap()
        };
        let mut back = vec![0; 65_536];
        let two = [frame(&cluster[..1000], 20), frame(&cluster[1000..], ZSTD_WINDOW_LOG_MAX)].concat();
        Compression::Zstd.inflate(&two, &mut back).unwrap();
        assert!(back == cluster);
        let huge = frame(&cluster, ZSTD_WINDOW_LOG_MAX + 1);
        assert!(Compression::Zstd.inflate(&huge, &mut back).is_err());
    }

    #[test]
    fn noise_is_not_compressed() {
        let noise: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(65_536).collect();
        for compression in [Compression::Deflate, Compression::Zstd] {
            let mut compressor = Compressor::new(compression, CompressionLevel::Fast, 65_536).unwrap();
            assert!(compressor.compress(&noise).is_none());
        }
    }
}
