//! The REST API as a client sees it: address and token from the environment, documents in, documents out.

use std::error::Error;
use std::io;
use std::iter::successors;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::header::{ETAG, IF_MATCH};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde_json::Value;

use super::Exit;
use crate::config::{Config, Server};
use crate::secret::{Secret, SecretError};

/// Base URL of the service, without `/api/v1`.
const URL_VARIABLE: &str = "BLOCKYARD_URL";
/// File that holds the token.
const TOKEN_VARIABLE: &str = "BLOCKYARD_TOKEN_FILE";

/// A service that answers at all does so within this; the longest answer waits for the node (`jobs.answer_within_s`).
const REQUEST_LIMIT: Duration = Duration::from_secs(90);

/// How long a stream of events may be silent.
const SILENCE_LIMIT: Duration = Duration::from_secs(45);

/// Why the service did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The token file cannot be read.
    #[error("the token cannot be read (BLOCKYARD_TOKEN_FILE names its file)")]
    Token(#[from] SecretError),
    /// What should be the address of the service is none.
    #[error("BLOCKYARD_URL is {url:?}: write http://HOST:PORT, such as {}", default_url())]
    Address {
        /// What is there.
        url: String,
    },
    /// No answer.
    #[error("the service at {url} does not answer (BLOCKYARD_URL names its address)")]
    Unreachable {
        /// Where it was looked for.
        url: String,
        /// What went wrong.
        source: reqwest::Error,
    },
    /// An answer that is no success.
    #[error("{detail}")]
    Refused {
        /// The HTTP status.
        status: StatusCode,
        /// The problem in words, with its code.
        detail: String,
        /// The problem document, or `null` when something else answered.
        document: Value,
    },
    /// A success whose body is no JSON: something else listens there.
    #[error("the answer of {url} is no JSON: is this Blockyard?")]
    Malformed {
        /// What was asked.
        url: String,
    },
}

impl ClientError {
    /// Whether nothing listens at the address: a service that was there has ended.
    pub(super) fn is_nobody_there(&self) -> bool {
        let Self::Unreachable { source, .. } = self else { return false };
        let causes = successors(Some(source as &(dyn Error + 'static)), |&error| error.source());
        let mut system = causes.filter_map(|error| error.downcast_ref::<io::Error>());
        system.any(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    }

    /// Whether the same question may have an answer a little later.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused { status, .. } => status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS,
            Self::Token(_) | Self::Address { .. } | Self::Malformed { .. } => false,
        }
    }

    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::Address { .. } => Exit::Usage,
            Self::Token(_) | Self::Unreachable { .. } | Self::Malformed { .. } => Exit::Unreachable,
            Self::Refused { document, .. } if document["code"] == "point_damaged" => Exit::Damaged,
            Self::Refused { status, .. } => match *status {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Exit::Unreachable,
                StatusCode::NOT_FOUND => Exit::NotFound,
                StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => Exit::Usage,
                StatusCode::CONFLICT
                | StatusCode::PRECONDITION_FAILED
                | StatusCode::LOCKED
                | StatusCode::PRECONDITION_REQUIRED => Exit::Conflict,
                _ => Exit::Failed,
            },
        }
    }
}

/// A client of one service.
#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    url: String,
    token: Option<Secret>,
}

impl Client {
    /// A client for what the environment names: by default the service with the default configuration. A missing default
    /// token file is no error: the service may run without tokens.
    pub(super) fn from_environment() -> Result<Self, ClientError> {
        let url = std::env::var_os(URL_VARIABLE).map(|url| url.to_string_lossy().into_owned());
        let url = url.filter(|url| !url.is_empty()).unwrap_or_else(default_url);
        if !is_address(&url) {
            return Err(ClientError::Address { url });
        }
        let token = match std::env::var_os(TOKEN_VARIABLE).filter(|path| !path.is_empty()) {
            Some(path) => Some(Secret::read(&PathBuf::from(path))?),
            None => Secret::read(&Config::default().token_file()).ok(),
        };
        Self::new(url.trim_end_matches('/').to_owned(), token)
    }

    /// A client for the service at `url`, which has no slash at its end.
    pub(super) fn new(url: String, token: Option<Secret>) -> Result<Self, ClientError> {
        // The API is plain HTTP on this machine: a proxy would only hand the token to somebody else.
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(REQUEST_LIMIT)
            .build()
            .map_err(|source| ClientError::Unreachable { url: url.clone(), source })?;
        Ok(Self { http, url, token })
    }

    /// GET of a path under `/api/v1`.
    pub(super) async fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, ClientError> {
        self.send(Method::GET, path, query, None).await
    }

    /// POST to a path under `/api/v1`.
    pub(super) async fn post(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        self.send(Method::POST, path, &[], Some(body)).await
    }

