//! Readers that share no code with the engine: QEMU, imago and qcow2-rs. Each says what it can read, and compares.
//!
//! Their known limits: imago refuses zstd and images that were not closed. qcow2-rs reads clusters of 4 KiB and more,
//! deflate only, and overlays whose base is an image of the same size.
#![allow(unreachable_pub, reason = "part of the tests that include it")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use blockyard_qcow2::{BackingFormat, ImageInfo, info};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::tokio_io::Qcow2IoTokio;
use qcow2_rs::utils::qcow2_alloc_dev;

use super::support::{assert_clean, assert_reads_as};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    Qemu,
    Imago,
    Qcow2Rs,
}

pub const READERS: [Reader; 3] = [Reader::Qemu, Reader::Imago, Reader::Qcow2Rs];

/// An image and the images below it, the top one first.
pub struct Chain {
    layers: Vec<(PathBuf, ImageInfo)>,
    over_raw: bool,
}

impl Chain {
    pub fn of(path: &Path) -> Self {
        let mut chain = Self { layers: Vec::new(), over_raw: false };
        let mut next = Some(path.to_owned());
        while let Some(path) = next.take() {
            let facts = info(&path).unwrap();
            if let Some(backing) = &facts.backing {
                match backing.format {
                    BackingFormat::Qcow2 => next = Some(path.parent().unwrap().join(&backing.name)),
                    BackingFormat::Raw => chain.over_raw = true,
                }
            }
            chain.layers.push((path, facts));
        }
        chain
    }

    fn all(&self, rule: impl Fn(&ImageInfo) -> bool) -> bool {
        self.layers.iter().all(|(_, facts)| rule(facts))
    }
}

impl Reader {
    pub fn accepts(self, chain: &Chain) -> bool {
        let size = chain.layers[0].1.size;
        match self {
            Self::Qemu => true,
            Self::Imago => chain.all(|facts| !facts.zstd && !facts.dirty),
            Self::Qcow2Rs => {
                !chain.over_raw
                    && chain.all(|facts| {
                        facts.cluster_size >= 4096 && !facts.zstd && facts.size == size && size.is_multiple_of(512)
                    })
            }
        }
    }

    /// Reads the whole disk, compares, and panics at the first difference.
    pub fn judge(self, chain: &Chain, content: &[u8]) {
        let path = &chain.layers[0].0;
        let read = match self {
            Self::Qemu => {
                assert_clean(path);
                assert_reads_as(path, content);
                return;
            }
            // Neither's futures are `Send`, and each expects a runtime to itself.
            Self::Imago => alone(read_with_imago(path, content.len())),
            Self::Qcow2Rs => alone(read_with_qcow2_rs(chain, content.len())),
        };
        let wrong = read.iter().zip(content).position(|(found, expected)| found != expected);
        assert_eq!(wrong, None, "{self:?} reads another byte first there in {}", path.display());
    }
}

fn alone<T>(reading: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(reading)
}

async fn read_with_imago(path: &Path, length: usize) -> Vec<u8> {
    let image = Qcow2::<File>::builder_path(path).open(PermissiveImplicitOpenGate::default()).await.unwrap();
    let image = FormatAccess::new(image);
    assert_eq!(image.size(), length as u64);
    let mut content = vec![0xee; length];
    image.read(&mut content[..], 0).await.unwrap();
    content
}

async fn read_with_qcow2_rs(chain: &Chain, length: usize) -> Vec<u8> {
    let mut below: Option<Qcow2Dev<Qcow2IoTokio>> = None;
    for (index, (path, _)) in chain.layers.iter().enumerate().rev() {
        let parameters = Qcow2DevParams::new(9, None, None, true, false);
        if index > 0 {
            parameters.mark_backing_dev(Some(true));
        }
        let file = Qcow2IoTokio::new(path, true, false).await;
        // The name that it finds in the header is not used: it would be looked up in the working directory.
        let (mut device, _) = qcow2_alloc_dev(path, file, &parameters).await.unwrap();
        if let Some(below) = below.take() {
            device.set_backing_dev(Box::new(below));
        }
        below = Some(device);
    }
    let device = below.unwrap();
    device.qcow2_prep_io().await.unwrap();
    assert_eq!(device.info.virtual_size(), length as u64);
    let mut content = vec![0xee; length];
    for (number, cluster) in content.chunks_mut(device.info.cluster_size()).enumerate() {
        let offset = (number * device.info.cluster_size()) as u64;
        assert_eq!(device.read_at(cluster, offset).await.unwrap(), cluster.len(), "at {offset}");
    }
    content
}
