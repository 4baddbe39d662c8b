//! Incremental backups: what builds upon what, what is refused, and that every point of a chain reads back as it was.

use std::path::{Path, PathBuf};

use blockyard::node::fake::{Event, Faults, PausePoint};
use blockyard::store::leases;
use serde_json::{Value, json};

use crate::rig::{Plan, Rig, content, id_of, manifest, published, tool};

/// The disks by device key.
const FIRST: u32 = 2000;
const SECOND: u32 = 2016;
const THIRD: u32 = 16_000;
const MIB: usize = 1 << 20;

/// The content of all disks as one point should have it.
pub type Disks = Vec<(u32, Vec<u8>)>;

/// A rig whose disks are all larger than what [`write_everywhere`] changes of them.
pub async fn rig(toml: &str) -> Rig {
    let disks = vec![(FIRST, content(1, 5 * MIB)), (SECOND, content(2, 3 * MIB + 512)), (THIRD, content(3, MIB / 2))];
    Rig::with(Plan { disks, toml: toml.to_owned(), ..Plan::default() }).await
}

/// Writes to every disk; another content each time.
pub fn write_everywhere(rig: &mut Rig, round: u8) {
    let at = usize::from(round) * 3 * 512;
    rig.write(&[
        (FIRST, at, content(round, 100 << 10)),
        (FIRST, 4 * MIB + at, vec![0; 128 << 10]),
        (SECOND, 3 * MIB - 512, content(round, 1024)),
        (THIRD, 0, content(round, 512)),
    ]);
}

/// Makes a backup that must succeed.
pub async fn commit(rig: &Rig) -> Value {
    let backup = rig.back_up().await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    backup
}

fn values(backup: &Value, field: &str) -> Vec<String> {
    let disks = backup["disks"].as_array().unwrap();
    disks.iter().map(|disk| disk[field].as_str().unwrap_or_default().to_owned()).collect()
}

