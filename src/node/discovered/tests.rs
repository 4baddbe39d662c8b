//! Answers of every kind, and what is read of them.

use serde_json::{Value, json};

use super::*;

fn wanted() -> Wanted {
    Wanted { path: "/DC1/vm/prod/db".to_owned(), name: "db".to_owned() }
}

fn read_answer(answer: &Value) -> Result<Vec<DiscoveredDisk>, AnswerError> {
    disks(answer.to_string().as_bytes(), &wanted())
}

fn vm(path: &Value, disks: &Value) -> Value {
    json!({"id": "vm-1", "name": "db", "path": path, "disks": disks, "guest": {"os": ["x", null]}})
}

fn one_disk() -> Value {
    json!([{"id": "disk-2000", "capacity_bytes": 1024, "vmdk_path": "[ds1] db/db.vmdk", "label": "Hard disk 1", "unit_number": 0}])
}

fn of_disk(field: &str, value: Value) -> Result<Vec<DiscoveredDisk>, AnswerError> {
    let mut disks = one_disk();
    disks[0][field] = value;
    read_answer(&json!({"vms": [vm(&json!("/DC1/vm/prod/db"), &disks)]}))
}

#[test]
fn the_vm_is_found_by_its_path_and_by_its_name_where_there_is_no_path() {
    let here = json!("/DC1/vm/prod/db");
    let found = DiscoveredDisk {
        device_key: 2000,
        size_bytes: 1024,
        vmdk_path: Some("[ds1] db/db.vmdk".to_owned()),
        unit_number: Some(0),
    };
    let other = vm(&json!("/DC1/vm/test/db"), &json!("whatever"));
    for vms in [
        json!([vm(&here, &one_disk())]),
        json!([other, vm(&here, &one_disk()), vm(&Value::Null, &json!(7))]),
        json!([vm(&Value::Null, &one_disk())]),
        json!([other, vm(&json!(""), &one_disk()), other]),
        json!([{"name": "db", "disks": one_disk()}]),
        json!([{"path": here, "disks": one_disk(), "name": "anything"}]),
    ] {
        assert_eq!(read_answer(&json!({"vms": vms, "total": 3})), Ok(vec![found.clone()]), "{vms}");
    }
    let path = wanted().path;
    let none = AnswerError::NoSuchVm { path: path.clone(), elsewhere: None };
    for vms in [json!([]), Value::Null, json!([{"name": "DB"}, {"name": "db2"}, {}])] {
        assert_eq!(read_answer(&json!({"vms": vms})), Err(none.clone()), "{vms}");
    }
    let moved = read_answer(&json!({"vms": [other]})).unwrap_err();
    assert!(moved.to_string().ends_with("; it finds one of this name at /DC1/vm/test/db"), "{moved}");
    for place in [here, Value::Null] {
        let twice = json!({"vms": [vm(&place, &one_disk()), vm(&place, &one_disk())]});
        assert_eq!(read_answer(&twice), Err(AnswerError::SeveralVms { path: path.clone() }));
    }
}

#[test]
fn what_cannot_be_of_a_disk_is_refused_by_name() {
    for id in
        ["disk-abc", "disk-", "disk-0", "disk--1", "disk-+5", "disk-02000", "disk-2147483648", "2000", "Disk-2000", ""]
    {
        assert_eq!(of_disk("id", json!(id)), Err(AnswerError::DiskId { id: id.to_owned() }));
    }
    for capacity_bytes in [0, 511, 513, u64::MAX, 1 << 63] {
        let refused = AnswerError::Capacity { device_key: 2000, capacity_bytes };
        assert_eq!(of_disk("capacity_bytes", json!(capacity_bytes)), Err(refused));
    }
    for path in [" ".to_owned(), "[ds1]\nx".to_owned(), "x".repeat(1001)] {
        assert_eq!(of_disk("vmdk_path", json!(path)), Err(AnswerError::VmdkPath { device_key: 2000 }));
    }
    for unit in [json!(64), json!(-1), Value::Null] {
        assert_eq!(of_disk("unit_number", unit).unwrap()[0].unit_number, None);
    }
    assert_eq!(of_disk("vmdk_path", json!("")).unwrap()[0].vmdk_path, None);
    let here = json!("/DC1/vm/prod/db");
    let twice = json!([one_disk()[0], one_disk()[0]]);
    assert_eq!(read_answer(&json!({"vms": [vm(&here, &twice)]})), Err(AnswerError::SameKey { device_key: 2000 }));
    for none in [json!([]), Value::Null] {
        assert_eq!(read_answer(&json!({"vms": [vm(&here, &none)]})), Err(AnswerError::NoDisks));
    }
    assert_eq!(read_answer(&json!({"vms": [{"path": here}]})), Err(AnswerError::NoDisks));
}

