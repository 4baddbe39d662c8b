//! Reading a restore point back the way a restore would: its image, opened read-only, served over NBD by our own listener,
//! read from the first byte to the last by a client.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use blockyard_nbd::client::{Client, ClientError, Uri};
use sha2::{Digest, Sha256};

use super::DemoError;
use crate::config;
use crate::export::ImageExport;
use crate::listeners::ports::PortPool;
use crate::listeners::{DiskListener, ListenerOptions};
use crate::node::fake::Source;

/// Bytes per read: large enough that requests cost little, small enough to keep several in memory.
const PIECE_BYTES: u32 = 4 << 20;
/// Ports for exports of restore points.
const PORTS: RangeInclusive<u16> = 10_300..=10_399;

/// SHA-256 of a source, in hexadecimal.
pub(super) async fn hash_source(source: &Source) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut offset = 0;
    while offset < source.size_bytes() {
        let length = (source.size_bytes() - offset).min(u64::from(PIECE_BYTES));
        hash.update(source.read(offset, usize::try_from(length).map_err(io::Error::other)?).await?);
        offset += length;
    }
    Ok(hexadecimal(&hash.finalize()))
}

/// SHA-256 of the virtual disk in an image, as an NBD client reads it.
pub(super) async fn hash_over_nbd(image: &Path, disk_id: u32, nbd: &config::Nbd) -> Result<String, DemoError> {
    let failed = |reason: String| DemoError::Restore { disk_id, reason };
    let name = format!("restore-disk{disk_id}");
    let export = ImageExport::open_read_only(&name, image).await.map_err(|error| failed(error.to_string()))?;
    let ports = PortPool::new(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let port = ports.lease(&PORTS, 1).map_err(|error| failed(error.to_string()))?.pop();
    let port = port.ok_or_else(|| failed("there is no free port".to_owned()))?;
    let uri = format!("nbd://127.0.0.1:{}/{name}", port.lease.port());
    let listener = DiskListener::serve(port, &export, &ListenerOptions::new(nbd)).map_err(|error| failed(error.to_string()))?;
    let mut hash = Sha256::new();
    let read = read_whole(&uri, &mut hash).await;
    listener.stop(Duration::ZERO).await;
    read.map_err(|error| failed(error.to_string()))?;
    Ok(hexadecimal(&hash.finalize()))
}

/// Reads an export from its first byte to its last, one piece after the other, and says goodbye.
async fn read_whole(uri: &str, hash: &mut Sha256) -> Result<(), ReadError> {
    let client = Client::connect(&uri.parse::<Uri>()?).await?;
    let size = client.size();
    let mut offset = 0;
    while offset < size {
        let length = u32::try_from(size - offset).map_or(PIECE_BYTES, |rest| rest.min(PIECE_BYTES));
        hash.update(client.read(offset, length).await?);
        offset += u64::from(length);
    }
    Ok(client.disconnect().await?)
}

/// What went wrong on the client's side.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Uri(#[from] blockyard_nbd::client::UriError),
    #[error(transparent)]
    Client(#[from] ClientError),
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_source_is_hashed_to_its_last_byte() {
        let hash = hash_source(&Source::Bytes((*b"abc").into())).await.unwrap();
        assert_eq!(hash, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
