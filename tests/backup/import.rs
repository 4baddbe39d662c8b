//! Repositories without their database: what manifests bring back, what they must never bring in, and what a check tells.

use std::fs;
use std::path::{Path, PathBuf};

use blockyard::id::BackupId;
use blockyard::node::fake::{FakeNode, Faults, PausePoint};
use serde_json::{Value, json};

use crate::process::sqlite;
use crate::received::flip;
use crate::rig::{self, Rig, id_of};
use crate::support::TestService;
use crate::support::process::blockyard;
use crate::verify::{point, verify};

/// What must come back as it was: a point without what is only known of its reading.
fn told(point: &Value) -> Value {
    let mut told = point.clone();
    let unread = ["trust", "trust_reason", "verified_at"];
    unread.iter().for_each(|member| told[*member] = Value::Null);
    for disk in told["disks"].as_array_mut().unwrap() {
        ["digest", "content_digest"].iter().for_each(|member| disk[*member] = Value::Null);
    }
    told
}

async fn import(service: &TestService) -> Value {
    service.post("/api/v1/repositories/main/import", &json!({})).await.expect_status(200).json()
}

async fn check(service: &TestService) -> Value {
    service.post("/api/v1/repositories/main/check", &json!({})).await.expect_status(200).json()
}

fn kinds(report: &Value) -> Vec<(&str, &str)> {
    let findings = report["findings"].as_array().unwrap().iter();
    findings.map(|finding| (finding["kind"].as_str().unwrap(), finding["path"].as_str().unwrap())).collect()
}

/// The same node, ports and folder with a new service.
async fn start_again(folder: tempfile::TempDir, node: FakeNode, old: Parts) -> Rig {
    let toml = rig::configuration(&node.url(), folder.path(), &old.ports, "");
    let service = TestService::start_in(folder, &toml).await;
    let hub_url = service.service.url();
    node.reconfigure(|config| config.hub_url = hub_url);
    Rig { service, node, vm: old.vm, repository: old.repository, disks: old.disks, ports: old.ports }
}

/// What a rig has beside its service and its node.
struct Parts {
    vm: String,
    repository: PathBuf,
    disks: Vec<(u32, Vec<u8>)>,
    ports: std::ops::RangeInclusive<u16>,
}

