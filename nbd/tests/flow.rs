//! Many requests at once: no deadlock, no order promised and none needed, durability across connections, bounded memory.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use std::sync::Arc;

use async_trait::async_trait;
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::Command;
use blockyard_nbd::wire::reply::ReplyHeader;
use blockyard_nbd::{Budget, BudgetLimits, Buffer, Content, Context, Device, Durability, Error, Extent, Limits, Space};
use common::devices::{Call, Counting, Disk, Gate, Hooked, Mem};
use common::servers::{NAME, Served, options};
use common::{pattern, request, soon, verdict};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const MIB: u64 = 1 << 20;

#[tokio::test(start_paused = true)]
async fn holes_that_nobody_collects_are_bounded_too() {
    let hooked = Hooked::new(Mem::new(1 << 40), Counting::default());
    let options = options();
    let budget = options.budget.clone();
    let served = Served::with(Disk::new(NAME, 1 << 40, hooked.clone()), options).await;
    let mut raw = served.raw(Mode::Extended, 4096).await;
    for cookie in 0..64 {
        raw.extended_request(request(Command::READ, cookie, 0, u64::from(u32::MAX)), b"").await.unwrap();
    }
    // The paused clock moves on when nothing moves any more.
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let reads = hooked.hook.of(Call::Read);
    assert!(reads > 1000, "{reads} pieces of them are waiting");
    assert!(reads <= (8 << 20) / 128 + 64, "{reads} pieces, each with a frame");
    assert!(budget.usage().output <= 8 << 20, "{} bytes", budget.usage().output);
}

#[tokio::test]
async fn reads_nobody_collects_do_not_keep_writes_from_coming_in() {
    for mode in [Mode::Simple, Mode::Structured] {
        let hooked = Hooked::new(Mem::filled(24 * MIB, 5), Counting::default());
        let served = Served::disk(24 * MIB, hooked.clone()).await;
        // A pipe of 64 KiB: nothing that is not received by the server can be sent.
        let mut raw = served.raw(mode, 64 << 10).await;
        for cookie in 0..24 {
            raw.request(request(Command::READ, cookie, cookie * MIB, MIB), b"").await.unwrap();
        }
        let data = pattern(9, MIB as usize);
        for cookie in 24..48 {
            let write = request(Command::WRITE, cookie, (cookie - 24) * MIB, MIB);
            soon("the payload to be taken", raw.request(write, &data)).await.unwrap();
        }
        assert!(hooked.hook.of(Call::Write) >= 23, "they reached the device before any reply was read");
        let mut seen = [0; 48];
        for _ in 0..48 {
            let reply = soon("a reply", raw.reply()).await.unwrap();
            let (errno, cookie) = verdict(&reply);
            assert_eq!(errno, 0);
            seen[cookie as usize] += 1;
            if mode == Mode::Simple && cookie < 24 {
                raw.receive(MIB as usize).await.unwrap();
            }
        }
        assert_eq!(seen, [1; 48]);
    }
}

#[tokio::test]
async fn ten_thousand_pipelined_requests_are_all_answered() {
    let mem = Mem::new(10_000 * 512);
    let served = Served::disk(10_000 * 512, mem.clone()).await;
    for mode in [Mode::Simple, Mode::Structured] {
        let raw = served.raw_socket(mode).await;
        let (mut reader, mut writer) = raw.0.into_split();
        let sending = tokio::spawn(async move {
            for cookie in 0..10_000u64 {
                let header = request(Command::WRITE, cookie, cookie * 512, 512).encode_compact().unwrap();
                writer.write_all(&[&header[..], &[cookie as u8; 512]].concat()).await.unwrap();
            }
            writer
        });
        let mut seen = vec![false; 10_000];
        for _ in 0..10_000 {
            let mut reply = [0; 16];
            soon("a reply", reader.read_exact(&mut reply)).await.unwrap();
            let Some(ReplyHeader::Simple { errno: 0, cookie }) = ReplyHeader::decode(&reply) else {
                panic!("{reply:?}")
            };
            assert!(!std::mem::replace(&mut seen[cookie as usize], true));
        }
        drop(sending.await.unwrap());
        let expected: Vec<u8> = (0..10_000u64).flat_map(|cookie| [cookie as u8; 512]).collect();
        assert!(mem.content() == expected);
    }
}

