//! Errors: every answer that is no success is a problem document with a code of the table.

use std::collections::BTreeSet;

use blockyard::http::Code;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{TestService, send, vm_body};

#[tokio::test]
async fn every_error_is_a_problem_document_with_a_known_code() {
    let service = TestService::start().await;
    let known: BTreeSet<&str> = Code::ALL.iter().map(|code| code.entry().name).collect();
    let openapi = service.get("/openapi.json").await.expect_status(200).json();
    let mut seen = BTreeSet::new();
    for path in openapi["paths"].as_object().unwrap().keys() {
        let path = path.replace(['{', '}'], "");
        for method in ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"] {
            for body in ["", "{", "[]", "{}", "null", "{\"name\":7}"] {
                for token in [&service.token, "wrong", ""] {
                    let method: Method = method.parse().unwrap();
                    let is_head = method == Method::HEAD;
                    let request = service.request_without_token(method, &path);
                    let request = if token.is_empty() { request } else { request.bearer_auth(token) };
                    // Streams have no end, unless they are asked for with what is no number.
                    let request = request.header("content-type", "application/json").header("last-event-id", "x");
                    let answer = send(request.body(body)).await;
                    if answer.status.is_success() {
                        continue;
                    }
                    assert_eq!(answer.header("content-type"), "application/problem+json", "{answer:?}");
                    if !is_head {
                        let code = answer.json()["code"].as_str().unwrap().to_owned();
                        assert!(known.contains(code.as_str()), "{code}");
                        let document = answer.expect_problem(answer.status.as_u16(), &code);
                        assert_eq!(document["instance"], path, "{document}");
                        assert_ne!(code, "internal", "{document}");
                        seen.insert(code);
                    }
                }
            }
        }
    }
    for code in
        ["token_missing", "token_invalid", "invalid_json", "invalid_field", "method_not_allowed", "vm_not_found"]
    {
        assert!(seen.contains(code), "{code} in {seen:?}");
    }
}

#[tokio::test]
async fn paths_methods_and_bodies_that_do_not_fit_have_their_own_codes() {
    let service = TestService::start_with("[server]\nbody_limit_bytes = 1024").await;
    for path in ["/", "/api", "/api/v1", "/api/v1/nothing", "/api/v1/vms/", "/api/v2/vms", "/docs/nothing"] {
        service.get(path).await.expect_problem(404, "not_found");
    }
    let refused = service.delete("/api/v1/vms").await;
    refused.expect_problem(405, "method_not_allowed");
    assert_eq!(refused.header("allow").split(',').collect::<BTreeSet<_>>(), ["GET", "HEAD", "POST"].into());

    let mut large = vm_body("large");
    large["uuid"] = "x".repeat(2000).into();
    service.post("/api/v1/vms", &large).await.expect_problem(413, "body_too_large");

    let bare = service.request(Method::POST, "/api/v1/vms").body(vm_body("x").to_string());
    send(bare).await.expect_problem(415, "unsupported_media_type");
    for (content_type, accepted) in [
        ("text/plain", false),
        ("application/x-www-form-urlencoded", false),
        ("application/jsonx", false),
        ("application/json; charset=utf-8", true),
        ("Application/JSON", true),
        ("application/vnd.x+json", true),
    ] {
        let body = json!({"name": "x", "vcenter_host": "v", "path": format!("/{content_type}x")});
        let request = service.request(Method::POST, "/api/v1/vms").header("content-type", content_type);
        let answer = send(request.body(body.to_string())).await;
        if accepted {
            answer.expect_status(201);
        } else {
            answer.expect_problem(415, "unsupported_media_type");
        }
    }
}

#[tokio::test]
async fn bodies_that_are_no_json_are_told_where() {
    let service = TestService::start().await;
    for body in ["", "{", "{\"name\": }", "\u{feff}{}", "nul"] {
        let request = service.request(Method::POST, "/api/v1/vms").header("content-type", "application/json");
        let problem = send(request.body(body)).await.expect_problem(400, "invalid_json");
        assert!(problem["detail"].as_str().unwrap().contains("line 1"), "{problem}");
    }
}

#[tokio::test]
async fn request_ids_come_back_and_are_made_when_missing() {
    let service = TestService::start().await;
    let ask = |id: &str| send(service.request(Method::GET, "/api/v1/nothing").header("x-request-id", id));
    assert_eq!(ask("call-7/ü".trim_end_matches('ü')).await.header("x-request-id"), "call-7/");
    let made = service.get("/api/v1/vms").await.header("x-request-id").to_owned();
    assert_eq!(made.len(), 26, "{made}");
    for unusable in ["", "two words", &"x".repeat(129)] {
        assert_eq!(ask(unusable).await.header("x-request-id").len(), 26, "{unusable:?}");
    }
}

#[tokio::test]
async fn table_of_problems_is_served_as_a_page_and_documented() {
    let service = TestService::start().await;
    let page = service.get("/docs/problems").await.expect_status(200).text;
    for code in Code::ALL {
        assert!(page.contains(&format!("<tr id=\"{}\">", code.entry().name)), "{code:?}");
    }
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/problems.md");
    let wanted = blockyard::http::codes::markdown();
    if std::env::var_os("WRITE_DOCS").is_some() {
        std::fs::write(&path, &wanted).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        written, wanted,
        "docs/problems.md is not the table: run this test with WRITE_DOCS=1 and look at the change"
    );
}

#[tokio::test]
async fn description_names_a_problem_for_every_operation_and_works_without_a_network() {
    let service = TestService::start().await;
    let openapi = service.get("/openapi.json").await.expect_status(200).json();
    let problem = json!({"$ref": "#/components/schemas/ProblemDocument"});
    for (path, item) in openapi["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let responses = operation["responses"].as_object().unwrap();
            assert_eq!(
                responses["default"]["content"]["application/problem+json"]["schema"], problem,
                "{method} {path}"
            );
            for (status, response) in responses {
                let text = response["description"].as_str().unwrap_or_default();
                assert!(!text.is_empty(), "{method} {path} {status} needs a description");
            }
            assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{method} {path}");
        }
    }
    references_resolve(&openapi, &openapi);

    let index = service.get("/docs/").await.expect_status(200);
    assert!(index.header("content-type").starts_with("text/html"));
    assert!(!index.text.contains("://"), "the page loads nothing from elsewhere");
    for file in ["swagger-ui.css", "swagger-ui-bundle.js", "swagger-initializer.js"] {
        let file = service.get(&format!("/docs/{file}")).await.expect_status(200);
        assert!(!file.text.is_empty());
    }
}

/// Every `$ref` of the description leads somewhere.
fn references_resolve(openapi: &Value, part: &Value) {
    match part {
        Value::Object(members) => {
            if let Some(reference) = members.get("$ref").and_then(Value::as_str) {
                assert!(openapi.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
            }
            members.values().for_each(|value| references_resolve(openapi, value));
        }
        Value::Array(items) => items.iter().for_each(|value| references_resolve(openapi, value)),
        _ => {}
    }
}
