//! Compressed clusters: from the bytes in the file to one whole cluster, with memory bounded whatever those bytes say.

use std::io::Read;

use crate::error::{Error, Result};
use crate::sync::{Arc, Mutex, lock};

/// Decoded clusters kept per image, and the bytes they may have together if they are more than one: neighbouring small
/// reads of one cluster decode it once.
const KEEP: usize = 8;
const KEEP_BYTES: usize = 2 << 20;
/// Largest window that a zstd frame may ask for: 8 MiB, four times the largest cluster.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// How the clusters of an image are compressed: one type for the whole image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    Deflate,
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
