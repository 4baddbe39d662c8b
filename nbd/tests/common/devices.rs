//! Test devices: `Mem` holds bytes and knows which would survive a crash; the others stand before one and get in the way.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use blockyard_nbd::{
    Buffer, Content, Context, ContextSet, Device, Durability, Error, ErrorKind, Export, Extent, Space,
};
use tokio::sync::{Semaphore, watch};

/// Bytes per block of `Mem`.
pub const BLOCK: u64 = 65536;

type Blocks = BTreeMap<u64, Arc<[u8]>>;

/// A sparse memory disk. A block that is missing is a hole. Only what was flushed survives [`Mem::crash`].
pub struct Mem {
    pub size: u64,
    now: Mutex<Blocks>,
    durable: Mutex<Blocks>,
}

impl Mem {
    pub fn new(size: u64) -> Arc<Self> {
        Arc::new(Self { size, now: Mutex::default(), durable: Mutex::default() })
    }

    /// A disk full of a pattern.
    pub fn filled(size: u64, seed: u64) -> Arc<Self> {
        let mem = Self::new(size);
        mem.put(0, &super::pattern(seed, size as usize));
        mem
    }

    pub fn put(&self, offset: u64, bytes: &[u8]) {
        let mut now = self.now.lock().unwrap();
        let mut at = offset;
        let end = offset + bytes.len() as u64;
        while at < end {
            let block = at / BLOCK;
            let next = end.min((block + 1) * BLOCK);
            let entry = now.entry(block).or_insert_with(|| vec![0; BLOCK as usize].into());
            if Arc::get_mut(entry).is_none() {
                *entry = entry.to_vec().into();
            }
            let source = &bytes[(at - offset) as usize..(next - offset) as usize];
            let inner = (at % BLOCK) as usize;
            Arc::get_mut(entry).unwrap()[inner..inner + source.len()].copy_from_slice(source);
            at = next;
        }
    }

    pub fn get(&self, offset: u64, bytes: &mut [u8]) {
        let now = self.now.lock().unwrap();
        let mut at = offset;
        let end = offset + bytes.len() as u64;
        while at < end {
            let block = at / BLOCK;
            let next = end.min((block + 1) * BLOCK);
            let target = &mut bytes[(at - offset) as usize..(next - offset) as usize];
            match now.get(&block) {
                Some(source) => {
                    let inner = (at % BLOCK) as usize;
                    target.copy_from_slice(&source[inner..inner + target.len()]);
                }
                None => target.fill(0),
            }
            at = next;
        }
    }

    /// Everything, for comparing.
    pub fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size as usize];
        self.get(0, &mut bytes);
        bytes
    }

    /// What a power cut leaves.
    pub fn crash(&self) {
        let durable = self.durable.lock().unwrap().clone();
        *self.now.lock().unwrap() = durable;
    }

    fn make_durable(&self) {
        let now = self.now.lock().unwrap().clone();
        *self.durable.lock().unwrap() = now;
    }

    fn punch(&self, offset: u64, length: u64, keep: bool) {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let block = at / BLOCK;
            let next = end.min((block + 1) * BLOCK);
            if next - at == BLOCK && !keep {
                self.now.lock().unwrap().remove(&block);
            } else if keep || self.now.lock().unwrap().contains_key(&block) {
                self.put(at, &vec![0; (next - at) as usize]);
            }
            at = next;
        }
    }

    fn settle(&self, durability: Durability) {
        if durability == Durability::BeforeReply {
            self.make_durable();
        }
    }
}

#[async_trait]
impl Device for Mem {
    fn buffer(&self, _offset: u64, length: usize) -> Buffer {
        Box::new(vec![0; length])
    }

    /// Holes are told, and the buffer is full of junk there.
    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Content, Error> {
        let length = (*buffer).as_ref().len();
        self.get(offset, (*buffer).as_mut());
        let mut holes = Vec::new();
        let mut at = 0;
        for extent in self.extents(Context::BaseAllocation, offset, length as u64, usize::MAX).await? {
            let next = at + extent.length as usize;
            if extent.status == 3 {
                (*buffer).as_mut()[at..next].fill(0xdd);
                holes.push(at..next);
            }
            at = next;
        }
        Ok(Content { buffer, holes })
    }

