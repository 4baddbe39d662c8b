//! The server killed or told to stop while clients write: what was flushed is there, and what was answered before a stop.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use blockyard_nbd::{Durability, client::Client};
use serde_json::Value;

use crate::clients::{MIB, connect, filled};
use crate::held::until;
use crate::process::blockyard;
use crate::server::NbdServer;
use crate::tools::{folder, image, succeed, text};

/// `blockyard image …`: its exit code and document.
fn image_command(arguments: &[&str]) -> (i32, Value) {
    let output = blockyard().arg("image").args(arguments).args(["--output", "json"]).output().unwrap();
    (output.status.code().unwrap(), serde_json::from_slice(&output.stdout).unwrap_or_default())
}

/// What must be there: the number that each block is filled with.
type Blocks = BTreeMap<u64, u64>;
const BLOCK: u64 = 100_000;

async fn write(client: &Client, block: u64, number: u64) -> Result<(), blockyard_nbd::client::ClientError> {
    client.write(block * BLOCK, filled(number, BLOCK as usize), Durability::OnFlush).await
}

async fn verify(client: &Client, blocks: &Blocks) {
    for (block, number) in blocks {
        let found = client.read(block * BLOCK, BLOCK as u32).await.unwrap();
        assert!(found == filled(*number, BLOCK as usize), "block {block} is not what was flushed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_connection_flushed_survives_a_kill() {
    let folder = folder();
    let mut size = 64 * MIB;
    let path = image(&folder, "disk.qcow2", size);
    let mut flushed = Blocks::new();
    let mut states = [0; 4];
    for round in 0..20_u64 {
        let server = NbdServer::start(&path, &[]);
        let (a, b) = (connect(&server.uri).await, connect(&server.uri).await);
        verify(&a, &flushed).await;
        // New blocks, and some of the old ones again.
        let blocks: Vec<u64> = (0..40).map(|n| round * 30 + n).filter(|n| (n + 1) * BLOCK <= size).collect();
        for block in blocks {
            write(&a, block, round + block).await.unwrap();
            flushed.insert(block, round + block);
        }
        b.flush().await.unwrap();
        // Under way when the server dies: far away from what is verified.
        let late = tokio::spawn({
            let a = a.clone();
            async move { while a.write(size - MIB, filled(round, MIB as usize), Durability::OnFlush).await.is_ok() {} }
        });
        tokio::task::yield_now().await;
        server.signal("KILL");
        server.wait();
        late.await.unwrap();
        // Every second time it is mended as a careful user would do, else simply used again.
        if round % 2 == 0 {
            let (code, _) = image_command(&["check", text(&path)]);
            assert!([0, 2, 3].contains(&code), "check exits with {code}");
            states[code as usize] += 1;
            let (code, report) = image_command(&["repair", text(&path)]);
            assert!([0, 3].contains(&code), "repair exits with {code}: {report}");
            assert_eq!(image_command(&["check", text(&path)]).0, 0);
        }
        if round % 5 == 4 {
            size += 16 * MIB;
            let (code, report) = image_command(&["grow", text(&path), "--size", &size.to_string()]);
            assert_eq!(code, 0, "{report}");
        }
    }
    let server = NbdServer::start(&path, &["--read-only"]);
    verify(&connect(&server.uri).await, &flushed).await;
    server.stop();
    println!(
        "20 kills: {} flushed blocks of {BLOCK} bytes are there; checks after a kill exit with {states:?}",
        flushed.len()
    );
}

/// Writes its own blocks until the server stops; counts those that were answered, and tells which.
async fn write_on(client: Client, first: u64, count: Arc<AtomicUsize>) -> Blocks {
    let mut answered = Blocks::new();
    for number in 0.. {
        let block = first + number % 300;
        if write(&client, block, number).await.is_err() {
            // This one may be there or not.
            answered.remove(&block);
            return answered;
        }
        answered.insert(block, number);
        count.fetch_add(1, Relaxed);
        if number % 50 == 49 && client.flush().await.is_err() {
            return answered;
        }
    }
    answered
}

async fn stop_while_writing(path: &Path, signal: &str, writes: usize) -> usize {
    let server = NbdServer::start(path, &[]);
    let count = Arc::<AtomicUsize>::default();
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..8 {
        writers.spawn(write_on(connect(&server.uri).await, writer * 300, count.clone()));
    }
    until("so many writes are answered", || count.load(Relaxed) >= writes).await;
    server.signal(signal);
    assert_eq!(server.wait().code(), Some(0), "{signal}");
    let mut answered = Blocks::new();
    while let Some(blocks) = writers.join_next().await {
        answered.extend(blocks.unwrap());
    }
    succeed("qemu-img", &["check", "-q", "-f", "qcow2", text(path)]);
    let server = NbdServer::start(path, &["--read-only"]);
    verify(&connect(&server.uri).await, &answered).await;
    server.stop();
    answered.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_under_load_loses_no_answered_write() {
    let folder = folder();
    let path = image(&folder, "disk.qcow2", 256 * MIB);
    for (round, signal) in ["TERM", "INT", "TERM", "INT", "TERM", "TERM"].into_iter().enumerate() {
        let blocks = stop_while_writing(&path, signal, 1 + 700 * round).await;
        println!("SIG{signal} while 8 connections write: {blocks} blocks were answered, and are there");
    }
}
