//! Our client against the servers of others.

use blockyard_nbd::client::{Client, Negotiation, Transport};
use blockyard_nbd::transmission::Mode;
use blockyard_nbd::{Durability, Extent, ZeroFlags};

use crate::clients::SIZE;
use crate::common::{pattern, soon};
use crate::programs::{Background, Folder, succeeds, version};

const MIB: u64 = 1 << 20;

/// A foreign server with a connection of ours.
async fn connected(server: &[&str], folder: &Folder) -> (Background, Client) {
    let socket = folder.file("socket");
    let server = Background::server(server, &socket);
    let uri = format!("nbd+unix:///?socket={socket}").parse().unwrap();
    let client = soon("the foreign server", Client::connect(&uri)).await.unwrap();
    (server, client)
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_works_with_qemu_nbd() {
    let folder = Folder::new();
    let image = folder.file("disk.qcow2");
    succeeds(&["qemu-img", "create", "-q", "-f", "qcow2", &image, "64M"]);
    let line = ["qemu-nbd", "-t", "-e", "0", "-A", "--discard=unmap", "-f", "qcow2", &image];
    let (_server, client) = connected(&line, &folder).await;
    assert_eq!(client.mode(), if qemu_has_extended_headers() { Mode::Extended } else { Mode::Structured });
    exercise(&client).await;
    soon("the goodbye", client.disconnect()).await.unwrap();
}

/// QEMU has them from 8.2 on; where everything is mandatory an older one fails the test.
pub fn qemu_has_extended_headers() -> bool {
    let has = version("qemu-nbd") >= (8, 2);
    let mandatory = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(has || !mandatory, "QEMU speaks extended headers from 8.2 on: install a newer qemu-utils");
    has
}

/// Requests of more than 4 GiB and two contexts at once, over layers of images that QEMU made.
#[tokio::test(flavor = "multi_thread")]
async fn our_client_asks_qemu_nbd_for_more_than_32_bits() {
    const GIB: u64 = 1 << 30;
    let folder = Folder::new();
    let (base, top) = (folder.file("base.qcow2"), folder.file("top.qcow2"));
    succeeds(&["qemu-img", "create", "-q", "-f", "qcow2", &base, "16G"]);
    succeeds(&["qemu-io", "-f", "qcow2", "-c", "write -q -P 1 1G 64k", &base]);
    succeeds(&["qemu-img", "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top]);
    succeeds(&["qemu-io", "-f", "qcow2", "-c", "write -q -P 2 10G 64k", &top]);
    let socket = folder.file("socket");
    let line = ["qemu-nbd", "-t", "-e", "0", "-A", "--discard=unmap", "-f", "qcow2", &top];
    let _server = Background::server(&line, &socket);
    let mut negotiation = soon("a greeting", Negotiation::connect(&Transport::Unix(socket.into()))).await.unwrap();
    if !qemu_has_extended_headers() {
        assert!(negotiation.extended_headers().await.is_err());
        return;
    }
    negotiation.extended_headers().await.unwrap();
    let names = ["base:allocation", "qemu:allocation-depth"];
    let contexts = negotiation.set_meta_contexts("", &names).await.unwrap();
    let client = negotiation.go("").await.unwrap();
    let status = soon("the status", client.block_status(0, 16 * GIB)).await.unwrap();
    let of = |name: &str| {
        let id = contexts.iter().find(|context| context.name == name).unwrap().id;
        &status.iter().find(|status| status.context == id).unwrap().extents
    };
    let holes = |data: u64, [hole, one, two]: [u64; 3]| {
        let extent = |length, status| Extent { length, status };
        [
            extent(GIB, hole),
            extent(data, two),
            extent(9 * GIB - data, hole),
            extent(data, one),
            extent(6 * GIB - data, hole),
        ]
    };
    assert_eq!(of("base:allocation")[..], holes(65536, [3, 0, 0]));
    assert_eq!(of("qemu:allocation-depth")[..], holes(65536, [0, 1, 2]));
    assert_eq!(soon("a read", client.read(GIB, 65536)).await.unwrap(), [1; 65536]);
    soon("zeroes", client.zero(0, 9 * GIB, ZeroFlags::default(), Durability::OnFlush)).await.unwrap();
    assert_eq!(soon("a read", client.read(GIB, 65536)).await.unwrap(), [0; 65536]);
    assert_eq!(soon("a read", client.read(10 * GIB, 65536)).await.unwrap(), [2; 65536]);
    soon("the goodbye", client.disconnect()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_works_with_nbdkit() {
    let folder = Folder::new();
    let (_server, client) = connected(&["nbdkit", "-f", "memory", "64M"], &folder).await;
    exercise(&client).await;
    soon("the goodbye", client.disconnect()).await.unwrap();
}

/// Each 8 bytes of this disk are their own offset.
#[tokio::test(flavor = "multi_thread")]
async fn our_client_reads_every_byte_of_a_foreign_disk() {
    let folder = Folder::new();
    let (_server, client) = connected(&["nbdkit", "-f", "pattern", "64M"], &folder).await;
    const REQUEST: u64 = 8 << 20;
    let reads: Vec<_> = (0..SIZE / REQUEST)
        .map(|number| {
            let client = client.clone();
            tokio::spawn(async move { client.read(number * REQUEST, REQUEST as u32).await.unwrap() })
        })
        .collect();
    let mut offset = 0_u64;
    for read in reads {
        for word in soon("a read", read).await.unwrap().chunks_exact(8) {
            assert_eq!(word, offset.to_be_bytes());
            offset += 8;
        }
    }
    assert_eq!(offset, SIZE);
    soon("the goodbye", client.disconnect()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_reports_an_unreadable_foreign_disk() {
    let folder = Folder::new();
    let line = ["nbdkit", "-f", "--filter=error", "pattern", "64M", "error-pread-rate=100%", "error=EIO"];
    let (_server, client) = connected(&line, &folder).await;
    assert_eq!(soon("the read", client.read(0, 65536)).await.unwrap_err().errno(), Some(5));
}

async fn exercise(client: &Client) {
    assert_eq!(client.size(), SIZE);
    let writes = (0..64u64).map(|part| {
        let client = client.clone();
        tokio::spawn(async move {
            let data = pattern(part + 1, 300_000);
            client.write(part * MIB + 12_345, data, Durability::OnFlush).await.unwrap();
        })
    });
    for write in writes.collect::<Vec<_>>() {
        soon("a write", write).await.unwrap();
    }
    client.zero(MIB, 1 << 20, ZeroFlags::default(), Durability::OnFlush).await.unwrap();
    client.trim(2 * MIB, 1 << 20, Durability::OnFlush).await.unwrap();
    client.flush().await.unwrap();
    for part in [0u64, 3, 63] {
        let read = client.read(part * MIB + 12_345, 300_000).await.unwrap();
        assert_eq!(read, pattern(part + 1, 300_000), "part {part}");
    }
    assert_eq!(client.read(MIB, 1 << 20).await.unwrap(), vec![0; 1 << 20]);
    let extents = client.allocation(0, 64 << 20).await.unwrap();
    assert!(extents.len() >= 3 && extents[0].status == 0, "{extents:?}");
    assert!(client.read(SIZE, 1).await.unwrap_err().errno().is_some());
}
