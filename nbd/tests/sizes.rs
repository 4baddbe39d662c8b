//! Exports of every size, to the byte: what is told, what can be reached, and where it ends.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use blockyard_nbd::wire::{Command, CommandFlags};
use blockyard_nbd::{Durability, ZeroFlags};
use common::devices::Mem;
use common::servers::{MODES, Served};
use common::soon;

#[tokio::test(start_paused = true)]
async fn the_last_byte_is_there_and_the_one_behind_it_is_not() {
    let sizes = [1, 511, 513, 1000, 65535, 65536, 65537, (1 << 20) + 1, (1 << 32) - 1, 1 << 32, (1 << 40) + 1];
    for (size, mode) in sizes.into_iter().flat_map(|size| MODES.map(|mode| (size, mode))) {
        let served = Served::disk(size, Mem::new(size)).await;
        let client = served.client_in(mode).await;
        assert_eq!(client.size(), size);
        let end = size - 1;
        soon("a write", client.write(end, vec![7], Durability::BeforeReply)).await.unwrap();
        assert_eq!(client.read(end, 1).await.unwrap(), [7], "{size} {mode:?}");
        let last = size.min(4096) as u32;
        assert_eq!(client.read(size - u64::from(last), last).await.unwrap().pop(), Some(7));
        for offset in [end, size] {
            let length = (size + 1 - offset) as usize;
            let beyond = client.write(offset, vec![1; length], Durability::OnFlush).await.unwrap_err();
            assert_eq!(beyond.errno(), Some(28), "{size} {mode:?}");
            let zeroes = client.zero(offset, length as u64, ZeroFlags::default(), Durability::OnFlush).await;
            assert_eq!(zeroes.unwrap_err().errno(), Some(28));
            assert_eq!(client.read(offset, length as u32).await.unwrap_err().errno(), Some(22));
            for command in [Command::TRIM, Command::CACHE] {
                let refused = client.plain(command, CommandFlags(0), offset, length as u64).await;
                assert_eq!(refused.unwrap_err().errno(), Some(22), "{command:?}");
            }
        }
        assert_eq!(client.read(end, 1).await.unwrap(), [7], "what was refused changed nothing");
        let told = client.block_status(end, 1).await;
        if mode == blockyard_nbd::transmission::Mode::Simple {
            assert!(told.is_err());
        } else {
            assert_eq!(told.unwrap()[0].extents.iter().map(|extent| extent.length).sum::<u64>(), 1);
            assert_eq!(client.block_status(end, 2).await.unwrap_err().errno(), Some(22));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_export_of_no_bytes_can_be_entered_and_flushed_and_has_nothing_to_read() {
    let served = Served::disk(0, Mem::new(0)).await;
    for mode in MODES {
        let client = served.client_in(mode).await;
        assert_eq!(client.size(), 0);
        client.flush().await.unwrap();
        assert_eq!(client.read(0, 0).await.unwrap(), b"");
        client.write(0, vec![], Durability::BeforeReply).await.unwrap();
        assert_eq!(client.read(0, 1).await.unwrap_err().errno(), Some(22));
        assert_eq!(client.write(0, vec![1], Durability::OnFlush).await.unwrap_err().errno(), Some(28));
        client.disconnect().await.unwrap();
    }
}
