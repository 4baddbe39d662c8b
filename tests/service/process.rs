//! The service as a process: one per state folder, signals, time zones, what listens, what is logged.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use blockyard::serve::{Service, StartError};
use reqwest::Client;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::support::process::{ServeProcess, blockyard};
use crate::support::{self, TestService, vm_body};

fn token(folder: &Path) -> String {
    std::fs::read_to_string(folder.join("state/token")).unwrap().trim().to_owned()
}

fn client() -> Client {
    Client::builder().no_proxy().build().unwrap()
}

#[tokio::test]
async fn second_instance_on_the_same_state_refuses_to_start() {
    let service = TestService::start().await;
    let error = Service::start(support::config(service.folder.path(), "")).await.unwrap_err();
    assert!(matches!(error, StartError::StateInUse { .. }), "{error:?}");

    let state = service.folder.path().join("state");
    let variables =
        [("BLOCKYARD__SERVER__BIND", "127.0.0.1:0".as_ref()), ("BLOCKYARD__SERVER__STATE_DIR", state.as_os_str())];
    let second = blockyard().arg("serve").envs(variables).output().unwrap();
    assert_eq!(second.status.code(), Some(5));
    let message = String::from_utf8(second.stderr).unwrap();
    assert!(message.contains("another instance is running on"), "{message}");
    service.get("/api/v1/vms").await.expect_status(200);

    let folder = service.stop().await;
    Service::start(support::config(folder.path(), "")).await.unwrap().stop().await;
}

#[tokio::test]
async fn the_service_takes_as_many_open_files_as_it_may_have() {
    let folder = tempfile::tempdir().unwrap();
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(512), ..before }).unwrap();
    let process = ServeProcess::start(folder.path(), |_| {});
    setrlimit(Resource::Nofile, before).unwrap();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", process.id())).unwrap();
    let files: Vec<&str> =
        limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap().split_whitespace().collect();
    assert_eq!(files[0], files[1], "{limits}");
}

#[tokio::test]
async fn certificates_that_cannot_be_used_refuse_the_start_and_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (state, file) = (folder.path().join("state"), folder.path().join("cert.pem"));
    for (content, code, reason) in [(None, 4, "cannot be read"), (Some("no PEM"), 2, "holds no certificate")] {
        if let Some(content) = content {
            std::fs::write(&file, content).unwrap();
        }
        let variables = [
            ("BLOCKYARD__SERVER__BIND", "127.0.0.1:0".as_ref()),
            ("BLOCKYARD__SERVER__STATE_DIR", state.as_os_str()),
            ("BLOCKYARD__NBD__TLS", "required".as_ref()),
            ("BLOCKYARD__NBD__CERT_FILE", file.as_os_str()),
            ("BLOCKYARD__NBD__KEY_FILE", file.as_os_str()),
        ];
        let output = blockyard().arg("serve").envs(variables).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), output.stdout.is_empty()), (Some(code), true), "{message}");
        assert!(message.contains(&format!("{} {reason}", file.display())), "{message}");
    }
}

#[tokio::test]
async fn killed_instance_leaves_no_lock_behind() {
    let folder = tempfile::tempdir().unwrap();
    let process = ServeProcess::start(folder.path(), |_| {});
    process.signal("KILL");
    process.wait();
    let process = ServeProcess::start(folder.path(), |_| {});
    let answer = client().get(format!("{}/readyz", process.url)).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);
}

#[tokio::test]
async fn sigterm_and_sigint_end_the_service_in_order_with_exit_code_zero() {
    for signal in ["TERM", "INT"] {
        let folder = tempfile::tempdir().unwrap();
        let process = ServeProcess::start(folder.path(), |_| {});
        process.signal(signal);
        assert_eq!(process.wait().code(), Some(0), "{signal}");
        assert!(ServeProcess::log(folder.path()).contains("stopped"), "{signal}");
        let files: BTreeSet<_> =
            std::fs::read_dir(folder.path().join("state")).unwrap().map(|f| f.unwrap().file_name()).collect();
        assert_eq!(
            files,
            ["ballast", "blockyard.db", "lock", "token"].map(Into::into).into(),
            "the journal is written back"
        );
    }
}