    async fn write(&self, offset: u64, buffer: Buffer, durability: Durability) -> Result<(), Error> {
        self.put(offset, (*buffer).as_ref());
        self.settle(durability);
        Ok(())
    }

    async fn zero(&self, offset: u64, length: u64, space: Space, durability: Durability) -> Result<(), Error> {
        self.punch(offset, length, space == Space::Keep);
        self.settle(durability);
        Ok(())
    }

    /// Only whole blocks are fast.
    async fn fast_zero(&self, offset: u64, length: u64) -> bool {
        offset.is_multiple_of(BLOCK) && length.is_multiple_of(BLOCK)
    }

    async fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), Error> {
        self.punch(offset, length, false);
        self.settle(durability);
        Ok(())
    }

    async fn flush(&self) -> Result<(), Error> {
        self.make_durable();
        Ok(())
    }

    async fn extents(&self, context: Context, offset: u64, length: u64, max: usize) -> Result<Vec<Extent>, Error> {
        let now = self.now.lock().unwrap();
        let mut extents: Vec<Extent> = Vec::new();
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let block = at / BLOCK;
            let next = end.min((block + 1) * BLOCK);
            let status = match (context, now.contains_key(&block)) {
                (Context::BaseAllocation, true) | (Context::AllocationDepth, false) => 0,
                (Context::BaseAllocation, false) => 3,
                (Context::AllocationDepth, true) => 1,
            };
            let full = extents.len() == max;
            match extents.last_mut() {
                Some(last) if last.status == status => last.length += next - at,
                _ if full => break,
                _ => extents.push(Extent { length: next - at, status }),
            }
            at = next;
        }
        Ok(extents)
    }
}

/// What a call is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Call {
    Read,
    Write,
    Zero,
    Trim,
    Flush,
    Cache,
    Extents,
}

/// Decides about each call before it reaches the disk.
#[async_trait]
pub trait Hook: Send + Sync + 'static {
    async fn before(&self, call: Call, offset: u64, length: u64) -> Result<(), Error>;
}

/// A disk behind a hook.
pub struct Hooked<H> {
    pub disk: Arc<dyn Device>,
    pub hook: H,
}

impl<H: Hook> Hooked<H> {
    pub fn new(disk: Arc<dyn Device>, hook: H) -> Arc<Self> {
        Arc::new(Self { disk, hook })
    }
}

#[async_trait]
impl<H: Hook> Device for Hooked<H> {
    fn buffer(&self, offset: u64, length: usize) -> Buffer {
        self.disk.buffer(offset, length)
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Content, Error> {
        self.hook.before(Call::Read, offset, (*buffer).as_ref().len() as u64).await?;
        self.disk.read(offset, buffer).await
    }

    async fn write(&self, offset: u64, buffer: Buffer, durability: Durability) -> Result<(), Error> {
        self.hook.before(Call::Write, offset, (*buffer).as_ref().len() as u64).await?;
        self.disk.write(offset, buffer, durability).await
    }

    async fn zero(&self, offset: u64, length: u64, space: Space, durability: Durability) -> Result<(), Error> {
        self.hook.before(Call::Zero, offset, length).await?;
        self.disk.zero(offset, length, space, durability).await
    }

    async fn fast_zero(&self, offset: u64, length: u64) -> bool {
        self.disk.fast_zero(offset, length).await
    }

    async fn cache(&self, offset: u64, length: u64) {
        // A hint has nobody to tell of a failure.
        let _ = self.hook.before(Call::Cache, offset, length).await;
        self.disk.cache(offset, length).await;
    }

    async fn trim(&self, offset: u64, length: u64, durability: Durability) -> Result<(), Error> {
        self.hook.before(Call::Trim, offset, length).await?;
        self.disk.trim(offset, length, durability).await
    }

    async fn flush(&self) -> Result<(), Error> {
        self.hook.before(Call::Flush, 0, 0).await?;
        self.disk.flush().await
    }

    async fn extents(&self, context: Context, offset: u64, length: u64, max: usize) -> Result<Vec<Extent>, Error> {
        self.hook.before(Call::Extents, offset, length).await?;
        self.disk.extents(context, offset, length, max).await
    }
}

/// Fails calls of one kind that touch a byte.
pub struct Faulty {
    pub call: Call,
    pub byte: u64,
    pub error: ErrorKind,
}

#[async_trait]
impl Hook for Faulty {
    async fn before(&self, call: Call, offset: u64, length: u64) -> Result<(), Error> {
        let touched = (offset..offset + length).contains(&self.byte) || (length == 0 && offset == self.byte);
        if call == self.call && touched {
            return Err(Error::new(self.error, "the medium is bad here").at(self.byte));
        }
        Ok(())
    }
}

/// Panics in calls of one kind.
pub struct Panics {
    pub call: Call,
    /// At the first poll, or after having waited.
    pub moment: Moment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    AtOnce,
    Later,
}

#[async_trait]
impl Hook for Panics {
    async fn before(&self, call: Call, _: u64, _: u64) -> Result<(), Error> {
        if self.moment == Moment::Later {
            tokio::task::yield_now().await;
        }
        assert!(call != self.call, "a device with a bug");
        Ok(())
    }
}

/// Holds calls of one kind until the test lets them through, one by one.
pub struct Gate {
    call: Call,
    permits: Semaphore,
    arrived: watch::Sender<usize>,
}

impl Gate {
    pub fn new(call: Call) -> Self {
        Self { call, permits: Semaphore::new(0), arrived: watch::Sender::new(0) }
    }