    /// POST whose answer may take as long as the work of the service does.
    pub(super) async fn post_at_length(
        &self,
        path: &str,
        query: &[(&str, &str)],
        body: &Value,
    ) -> Result<Value, ClientError> {
        let request = self.request(Method::POST, path).query(query).json(body).timeout(Duration::MAX);
        Ok(self.answer(request, path).await?.0)
    }

    /// Reads a document and replaces it by what `change` makes of it, unless somebody else did so in between.
    pub(super) async fn replace(&self, path: &str, change: impl FnOnce(&Value) -> Value) -> Result<Value, ClientError> {
        let (document, etag) = self.answer(self.request(Method::GET, path), path).await?;
        let request = self.request(Method::PUT, path).header(IF_MATCH, etag.unwrap_or_default());
        Ok(self.answer(request.json(&change(&document)), path).await?.0)
    }

    /// DELETE of a path under `/api/v1`.
    pub(super) async fn delete(&self, path: &str) -> Result<Value, ClientError> {
        self.send(Method::DELETE, path, &[], None).await
    }

    /// GET of a stream of events under `/api/v1`; `last` is the id of the last one that was seen.
    pub(super) async fn stream(&self, path: &str, last: Option<&str>) -> Result<Response, ClientError> {
        let unreachable = |source| ClientError::Unreachable { url: self.url.clone(), source };
        // It has no end, but the service gives a sign of life every 15 seconds.
        let http = reqwest::Client::builder().no_proxy().connect_timeout(SILENCE_LIMIT).read_timeout(SILENCE_LIMIT);
        let mut request = http.build().map_err(unreachable)?.get(format!("{}/api/v1{path}", self.url));
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.expose());
        }
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let document = response.bytes().await.map_err(unreachable)?;
        Err(refused(status, serde_json::from_slice(&document).unwrap_or_default()))
    }

    /// All rows of a list, over all its pages, as one document.
    pub(super) async fn list(&self, noun: &str, query: &[(&str, &str)]) -> Result<Value, ClientError> {
        let path = format!("/{noun}");
        let mut document = self.get(&path, query).await?;
        while let Some(token) = document["next_page_token"].as_str() {
            let query: Vec<_> = query.iter().copied().chain([("page_token", token)]).collect();
            let mut next = self.get(&path, &query).await?;
            let mut rows = document[noun].take();
            if let (Some(rows), Some(more)) = (rows.as_array_mut(), next[noun].as_array_mut()) {
                rows.append(more);
            }
            next[noun] = rows;
            document = next;
        }
        Ok(document)
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Result<Value, ClientError> {
        let mut request = self.request(method, path).query(query);
        if let Some(body) = body {
            request = request.json(body);
        }
        Ok(self.answer(request, path).await?.0)
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, self.url_of(path));
        match &self.token {
            Some(token) => request.bearer_auth(token.expose()),
            None => request,
        }
    }

    fn url_of(&self, path: &str) -> String {
        format!("{}/api/v1{path}", self.url)
    }

    /// The document that a request brings, and its `ETag`.
    async fn answer(&self, request: RequestBuilder, path: &str) -> Result<(Value, Option<String>), ClientError> {
        let unreachable = |source| ClientError::Unreachable { url: self.url.clone(), source };
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let etag = response.headers().get(ETAG).and_then(|etag| etag.to_str().ok()).map(str::to_owned);
        let text = response.bytes().await.map_err(unreachable)?;
        if status == StatusCode::NO_CONTENT {
            return Ok((Value::Null, etag));
        }
        let document: Option<Value> = serde_json::from_slice(&text).ok();
        match document {
            Some(document) if status.is_success() => Ok((document, etag)),
            None if status.is_success() => Err(ClientError::Malformed { url: self.url_of(path) }),
            document => Err(refused(status, document.unwrap_or_default())),
        }
    }
}

/// Of the service with the default configuration.
fn default_url() -> String {
    format!("http://{}", Server::default().bind)
}

/// Whether requests can be sent there: paths are put behind it, and the API is plain HTTP.
fn is_address(url: &str) -> bool {
    let Ok(parsed) = url.parse::<Url>() else { return false };
    // `http:host` is mended by the parser, and would be asked for something else once there is a path behind it.
    url.starts_with("http://") && parsed.has_host() && parsed.query().is_none() && parsed.fragment().is_none()
}

fn refused(status: StatusCode, document: Value) -> ClientError {
    let detail = match (document["detail"].as_str(), document["code"].as_str()) {
        (Some(detail), Some(code)) => format!("{detail} ({code})"),
        _ => format!("the service answered {status}"),
    };
    ClientError::Refused { status, detail, document }
}
