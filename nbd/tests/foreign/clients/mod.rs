//! What each foreign client does with an empty, writable disk of 64 MiB called `disk0`, wherever it is served: a device of a
//! test here, an image elsewhere. Each says whether the client was content; whether the disk then holds what was written is
//! for the one who serves it.

pub mod fio;
pub mod nbd_client;
pub mod nbdcopy;
pub mod nbdfuse;
pub mod nbdinfo;
pub mod nbdsh;
pub mod qemu_img;
pub mod qemu_io;
pub mod qemu_nbd;
pub mod qemu_storage_daemon;

use std::io::{Seek, SeekFrom, Write};

use crate::programs::{Folder, succeeds};

/// Name of the export.
pub const NAME: &str = "disk0";
/// Size of the disk in bytes.
pub const SIZE: u64 = 64 << 20;

/// What one client does with a disk.
pub type Client = fn(&Target);

/// A test for each client, in which `$serve` gives it a disk.
macro_rules! a_test_for_each_client {
    ($serve:path) => {
        $crate::clients::a_test_for_each_client! { $serve:
            nbdinfo::sees_what_is_offered,
            nbdinfo::maps_what_was_written,
            nbdcopy::copies_up_and_down_in_every_manner,
            qemu_img::converts_compares_and_maps,
            qemu_io::reads_back_what_it_did,
            qemu_nbd::lists_the_export,
            fio::verifies_what_it_wrote_and_trims,
            nbdsh::finds_the_errors_and_chunks_of_the_protocol,
            nbdsh::takes_the_old_paths,
            nbdsh::verifies_64_requests_in_flight_on_each_of_8_connections,
            nbdfuse::mounts_the_disk_as_a_file,
            nbd_client::tells_the_export,
            qemu_storage_daemon::backs_up_into_the_export,
        }
    };
    ($serve:path: $($client:ident::$deed:ident,)*) => {
        $(#[test]
        fn $deed() {
            $serve($crate::clients::$client::$deed);
        })*
    };
}
pub(crate) use a_test_for_each_client;

/// Where a disk is served, and a folder for the files of the client.
pub struct Target {
    pub uri: String,
    pub folder: Folder,
}

/// An address as the command lines of QEMU and nbd-client want it.
pub enum Place<'a> {
    Tcp { host: &'a str, port: &'a str },
    Unix(&'a str),
}

impl Target {
    pub fn new(uri: String, folder: Folder) -> Self {
        Self { uri, folder }
    }

    pub fn place(&self) -> Place<'_> {
        match self.uri.strip_prefix("nbd://") {
            Some(rest) => {
                let (host, port) = rest.split_once('/').unwrap().0.rsplit_once(':').unwrap();
                Place::Tcp { host: host.trim_matches(['[', ']']), port }
            }
            None => Place::Unix(self.uri.split_once("?socket=").unwrap().1),
        }
    }

    /// The URI with another name in it.
    pub fn export(&self, name: &str) -> String {
        self.uri.replacen(&format!("/{NAME}"), &format!("/{name}"), 1)
    }

    /// A raw file of the size of the disk with 20 MiB of data in three places, different for each seed.
    pub fn source(&self, seed: u64) -> String {
        let path = self.folder.file(&format!("source-{seed}.raw"));
        let mut file = std::fs::File::create(&path).unwrap();
        file.set_len(SIZE).unwrap();
        for (start, length) in [(0, 7), (20, 8), (59, 5)] {
            file.seek(SeekFrom::Start(start << 20)).unwrap();
            file.write_all(&noise(seed << 8 | start, length << 20)).unwrap();
        }
        path
    }

    /// The whole disk, as `nbdcopy` reads it.
    #[track_caller]
    pub fn download(&self) -> String {
        let path = self.folder.file("download.raw");
        let _ = std::fs::remove_file(&path);
        succeeds(&["nbdcopy", &self.uri, &path]);
        path
    }
}

/// Bytes that repeat nowhere.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Whether two files hold the same bytes.
#[track_caller]
pub fn assert_same(one: &str, other: &str) {
    succeeds(&["cmp", one, other]);
}