#[tokio::test]
async fn port_that_is_taken_refuses_the_start_and_names_the_address() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut config = support::config(folder.path(), "");
    config.server.bind = address;
    let error = Service::start(config).await.unwrap_err();
    assert!(error.to_string().starts_with(&format!("cannot listen on {address}")), "{error}");
    let variables = [
        ("BLOCKYARD__SERVER__BIND", address.to_string().into()),
        ("BLOCKYARD__SERVER__STATE_DIR", folder.path().join("another").into_os_string()),
    ];
    let output = blockyard().arg("serve").envs(variables).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    let told = format!("cannot listen on {address}, which is server.bind");
    assert!(output.status.code() == Some(5) && message.contains(&told), "{message}");
}

#[tokio::test]
async fn times_are_utc_under_any_time_zone_of_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let process = ServeProcess::start(folder.path(), |command| {
        command.env("TZ", "Pacific/Kiritimati");
    });
    let body = vm_body("db");
    let request = client().post(format!("{}/api/v1/vms", process.url)).bearer_auth(token(folder.path())).json(&body);
    let vm: Value = request.send().await.unwrap().json().await.unwrap();
    let health: Value = client().get(format!("{}/health", process.url)).send().await.unwrap().json().await.unwrap();
    let now = blockyard::clock::UtcTime::now();
    let first_log_word = ServeProcess::log(folder.path()).split_whitespace().next().unwrap().to_owned();
    for text in [vm["created_at"].as_str().unwrap(), health["timestamp"].as_str().unwrap(), &first_log_word] {
        assert!(text.ends_with('Z'), "{text}");
        let seconds = now.seconds_since(text.parse().unwrap());
        assert!(seconds.abs() < 600.0, "{text} is {seconds} s from now");
    }
}

