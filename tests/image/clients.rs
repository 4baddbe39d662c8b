//! The clients that people have: libnbd's tools, QEMU's tools, fio, nbdsh.

use crate::server::NbdServer;
use crate::tools::{assert_whole, folder, image, run, source, succeed, text};

const MIB: u64 = 1 << 20;

#[test]
fn nbdcopy_copies_up_and_down_in_every_way() {
    let folder = folder();
    // No multiple of a cluster, so that the last one is partial.
    let size = 40 * MIB + 512;
    let raw = source(&folder, "source.raw", size);
    for (number, options) in [
        &["--flush"][..],
        &["-C", "8", "-T", "8", "-R", "128", "--request-size=262144"],
        &["--synchronous"],
        &["--no-extents", "--allocated"],
        &["-S", "0", "--flush"],
        &["--request-size=33554432", "-R", "2"],
    ]
    .into_iter()
    .enumerate()
    {
        let image = image(&folder, &format!("{number}.qcow2"), size);
        let server = NbdServer::start(&image, &[]);
        succeed("nbdcopy", &[options, &[text(&raw), &server.uri]].concat());
        let back = folder.path().join("back.raw");
        let _ = std::fs::remove_file(&back);
        succeed("nbdcopy", &[&server.uri, text(&back)]);
        assert!(std::fs::read(&back).unwrap() == std::fs::read(&raw).unwrap(), "{options:?}: read back differently");
        server.stop();
        assert_whole(&image, &raw);
    }
}

#[test]
fn nbdinfo_tells_size_abilities_and_map() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", 8 * MIB);
    succeed("qemu-io", &["-f", "qcow2", "-c", "write -q -P 1 1M 64k", "-c", "write -q -z 2M 64k", text(&image)]);
    let server = NbdServer::start(&image, &["--export", "disk 0"]);
    let information: serde_json::Value = serde_json::from_str(&succeed("nbdinfo", &["--json", &server.uri])).unwrap();
    let export = &information["exports"][0];
    assert_eq!(information["structured"], true, "{information}");
    assert_eq!(export["export-size"], 8 * MIB, "{information}");
    assert_eq!(export["block_size_minimum"], 1, "{information}");
    assert_eq!(export["block_size_maximum"], 64 * MIB, "{information}");
    for ability in
        ["write", "zero", "fast-zero", "trim", "flush", "fua", "df", "multi-conn", "cache", "structured-reply"]
    {
        succeed("nbdinfo", &["--can", ability, &server.uri]);
    }
    let map: serde_json::Value = serde_json::from_str(&succeed("nbdinfo", &["--json", "--map", &server.uri])).unwrap();
    let extents: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["offset"].as_u64(), e["length"].as_u64(), e["type"].as_u64()))
        .collect();
    let hole = |offset, length| (Some(offset), Some(length), Some(3));
    assert_eq!(extents, [hole(0, MIB), (Some(MIB), Some(65536), Some(0)), hole(MIB + 65536, 7 * MIB - 65536)], "{map}");
    // The empty name means the only export; the real one is listed; another is refused.
    let place = server.uri.rsplit_once('/').unwrap().0;
    succeed("nbdinfo", &["--size", place]);
    assert!(succeed("nbdinfo", &["--list", place]).contains("disk 0"));
    assert!(!run("nbdinfo", &[&format!("{place}/other")]).status.success());
    server.stop();
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let folder = folder();
    let size = 24 * MIB;
    let raw = source(&folder, "source.raw", size);
    let image = image(&folder, "image.qcow2", size);
    let server = NbdServer::start(&image, &[]);
    succeed("qemu-img", &["convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", text(&raw), &server.uri]);
    succeed("qemu-img", &["compare", "-q", "-f", "raw", "-F", "raw", text(&raw), &server.uri]);
    let map = succeed("qemu-img", &["map", "--output=json", "-f", "raw", &server.uri]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let total: u64 = map.as_array().unwrap().iter().map(|extent| extent["length"].as_u64().unwrap()).sum();
    assert_eq!(total, size);
    assert!(map.as_array().unwrap().iter().any(|extent| extent["zero"] == true), "the holes are seen: {map}");
    succeed(
        "qemu-img",
        &["bench", "-q", "-f", "raw", "-c", "500", "-d", "64", "-s", "65536", "-t", "none", &server.uri],
    );
    server.stop();
    assert_whole(&image, &raw);
}

