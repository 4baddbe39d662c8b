//! Foreign clients in the place of the backup client: three `nbdcopy` at once into the listeners of one request.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use blockyard::node::fake::Faults;
use serde_json::Value;

use crate::rig::{self, Plan, Rig, change_id, id_of};

/// Size of each disk in MiB: `SCALE=1` is the default, and more takes disk space in proportion.
fn disk_mib() -> u64 {
    let scale: u64 = std::env::var("SCALE").ok().and_then(|scale| scale.parse().ok()).unwrap_or(1);
    256 * scale
}

/// A raw file of which a fifth, in pieces all over it, is data.
fn sparse_source(path: &Path, size: u64, seed: u8) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    let piece = 1 << 20;
    let data = rig::content(seed, piece);
    let mut offset = u64::from(seed) * 4096;
    while offset + piece as u64 <= size {
        // Each piece begins with its place, so that a piece that lands elsewhere is found.
        let mut bytes = data.clone();
        bytes[..8].copy_from_slice(&offset.to_be_bytes());
        file.write_all_at(&bytes, offset).unwrap();
        offset += 5 * piece as u64;
    }
}

fn nbdcopy(source: &Path, uri: &str) -> Child {
    Command::new("nbdcopy")
        .args(["--", source.to_str().unwrap(), uri])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nbdcopy: install the package libnbd-bin")
}

async fn copy_three_disks(disks: Vec<(PathBuf, u64)>) {
    let faults = Faults { never_connect: true, ..Faults::default() };
    let keys = [2000, 2016, 16_000];
    // The rig's own disks are of no account: nobody but nbdcopy connects.
    let rig = Rig::with(Plan { faults, disks: vec![(1, vec![0; 512])], ..Plan::default() }).await;
    let sizes: Vec<(u32, u64)> = keys.into_iter().zip(disks.iter().map(|(_, size)| *size)).collect();
    let vm = rig::add_vm(&rig.service, "three-disks", &sizes).await;
    let body = serde_json::json!({"vm_context_id": vm, "repository_id": "main", "backup_type": "full"});
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    let uris: Vec<String> = started["nbd_targets_string"]
        .as_str()
        .unwrap()
        .split(',')
        .map(|target| target.split_once(':').unwrap().1.to_owned())
        .collect();
    let copies: Vec<Child> = disks.iter().zip(&uris).map(|((source, _), uri)| nbdcopy(source, uri)).collect();
    for copy in copies {
        let output = tokio::task::spawn_blocking(|| copy.wait_with_output()).await.unwrap().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    for disk_id in 0..3_u32 {
        assert!(rig.points().await.is_empty(), "no point before the last disk is completed");
        let key = keys[disk_id as usize];
        rig.complete(id_of(&started), disk_id, &change_id(key)).await.expect_status(200);
    }
    // The last answer came when the restore point was there.
    let point = rig.points().await.remove(0);
    assert_eq!(point["id"], started["backup_id"]);
    let folder = PathBuf::from(point["path"].as_str().unwrap());
    for (disk_id, (source, size)) in disks.iter().enumerate() {
        let image = folder.join(format!("disk-{disk_id}.qcow2"));
        let (image, source) = (image.to_str().unwrap(), source.to_str().unwrap());
        let check: Value = serde_json::from_str(&rig::tool(
            "qemu-utils",
            "qemu-img",
            &["check", "--output=json", "-f", "qcow2", image],
        ))
        .unwrap();
        let none = |field: &str| check.get(field).is_none_or(|count| count == 0);
        assert!(none("corruptions") && none("leaks") && check["check-errors"] == 0, "{check}");
        rig::tool("qemu-utils", "qemu-img", &["compare", "-f", "qcow2", "-F", "raw", image, source]);
        // Holes stay holes: the image holds about the fifth that is data.
        let stored = std::fs::metadata(image).unwrap().len();
        assert!(stored < size / 2, "{stored} of {size} bytes are stored");
    }
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nbdcopy_clients_at_once_fill_one_vm() {
    let folder = tempfile::tempdir().unwrap();
    let disks = (1..=3_u8)
        .map(|seed| {
            let path = folder.path().join(format!("source-{seed}"));
            // Of odd size, the last one too small for a cluster at its end.
            let size = (disk_mib() << 20) + u64::from(seed) * 512;
            sparse_source(&path, size, seed);
            (path, size)
        })
        .collect();
    copy_three_disks(disks).await;
}