/// Addresses on which a process listens, from the tables of the kernel.
fn listening(process: u32) -> Vec<String> {
    let links = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let sockets: BTreeSet<String> = links
        .filter_map(|link| std::fs::read_link(link.ok()?.path()).ok()?.into_os_string().into_string().ok())
        .filter_map(|target| Some(target.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let tables = ["tcp", "tcp6"]
        .map(|table| std::fs::read_to_string(format!("/proc/{process}/net/{table}")).unwrap_or_default());
    let lines = tables.iter().flat_map(|table| table.lines().skip(1));
    lines
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        // Columns: number, local address, remote address, state (0A: listening), ..., inode.
        .filter(|columns| columns[3] == "0A" && sockets.contains(columns[9]))
        .map(|columns| columns[1].split(':').next().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn nothing_listens_outside_loopback_by_default() {
    let folder = tempfile::tempdir().unwrap();
    let process = ServeProcess::start(folder.path(), |command| {
        command.env("BLOCKYARD__SERVER__CALLBACKS_BIND", "[::1]:0");
    });
    let addresses = listening(process.id());
    assert_eq!(addresses.len(), 2, "{addresses:?}");
    for address in addresses {
        let loopback = ["0100007F", "00000000000000000000000001000000"];
        assert!(loopback.contains(&address.as_str()), "{address}");
    }
    for bind in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        for key in ["SERVER__BIND", "SERVER__CALLBACKS_BIND"] {
            let output = blockyard().arg("serve").env(format!("BLOCKYARD__{key}"), bind).output().unwrap();
            assert_eq!(output.status.code(), Some(2), "{output:?}");
        }
    }
}

#[tokio::test]
async fn no_secret_appears_in_logs_errors_events_or_the_database() {
    let folder = tempfile::tempdir().unwrap();
    let password = "correct-horse-battery";
    std::fs::write(folder.path().join("password"), password).unwrap();
    let process = ServeProcess::start(folder.path(), |command| {
        command
            .env("BLOCKYARD__SERVER__LOG", "trace")
            .env("BLOCKYARD__CREDENTIALS__MAIN__VCENTER_HOST", "vc.example")
            .env("BLOCKYARD__CREDENTIALS__MAIN__USERNAME", "backup")
            .env("BLOCKYARD__CREDENTIALS__MAIN__PASSWORD_FILE", folder.path().join("password"));
    });
    let token = token(folder.path());
    let mut seen = String::new();
    let mut body = vm_body("db");
    body["credential"] = "main".into();
    for (path, body) in [("/api/v1/vms", body), ("/api/v1/vms", json!({"name": 7})), ("/api/v1/nothing", json!({}))] {
        for token in [token.clone(), format!("{token}x")] {
            let request = client().post(format!("{}{path}", process.url)).bearer_auth(token).json(&body);
            let answer = request.send().await.unwrap();
            seen += &format!("{:?}", answer.headers());
            seen += &answer.text().await.unwrap();
        }
    }
    process.signal("TERM");
    assert_eq!(process.wait().code(), Some(0));
    let log = ServeProcess::log(folder.path());
    assert!(log.contains("request refused"), "the log is complete");
    seen += &log;
    seen += &String::from_utf8_lossy(&std::fs::read(folder.path().join("state/blockyard.db")).unwrap());
    for secret in [token.as_str(), password] {
        assert!(!seen.contains(secret), "found at {:?}", seen.find(secret).map(|at| &seen[at.saturating_sub(200)..at]));
    }
}

#[tokio::test]
async fn log_lines_are_json_on_request_and_carry_the_request_id() {
    let folder = tempfile::tempdir().unwrap();
    let process = ServeProcess::start(folder.path(), |command| {
        command.env("BLOCKYARD__SERVER__LOG_FORMAT", "json");
    });
    let request = client().get(format!("{}/api/v1/vms", process.url)).header("x-request-id", "call-7");
    request.send().await.unwrap();
    process.signal("TERM");
    process.wait();
    let log = ServeProcess::log(folder.path());
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_the_request: Vec<&Value> = lines.iter().filter(|line| line["span"]["request_id"] == "call-7").collect();
    assert_eq!(of_the_request.len(), 2, "refused, answered: {log}");
    assert!(of_the_request.iter().any(|line| line["status"] == 401), "{log}");
}

#[tokio::test]
async fn readiness_names_what_is_missing() {
    let service = TestService::start().await;
    service.get("/readyz").await.expect_status(200);
    let path = service.add_repository("main").await;
    service.get("/readyz").await.expect_status(200);
    std::fs::remove_dir(path).unwrap();
    let answer = service.get("/readyz").await;
    let problem = answer.expect_problem(503, "repository_unavailable");
    assert_eq!(problem["reasons"], json!(["the folder of repository main cannot be reached"]));
    assert!(answer.header("retry-after").parse::<u32>().unwrap() > 0);

    let health = service.get("/health").await.expect_status(200).json();
    assert_eq!(health["service"], "blockyard");
    assert_eq!((&health["status"], &health["database"]), (&json!("ok"), &json!("ok")));
    assert_eq!(health["version"], env!("CARGO_PKG_VERSION"));

    service.service.app().store.close().await;
    let health = service.get("/health").await.expect_status(200).json();
    assert_eq!((&health["status"], &health["database"]), (&json!("degraded"), &json!("unreachable")));
    service.get("/readyz").await.expect_problem(503, "database_busy");
    let failed = service.get("/api/v1/vms").await;
    let problem = failed.expect_problem(500, "internal");
    assert_eq!(problem["request_id"], failed.header("x-request-id"));
    assert!(!failed.text.contains("SELECT") && !failed.text.contains("pool"), "{}", failed.text);
}

#[tokio::test]
async fn open_connections_do_not_hold_up_the_stop() {
    let service = TestService::start().await;
    let mut idle = std::net::TcpStream::connect(service.service.address()).unwrap();
    std::io::Write::write_all(&mut idle, b"GET /health HTTP/1.1\r\n").unwrap();
    tokio::time::timeout(Duration::from_secs(30), service.stop()).await.expect("the stop ends");
}