#[tokio::test]
async fn no_more_requests_are_under_way_than_the_limit_says() {
    let hooked = Hooked::new(Mem::new(MIB), Gate::new(Call::Write));
    let mut options = options();
    options.limits.requests_in_flight = 4;
    let served = Served::with(Disk::new(NAME, MIB, hooked.clone()), options).await;
    let client = served.client().await;
    let writes: Vec<_> = (0..20u64)
        .map(|at| {
            let client = client.clone();
            tokio::spawn(async move { client.write(at * 512, vec![1; 512], Durability::OnFlush).await })
        })
        .collect();
    soon("four writes", hooked.hook.arrived(4)).await;
    for through in 4..20 {
        assert!(hooked.hook.count() <= through);
        hooked.hook.open(1);
        soon("the next write", hooked.hook.arrived(through + 1)).await;
    }
    hooked.hook.open(4);
    for write in writes {
        soon("a write", write).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_write_on_one_connection_is_made_durable_by_a_flush_on_another() {
    let mem = Mem::new(MIB);
    let served = Served::disk(MIB, mem.clone()).await;
    let (a, b) = (served.client().await, served.client().await);
    a.write(0, vec![1; 4096], Durability::OnFlush).await.unwrap();
    b.flush().await.unwrap();
    a.write(4096, vec![2; 4096], Durability::OnFlush).await.unwrap();
    b.write(8192, vec![3; 4096], Durability::BeforeReply).await.unwrap();
    mem.crash();
    let bytes = a.read(0, 12288).await.unwrap();
    assert_eq!(bytes[..4096], [1; 4096]);
    assert_eq!(bytes[8192..], [3; 4096]);
}

#[tokio::test]
async fn what_was_acknowledged_on_one_connection_is_read_on_all() {
    let served = Served::disk(16 * MIB, Mem::new(16 * MIB)).await;
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(served.client().await);
    }
    let (writer, reader) = (clients[0].clone(), clients[7].clone());
    for round in 0..200u64 {
        let data = pattern(round, 3000);
        writer.write(round * 3001, data.clone(), Durability::OnFlush).await.unwrap();
        assert_eq!(reader.read(round * 3001, 3000).await.unwrap(), data);
    }
    // All eight at once, each in its own part, mixed with reads of its own.
    let tasks: Vec<_> = clients
        .into_iter()
        .zip(0u64..)
        .map(|(client, part)| {
            tokio::spawn(async move {
                for round in 0..40 {
                    let data = pattern(part * 1000 + round, 70_000 + round as usize);
                    let at = part * 2 * MIB + round * 17;
                    client.write(at, data.clone(), Durability::OnFlush).await.unwrap();
                    assert_eq!(client.read(at, data.len() as u32).await.unwrap(), data);
                }
            })
        })
        .collect();
    for task in tasks {
        soon("a client", task).await.unwrap();
    }
    assert_eq!(served.stats.snapshot().counts.all_errors(), 0);
}

/// A disk that counts the buffers it has lent.
struct Lending {
    lent: Arc<std::sync::atomic::AtomicU64>,
    most: std::sync::atomic::AtomicU64,
}

struct Lent(Vec<u8>, Arc<std::sync::atomic::AtomicU64>);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsMut<[u8]> for Lent {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.1.fetch_sub(self.0.len() as u64, std::sync::atomic::Ordering::SeqCst);
    }
}

#[async_trait]
impl Device for Lending {
    fn buffer(&self, _: u64, length: usize) -> Buffer {
        use std::sync::atomic::Ordering::SeqCst;
        let now = self.lent.fetch_add(length as u64, SeqCst) + length as u64;
        self.most.fetch_max(now, SeqCst);
        Box::new(Lent(vec![0; length], self.lent.clone()))
    }

    async fn read(&self, _: u64, buffer: Buffer) -> Result<Content, Error> {
        Ok(buffer.into())
    }

    async fn write(&self, _: u64, _: Buffer, _: Durability) -> Result<(), Error> {
        Ok(())
    }

