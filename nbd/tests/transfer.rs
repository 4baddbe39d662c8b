//! Bytes through server and client: what is written is read, in every form a client may choose.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]
mod common;

use blockyard_nbd::client::{Client, Negotiation};
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::wire::CommandFlags;
use blockyard_nbd::{Durability, Extent, ZeroFlags};
use common::devices::Mem;
use common::servers::{NAME, Served};
use common::{pattern, soon};

const MIB: u64 = 1 << 20;

async fn simple(served: &Served) -> Client {
    served.negotiation().await.go(NAME).await.unwrap()
}

async fn old(served: &Served) -> Client {
    served.negotiation().await.export_name(NAME).await.unwrap()
}

#[tokio::test]
async fn what_was_written_is_read_in_every_reply_mode() {
    let mem = Mem::new(64 * MIB);
    let served = Served::disk(64 * MIB, mem.clone()).await;
    let structured = served.client_in(Mode::Structured).await;
    let clients = [served.client().await, structured, simple(&served).await, old(&served).await];
    assert_eq!(
        clients.each_ref().map(|client| client.mode()),
        [Mode::Extended, Mode::Structured, Mode::Simple, Mode::Simple]
    );
    for (offset, length) in [(0, 1), (1, 511), (12345, 777), (MIB - 1, 2), (3 * MIB + 5, 5 << 20), (0, 32 << 20)] {
        let data = pattern(length, length as usize);
        soon("a write", clients[0].write(offset, data.clone(), Durability::OnFlush)).await.unwrap();
        for client in &clients {
            assert_eq!(soon("a read", client.read(offset, length as u32)).await.unwrap(), data);
        }
        let whole = clients[0].read_with(offset, length as u32, CommandFlags::DF);
        assert_eq!(soon("an unfragmented read", whole).await.unwrap(), data);
    }
    let last = clients[2].read(64 * MIB - 1, 1).await.unwrap();
    assert_eq!(last, [0]);
    for client in clients {
        soon("the goodbye", client.disconnect()).await.unwrap();
    }
}

#[tokio::test]
async fn zeroes_and_holes_read_as_zeroes_and_show_in_the_block_status() {
    let served = Served::disk(4 * MIB, Mem::filled(4 * MIB, 1)).await;
    let client = served.client().await;
    assert_eq!(client.allocation(0, 4 << 20).await.unwrap(), [Extent { length: 4 * MIB, status: 0 }]);
    client.zero(MIB, 1 << 20, ZeroFlags::default(), Durability::OnFlush).await.unwrap();
    client.trim(3 * MIB, 65536, Durability::BeforeReply).await.unwrap();
    client.cache(0, 4 << 20).await.unwrap();
    client.flush().await.unwrap();
    let expected = [(MIB, 0), (MIB, 3), (MIB, 0), (65536, 3), (MIB - 65536, 0)];
    assert_eq!(
        client.allocation(0, 4 << 20).await.unwrap(),
        expected.map(|(length, status)| Extent { length, status })
    );
    let one = client.block_status_with(MIB / 2, 4 << 19, CommandFlags::REQ_ONE).await.unwrap();
    assert_eq!(one[0].extents, [Extent { length: MIB / 2, status: 0 }]);
    assert_eq!(client.read(MIB, 1 << 20).await.unwrap(), vec![0; 1 << 20]);
}

#[tokio::test]
async fn the_handshake_tells_what_there_is() {
    let served = Served::disk(1000, Mem::new(1000)).await;
    let mut negotiation: Negotiation = served.negotiation().await;
    let listed = negotiation.list().await.unwrap();
    assert_eq!((listed[0].name.as_str(), listed[0].description.as_str()), (NAME, "a disk for tests"));
    let details = negotiation.info("").await.unwrap();
    assert_eq!((details.info.size, details.name.as_deref()), (1000, Some(NAME)));
    let client = negotiation.go("").await.unwrap();
    assert_eq!(client.size(), 1000);
    assert_eq!(client.details(), &details);
}
