//! Who may call what: tokens, callback peers, and the two headers by which a browser gives itself away.
//!
//! Everything demands a token except the routes named here. The tunnel of a node ends on loopback, so coming from loopback
//! proves nothing; it only is what callbacks must do by default.

use std::net::{IpAddr, SocketAddr};

use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::problem::{Code, Problem};
use super::token::Grant;
use crate::app::{AppState, Phase};

/// Routes that everybody may call.
pub const OPEN_ROUTES: &[&str] =
    &["/health", "/readyz", "/openapi.json", "/docs", "/docs/", "/docs/{*rest}", "/docs/problems"];

/// Open too when `observability.metrics_public` says so.
pub const METRICS_ROUTE: &str = "/metrics";

/// Routes of the backup client: no token, but a peer in `auth.callback_peers`.
pub const CALLBACK_ROUTES: &[(Method, &str)] = &[
    (Method::GET, "/api/v1/backups/changeid"),
    (Method::POST, "/api/v1/backups/{id}/complete"),
    (Method::POST, "/api/v1/telemetry/{job_type}/{id}"),
];

/// What a route demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Open,
    Callback,
    Token,
}

fn access(app: &AppState, request: &Request) -> Access {
    let Some(path) = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str) else {
        return Access::Token;
    };
    if OPEN_ROUTES.contains(&path) || (path == METRICS_ROUTE && app.config.observability.metrics_public) {
        Access::Open
    } else if CALLBACK_ROUTES.iter().any(|(method, route)| method == request.method() && *route == path) {
        Access::Callback
    } else {
        Access::Token
    }
}

/// Lets a request through or answers it with the reason why not.
pub(super) async fn guard(State(app): State<AppState>, request: Request, next: Next) -> Response {
    match admit(&app, &request) {
        Ok(()) => next.run(request).await,
        Err(problem) => {
            tracing::warn!(code = problem.code().entry().name, method = %request.method(), "request refused");
            let unauthorized = matches!(problem.code(), Code::TokenMissing | Code::TokenInvalid);
            let mut response = problem.into_response();
            if unauthorized {
                response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            response
        }
    }
}

fn admit(app: &AppState, request: &Request) -> Result<(), Problem> {
    check_host(app, request.headers())?;
    check_origin(request.headers())?;
    match access(app, request) {
        Access::Open => return Ok(()),
        Access::Callback => check_peer(app, request)?,
        Access::Token => check_token(app, request)?,
    }
    if app.phase() == Phase::Starting {
        return Err(Problem::new(Code::Starting, "The service is bringing its records in order.").with_retry_after(1));
    }
    Ok(())
}

fn check_token(app: &AppState, request: &Request) -> Result<(), Problem> {
    if app.tokens.is_off() {
        return Ok(());
    }
    let Some(token) = bearer(request.headers()) else {
        return Err(Problem::new(Code::TokenMissing, "Send Authorization: Bearer with the content of the token file."));
    };
    match app.tokens.grant(token) {
        Some(Grant::Full) => Ok(()),
        Some(Grant::Read) if matches!(*request.method(), Method::GET | Method::HEAD) => Ok(()),
        Some(Grant::Read) => Err(Problem::new(Code::ReadOnlyToken, "This token serves GET requests only.")),
        None => Err(Problem::new(Code::TokenInvalid, "The token is not the one of this service.")),
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn check_peer(app: &AppState, request: &Request) -> Result<(), Problem> {
    // A dual-stack socket shows IPv4 peers as mapped IPv6 addresses.
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(peer)| peer.ip().to_canonical());
    if peer.is_some_and(|peer| app.config.auth.callback_peers.iter().any(|network| network.contains(&peer))) {
        return Ok(());
    }
    let peer = peer.map_or_else(|| "an unknown address".to_owned(), |peer| peer.to_string());
    Err(Problem::new(Code::CallbackPeerRefused, format!("{peer} is in none of the networks of auth.callback_peers.")))
}

/// A page that made a foreign name resolve to loopback still sends that name.
fn check_host(app: &AppState, headers: &HeaderMap) -> Result<(), Problem> {
    let Some(host) = headers.get(HOST) else { return Ok(()) };
    let own = [Some(app.config.server.bind), app.config.server.callbacks_bind];
    let known = |host: &str| {
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        host.eq_ignore_ascii_case("localhost")
            || address.is_ok_and(|ip| ip.is_loopback() || own.iter().flatten().any(|own| own.ip() == ip))
    };
    if host.to_str().is_ok_and(|host| known(without_port(host))) {
        return Ok(());
    }
    Err(Problem::new(Code::HostRefused, "Host is neither a loopback name nor the address the service listens on."))
}

fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        // The last colon of a bare IPv6 address in brackets is inside them.
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    }
}

/// A browser names the page that sends a request; only pages of this very service may.
fn check_origin(headers: &HeaderMap) -> Result<(), Problem> {
    let Some(origin) = headers.get(ORIGIN) else { return Ok(()) };
    let authority = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, authority)| authority);
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    if authority.is_some() && authority == host {
        return Ok(());
    }
    Err(Problem::new(Code::OriginRefused, "Origin is not this service."))
}

#[cfg(test)]
mod tests {
    use super::without_port;

    #[test]
    fn ports_are_cut_off_and_addresses_are_not() {
        for (authority, host) in [
            ("localhost:8082", "localhost"),
            ("127.0.0.1", "127.0.0.1"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
            ("a.b:x", "a.b:x"),
        ] {
            assert_eq!(without_port(authority), host);
        }
    }
}
