//! Who may call what.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;

use blockyard::serve::Service;
use reqwest::Method;

use crate::support::{self, TestService, send, vm_body};

/// The routes that the contract opens, and no other.
const OPEN: [(&str, &str); 4] =
    [("get", "/health"), ("get", "/readyz"), ("get", "/openapi.json"), ("get", "/docs/problems")];
/// The routes that the contract opens to the peers of callbacks.
const CALLBACKS: [(&str, &str); 3] = [
    ("get", "/api/v1/backups/changeid"),
    ("post", "/api/v1/backups/{id}/complete"),
    ("post", "/api/v1/telemetry/{job_type}/{id}"),
];

#[tokio::test]
async fn every_route_but_the_named_ones_demands_a_token() {
    let service = TestService::start().await;
    let openapi = service.get("/openapi.json").await.expect_status(200).json();
    // What is served is described, as the description is made from the routes.
    let mut routes: BTreeSet<(String, String)> = BTreeSet::new();
    for (path, item) in openapi["paths"].as_object().unwrap() {
        routes.extend(item.as_object().unwrap().keys().map(|method| (method.clone(), path.clone())));
    }
    routes.extend(OPEN.map(|(method, path)| (method.to_owned(), path.to_owned())));
    assert!(routes.len() >= 15, "{routes:?}");
    for (method, path) in &routes {
        let pair = (method.as_str(), path.as_str());
        let exempt = OPEN.contains(&pair) || CALLBACKS.contains(&pair);
        let verb: Method = method.to_uppercase().parse().unwrap();
        let url = path.replace(['{', '}'], "");
        let answer = send(service.request_without_token(verb.clone(), &url)).await;
        if exempt {
            assert_ne!(answer.status.as_u16(), 401, "{method} {path}");
            continue;
        }
        answer.expect_problem(401, "token_missing");
        assert_eq!(answer.header("www-authenticate"), "Bearer");
        for wrong in ["wrong", &service.token[1..], &service.token.to_uppercase(), &format!("{}0", service.token)] {
            let request = service.request_without_token(verb.clone(), &url).bearer_auth(wrong);
            send(request).await.expect_problem(401, "token_invalid");
        }
        let basic =
            service.request_without_token(verb, &url).header("authorization", format!("Basic {}", service.token));
        send(basic).await.expect_problem(401, "token_missing");
    }
    // Nothing is learned about paths and methods without a token either.
    for (method, path) in [(Method::GET, "/api/v1/nothing"), (Method::PATCH, "/api/v1/vms"), (Method::GET, "/x")] {
        send(service.request_without_token(method, path)).await.expect_problem(401, "token_missing");
    }
}

#[tokio::test]
async fn token_is_made_once_readable_by_its_owner_alone() {
    let service = TestService::start().await;
    let path = service.folder.path().join("state/token");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let state = std::fs::metadata(service.folder.path().join("state")).unwrap();
    assert_eq!(state.permissions().mode() & 0o777, 0o700);
    let token = service.token.clone();
    assert_eq!(token.len(), 64);
    let service = TestService::start_in(service.stop().await, "").await;
    assert_eq!(service.token, token, "a restart keeps the token");
}

#[tokio::test]
async fn token_file_that_is_empty_or_open_to_everybody_refuses_the_start() {
    for (content, mode, words) in [("\n", 0o600, "is empty"), ("secret", 0o644, "chmod 600")] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, content).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        let config = support::config(folder.path(), &format!("[auth]\ntoken_file = {file:?}"));
        let error = Service::start(config).await.unwrap_err();
        let text = blockyard::telemetry::Chain(&error).to_string();
        assert!(text.contains(words), "{text}");
    }
}

#[tokio::test]
async fn read_token_serves_get_requests_only() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("read");
    std::fs::write(&file, "reader\n").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let service = TestService::start_in(folder, "[auth]\nread_token_file = \"{folder}/read\"").await;
    let request = |method| service.request_without_token(method, "/api/v1/vms").bearer_auth("reader");
    send(request(Method::GET)).await.expect_status(200);
    send(request(Method::POST).json(&vm_body("x"))).await.expect_problem(403, "read_only_token");
    service.post("/api/v1/vms", &vm_body("x")).await.expect_status(201);
}

#[tokio::test]
async fn metrics_demand_a_token_unless_they_are_public_or_nothing_demands_one() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("read");
    std::fs::write(&file, "reader\n").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let service = TestService::start_in(folder, "[auth]\nread_token_file = \"{folder}/read\"").await;
    let ask = |service: &TestService| service.request_without_token(Method::GET, "/metrics");
    send(ask(&service)).await.expect_problem(401, "token_missing");
    send(ask(&service).bearer_auth("wrong")).await.expect_problem(401, "token_invalid");
    for token in ["reader", &service.token] {
        send(ask(&service).bearer_auth(token)).await.expect_status(200);
    }
    for toml in ["[observability]\nmetrics_public = true", "[auth]\nmode = \"off\""] {
        let service = TestService::start_with(toml).await;
        let answer = send(ask(&service)).await.expect_status(200);
        assert!(answer.text.starts_with("# HELP blockyard_"), "{}", answer.text);
        // A page of another origin does not get to see them all the same.
        send(ask(&service).header("origin", "http://evil.example")).await.expect_problem(403, "origin_refused");
    }
    let public = TestService::start_with("[observability]\nmetrics_public = true").await;
    send(public.request_without_token(Method::GET, "/api/v1/nbd/exports")).await.expect_problem(401, "token_missing");
}

#[tokio::test]
async fn with_auth_off_nobody_needs_a_token() {
    let service = TestService::start_with("[auth]\nmode = \"off\"").await;
    send(service.request_without_token(Method::GET, "/api/v1/vms")).await.expect_status(200);
    assert!(!service.folder.path().join("state/token").exists());
}

#[tokio::test]
async fn foreign_hosts_and_origins_are_refused_everywhere() {
    let service = TestService::start().await;
    let port = service.service.address().port();
    for path in ["/api/v1/vms", "/health", "/docs/"] {
        let ask = |name: &'static str, value: String| send(service.request(Method::GET, path).header(name, value));
        for host in ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "[fe80::1]:80", ""] {
            ask("host", host.to_owned()).await.expect_problem(403, "host_refused");
        }
        for host in
            [format!("localhost:{port}"), "LOCALHOST".to_owned(), "127.0.0.2:1".to_owned(), format!("[::1]:{port}")]
        {
            ask("host", host).await.expect_status(200);
        }
        for origin in ["http://evil.example".to_owned(), "null".to_owned(), format!("http://127.0.0.1:{}", port - 1)] {
            ask("origin", origin).await.expect_problem(403, "origin_refused");
        }
        ask("origin", format!("http://127.0.0.1:{port}")).await.expect_status(200);
    }
}

#[tokio::test]
async fn address_for_callbacks_serves_nothing_else() {
    let service = TestService::start_with("[server]\ncallbacks_bind = \"127.0.0.1:0\"").await;
    let address = service.service.callbacks_address().unwrap();
    assert_ne!(address, service.service.address());
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for path in ["/api/v1/vms", "/api/v1/repositories", "/health", "/docs/", "/openapi.json"] {
        let request = client.get(format!("http://{address}{path}"));
        send(request.try_clone().unwrap().bearer_auth(&service.token)).await.expect_problem(404, "not_found");
        send(request).await.expect_problem(401, "token_missing");
    }
}