    async fn zero(&self, _: u64, _: u64, _: Space, _: Durability) -> Result<(), Error> {
        Ok(())
    }

    async fn fast_zero(&self, _: u64, _: u64) -> bool {
        false
    }

    async fn trim(&self, _: u64, _: u64, _: Durability) -> Result<(), Error> {
        Ok(())
    }

    async fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    async fn extents(&self, _: Context, _: u64, length: u64, _: usize) -> Result<Vec<Extent>, Error> {
        Ok(vec![Extent { length, status: 0 }])
    }
}

#[tokio::test]
async fn memory_stays_within_the_budget_while_nobody_collects_and_others_are_served() {
    for mode in [Mode::Simple, Mode::Structured] {
        let lending = Arc::new(Lending { lent: Arc::default(), most: Default::default() });
        let limits = BudgetLimits { bytes: 160 * MIB, kept_bytes: 8 * MIB, ..BudgetLimits::default() };
        let mut options = options();
        options.budget = Budget::new(&limits);
        let budget = options.budget.clone();
        let served = Served::with(Disk::new(NAME, 1 << 40, lending.clone()), options).await;
        let mut greedy = Vec::new();
        for _ in 0..8 {
            let mut raw = served.raw(mode, 64 << 10).await;
            for cookie in 0..64 {
                raw.request(request(Command::READ, cookie, 0, 32 * MIB), b"").await.unwrap();
            }
            greedy.push(raw);
        }
        let client = served.client().await;
        for _ in 0..20 {
            let bytes = soon("the modest client to be served", client.read(0, 1 << 20)).await.unwrap();
            assert_eq!(bytes.len(), 1 << 20);
            soon("its write", client.write(0, bytes, Durability::OnFlush)).await.unwrap();
        }
        let usage = budget.usage();
        assert!(usage.output > 16 * MIB, "the greedy ones hold something: {usage:?}");
        let most = lending.most.load(std::sync::atomic::Ordering::SeqCst);
        assert!(most <= 160 * MIB && usage.output_peak <= 80 * MIB, "{most} {usage:?}");
        drop(greedy);
        served.connections(1).await;
        client.disconnect().await.unwrap();
        served.connections(0).await;
        assert_eq!((budget.usage().output, budget.usage().input), (0, 0));
        assert_eq!(lending.lent.load(std::sync::atomic::Ordering::SeqCst), 0);
    }
}

#[tokio::test]
async fn memory_for_writes_grows_with_what_arrived_and_not_with_what_was_announced() {
    let options = options();
    let budget = options.budget.clone();
    let served = Served::with(Disk::new(NAME, 1 << 30, Mem::new(1 << 30)), options).await;
    let mut raws = Vec::new();
    for _ in 0..16 {
        let mut raw = served.raw(Mode::Simple, 64 << 10).await;
        raw.request(request(Command::WRITE, 1, 0, 64 * MIB), &[1; 1000]).await.unwrap();
        raws.push(raw);
    }
    served.connections(16).await;
    let served_well = Served::disk(MIB, Mem::new(MIB)).await;
    served_well.client().await.write(0, vec![1; 1 << 20], Durability::OnFlush).await.unwrap();
    assert!(budget.usage().input_peak <= 16 * MIB, "{:?}", budget.usage());
}

#[tokio::test]
async fn the_largest_writes_and_reads_pass_with_any_size_of_piece() {
    for piece_bytes in [4096, 65536, 1 << 20] {
        let mem = Mem::new(65 * MIB);
        let mut options = options();
        options.limits = Limits { piece_bytes, ..Limits::default() };
        let served = Served::with(Disk::new(NAME, 65 * MIB, mem.clone()), options).await;
        let client = served.client().await;
        let data = pattern(u64::from(piece_bytes), 64 << 20);
        soon("the write", client.write(4095, data.clone(), Durability::OnFlush)).await.unwrap();
        let read = soon("the read", client.read(4095, 64 << 20)).await.unwrap();
        assert!(read == data, "pieces of {piece_bytes}");
        let simple = served.negotiation().await.go(NAME).await.unwrap();
        let read = soon("the read", simple.read(4095, 64 << 20)).await.unwrap();
        assert!(read == data, "pieces of {piece_bytes}");
    }
}