#[test]
fn qemu_io_writes_at_odd_offsets_with_fua_zeroes_and_discard() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", 8 * MIB);
    let server = NbdServer::start(&image, &[]);
    let commands = [
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
        "write -P 4 8388607 1",
        "read -P 4 8388607 1",
        "read -P 0 3M 2047k",
    ];
    let mut arguments = vec!["-f", "raw"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(&server.uri);
    succeed("qemu-io", &arguments);
    server.stop();
    succeed("qemu-img", &["check", "-q", "-f", "qcow2", text(&image)]);
    // The same is read from the file itself.
    let reads: Vec<_> = ["read -P 7 12345 777", "read -P 0 256k 64k", "read -P 9 2M 64k", "read -P 4 8388607 1"]
        .iter()
        .flat_map(|command| ["-c", command])
        .collect();
    succeed("qemu-io", &[&["-r", "-f", "qcow2"], &reads[..], &[text(&image)]].concat());
}

#[test]
fn fio_verifies_what_it_wrote_in_random_sizes() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", 64 * MIB);
    let server = NbdServer::start(&image, &[]);
    let uri = format!("--uri={}", server.uri);
    succeed(
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            "--bsrange=4k-128k",
            "--size=32M",
            "--iodepth=16",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ],
    );
    succeed(
        "fio",
        &["--name=trim", "--ioengine=nbd", &uri, "--rw=randtrimwrite", "--bs=64k", "--size=32M", "--iodepth=16"],
    );
    server.stop();
    succeed("qemu-img", &["check", "-q", "-f", "qcow2", text(&image)]);
}

#[test]
fn nbdsh_meets_the_errors_of_the_protocol() {
    let folder = folder();
    let image = image(&folder, "image.qcow2", MIB);
    let server = NbdServer::start(&image, &[]);
    let script = r#"
h.set_strict_mode(0)
size = h.get_size()
def err(call):
    try:
        call()
        return 'OK'
    except nbd.Error as error:
        return error.errno
assert err(lambda: h.pwrite(b'a' * 1024, size - 512)) == 'ENOSPC'
assert err(lambda: h.pread(1024, size - 512)) == 'EINVAL'
assert err(lambda: h.zero(1024, size - 512)) == 'ENOSPC'
assert err(lambda: h.trim(1024, size - 512)) == 'EINVAL'
assert err(lambda: h.pread(512, 0, 0x4000)) == 'EINVAL'
assert err(lambda: h.zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO)) == 'OK'
h.pwrite(b'q' * 65536, 0)
assert err(lambda: h.zero(100, 7, nbd.CMD_FLAG_FAST_ZERO)) == 'ENOTSUP'
assert h.pread(65536, 0) == b'q' * 65536
assert h.pread(1, size - 1) == b'\0'
"#;
    succeed("nbdsh", &["-u", &server.uri, "-c", script]);
    server.stop();

    let server = NbdServer::start(&image, &["--read-only"]);
    let script = r#"
h.set_strict_mode(0)
for call in (lambda: h.pwrite(b'a', 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)):
    try:
        call()
        raise SystemExit('a write went through')
    except nbd.Error as error:
        assert error.errno == 'EPERM', error
assert h.is_read_only()
h.flush()
"#;
    succeed("nbdsh", &["-u", &server.uri, "-c", script]);
    // A second server of the same image may read beside it.
    let second = NbdServer::start(&image, &["--read-only"]);
    succeed("nbdinfo", &["--size", &second.uri]);
    second.stop();
    server.stop();
}

#[test]
fn an_overlay_is_served_through_its_base() {
    let folder = folder();
    let size = 6 * MIB;
    let raw = source(&folder, "source.raw", size);
    let base = folder.path().join("base.qcow2");
    succeed("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&base)]);
    let overlay = folder.path().join("overlay.qcow2");
    succeed("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", text(&overlay)]);
    let server = NbdServer::start(&overlay, &[]);
    succeed("qemu-img", &["compare", "-q", "-f", "raw", "-F", "raw", text(&raw), &server.uri]);
    succeed("qemu-io", &["-f", "raw", "-c", "write -q -P 5 100001 70000", &server.uri]);
    server.stop();
    succeed("qemu-io", &["-f", "raw", "-c", "write -q -P 5 100001 70000", text(&raw)]);
    assert_whole(&overlay, &raw);
}