/// Holds that QEMU reads every disk of the point through its chain as it was, and finds the image sound.
pub fn expect_restores(folder: &Path, disks: &Disks) {
    for (index, (_, bytes)) in disks.iter().enumerate() {
        let image = folder.join(format!("disk-{index}.qcow2"));
        let raw = tempfile::NamedTempFile::new().unwrap();
        let (from, to) = (image.to_str().unwrap(), raw.path().to_str().unwrap());
        tool("qemu-utils", "qemu-img", &["check", "-f", "qcow2", from]);
        tool("qemu-utils", "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", from, to]);
        let restored = std::fs::read(raw.path()).unwrap();
        assert_eq!(restored.len(), bytes.len(), "{from}");
        let differs = restored.iter().zip(bytes).position(|(restored, expected)| restored != expected);
        assert_eq!(differs, None, "{from}: first byte that differs");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn full_then_three_incrementals_restore_every_point_byte_for_byte() {
    let mut rig = rig("").await;
    let mut history: Vec<(String, Disks)> = Vec::new();
    for round in 0..4 {
        if round > 0 {
            write_everywhere(&mut rig, round);
        }
        let backup = commit(&rig).await;
        let expected = if round == 0 { "full" } else { "incremental" };
        assert_eq!(values(&backup, "effective_type"), [expected; 3], "{backup:#}");
        history.push((id_of(&backup).to_owned(), rig.disks.clone()));
    }
    for (round, (id, disks)) in history.iter().enumerate() {
        expect_restores(&published(&rig, id).await, disks);
        let manifest = manifest(&rig, id).await;
        for disk in manifest["disks"].as_array().unwrap() {
            assert_eq!(disk["chain_depth"], round + 1, "{disk:#}");
        }
    }
    rig.expect_nothing_left(4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_incremental_is_backed_by_the_point_whose_change_id_it_started_from() {
    let mut rig = rig("").await;
    let mut parent = manifest(&rig, id_of(&commit(&rig).await)).await;
    for round in 1..3 {
        write_everywhere(&mut rig, round);
        rig.node.reconfigure(|config| config.faults.pause = Some(PausePoint::BeforeConnect(0)));
        let started = rig.start().await;
        rig.paused().await;
        let store = &rig.service.service.app().store;
        // VM, inventory name, three ports, and each point of the chain once for all disks.
        assert_eq!(leases::count(&mut store.read().await.unwrap()).await.unwrap(), 5 + u64::from(round));
        rig.node.resume();
        let backup = rig.end_of(id_of(&started)).await;
        assert_eq!(backup["state"], "committed", "{backup:#}");

        let call = rig.node.log().events().into_iter().rev().find_map(|event| match event {
            Event::Called(call) => Some(call),
            _ => None,
        });
        let call = call.unwrap();
        assert_eq!(
            (call.backup_type.as_str(), json!(call.previous_change_id)),
            ("incremental", parent["disks"][0]["change_id"].clone())
        );

        let point = manifest(&rig, id_of(&backup)).await;
        let folder = published(&rig, id_of(&backup)).await;
        for (disk, below) in point["disks"].as_array().unwrap().iter().zip(parent["disks"].as_array().unwrap()) {
            assert_eq!((&disk["backup_type"], &disk["reason"]), (&json!("incremental"), &json!("parent_ok")));
            assert_eq!((&disk["parent_id"], &disk["from_change_id"]), (&parent["backup_id"], &below["change_id"]));
            assert_ne!(disk["change_id"], below["change_id"]);
            let image = folder.join(disk["file"].as_str().unwrap());
            let info = tool("qemu-utils", "qemu-img", &["info", "--output=json", image.to_str().unwrap()]);
            let info: Value = serde_json::from_str(&info).unwrap();
            let name = format!("../{}/{}", parent["backup_id"].as_str().unwrap(), below["file"].as_str().unwrap());
            assert_eq!((&info["backing-filename"], &info["backing-filename-format"]), (&json!(name), &json!("qcow2")));
        }
        parent = point;
    }
    rig.expect_nothing_left(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn first_incremental_of_a_new_vm_finds_its_full() {
    // By whatever name it is asked for, and although another VM has points already.
    let mut rig = rig("").await;
    commit(&rig).await;
    let vm = crate::rig::add_vm(&rig.service, "new-vm", &crate::rig::sizes(&rig.disks)).await;
    let by_name = json!({"vm_name": "new-vm", "repository_id": "main", "backup_type": "full"});
    let started = rig.service.post("/api/v1/backups/vm", &by_name).await.expect_status(200).json();
    let full = rig.end_of(id_of(&started)).await;
    assert_eq!(full["state"], "committed", "{full:#}");
    let mut below = id_of(&full).to_owned();
    for (round, field, value) in [(1, "vm_context_id", vm.as_str()), (2, "vm_name", "new-vm")] {
        write_everywhere(&mut rig, round);
        let body = json!({field: value, "repository_id": "main", "backup_type": "incremental"});
        let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
        let backup = rig.end_of(id_of(&started)).await;
        assert_eq!((&backup["state"], &backup["vm_context_id"]), (&json!("committed"), &json!(vm)), "{backup:#}");
        assert_eq!(values(&backup, "parent_id"), vec![below; 3]);
        assert_eq!(values(&backup, "effective_type"), ["incremental"; 3]);
        expect_restores(&published(&rig, id_of(&backup)).await, &rig.disks);
        below = id_of(&backup).to_owned();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn second_repository_starts_with_a_full_although_the_first_has_points() {
    let mut rig = rig("").await;
    let first = commit(&rig).await;
    rig.service.add_repository("second").await;
    let mut body = rig.start_body();
    body["repository_id"] = "second".into();
    write_everywhere(&mut rig, 1);
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    assert_eq!(started["disk_results"][0]["reason"], "first_backup");
    let second = rig.end_of(id_of(&started)).await;
    assert_eq!((&second["state"], &second["backup_type"]), (&json!("committed"), &json!("full")));
    // What was committed elsewhere meanwhile is no parent either.
    write_everywhere(&mut rig, 2);
    let third = commit(&rig).await;
    assert_eq!(values(&third, "parent_id"), [id_of(&first); 3]);
    assert_eq!(values(&third, "from_change_id"), values(&first, "change_id"));
    rig.expect_restorable(id_of(&third)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_full_between_two_incrementals_never_becomes_a_parent() {
    let mut rig = rig("[jobs]\nreconnect_s = 1\n").await;
    commit(&rig).await;
    write_everywhere(&mut rig, 1);
    let before = commit(&rig).await;
    write_everywhere(&mut rig, 2);
    // Dies with two of three disks sealed.
    rig.node.reconfigure(|config| config.faults.die_after_bytes = Some(8 * MIB as u64 + 1024));
    let mut body = rig.start_body();
    body["backup_type"] = "full".into();
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    let failed = rig.end_of(id_of(&started)).await;
    assert_eq!(failed["state"], "failed", "{failed:#}");
    rig.node.reconfigure(|config| config.faults = Faults::default());
    write_everywhere(&mut rig, 3);
    let after = commit(&rig).await;
    assert_eq!(values(&after, "parent_id"), [id_of(&before); 3]);
    assert_eq!(values(&after, "from_change_id"), values(&before, "change_id"));
    assert_eq!(values(&after, "effective_type"), ["incremental"; 3]);
    expect_restores(&published(&rig, id_of(&after)).await, &rig.disks);
    rig.expect_nothing_left(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grown_disk_is_full_while_the_others_stay_incremental() {
    let mut rig = rig("").await;
    commit(&rig).await;
    let mut disks = rig.disks.clone();
    disks[1].1.extend(content(9, MIB));
    rig.replace_disks(disks).await;
    write_everywhere(&mut rig, 1);
    let backup = commit(&rig).await;
    assert_eq!(backup["backup_type"], "incremental");
    assert_eq!(values(&backup, "reason"), ["parent_ok", "size_changed", "parent_ok"]);
    assert_eq!(values(&backup, "effective_type"), ["incremental", "full", "incremental"]);
    expect_restores(&published(&rig, id_of(&backup)).await, &rig.disks);
    // The new full carries on.
    write_everywhere(&mut rig, 2);
    let next = commit(&rig).await;
    assert_eq!(values(&next, "effective_type"), ["incremental"; 3]);
    expect_restores(&published(&rig, id_of(&next)).await, &rig.disks);
}

#[tokio::test(flavor = "multi_thread")]
async fn new_disk_is_full_and_the_rest_incremental_in_one_job() {
    let mut rig = rig("").await;
    commit(&rig).await;
    let mut disks = rig.disks.clone();
    disks.push((16_001, content(9, MIB)));
    rig.replace_disks(disks).await;
    write_everywhere(&mut rig, 1);
    let mut body = rig.start_body();
    body["backup_type"] = "incremental".into();
    let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!((&backup["state"], &backup["backup_type"]), (&json!("committed"), &json!("incremental")), "{backup:#}");
    assert_eq!(values(&backup, "reason"), ["parent_ok", "parent_ok", "parent_ok", "disk_new"]);
    assert_eq!(values(&backup, "effective_type"), ["incremental", "incremental", "incremental", "full"]);
    expect_restores(&published(&rig, id_of(&backup)).await, &rig.disks);
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_epoch_without_full_coverage_is_refused() {
    let mut rig = rig("").await;
    commit(&rig).await;
    write_everywhere(&mut rig, 1);
    let begin_anew = |rig: &Rig, delta: bool| {
        rig.node.reconfigure(|config| {
            config.faults.delta_instead_of_full = delta;
            for (key, disk) in &mut config.disks {
                disk.change_id = format!("99 {key:x}/1");
            }
        });
    };
    begin_anew(&rig, true);
    let backup = rig.back_up().await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("epoch_mismatch")), "{backup:#}");
    let failed = backup["disks"].as_array().unwrap().iter().filter(|disk| disk["error_message"].is_string());
    assert_eq!(failed.map(|disk| &disk["error_message"]).collect::<Vec<_>>(), [&backup["error_message"]]);
    let refused = rig
        .seen(|event| match event {
            Event::Completed { status: 409, body, .. } => Some(body.clone()),
            _ => None,
        })
        .await;
    assert_eq!(serde_json::from_str::<Value>(&refused).unwrap()["code"], "epoch_mismatch");
    rig.expect_nothing_left(1).await;
    // The whole disk is right whatever the change ids say.
    begin_anew(&rig, false);
    let backup = commit(&rig).await;
    assert_eq!(values(&backup, "effective_type"), ["full_copy_into_overlay"; 3]);
    expect_restores(&published(&rig, id_of(&backup)).await, &rig.disks);
}

#[tokio::test(flavor = "multi_thread")]
async fn unchanged_full_copy_into_an_overlay_stores_almost_nothing() {
    for drop_identical in [true, false] {
        let toml = format!("[storage]\ndrop_identical = {drop_identical}\n");
        let mut rig = rig(&toml).await;
        commit(&rig).await;
        rig.write(&[]);
        rig.node.reconfigure(|config| config.faults.full_instead_of_delta = true);
        let backup = commit(&rig).await;
        assert_eq!(values(&backup, "effective_type"), ["full_copy_into_overlay"; 3]);
        let manifest = manifest(&rig, id_of(&backup)).await;
        for disk in manifest["disks"].as_array().unwrap() {
            let number = |field: &str| disk[field].as_u64().unwrap();
            assert_eq!(number("written_bytes") + number("zeroed_bytes"), number("size_bytes"));
            if drop_identical {
                // A part of a cluster that is zeroed may be left out too.
                assert!(number("identical_bytes") >= number("written_bytes"), "{disk:#}");
                assert!(number("file_bytes") <= 8 * 65_536, "{disk:#}");
            } else {
                assert_eq!(number("identical_bytes"), 0, "{disk:#}");
                assert!(number("file_bytes") > number("written_bytes"), "{disk:#}");
            }
        }
        assert_eq!(backup["disks"][0]["identical_bytes"], manifest["disks"][0]["identical_bytes"]);
        expect_restores(&published(&rig, id_of(&backup)).await, &rig.disks);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn incremental_of_three_disks_is_incremental_for_all_with_the_stock_client() {
    for (predict, expected) in [
        (true, ["incremental"; 3]),
        // A client that is always told of disk 0 finds that the others have another epoch.
        (false, ["incremental", "full_copy_into_overlay", "full_copy_into_overlay"]),
    ] {
        let toml = format!("[jobs]\npredict_next_disk = {predict}\n");
        let mut rig = rig(&toml).await;
        commit(&rig).await;
        write_everywhere(&mut rig, 1);
        let backup = commit(&rig).await;
        assert_eq!(values(&backup, "effective_type"), expected, "{backup:#}");
        expect_restores(&published(&rig, id_of(&backup)).await, &rig.disks);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_change_id_that_is_told_is_that_of_the_disk_that_was_asked_for() {
    let rig = rig("").await;
    let first = commit(&rig).await;
    rig.node.reconfigure(|config| config.faults.pause = Some(PausePoint::BeforeConnect(0)));
    let ask = async |disk_id: &str| {
        let path = format!("/api/v1/backups/changeid?vm_name=db-server&disk_id={disk_id}");
        let answer = crate::support::send(rig.service.request_without_token(reqwest::Method::GET, &path)).await;
        answer.expect_status(200).json()
    };
    assert_eq!(ask("0").await["change_id"], "", "nothing runs");
    let started = rig.start().await;
    rig.paused().await;
    for (disk_id, expected) in [("0", 0), ("", 0), ("1", 1), ("2", 2)] {
        let answer = ask(disk_id).await;
        assert_eq!(answer["change_id"], first["disks"][expected]["change_id"], "{disk_id}");
        assert_eq!(answer["backup_job_id"], started["backup_id"]);
        assert_eq!(answer["message"], "Previous change_id found");
    }
    for disk_id in ["3", "x", "-1"] {
        let answer = ask(disk_id).await;
        assert_eq!((&answer["change_id"], &answer["message"]), (&json!(""), &json!("No previous backup found")));
    }
    rig.node.resume();
    rig.end_of(id_of(&started)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_built_upon_a_full_that_lacks_bytes() {
    let rig = rig("[storage]\ncoverage_full = \"warn\"\n").await;
    rig.node.reconfigure(|config| config.faults.delta_instead_of_full = true);
    let partial = commit(&rig).await;
    assert_eq!(partial["result"], "warning");
    assert_eq!(rig.points().await[0]["trust"], "suspect");
    rig.node.reconfigure(|config| config.faults = Faults::default());
    let whole = commit(&rig).await;
    assert_eq!((&whole["backup_type"], &whole["result"]), (&json!("full"), &json!("success")));
    assert_eq!(values(&whole, "reason"), ["parent_suspect"; 3]);
    expect_restores(&published(&rig, id_of(&whole)).await, &rig.disks);
}

#[tokio::test(flavor = "multi_thread")]
async fn chain_at_its_limit_continues_with_a_full() {
    let mut rig = rig("[storage]\nmax_chain_depth = 2\n").await;
    let expected =
        [("full", "first_backup"), ("incremental", "parent_ok"), ("full", "chain_depth"), ("incremental", "parent_ok")];
    for (round, (backup_type, reason)) in (0..).zip(expected) {
        write_everywhere(&mut rig, round);
        let backup = commit(&rig).await;
        assert_eq!(backup["backup_type"], backup_type, "{round}");
        assert_eq!(values(&backup, "reason"), [reason; 3], "{round}");
        expect_restores(&published(&rig, id_of(&backup)).await, &rig.disks);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn result_shows_requested_and_effective_type_with_reason() {
    let mut rig = rig("").await;
    let first = commit(&rig).await;
    let mut body = rig.start_body();
    for (requested, job_type, reason) in [
        ("incremental", "incremental", "parent_ok"),
        ("auto", "incremental", "parent_ok"),
        ("full", "full", "requested_full"),
    ] {
        write_everywhere(&mut rig, 1);
        body["backup_type"] = requested.into();
        let started = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
        assert_eq!((&started["requested_type"], &started["backup_type"]), (&json!(requested), &json!(job_type)));
        assert_eq!(
            (&started["disk_results"][0]["backup_type"], &started["disk_results"][0]["reason"]),
            (&json!(job_type), &json!(reason))
        );
        let backup = rig.end_of(id_of(&started)).await;
        assert_eq!((&backup["requested_type"], &backup["backup_type"]), (&json!(requested), &json!(job_type)));
        assert_eq!(backup["progress_percent"], 100.0);
        assert_eq!(values(&backup, "backup_type"), [job_type; 3]);
        assert_eq!(values(&backup, "effective_type"), [job_type; 3]);
        assert_eq!(values(&backup, "reason"), [reason; 3]);
        let point = rig.service.get(&format!("/api/v1/points/{}", id_of(&backup))).await.expect_status(200).json();
        assert_eq!(point["backup_type"], job_type);
    }
    let listed = rig.service.get("/api/v1/backups?backup_type=incremental").await.expect_status(200).json();
    assert_eq!(listed["total"], 2);
    assert_eq!((&first["requested_type"], &first["backup_type"]), (&json!("auto"), &json!("full")));
}

#[tokio::test(flavor = "multi_thread")]
async fn moved_repository_opens_and_restores_with_qemu_img_alone() {
    let mut rig = rig("").await;
    commit(&rig).await;
    for round in 1..3 {
        write_everywhere(&mut rig, round);
        commit(&rig).await;
    }
    let id = rig.points().await[0]["id"].as_str().unwrap().to_owned();
    let folder = published(&rig, &id).await;
    let inside = folder.strip_prefix(&rig.repository).unwrap().to_owned();
    let Rig { service, repository, disks, .. } = rig;
    let kept = service.stop().await;
    let elsewhere = tempfile::tempdir_in(kept.path()).unwrap().keep().join("another name");
    std::fs::rename(&repository, &elsewhere).unwrap();
    expect_restores(&elsewhere.join(inside), &disks);
}

/// The image of the first disk of a point.
async fn first_image(rig: &Rig, id: &str) -> PathBuf {
    published(rig, id).await.join("disk-0.qcow2")
}

#[tokio::test(flavor = "multi_thread")]
async fn auto_succeeds_whatever_the_state_of_the_chain() {
    let mut rig = rig("").await;
    let mut round = 0;
    let mut chain = async |rig: &mut Rig| {
        let mut body = rig.start_body();
        body["backup_type"] = "full".into();
        let full = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
        rig.end_of(id_of(&full)).await;
        round += 1;
        write_everywhere(rig, round);
        let top = commit(rig).await;
        assert_eq!(values(&top, "reason"), ["parent_ok"; 3]);
        write_everywhere(rig, round + 10);
        (id_of(&full).to_owned(), id_of(&top).to_owned())
    };
    let expect = async |rig: &Rig, reasons: [&str; 3]| {
        let backup = commit(rig).await;
        assert_eq!(values(&backup, "reason"), reasons);
        expect_restores(&published(rig, id_of(&backup)).await, &rig.disks);
    };

    let (_, top) = chain(&mut rig).await;
    std::fs::remove_file(first_image(&rig, &top).await).unwrap();
    expect(&rig, ["parent_missing", "parent_ok", "parent_ok"]).await;

    let (full, _) = chain(&mut rig).await;
    std::fs::remove_file(first_image(&rig, &full).await).unwrap();
    expect(&rig, ["parent_missing", "parent_ok", "parent_ok"]).await;

    let (_, top) = chain(&mut rig).await;
    let image = first_image(&rig, &top).await;
    let length = std::fs::metadata(&image).unwrap().len();
    std::fs::File::options().write(true).open(&image).unwrap().set_len(length - 65_536).unwrap();
    expect(&rig, ["parent_corrupt", "parent_ok", "parent_ok"]).await;

    // Below the newest point, too: the backup would fail when it reads there, night after night.
    let (full, _) = chain(&mut rig).await;
    let image = first_image(&rig, &full).await;
    let length = std::fs::metadata(&image).unwrap().len();
    std::fs::File::options().write(true).open(&image).unwrap().set_len(length - 65_536).unwrap();
    expect(&rig, ["parent_corrupt", "parent_ok", "parent_ok"]).await;

    let (_, top) = chain(&mut rig).await;
    std::fs::write(first_image(&rig, &top).await, b"not an image").unwrap();
    expect(&rig, ["parent_corrupt", "parent_ok", "parent_ok"]).await;

    for (trust, is_below) in [("suspect", false), ("corrupt", false), ("corrupt", true)] {
        let (full, top) = chain(&mut rig).await;
        let marked = if is_below { full } else { top };
        let mut transaction = rig.service.service.app().store.write().await.unwrap();
        let mark = sqlx::query("UPDATE restore_points SET trust = ? WHERE id = ?").bind(trust).bind(marked);
        mark.execute(&mut *transaction).await.unwrap();
        transaction.commit().await.unwrap();
        let reason = format!("parent_{trust}");
        let mut body = rig.start_body();
        body["backup_type"] = "incremental".into();
        let refused = rig.service.post("/api/v1/backups/vm", &body).await.expect_problem(422, "no_parent_point");
        assert!(refused["detail"].as_str().unwrap().contains(&reason), "{refused}");
        expect(&rig, [&reason; 3]).await;
    }
}
