//! The command line against a running service: what is printed, and the exit codes.

use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};

use crate::support::TestService;
use crate::support::process::blockyard;

/// Runs a command against a service, away from the thread that serves it.
async fn run(service: &TestService, arguments: &[&str]) -> Output {
    let token_file = service.folder.path().join("state/token");
    run_at(&service.service.url(), &token_file, arguments).await
}

async fn run_at(url: &str, token_file: &Path, arguments: &[&str]) -> Output {
    let mut command = blockyard();
    command.args(arguments).env("BLOCKYARD_URL", url).env("BLOCKYARD_TOKEN_FILE", token_file);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

#[track_caller]
fn expect(output: &Output, code: i32, text: &str) {
    let printed = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{printed}");
    assert!(printed.contains(text), "{text:?} in {printed}");
}

fn document(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test]
async fn inventory_is_added_listed_shown_and_removed() {
    let service = TestService::start().await;
    let folder = service.folder.path().join("backups");
    std::fs::create_dir(&folder).unwrap();
    let folder = folder.to_str().unwrap();
    expect(&run(&service, &["repo", "add", folder, "--id", "repo-001", "--name", "Main"]).await, 0, "as repo-001");
    expect(&run(&service, &["repo", "list"]).await, 0, folder);
    expect(&run(&service, &["repo", "show", "repo-001"]).await, 0, "Main");

    let add = [
        "vm",
        "add",
        "--name",
        "db",
        "--vcenter-host",
        "vc.example",
        "--path",
        "/DC1/vm/db",
        "--disk",
        "2000=40G",
        "--disk",
        "unit1=1M",
    ];
    expect(&run(&service, &add).await, 0, "added db as vm-");
    expect(&run(&service, &["vm", "list"]).await, 0, "40.0 GiB");
    expect(&run(&service, &["vm", "show", "db"]).await, 0, "2001");
    let vm = document(&run(&service, &["vm", "show", "db", "--output", "json"]).await);
    assert_eq!(vm["disks"][1]["size_bytes"], 1 << 20);
    let id = vm["id"].as_str().unwrap();
    assert_eq!(document(&run(&service, &["--output", "json", "vm", "show", id]).await), vm);
    let quiet = run(&service, &["--quiet", "vm", "remove", id]).await;
    expect(&quiet, 0, "");
    assert!(quiet.stdout.is_empty());
    expect(&run(&service, &["vm", "show", "db"]).await, 4, "there is no VM named");
}

#[tokio::test]
async fn vm_is_added_from_a_file() {
    let service = TestService::start().await;
    let file = service.folder.path().join("vm.json");
    std::fs::write(&file, crate::support::vm_body("from-file").to_string()).unwrap();
    expect(&run(&service, &["vm", "add", "--file", file.to_str().unwrap()]).await, 0, "added from-file");
    std::fs::write(&file, "{").unwrap();
    expect(&run(&service, &["vm", "add", "--file", file.to_str().unwrap()]).await, 2, "is not valid JSON");
    expect(&run(&service, &["vm", "add", "--file", "/nonexistent/vm.json"]).await, 2, "cannot be read");
}

#[tokio::test]
async fn exit_codes_tell_what_kind_of_failure_it_was() {
    let service = TestService::start().await;
    service.add_vm("twin", &[]).await;
    let mut other = crate::support::vm_body("twin");
    other["path"] = "/DC2/vm/twin".into();
    service.post("/api/v1/vms", &other).await.expect_status(201);
    let rows: [(&[&str], i32, &str); 10] = [
        (&["vm", "show", "vm-01JC0A7K2E5H8M3P6R9T1V4X7Z"], 4, "vm_not_found"),
        (&["vm", "show", "twin"], 5, "2 VMs are named"),
        (&["repo", "show", "nothing"], 4, "repository_not_found"),
        (&["repo", "show", "../vms"], 4, "there is no repository"),
        (&["repo", "add", "/nonexistent"], 2, "invalid_field"),
        (&["vm", "add", "--name", "twin", "--vcenter-host", "vc.example", "--path", "/DC1/vm/twin"], 5, "vm_exists"),
        (&["vm", "add", "--name", "x"], 2, "--vcenter-host"),
        (&["vm", "add", "--name", "x", "--vcenter-host", "v", "--path", "/x", "--disk", "x"], 2, "is no disk"),
        (&["nonsense"], 2, "unrecognized subcommand"),
        (&["serve", "--config", "/nonexistent.toml"], 2, "cannot be read"),
    ];
    for (arguments, code, text) in rows {
        expect(&run(&service, arguments).await, code, text);
    }
    let token = service.folder.path().join("state/token");
    let wrong = service.folder.path().join("wrong");
    std::fs::write(&wrong, "wrong").unwrap();
    expect(&run_at(&service.service.url(), &wrong, &["vm", "list"]).await, 7, "token_invalid");
    expect(
        &run_at(&service.service.url(), Path::new("/nonexistent"), &["vm", "list"]).await,
        7,
        "the token cannot be read",
    );
    let address = service.service.url().replace("http://", "");
    for url in [
        address.as_str(),
        "localhost:8082",
        "http://",
        "http:localhost",
        "https://localhost:8082",
        "ftp://localhost",
        "http://localhost/?",
    ] {
        // Before the token is looked for, which is not there.
        let refused = run_at(url, Path::new("/nonexistent"), &["vm", "list"]).await;
        expect(&refused, 2, "BLOCKYARD_URL");
        expect(&refused, 2, "http://HOST:PORT");
    }
    // The port of a listener that was closed: nobody answers there.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    expect(&run_at(&format!("http://{closed}"), &token, &["vm", "list"]).await, 7, "does not answer");
}

#[tokio::test]
async fn refusals_are_one_document_in_json() {
    let service = TestService::start().await;
    let refused = run(&service, &["--output", "json", "repo", "show", "nothing"]).await;
    assert_eq!(refused.status.code(), Some(4));
    let problem: Value = serde_json::from_slice(&refused.stderr).unwrap();
    assert_eq!(problem["code"], "repository_not_found");
    assert!(refused.stdout.is_empty());
    let missing = run(&service, &["--output", "json", "vm", "show", "nobody"]).await;
    let message: Value = serde_json::from_slice(&missing.stderr).unwrap();
    assert_eq!(message, json!({"error": "there is no VM named \"nobody\""}));
}

#[tokio::test]
async fn lists_hold_the_rows_of_all_pages() {
    let service = TestService::start().await;
    // One more than a page holds at most.
    let mut transaction = service.service.app().store.write().await.unwrap();
    for index in 0..1001 {
        let vm = blockyard::store::vms::VmDescription {
            name: format!("vm{index}"),
            vcenter: "vc.example".to_owned(),
            path: format!("/DC1/vm/{index}"),
            uuid: None,
            node: "default".to_owned(),
            credential: None,
            disks: Vec::new(),
        };
        blockyard::store::vms::insert(&mut transaction, &vm).await.unwrap();
    }
    transaction.commit().await.unwrap();
    let listed = document(&run(&service, &["--output", "json", "vm", "list"]).await);
    let names: std::collections::BTreeSet<&str> =
        listed["vms"].as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 1001);
    assert_eq!(listed["next_page_token"], Value::Null);
}
