//! `fio` with its own NBD engine: 16 requests in flight, of random sizes, each found again.

use super::Target;
use crate::programs::succeeds;

pub fn verifies_what_it_wrote_and_trims(target: &Target) {
    let (uri, folder) = (format!("--uri={}", target.uri), target.folder.0.to_str().unwrap());
    let always = ["--ioengine=nbd", &uri, "--size=32M", "--iodepth=16", "--aux-path", folder];
    let verify = ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"];
    let writes = ["--name=v", "--rw=randwrite", "--bsrange=4k-128k"];
    succeeds(&[&["fio"], &always[..], &writes, &verify].concat());
    succeeds(&[&["fio"], &always[..], &["--name=t", "--rw=randtrimwrite", "--bs=64k"]].concat());
}
