//! What came in over the wire, held against what the disk holds at the first verification.

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use blockyard::node::fake::{Faults, PausePoint};
use serde_json::{Value, json};

use crate::merge::merge;
use crate::rig::{Nbd, Plan, Rig, content, id_of, manifest, published, tool};
use crate::verify::{findings, point, verify};

const FIRST: u32 = 2000;
const SECOND: u32 = 2016;
const MIB: usize = 1 << 20;
const PIECE: usize = 64 << 10;
const WINDOW: usize = 64 * MIB;

/// The second disk ends within a piece, and its client's connections meet within another; the first has zeroes, and two windows.
async fn rig() -> Rig {
    with_requests_of(4 * PIECE).await
}

async fn with_requests_of(request_bytes: usize) -> Rig {
    let mut first = content(1, WINDOW + 2 * MIB);
    first[MIB..63 * MIB].fill(0);
    let disks = vec![(FIRST, first), (SECOND, content(2, MIB + 512))];
    Rig::with(Plan { disks, request_bytes, ..Plan::default() }).await
}

/// The mark of each window, and the root over them, by their formulas.
fn marks(disk: &[u8]) -> (Vec<String>, blake3::Hash) {
    let mut all = blake3::Hasher::new();
    let windows = disk.chunks(WINDOW).enumerate().map(|(window, bytes)| {
        let mut mark = [0; 32];
        for (index, piece) in bytes.chunks(PIECE).enumerate().filter(|(_, piece)| piece.iter().any(|byte| *byte != 0)) {
            let place = (window * WINDOW + index * PIECE) as u64;
            let digest = blake3::hash(&[piece, &place.to_le_bytes()].concat());
            mark.iter_mut().zip(digest.as_bytes()).for_each(|(byte, other)| *byte ^= other);
        }
        all.update(&mark);
        blake3::Hash::from_bytes(mark).to_hex().to_string()
    });
    let windows = windows.collect();
    // All of it was received.
    for number in [0, disk.len() as u64] {
        all.update(&number.to_le_bytes());
    }
    (windows, all.finalize())
}

/// Where a byte of the disk lies in its image, by QEMU.
fn host_offset(image: &Path, guest: usize) -> u64 {
    let map = tool("qemu-utils", "qemu-img", &["map", "--output=json", "-f", "qcow2", image.to_str().unwrap()]);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let at = |extent: &Value, name: &str| extent[name].as_u64().unwrap();
    let holds = |extent: &&Value| {
        (at(extent, "start")..at(extent, "start") + at(extent, "length")).contains(&(guest as u64))
            && extent["depth"] == 0
    };
    let extent = map.iter().find(holds).unwrap();
    at(extent, "offset") + guest as u64 - at(extent, "start")
}

/// Flips a bit of the disk in its image.
pub fn flip(image: &Path, guest: usize) {
    let offset = host_offset(image, guest);
    fs::set_permissions(image, Permissions::from_mode(0o640)).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(image).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 16], offset).unwrap();
}