    /// Lets so many more calls through.
    pub fn open(&self, calls: usize) {
        self.permits.add_permits(calls);
    }

    /// Waits until so many calls have come in all.
    pub async fn arrived(&self, calls: usize) {
        self.arrived.subscribe().wait_for(|count| *count >= calls).await.unwrap();
    }

    pub fn count(&self) -> usize {
        *self.arrived.borrow()
    }
}

#[async_trait]
impl Hook for Gate {
    async fn before(&self, call: Call, _: u64, _: u64) -> Result<(), Error> {
        if call == self.call {
            self.arrived.send_modify(|count| *count += 1);
            self.permits.acquire().await.unwrap().forget();
        }
        Ok(())
    }
}

/// Counts calls.
#[derive(Default)]
pub struct Counting {
    pub calls: Mutex<BTreeMap<Call, usize>>,
    pub largest: AtomicU64,
}

impl Counting {
    pub fn of(&self, call: Call) -> usize {
        self.calls.lock().unwrap().get(&call).copied().unwrap_or(0)
    }
}

#[async_trait]
impl Hook for Counting {
    async fn before(&self, call: Call, _: u64, length: u64) -> Result<(), Error> {
        *self.calls.lock().unwrap().entry(call).or_default() += 1;
        self.largest.fetch_max(length, Ordering::Relaxed);
        Ok(())
    }
}

/// An export of one device.
pub struct Disk {
    pub name: String,
    pub size: u64,
    pub read_only: bool,
    pub fast_zero: bool,
    pub device: Arc<dyn Device>,
    pub opened: AtomicUsize,
    /// What opening says, if it fails.
    pub broken: Option<Error>,
}

impl Disk {
    pub fn new(name: &str, size: u64, device: Arc<dyn Device>) -> Self {
        let opened = AtomicUsize::new(0);
        Self { name: name.into(), size, read_only: false, fast_zero: true, device, opened, broken: None }
    }

    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    pub fn without_fast_zero(mut self) -> Self {
        self.fast_zero = false;
        self
    }

    pub fn broken(mut self, error: Error) -> Self {
        self.broken = Some(error);
        self
    }
}

#[async_trait]
impl Export for Disk {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> &str {
        "a disk for tests"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn contexts(&self) -> ContextSet {
        ContextSet::ALL
    }

    fn fast_zero(&self) -> bool {
        self.fast_zero
    }

    async fn open(&self) -> Result<Arc<dyn Device>, Error> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        match &self.broken {
            Some(error) => Err(error.clone()),
            None => Ok(self.device.clone()),
        }
    }
}
