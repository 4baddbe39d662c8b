//! The REST API as the demo calls it: with the token, and with the service's own words when it refuses.

use std::path::Path;

use reqwest::Method;
use serde_json::Value;

use super::DemoError;
use crate::secret::Secret;

/// A caller of one service.
#[derive(Debug)]
pub(super) struct Api {
    http: reqwest::Client,
    url: String,
    token: Secret,
}

impl Api {
    pub(super) fn new(url: String, token_file: &Path) -> Result<Self, DemoError> {
        let failed = |reason: String| DemoError::Api { request: "the API".to_owned(), reason };
        let token = Secret::read(token_file).map_err(|error| failed(error.to_string()))?;
        let http = reqwest::Client::builder().no_proxy().build().map_err(|error| failed(error.to_string()))?;
        Ok(Self { http, url, token })
    }

    pub(super) async fn get(&self, path: &str) -> Result<Value, DemoError> {
        self.send(Method::GET, path, None).await
    }

    pub(super) async fn post(&self, path: &str, body: &Value) -> Result<Value, DemoError> {
        self.send(Method::POST, path, Some(body)).await
    }

    async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, DemoError> {
        let failed = |reason: String| DemoError::Api { request: format!("{method} {path}"), reason };
        let mut request =
            self.http.request(method.clone(), format!("{}/api/v1{path}", self.url)).bearer_auth(self.token.expose());
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await.map_err(|error| failed(error.to_string()))?;
        let status = answer.status();
        let document: Value = answer.json().await.map_err(|error| failed(error.to_string()))?;
        if status.is_success() {
            return Ok(document);
        }
        Err(failed(document["detail"].as_str().map_or_else(|| status.to_string(), str::to_owned)))
    }
}
