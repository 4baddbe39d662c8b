//! `qemu-io`: small requests of every kind at odd offsets.

use super::{SIZE, Target, assert_same};
use crate::programs::succeeds;

/// `write` has FUA with `-f`, `write -z` says NO_HOLE unless `-u` drops it, and `-n` is FAST_ZERO.
const COMMANDS: [&str; 20] = [
    "write -P 0x5a 0 1M",
    "write -z 256k 64k",
    "read -P 0 256k 64k",
    "discard 512k 64k",
    "read -P 0 512k 64k",
    "write -f -P 7 12345 777",
    "read -P 7 12345 777",
    "read -P 0x5a 0 12345",
    "read -P 0x5a 13122 200000",
    "flush",
    "aio_write -P 9 2M 64k",
    "aio_flush",
    "read -P 9 2M 64k",
    "write -z -n 3M 1M",
    "write -z -u 4M 1M",
    "write -P 3 5242879 3",
    "read -P 3 5242879 3",
    "write -P 3 32M 32M",
    "read -P 3 32M 32M",
    "write -P 4 67108863 1",
];

pub fn reads_back_what_it_did(target: &Target) {
    let commands: Vec<&str> = COMMANDS.iter().flat_map(|command| ["-c", command]).collect();
    let said = succeeds(&[&["qemu-io", "-f", "raw"], &commands[..], &[&target.uri]].concat());
    for complaint in ["error", "failed", "not supported"] {
        assert!(!said.to_lowercase().contains(complaint), "{said}");
    }
    // The same done to a file, where no NBD is between. FAST_ZERO is one that a file system may refuse.
    let file = target.folder.file("same.raw");
    std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
    let commands: Vec<String> = COMMANDS.iter().map(|command| command.replace("-z -n", "-z")).collect();
    let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
    succeeds(&[&["qemu-io", "-f", "raw", "-d", "unmap"], &commands[..], &[&file]].concat());
    assert_same(&file, &target.download());
}