async fn expect_verified(rig: &Rig, id: &str, compared: usize) {
    let verification = verify(&rig.service, id, json!({"scope": "point"})).await;
    assert_eq!(
        (&verification["outcome"], &verification["bytes_compared"], findings(&verification)),
        (&json!("verified"), &json!(compared), vec![]),
        "{verification:#}"
    );
    assert_eq!(point(&rig.service, id).await["compared_bytes"], compared);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_manifest_has_the_marks_of_what_was_received_by_their_formula() {
    // Short requests, and such as are hashed beside their write.
    for request_bytes in [4 * PIECE, 8 * MIB] {
        let rig = with_requests_of(request_bytes).await;
        let backup = rig.back_up().await;
        let manifest = manifest(&rig, id_of(&backup)).await;
        let mut roots = Vec::new();
        for (index, (_, bytes)) in rig.disks.iter().enumerate() {
            let (windows, root) = marks(bytes);
            let expected = json!({
                "piece_bytes": PIECE, "window_bytes": WINDOW, "windows": windows, "root": root.to_hex().to_string(),
            });
            assert_eq!(manifest["disks"][index]["received"], expected);
            roots.extend(*root.as_bytes());
        }
        assert_eq!(manifest["received"], blake3::hash(&roots).to_hex().to_string());
        expect_verified(&rig, id_of(&backup), WINDOW + 3 * MIB + 512).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bit_that_flips_between_the_commit_and_the_first_verification_is_found() {
    for (disk, guest) in [(0, 17), (0, WINDOW + 5), (1, MIB + 100)] {
        let rig = rig().await;
        let backup = rig.back_up().await;
        let folder = published(&rig, id_of(&backup)).await;
        flip(&folder.join(format!("disk-{disk}.qcow2")), guest);
        let verification = verify(&rig.service, id_of(&backup), json!({})).await;
        assert_eq!(
            (&verification["outcome"], findings(&verification)),
            (&json!("corrupt"), vec!["received_mismatch"]),
            "{verification:#}"
        );
        assert_eq!(point(&rig.service, id_of(&backup)).await["trust"], "corrupt");
        assert!(!folder.join("digests.json").exists(), "what is damaged is not made the measure");
        assert!(!folder.join(format!("disk-{disk}.blocks")).exists());
        // Nothing is built upon it.
        assert_eq!(rig.back_up().await["disks"][0]["reason"], "parent_corrupt");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_is_held_against_what_was_received_for_it() {
    let mut rig = rig().await;
    let full = rig.back_up().await;
    expect_verified(&rig, id_of(&full), WINDOW + 3 * MIB + 512).await;
    rig.write(&[(FIRST, 2 * PIECE, content(9, PIECE)), (FIRST, WINDOW, vec![0; PIECE])]);
    let delta = rig.back_up().await;
    expect_verified(&rig, id_of(&delta), 2 * PIECE).await;
    rig.write(&[(FIRST, 5 * PIECE, content(10, PIECE))]);
    let damaged = rig.back_up().await;
    flip(&published(&rig, id_of(&damaged)).await.join("disk-0.qcow2"), 5 * PIECE + 9);
    let verification = verify(&rig.service, id_of(&damaged), json!({})).await;
    assert_eq!(
        (&verification["outcome"], findings(&verification)),
        // Whether it is the image or what lies below it, a mark does not tell.
        (&json!("suspect"), vec!["received_mismatch"]),
        "{verification:#}"
    );
    assert_eq!(point(&rig.service, id_of(&delta)).await["trust"], "verified");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_full_copy_left_out_is_compared_only_when_the_disk_is_read() {
    let mut rig = rig().await;
    let full = rig.back_up().await;
    expect_verified(&rig, id_of(&full), WINDOW + 3 * MIB + 512).await;
    rig.write(&[(FIRST, 0, content(9, PIECE))]);
    rig.node.reconfigure(|config| config.faults.full_instead_of_delta = true);
    let copy = rig.back_up().await;
    assert_eq!(copy["disks"][0]["effective_type"], "full_copy_into_overlay");
    // The rest is the parent's, and was not read; nothing of a window is judged by its half.
    expect_verified(&rig, id_of(&copy), 0).await;
    let read = verify(&rig.service, id_of(&copy), json!({"content": true})).await;
    assert_eq!(
        (&read["outcome"], &read["bytes_compared"]),
        (&json!("verified"), &json!(WINDOW + 3 * MIB + 512)),
        "{read:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merged_point_is_held_against_what_was_received_for_it() {
    let mut rig = rig().await;
    let full = rig.back_up().await;
    expect_verified(&rig, id_of(&full), WINDOW + 3 * MIB + 512).await;
    rig.write(&[(FIRST, 2 * PIECE, content(9, PIECE))]);
    let delta = rig.back_up().await;
    let before = manifest(&rig, id_of(&delta)).await;
    merge(&rig, &id_of(&delta).parse().unwrap()).await.unwrap();
    let after = manifest(&rig, id_of(&delta)).await;
    assert_eq!((&after["parent_id"], &after["received"]), (&json!(null), &before["received"]));
    expect_verified(&rig, id_of(&delta), PIECE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_twice_or_was_discarded_is_not_judged_and_the_rest_is() {
    let faults = Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
    let mut bytes = vec![0; 2 * WINDOW + MIB];
    for window in 0..3 {
        bytes[window * WINDOW..][..MIB].copy_from_slice(&content(1, MIB));
    }
    let disks = vec![(FIRST, bytes)];
    let rig = Rig::with(Plan { disks, request_bytes: 4 * PIECE, faults, ..Plan::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    // Before the client comes: what it writes over this, and what it writes over a discarded range, came in an order that only the
    // image knows.
    let port = &started["disk_results"][0]["nbd_port"];
    let mut link = Nbd::connect(&format!("nbd://127.0.0.1:{port}/db-server-disk0"));
    link.write(PIECE as u64, &[1; PIECE]).unwrap();
    link.trim(WINDOW as u64, PIECE).unwrap();
    drop(link);
    rig.node.resume();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    let windows = manifest(&rig, id_of(&backup)).await["disks"][0]["received"]["windows"].take();
    let (expected, _) = marks(&rig.disks[0].1);
    assert_eq!(windows, json!([null, null, expected[2]]));
    expect_verified(&rig, id_of(&backup), MIB).await;
    rig.expect_restorable(id_of(&backup)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_of_a_version_that_took_no_marks_is_verified_without_them() {
    let rig = rig().await;
    let backup = rig.back_up().await;
    let path = published(&rig, id_of(&backup)).await.join("manifest.json");
    let mut older = manifest(&rig, id_of(&backup)).await;
    older.as_object_mut().unwrap().remove("received");
    for disk in older["disks"].as_array_mut().unwrap() {
        disk.as_object_mut().unwrap().remove("received");
    }
    fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    fs::write(&path, serde_json::to_vec(&older).unwrap()).unwrap();
    expect_verified(&rig, id_of(&backup), 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn marks_that_were_changed_make_the_manifest_damaged() {
    let rig = rig().await;
    let backup = rig.back_up().await;
    let path = published(&rig, id_of(&backup)).await.join("manifest.json");
    fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    let sound = manifest(&rig, id_of(&backup)).await;
    for change in [
        |disk: &mut Value| disk["received"]["windows"][1] = json!(null),
        |disk: &mut Value| disk["coverage"][0][0] = json!(PIECE),
        |disk: &mut Value| disk["received"] = json!(null),
    ] {
        let mut changed = sound.clone();
        change(&mut changed["disks"][0]);
        fs::write(&path, serde_json::to_vec(&changed).unwrap()).unwrap();
        let verification = verify(&rig.service, id_of(&backup), json!({})).await;
        assert_eq!(findings(&verification)[0], "manifest", "{verification:#}");
        assert_eq!(verification["outcome"], "corrupt");
    }
}
