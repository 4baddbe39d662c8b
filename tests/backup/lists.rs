//! Lists of backups and points: everything by default, each row once, filters and pages.

use blockyard::node::fake::{Faults, PausePoint, StartFault};
use serde_json::{Value, json};

use crate::rig::{self, Plan, Rig, content, id_of};

fn ids(list: &Value, noun: &str, field: &str) -> Vec<String> {
    list[noun].as_array().unwrap().iter().map(|row| row[field].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn list_shows_each_backup_once() {
    // Three disks, a VM whose name looks like a disk, and still one row.
    let rig = Rig::new().await;
    let vm = rig::add_vm(&rig.service, "web-disk2", &rig::sizes(&rig.disks)).await;
    rig.back_up().await;
    let body = json!({"vm_context_id": vm, "repository_id": "main", "backup_type": "auto"});
    let second = rig.service.post("/api/v1/backups/vm", &body).await.expect_status(200).json();
    rig.end_of(id_of(&second)).await;
    let list = rig.service.get("/api/v1/backups").await.expect_status(200).json();
    assert_eq!(list["total"], 2);
    assert_eq!(ids(&list, "backups", "vm_name"), ["web-disk2", "db-server"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn list_without_filter_returns_everything_once_over_pages() {
    let rig = Rig::with(Plan { disks: vec![(2000, content(1, 512))], ..Plan::default() }).await;
    let mut made = Vec::new();
    for _ in 0..5 {
        made.push(id_of(&rig.back_up().await).to_owned());
    }
    made.reverse();
    let all = rig.service.get("/api/v1/backups").await.expect_status(200).json();
    assert_eq!((ids(&all, "backups", "backup_id"), &all["next_page_token"]), (made.clone(), &json!(null)));
    for noun in ["backups", "points"] {
        let field = if noun == "points" { "id" } else { "backup_id" };
        let (mut paged, mut token) = (Vec::new(), String::new());
        loop {
            let page = rig.service.get(&format!("/api/v1/{noun}?limit=2{token}")).await.expect_status(200).json();
            assert_eq!(page["total"], 5);
            paged.extend(ids(&page, noun, field));
            match page["next_page_token"].as_str() {
                Some(next) => token = format!("&page_token={next}"),
                None => break,
            }
        }
        assert_eq!(paged, made, "{noun}");
        rig.service.get(&format!("/api/v1/{noun}?limit=0")).await.expect_problem(400, "invalid_field");
        rig.service.get(&format!("/api/v1/{noun}?limit=1001")).await.expect_problem(400, "invalid_field");
        rig.service.get(&format!("/api/v1/{noun}?page_token=nonsense")).await.expect_problem(400, "invalid_field");
        rig.service.get(&format!("/api/v1/{noun}?colour=red")).await.expect_problem(400, "invalid_field");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_select_exactly_what_they_say() {
    let rig = Rig::with(Plan { disks: vec![(2000, content(1, 512))], ..Plan::default() }).await;
    let committed = rig.back_up().await;
    let between = committed["completed_at"].as_str().unwrap().to_owned();
    rig.node.reconfigure(|config| config.faults.start = StartFault::StatusFailed);
    let failed = rig.try_start().await.expect_problem(502, "node_rejected");
    rig.node.reconfigure(|config| {
        config.faults = Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
    });
    let running = rig.start().await;
    let (committed, failed, running) =
        (id_of(&committed).to_owned(), id_of(&failed).to_owned(), id_of(&running).to_owned());
    let all = vec![running.clone(), failed.clone(), committed.clone()];
    for (query, expected) in [
        ("vm_name=db-server".to_owned(), all.clone()),
        ("vm_name=nobody".to_owned(), vec![]),
        (format!("vm_context_id={}", rig.vm), all.clone()),
        ("vm_context_id=vm-01JC0A7K2E5H8M3P6R9T1V4X7Z".to_owned(), vec![]),
        ("repository_id=main".to_owned(), all.clone()),
        ("repository_id=other".to_owned(), vec![]),
        ("status=running".to_owned(), vec![running.clone()]),
        ("status=completed".to_owned(), vec![committed.clone()]),
        ("status=failed".to_owned(), vec![failed.clone()]),
        ("state=starting".to_owned(), vec![running.clone()]),
        ("backup_type=full".to_owned(), vec![committed.clone()]),
        ("backup_type=incremental".to_owned(), vec![running.clone(), failed.clone()]),
        (format!("since={between}"), vec![running.clone(), failed.clone()]),
        ("status=failed&repository_id=main".to_owned(), vec![failed.clone()]),
    ] {
        let list = rig.service.get(&format!("/api/v1/backups?{query}")).await.expect_status(200).json();
        assert_eq!(ids(&list, "backups", "backup_id"), expected, "{query}");
        assert_eq!(list["total"], expected.len(), "{query}");
    }
    for query in ["status=green", "state=green", "since=yesterday", "vm_context_id=x"] {
        rig.service.get(&format!("/api/v1/backups?{query}")).await.expect_problem(400, "invalid_field");
    }
    let points = rig.service.get(&format!("/api/v1/points?vm_context_id={}", rig.vm)).await.expect_status(200).json();
    assert_eq!(ids(&points, "points", "id"), [committed]);
    let points = rig.service.get("/api/v1/points?repository_id=other").await.expect_status(200).json();
    assert_eq!(points["total"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_for_a_change_ends_with_it_and_never_waits_for_what_is_over() {
    let rig = Rig::faulty(Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() }).await;
    let started = rig.start().await;
    rig.paused().await;
    let path = format!("/api/v1/backups/{}?wait=60", id_of(&started));
    let waiting = tokio::spawn(crate::support::send(rig.service.request(reqwest::Method::GET, &path)));
    rig.node.resume();
    let changed = tokio::time::timeout(rig::DEADLINE, waiting).await.unwrap().unwrap().json();
    assert_ne!(changed["state"], "starting", "{changed:#}");
    rig.end_of(id_of(&started)).await;
    let over = tokio::time::timeout(rig::DEADLINE / 2, rig.service.get(&path)).await.unwrap();
    assert_eq!(over.json()["state"], "committed");
    let too_long = format!("/api/v1/backups/{}?wait=61", id_of(&started));
    rig.service.get(&too_long).await.expect_problem(400, "invalid_field");
    rig.service.get("/api/v1/backups/x").await.expect_problem(404, "backup_not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_a_vm_keeps_its_points_and_is_refused_while_it_is_backed_up() {
    let rig = Rig::new().await;
    rig.back_up().await;
    rig.node.reconfigure(|config| config.faults.pause = Some(PausePoint::BeforeConnect(0)));
    let started = rig.start().await;
    rig.service.delete(&format!("/api/v1/vms/{}", rig.vm)).await.expect_problem(409, "backup_in_progress");
    rig.cancel(id_of(&started)).await;
    rig.end_of(id_of(&started)).await;
    rig.service.delete(&format!("/api/v1/vms/{}", rig.vm)).await.expect_status(204);
    assert_eq!(rig.points().await.len(), 1);
    rig.service.delete("/api/v1/repositories/main").await.expect_problem(409, "repository_not_empty");
}
