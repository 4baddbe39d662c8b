//! Serves a disk in memory, to try clients against and to measure the protocol without a disk behind it:
//! `cargo run --release -p blockyard-nbd --example memory -- 127.0.0.1:10809 1024 [null]` (size in MiB; `null` drops what is
//! written and reads as zeroes).
#![allow(clippy::print_stdout, reason = "a program for people")]

use std::error::Error as StdError;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use async_trait::async_trait;
use blockyard_nbd::{
    Budget, BudgetLimits, Buffer, Content, Context, Device, Durability, Error, Export, Exports, Extent, Options,
    Server, Space,
};
use tokio::net::TcpListener;

/// Bytes per separately locked part of the disk.
const PART: u64 = 256 << 10;

/// Buffers wait here to be used again: fresh ones of this size cost a page fault for every 4 KiB.
type Pool = Arc<Mutex<Vec<Vec<u8>>>>;

struct Pooled {
    bytes: Vec<u8>,
    pool: Pool,
}

impl AsRef<[u8]> for Pooled {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsMut<[u8]> for Pooled {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).push(std::mem::take(&mut self.bytes));
    }
}

struct Memory {
    size: u64,
    /// Empty for the null disk.
    parts: Vec<RwLock<Vec<u8>>>,
    pool: Pool,
}

impl Memory {
    /// Calls `work` with each part of the range: the part, where in it, and where in the range.
    fn each(&self, offset: u64, length: u64, mut work: impl FnMut(&RwLock<Vec<u8>>, usize, std::ops::Range<usize>)) {
        let mut at = offset;
        while at < offset + length {
            let next = (offset + length).min((at / PART + 1) * PART);
            if let Some(part) = self.parts.get((at / PART) as usize) {
                work(part, (at % PART) as usize, (at - offset) as usize..(next - offset) as usize);
            }
            at = next;
        }
    }
}

#[async_trait]
impl Device for Memory {
    fn buffer(&self, _offset: u64, length: usize) -> Buffer {
        let mut bytes = self.pool.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        bytes.resize(length, 0);
        Box::new(Pooled { bytes, pool: self.pool.clone() })
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Content, Error> {
        let bytes = (*buffer).as_mut();
        self.each(offset, bytes.len() as u64, |part, start, range| {
            let part = part.read().unwrap_or_else(PoisonError::into_inner);
            bytes[range.clone()].copy_from_slice(&part[start..start + range.len()]);
        });
        Ok(buffer.into())
    }

    async fn write(&self, offset: u64, buffer: Buffer, _: Durability) -> Result<(), Error> {
        let bytes = (*buffer).as_ref();
        self.each(offset, bytes.len() as u64, |part, start, range| {
            let mut part = part.write().unwrap_or_else(PoisonError::into_inner);
            part[start..start + range.len()].copy_from_slice(&bytes[range]);
        });
        Ok(())
    }

    async fn zero(&self, offset: u64, length: u64, _: Space, _: Durability) -> Result<(), Error> {
        self.each(offset, length, |part, start, range| {
            part.write().unwrap_or_else(PoisonError::into_inner)[start..start + range.len()].fill(0);
        });
        Ok(())
    }

    async fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), Error> {
        self.zero(offset, length, Space::Release, durability).await
    }

    async fn fast_zero(&self, _offset: u64, _length: u64) -> bool {
        false
    }

    async fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    async fn extents(&self, _: Context, _offset: u64, length: u64, _max: usize) -> Result<Vec<Extent>, Error> {
        Ok(vec![Extent { length, status: 0 }])
    }
}

struct Disk(Arc<Memory>);

#[async_trait]
impl Export for Disk {
    fn name(&self) -> &str {
        "memory"
    }

    fn size(&self) -> u64 {
        self.0.size
    }

    fn read_only(&self) -> bool {
        false
    }

    async fn open(&self) -> Result<Arc<dyn Device>, Error> {
        Ok(self.0.clone())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn StdError>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (address, mib, null) = match arguments.as_slice() {
        [address, mib] => (address, mib.parse::<u64>()?, false),
        [address, mib, null] if null == "null" => (address, mib.parse::<u64>()?, true),
        _ => return Err("usage: memory ADDRESS MIB [null]".into()),
    };
    let parts = if null { 0 } else { (mib << 20) / PART };
    let parts = (0..parts).map(|_| RwLock::new(vec![0; PART as usize])).collect();
    let memory = Arc::new(Memory { size: mib << 20, parts, pool: Pool::default() });
    let options = Options::new(Budget::new(&BudgetLimits::default()));
    let server = Server::start(TcpListener::bind(address).await?, Exports::single(Arc::new(Disk(memory)))?, options)?;
    println!("{}", server.uris().join("\n"));
    std::future::pending::<()>().await;
    Ok(())
}
