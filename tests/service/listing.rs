//! Lists: everything by default, newest first, each row once over all pages.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::support::TestService;

/// Ids of all pages of a list, in order, asking for `limit` rows at a time.
async fn all_pages(service: &TestService, noun: &str, limit: u32) -> Vec<String> {
    let mut ids = Vec::new();
    let mut query = format!("limit={limit}");
    loop {
        let page = service.get(&format!("/api/v1/{noun}?{query}")).await.expect_status(200).json();
        let rows = page[noun].as_array().unwrap();
        assert!(rows.len() <= limit as usize);
        assert!(ids.len() < 1000, "the pages of {noun} never end");
        ids.extend(rows.iter().map(|row| row["id"].as_str().unwrap().to_owned()));
        match &page["next_page_token"] {
            Value::Null => return ids,
            token => query = format!("limit={limit}&page_token={}", token.as_str().unwrap()),
        }
    }
}

#[tokio::test]
async fn list_without_filter_returns_everything_once_over_pages() {
    let service = TestService::start().await;
    let mut vms = Vec::new();
    let mut repositories = Vec::new();
    for index in 0..23 {
        vms.push(service.add_vm(&format!("vm{index}"), &[(2000, 512)]).await);
        let id = format!("r{}", 50 - index);
        service.add_repository(&id).await;
        repositories.push(id);
    }
    vms.reverse();
    repositories.reverse();
    for (noun, newest_first) in [("vms", vms), ("repositories", repositories)] {
        let all = service.get(&format!("/api/v1/{noun}")).await.expect_status(200).json();
        let ids: Vec<&str> = all[noun].as_array().unwrap().iter().map(|row| row["id"].as_str().unwrap()).collect();
        if noun == "vms" {
            assert_eq!(ids, newest_first);
        } else {
            // Rows of one millisecond may stand in either order.
            assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), newest_first.len());
        }
        assert_eq!(all["total"], 23);
        assert_eq!(all["next_page_token"], Value::Null);
        for limit in [1, 7, 22, 23, 24] {
            assert_eq!(all_pages(&service, noun, limit).await, ids, "{noun} in pages of {limit}");
        }
    }
}

#[tokio::test]
async fn rows_that_come_and_go_between_pages_neither_repeat_nor_hide_others() {
    let service = TestService::start().await;
    let mut ids = Vec::new();
    for index in 0..6 {
        ids.push(service.add_vm(&format!("vm{index}"), &[]).await);
    }
    let first = service.get("/api/v1/vms?limit=3").await.json();
    // The row that the token names goes away, and a new one comes before all others.
    service.delete(&format!("/api/v1/vms/{}", ids[3])).await.expect_status(204);
    service.add_vm("late", &[]).await;
    let token = first["next_page_token"].as_str().unwrap();
    let second = service.get(&format!("/api/v1/vms?limit=3&page_token={token}")).await.json();
    let second: Vec<&str> = second["vms"].as_array().unwrap().iter().map(|vm| vm["id"].as_str().unwrap()).collect();
    assert_eq!(second, [ids[2].as_str(), ids[1].as_str(), ids[0].as_str()]);
}

#[tokio::test]
async fn limits_tokens_and_filters_that_do_not_exist_are_refused() {
    let service = TestService::start().await;
    for query in
        ["limit=0", "limit=1001", "limit=x", "limit=-1", "page_token=x", "page_token=", "colour=red", "limit=1&limit=2"]
    {
        for noun in ["vms", "repositories"] {
            service.get(&format!("/api/v1/{noun}?{query}")).await.expect_problem(400, "invalid_field");
        }
    }
}
