//! Names of VMs as strangers give them: whatever they contain, the backup is right and stays in its folder.

use serde_json::json;

use crate::rig::{self, Plan, Rig, content, id_of};

#[tokio::test(flavor = "multi_thread")]
async fn vm_names_with_disk2_comma_percent_unicode_and_200_characters_back_up_correctly() {
    let disks = vec![(2000, content(1, 70_000 / 512 * 512)), (2016, content(2, 1024))];
    let rig = Rig::with(Plan { disks: disks.clone(), ..Plan::default() }).await;
    let names = [
        "web-disk2-a".to_owned(),
        "x-disk-2000".to_owned(),
        "SQL 01, prod (50%)".to_owned(),
        "a,2000:nbd://127.0.0.1:1/evil".to_owned(),
        "../../../etc/passwd".to_owned(),
        "..".to_owned(),
        ".hidden".to_owned(),
        "größe-大-🚀".to_owned(),
        "tab\tand\nnewline".to_owned(),
        "quote\"and'and\\".to_owned(),
        "x".repeat(200),
        "ä".repeat(300),
        "%2f%2e%2e".to_owned(),
        "-rf".to_owned(),
    ];
    for name in &names {
        let mut body = crate::support::vm_body(name);
        // vCenter writes a slash inside a name as %2f in its paths.
        body["path"] = format!("/DC1/vm/{}", name.replace('/', "%2f")).into();
        body["credential"] = "main".into();
        body["disks"] =
            rig::sizes(&disks).iter().map(|(key, size)| json!({"device_key": key, "size_bytes": size})).collect();
        let answer = rig.service.post("/api/v1/vms", &body).await;
        if name.chars().any(char::is_control) && answer.status == 400 {
            continue;
        }
        let vm = answer.expect_status(201).json();
        let start = json!({"vm_name": name, "repository_id": "main", "backup_type": "full"});
        let started = rig.service.post("/api/v1/backups/vm", &start).await.expect_status(200).json();
        assert_eq!(started["vm_context_id"], vm["id"], "{name}");
        assert_eq!(started["vm_name"], *name);
        for (index, disk) in started["disk_results"].as_array().unwrap().iter().enumerate() {
            let export = disk["nbd_export_name"].as_str().unwrap();
            assert!(export.ends_with(&format!("-disk{index}")), "{export}");
            assert!(export.len() <= 128 + "-disk0".len(), "{export}");
            assert!(export.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)), "{export}");
            let path = std::path::Path::new(disk["qcow2_path"].as_str().unwrap());
            assert_eq!(path.ancestors().nth(3), Some(rig.repository.as_path()), "{}", path.display());
        }
        let backup = rig.end_of(id_of(&started)).await;
        assert_eq!(backup["state"], "committed", "{name}: {backup:#}");
        rig.expect_restorable(id_of(&started)).await;
    }
    let found: Vec<String> = std::fs::read_dir(rig.service.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(found.len(), 3, "nothing but state, password and repository: {found:?}");
    rig.expect_nothing_left(rig.points().await.len()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disk_numbers_survive_gaps_second_controllers_and_more_than_ten_disks() {
    let disks: Vec<(u32, Vec<u8>)> = (0..12)
        .map(|index| {
            (
                if index < 6 { 2000 + index } else { 16_000 + index * 16 },
                content(index as u8 + 1, 4096 + 512 * index as usize),
            )
        })
        .collect();
    let rig = Rig::with(Plan { disks, ..Plan::default() }).await;
    let first = rig.start().await;
    assert_eq!(rig.end_of(id_of(&first)).await["state"], "committed");
    rig.expect_restorable(id_of(&first)).await;

    // Two disks go, one comes with a key in between: the others keep their numbers, the new one gets a new number.
    let mut rig = rig;
    let show = rig.service.get(&format!("/api/v1/vms/{}", rig.vm)).await;
    rig.disks.retain(|(key, _)| *key != 2001 && *key != 16_096);
    rig.disks.push((2050, content(99, 2048)));
    let mut body = crate::support::vm_body("db-server");
    body["credential"] = "main".into();
    body["disks"] =
        rig::sizes(&rig.disks).iter().map(|(key, size)| json!({"device_key": key, "size_bytes": size})).collect();
    rig.service.put(&format!("/api/v1/vms/{}", rig.vm), show.header("etag"), &body).await.expect_status(200);
    let disks = rig
        .disks
        .iter()
        .map(|(key, bytes)| {
            let source = blockyard::node::fake::Source::Bytes(bytes.as_slice().into());
            (*key, blockyard::node::fake::FakeDisk::new(source, rig::change_id(*key)))
        })
        .collect();
    rig.node.reconfigure(|config| config.disks = disks);
    let second = rig.start().await;
    let numbers: Vec<(u64, u64)> = second["disk_results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|disk| (disk["disk_id"].as_u64().unwrap(), disk["device_key"].as_u64().unwrap()))
        .collect();
    assert_eq!(
        numbers,
        [
            (0, 2000),
            (2, 2002),
            (3, 2003),
            (4, 2004),
            (5, 2005),
            (7, 16_112),
            (8, 16_128),
            (9, 16_144),
            (10, 16_160),
            (11, 16_176),
            (12, 2050)
        ]
    );
    assert_eq!(second["disk_results"][10]["reason"], "disk_new");
    let backup = rig.end_of(id_of(&second)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    rig.expect_restorable(id_of(&second)).await;
}