/// Stops the service, changes what it left, and starts another.
async fn restart(rig: Rig, change: impl AsyncFnOnce(&Path)) -> Rig {
    let Rig { service, node, vm, repository, disks, ports } = rig;
    let folder = service.stop().await;
    change(&folder.path().join("state")).await;
    start_again(folder, node, Parts { vm, repository, disks, ports }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn database_rebuilt_from_manifests_lists_and_restores_everything() {
    let mut rig = Rig::new().await;
    let mut states = Vec::new();
    for round in 0..3_u8 {
        if round > 0 {
            rig.write(&[(2000, 512 * usize::from(round), vec![round; 70_000]), (16_000, 0, vec![round; 512])]);
        }
        let backup = rig.back_up().await;
        assert_eq!(backup["state"], "committed", "{backup:#}");
        states.push((id_of(&backup).to_owned(), rig.disks.clone()));
    }
    let before: Vec<Value> = rig.points().await.iter().map(told).collect();
    assert_eq!(before[0]["backup_type"], "incremental");

    let rig = restart(rig, async |state: &Path| fs::remove_dir_all(state).unwrap()).await;
    assert!(rig.points().await.is_empty());
    let repository = json!({"id": "main", "name": "main", "path": rig.repository});
    rig.service.post("/api/v1/repositories", &repository).await.expect_status(201);
    let report = import(&rig.service).await;
    let ids: Vec<&String> = states.iter().map(|(id, _)| id).collect();
    assert_eq!(report["imported"], json!(ids), "{report:#}");
    assert_eq!((&report["known"], &report["skipped"]), (&json!(0), &json!([])));

    let after: Vec<Value> = rig.points().await.iter().map(told).collect();
    assert_eq!(after, before);
    for (id, disks) in &states {
        let folder = rig::published(&rig, id).await;
        for (number, (_, bytes)) in disks.iter().enumerate() {
            rig::expect_image_equals(&folder.join(format!("disk-{number}.qcow2")), bytes);
        }
        let backup = rig.backup(id).await;
        assert_eq!((&backup["state"], &backup["result"]), (&json!("committed"), &json!("success")), "{backup:#}");
    }
    assert_eq!(check(&rig.service).await["result"], "clean");
    // Once more finds nothing new.
    let report = import(&rig.service).await;
    assert_eq!((&report["imported"], &report["known"]), (&json!([]), &json!(3)));

    // The VM is described again and goes on where its history ends.
    rig.service.get(&format!("/api/v1/vms/{}", rig.vm)).await.expect_problem(404, "vm_not_found");
    assert_eq!(rig::add_vm(&rig.service, "db-server", &rig::sizes(&rig.disks)).await, rig.vm);
    let mut rig = rig;
    rig.write(&[(2016, 4096, vec![77; 4096])]);
    let next = rig.back_up().await;
    assert_eq!(next["state"], "committed", "{next:#}");
    for disk in next["disks"].as_array().unwrap() {
        assert_eq!(
            (&disk["reason"], &disk["effective_type"]),
            (&json!("parent_ok"), &json!("incremental")),
            "{next:#}"
        );
        assert_eq!(disk["parent_id"], json!(states[2].0));
    }
    rig.expect_restorable(id_of(&next)).await;
    rig.expect_nothing_left(4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_point_is_restored_against_its_digests_before_anybody_has_verified_it_again() {
    let rig = Rig::new().await;
    let id = id_of(&rig.back_up().await).to_owned();
    assert_eq!(verify(&rig.service, &id, json!({})).await["outcome"], "verified");
    let before = point(&rig.service, &id).await;
    flip(&rig::published(&rig, &id).await.join("disk-0.qcow2"), 5000);
    let rig = restart(rig, async |state: &Path| fs::remove_dir_all(state).unwrap()).await;
    let repository = json!({"id": "main", "name": "main", "path": rig.repository});
    rig.service.post("/api/v1/repositories", &repository).await.expect_status(201);
    assert_eq!(import(&rig.service).await["imported"], json!([id]));
    let imported = point(&rig.service, &id).await;
    assert_eq!(imported["trust"], "unverified");
    for disk in 0..3 {
        for digest in ["digest", "content_digest"] {
            assert_eq!(imported["disks"][disk][digest], before["disks"][disk][digest]);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("disk.raw");
    let (code, said) = cli(&rig, &["restore", "raw", &id, "--disk", "0", "--output", output.to_str().unwrap()]);
    assert_eq!(code, 6, "{said}");
    assert_eq!(verify(&rig.service, &id, json!({})).await["outcome"], "corrupt");
}

/// Removes the record of a point and of its job.
async fn forget(state: &Path, id: &str) {
    let statements = format!(
        "DELETE FROM point_disks WHERE point_id = '{id}'; DELETE FROM restore_points WHERE id = '{id}'; \
         DELETE FROM backup_disks WHERE backup_id = '{id}'; DELETE FROM backups WHERE id = '{id}';"
    );
    sqlite(&state.join("blockyard.db"), &statements).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_without_a_record_is_imported_at_the_start() {
    let mut rig = Rig::new().await;
    let full = rig.back_up().await;
    rig.write(&[(2000, 0, vec![3; 512])]);
    let top = rig.back_up().await;
    let id = id_of(&top).to_owned();
    let forgotten = id.clone();
    let rig = restart(rig, async move |state: &Path| forget(state, &forgotten).await).await;
    let points = rig.points().await;
    assert_eq!(points.len(), 2);
    assert_eq!((&points[0]["id"], &points[0]["trust"]), (&json!(id), &json!("unverified")));
    assert_eq!(points[0]["disks"][0]["parent_id"], full["backup_id"]);
    rig.expect_restorable(&id).await;
    rig.expect_nothing_left(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_whose_parent_is_gone_is_not_imported() {
    let mut rig = Rig::new().await;
    let full = rig.back_up().await;
    rig.write(&[(2000, 0, vec![3; 512])]);
    let top = rig.back_up().await;
    let (full, top) = (id_of(&full).to_owned(), id_of(&top).to_owned());
    let aside = rig.service.folder.path().join("aside");
    let published = rig::published(&rig, &full).await;
    fs::rename(&published, &aside).unwrap();
    let rig = restart(rig, async |state: &Path| fs::remove_dir_all(state).unwrap()).await;
    let repository = json!({"id": "main", "name": "main", "path": rig.repository});
    rig.service.post("/api/v1/repositories", &repository).await.expect_status(201);
    let report = import(&rig.service).await;
    assert_eq!((&report["imported"], report["skipped"].as_array().unwrap().len()), (&json!([]), 1));
    assert!(report["skipped"][0]["reason"].as_str().unwrap().contains(&full), "{report:#}");
    assert!(rig.points().await.is_empty());
    // With its parent there again both are taken, the parent first.
    fs::rename(&aside, &published).unwrap();
    assert_eq!(import(&rig.service).await["imported"], json!([full, top]));
    rig.expect_restorable(&top).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_and_foreign_manifests_are_told_and_never_imported() {
    let rig = Rig::new().await;
    let backup = rig.back_up().await;
    let origin = rig::published(&rig, id_of(&backup)).await;
    let vm_folder = origin.parent().unwrap().to_owned();
    let manifest = rig::manifest(&rig, id_of(&backup)).await;
    let mut expected = 0;
    // A copy of the point under another id, with its manifest changed.
    let mut plant = |change: &dyn Fn(&mut Value, &Path)| -> PathBuf {
        let id = BackupId::new();
        let folder = vm_folder.join(id.as_str());
        fs::create_dir(&folder).unwrap();
        for number in 0..3 {
            let name = format!("disk-{number}.qcow2");
            fs::copy(origin.join(&name), folder.join(&name)).unwrap();
        }
        let mut manifest = manifest.clone();
        manifest["backup_id"] = id.as_str().into();
        change(&mut manifest, &folder);
        if !folder.join("manifest.json").exists() && !folder.join("manifest.json").is_symlink() {
            fs::write(folder.join("manifest.json"), manifest.to_string()).unwrap();
        }
        expected += 1;
        folder
    };
    let outside = rig.service.folder.path().join("outside.qcow2");
    fs::copy(origin.join("disk-0.qcow2"), &outside).unwrap();
    for file in ["../../../outside.qcow2", outside.to_str().unwrap(), "disk-1.qcow2", "", "disk-0.qcow2/"] {
        plant(&|manifest, _| manifest["disks"][0]["file"] = file.into());
    }
    plant(&|manifest, _| manifest["repository_id"] = "other".into());
    plant(&|manifest, _| manifest["backup_id"] = id_of(&backup).into());
    plant(&|manifest, _| manifest["format"] = 2.into());
    plant(&|manifest, _| manifest["vm"]["id"] = "vm-../../x".into());
    plant(&|manifest, _| manifest["vm"]["name"] = "".into());
    plant(&|manifest, _| manifest["vm"]["path"] = "x".repeat(1 << 20).into());
    plant(&|manifest, _| manifest["disks"] = json!([]));
    plant(&|manifest, _| manifest["disks"][1]["disk_id"] = 0.into());
    plant(&|manifest, _| manifest["disks"][0]["size_bytes"] = u64::MAX.into());
    plant(&|manifest, _| manifest["disks"][0]["size_bytes"] = 513.into());
    plant(&|manifest, _| manifest["disks"][0]["file_bytes"] = 1.into());
    plant(&|manifest, _| manifest["disks"][0]["written_bytes"] = u64::MAX.into());
    plant(&|manifest, _| manifest["disks"][0]["coverage"] = json!([[u64::MAX, u64::MAX]]));
    plant(&|manifest, _| manifest["disks"][0]["parent_id"] = id_of(&backup).into());
    plant(&|manifest, _| {
        let own = manifest["backup_id"].clone();
        manifest["disks"][0]["backup_type"] = "incremental".into();
        manifest["disks"][0]["parent_id"] = own;
    });
    plant(&|_, folder| fs::write(folder.join("manifest.json"), "[".repeat(1 << 20)).unwrap());
    plant(&|_, folder| fs::write(folder.join("manifest.json"), [0xff; 4096]).unwrap());
    plant(&|_, folder| fs::create_dir(folder.join("manifest.json")).unwrap());
    plant(&|_, folder| {
        // Sparse, and longer than any manifest.
        fs::File::create(folder.join("manifest.json")).unwrap().set_len(1 << 40).unwrap();
    });
    plant(&|_, folder| {
        std::os::unix::fs::symlink(origin.join("manifest.json"), folder.join("manifest.json")).unwrap();
    });
    plant(&|_, folder| {
        fs::remove_file(folder.join("disk-0.qcow2")).unwrap();
        std::os::unix::fs::symlink(&outside, folder.join("disk-0.qcow2")).unwrap();
    });
    plant(&|_, folder| {
        // An image that claims a backing file outside of the folder.
        let image = folder.join("disk-0.qcow2");
        fs::remove_file(&image).unwrap();
        let size = rig.disks[0].1.len().to_string();
        let arguments = ["create", "-u", "-f", "qcow2", "-F", "qcow2", "-b", outside.to_str().unwrap()];
        let arguments = arguments.into_iter().chain([image.to_str().unwrap(), &size]);
        rig::tool("qemu-utils", "qemu-img", &arguments.collect::<Vec<_>>());
    });
    plant(&|manifest, folder| {
        // Two points that build upon each other, one of which is not even there.
        let id = BackupId::new();
        let image = folder.join("disk-0.qcow2");
        let below = format!("../{id}/disk-0.qcow2");
        let size = rig.disks[0].1.len().to_string();
        fs::remove_file(&image).unwrap();
        let arguments = ["create", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &below, image.to_str().unwrap(), &size];
        rig::tool("qemu-utils", "qemu-img", &arguments);
        manifest["disks"][0]["backup_type"] = "incremental".into();
        manifest["disks"][0]["parent_id"] = id.as_str().into();
        manifest["disks"][0]["file_bytes"] = fs::metadata(&image).unwrap().len().into();
    });
    // In the folder of another VM, which nobody has, but under the id of this one.
    let elsewhere = vm_folder.parent().unwrap().join("elsewhere");
    let planted = plant(&|_, _| ());
    fs::create_dir(&elsewhere).unwrap();
    fs::rename(&planted, elsewhere.join(planted.file_name().unwrap())).unwrap();
    // A link in place of a folder.
    std::os::unix::fs::symlink(&origin, vm_folder.join(BackupId::new().as_str())).unwrap();
    expected += 1;

    let report = import(&rig.service).await;
    assert_eq!((&report["imported"], &report["known"]), (&json!([]), &json!(1)), "{report:#}");
    assert_eq!(report["skipped"].as_array().unwrap().len(), expected, "{report:#}");
    assert_eq!(rig.points().await.len(), 1);
    let report = check(&rig.service).await;
    assert_eq!((&report["result"], &report["intact"]), (&json!("warnings"), &json!(1)), "{report:#}");
    let unusable = kinds(&report).iter().filter(|(kind, _)| *kind == "unusable").count();
    // What only an import finds out: a missing parent, and the folder of another VM.
    assert_eq!(unusable, expected - 2, "{report:#}");
    // Nor does a start take them in, or stumble.
    let rig = restart(rig, async |_: &Path| ()).await;
    assert_eq!(rig.points().await.len(), 1);
    rig.expect_restorable(id_of(&backup)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn check_tells_what_is_missing_damaged_and_too_much_and_removes_nothing() {
    let mut rig = Rig::new().await;
    let full = rig.back_up().await;
    rig.write(&[(2000, 0, vec![3; 512])]);
    let top = rig.back_up().await;
    let report = check(&rig.service).await;
    assert_eq!((&report["result"], &report["intact"], &report["findings"]), (&json!("clean"), &json!(2), &json!([])));
    let repository = rig.service.get("/api/v1/repositories/main").await.expect_status(200).json();
    assert_eq!(repository["last_check_at"], report["checked_at"]);
    let full_folder = rig::published(&rig, id_of(&full)).await;
    let vm = full_folder.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let (full_path, top_path) = (format!("{vm}/{}", id_of(&full)), format!("{vm}/{}", id_of(&top)));

    // A point that is gone, and one that stands upon it.
    let aside = rig.service.folder.path().join("aside");
    fs::rename(&full_folder, &aside).unwrap();
    let report = check(&rig.service).await;
    assert_eq!(report["result"], "damaged");
    let mut found = vec![("missing", full_path.as_str()), ("damaged", top_path.as_str())];
    found.sort_by_key(|(_, path)| *path);
    assert_eq!(kinds(&report), found, "{report:#}");
    assert_eq!(rig.points().await[1]["state"], "missing");
    // And back.
    fs::rename(&aside, &full_folder).unwrap();
    let report = check(&rig.service).await;
    assert_eq!((kinds(&report), &report["intact"]), (vec![("back", full_path.as_str())], &json!(2)));
    assert_eq!(rig.points().await[1]["state"], "committed");
    let store = &rig.service.service.app().store;
    let told = blockyard::store::events::about(&mut store.read().await.unwrap(), id_of(&full)).await.unwrap();
    let alerts: Vec<&Value> = told.iter().filter(|(kind, _)| kind == "alert").map(|(_, data)| &data["alert"]).collect();
    assert_eq!(alerts, ["point_missing", "point_back"]);

    // A file that was cut.
    let image = full_folder.join("disk-0.qcow2");
    let whole = fs::read(&image).unwrap();
    let mut permissions = fs::metadata(&image).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o640);
    fs::set_permissions(&image, permissions).unwrap();
    fs::write(&image, &whole[..whole.len() - 1]).unwrap();
    let report = check(&rig.service).await;
    assert_eq!((&report["result"], &report["intact"]), (&json!("damaged"), &json!(0)), "{report:#}");
    fs::write(&image, &whole).unwrap();

    // Things that are too much; a job that runs is none of them.
    let id = BackupId::new();
    let mut strays: Vec<(String, &str)> = ["partial", "failed", "deleting", "merging"]
        .iter()
        .zip(["staged", "quarantined", "deleting", "merging"])
        .map(|(extension, kind)| (format!("{vm}/{id}.{extension}"), kind))
        .collect();
    strays.push((format!("{vm}/notes"), "unknown"));
    strays.push((format!("{vm}/{id}"), "unusable"));
    for (path, _) in &strays {
        fs::create_dir(rig.repository.join(path)).unwrap();
    }
    fs::write(rig.repository.join("README"), "mine").unwrap();
    strays.push(("README".to_owned(), "unknown"));
    strays.sort();
    rig.node.reconfigure(|config| {
        config.faults = Faults { pause: Some(PausePoint::Connected(0)), ..Faults::default() };
    });
    let running = rig.start().await;
    rig.paused().await;
    let report = check(&rig.service).await;
    let expected: Vec<(&str, &str)> = strays.iter().map(|(path, kind)| (*kind, path.as_str())).collect();
    assert_eq!((kinds(&report), &report["result"]), (expected, &json!("warnings")), "{report:#}");
    rig.node.resume();
    assert_eq!(rig.end_of(id_of(&running)).await["state"], "committed");
    assert!(strays.iter().all(|(path, _)| rig.repository.join(path).exists()), "nothing is removed");
    rig.service.post("/api/v1/repositories/none/check", &json!({})).await.expect_problem(404, "repository_not_found");
    fs::rename(&rig.repository, rig.service.folder.path().join("elsewhere")).unwrap();
    let problem = rig.service.post("/api/v1/repositories/main/check", &json!({})).await;
    problem.expect_problem(503, "repository_unavailable");
}

fn cli(rig: &Rig, arguments: &[&str]) -> (i32, String) {
    let output = blockyard()
        .args(arguments)
        .env("BLOCKYARD_URL", rig.service.service.url())
        .env("BLOCKYARD_TOKEN_FILE", rig.service.folder.path().join("state/token"))
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), printed)
}

#[tokio::test(flavor = "multi_thread")]
async fn repo_check_and_import_tell_by_their_exit_codes() {
    let rig = Rig::new().await;
    let backup = rig.back_up().await;
    let folder = rig::published(&rig, id_of(&backup)).await;
    let (code, printed) = cli(&rig, &["repo", "check", "main"]);
    assert_eq!((code, printed.contains("clean: 1 of 1 points are intact")), (0, true), "{printed}");
    fs::create_dir(folder.with_extension("failed")).unwrap();
    let (code, printed) = cli(&rig, &["repo", "check", "main"]);
    assert_eq!((code, printed.contains("quarantined")), (3, true), "{printed}");
    fs::rename(&folder, rig.service.folder.path().join("aside")).unwrap();
    assert_eq!(cli(&rig, &["repo", "check", "main"]).0, 6);
    assert_eq!(cli(&rig, &["repo", "check", "none"]).0, 4);
    fs::rename(rig.service.folder.path().join("aside"), &folder).unwrap();

    let rig = restart(rig, async |state: &Path| fs::remove_dir_all(state).unwrap()).await;
    // The folder is not known to this hub; its marker says what it is.
    let path = rig.repository.to_str().unwrap().to_owned();
    let (code, printed) = cli(&rig, &["repo", "import", &path]);
    assert_eq!((code, printed.contains("imported 1")), (0, true), "{printed}");
    let (code, printed) = cli(&rig, &["--output", "json", "repo", "import", "main"]);
    assert_eq!((code, serde_json::from_str::<Value>(&printed).unwrap()["known"].clone()), (0, json!(1)), "{printed}");
    let stray = folder.with_file_name(BackupId::new().as_str());
    fs::create_dir(&stray).unwrap();
    let (code, printed) = cli(&rig, &["repo", "import", &path]);
    assert_eq!((code, printed.contains("skipped 1")), (3, true), "{printed}");
    assert_eq!(cli(&rig, &["repo", "import", "none"]).0, 4);
    let (code, _) = cli(&rig, &["repo", "import", rig.service.folder.path().to_str().unwrap()]);
    assert_ne!(code, 0, "a folder that no hub has marked");
}