#[test]
fn what_is_no_answer_is_malformed_whatever_it_is() {
    let disk = one_disk()[0].clone();
    let many: Vec<Value> = (1..=1025).map(|key| json!({"id": format!("disk-{key}"), "capacity_bytes": 512})).collect();
    let here = json!("/DC1/vm/prod/db");
    let answers = [
        json!([]),
        json!(7),
        json!({}),
        json!({"vms": {}}),
        json!({"vms": "none"}),
        json!({"vms": [7]}),
        json!({"vms": [vm(&json!(7), &one_disk())]}),
        json!({"vms": [{"name": ["db"], "path": here}]}),
        json!({"vms": [vm(&here, &json!({"0": disk}))]}),
        json!({"vms": [vm(&here, &json!(["disk-2000"]))]}),
        json!({"vms": [vm(&here, &json!([{"id": "disk-2000"}]))]}),
        json!({"vms": [vm(&here, &json!([{"capacity_bytes": 512}]))]}),
        json!({"vms": [vm(&here, &json!([{"id": 2000, "capacity_bytes": 512}]))]}),
        json!({"vms": [vm(&here, &json!([{"id": "disk-2000", "capacity_bytes": "512"}]))]}),
        json!({"vms": [vm(&here, &json!([{"id": "disk-2000", "capacity_bytes": -512}]))]}),
        json!({"vms": [vm(&here, &json!([{"id": "disk-2000", "capacity_bytes": 512.0}]))]}),
        json!({"vms": [vm(&here, &json!(many))]}),
    ];
    let mut bodies: Vec<Vec<u8>> = answers.iter().map(|answer| answer.to_string().into_bytes()).collect();
    let whole = json!({"vms": [vm(&here, &one_disk())]}).to_string();
    bodies.extend((0..whole.len()).map(|length| whole.as_bytes()[..length].to_vec()));
    bodies.push(format!("{whole}{whole}").into_bytes());
    bodies.push(format!("{{\"vms\": [], {}", &whole[1..]).into_bytes());
    bodies.push([b"\xff".as_slice(), whole.as_bytes()].concat());
    bodies.push(["[".repeat(100_000).as_bytes(), b"{}"].concat());
    bodies.push(format!("{{\"x\": {}", "[".repeat(100_000)).into_bytes());
    for body in bodies {
        let text = String::from_utf8_lossy(&body).chars().take(200).collect::<String>();
        let read = disks(&body, &wanted());
        assert!(matches!(read, Err(AnswerError::Malformed { .. })), "{text}: {read:?}");
    }
}

#[test]
fn whatever_byte_of_an_answer_is_another_what_is_read_can_be_of_a_disk() {
    let two = json!([one_disk()[0], {"id": "disk-2001", "capacity_bytes": 4096, "unit_number": 1}]);
    let whole = json!({"vms": [{"name": "web"}, vm(&json!("/DC1/vm/prod/db"), &two)]}).to_string().into_bytes();
    for index in 0..whole.len() {
        for byte in 0..=u8::MAX {
            let mut body = whole.clone();
            body[index] = byte;
            let Ok(disks) = disks(&body, &wanted()) else { continue };
            let keys: BTreeSet<u32> = disks.iter().map(|disk| disk.device_key).collect();
            assert!(!disks.is_empty() && keys.len() == disks.len(), "{disks:?}");
            for disk in disks {
                assert!((1..=DEVICE_KEY_MAX).contains(&disk.device_key), "{disk:?}");
                assert!(disk.size_bytes > 0 && disk.size_bytes.is_multiple_of(SECTOR_BYTES), "{disk:?}");
            }
        }
    }
}

#[test]
fn a_thousand_disks_are_read_and_texts_of_the_peer_are_mapped() {
    let most: Vec<Value> = (1..=1024).map(|key| json!({"id": format!("disk-{key}"), "capacity_bytes": 512})).collect();
    let read = read_answer(&json!({"vms": [vm(&json!("/DC1/vm/prod/db"), &json!(most))]})).unwrap();
    assert_eq!(read.len(), 1024);
    let hide = |text: &str| text.replace("hunter2", "***");
    let echoed = of_disk("id", json!("hunter2")).unwrap_err().map_texts(hide);
    assert_eq!(echoed, AnswerError::DiskId { id: "***".to_owned() });
    let echoed = of_disk("capacity_bytes", json!("hunter2")).unwrap_err().map_texts(hide);
    assert!(!echoed.to_string().contains("hunter2") && echoed.to_string().contains("***"), "{echoed}");
    let other = json!({"vms": [vm(&json!("/hunter2/db"), &one_disk())]});
    assert!(!read_answer(&other).unwrap_err().map_texts(hide).to_string().contains("hunter2"));
}
