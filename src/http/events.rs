//! Events as they happen, as server-sent events (the WHATWG HTML standard's `text/event-stream`).
//!
//! Each stream pulls from a feed of its own ([`feed`](crate::events::feed)) as fast as its reader takes, so that nothing piles up
//! here. Stored events carry their number as `id`; progress has none, so that `Last-Event-ID` always names a stored event.

use std::convert::Infallible;

use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::backups::{not_found, parse_id};
use super::extract::QueryParams;
use super::problem::{Code, Problem};
use crate::app::AppState;
use crate::events::feed::{About, Feed, FeedError, Told};
use crate::store::events::{KINDS, PROGRESS};

/// The header in which a reader that comes again says what it has seen.
const LAST_EVENT_ID: &str = "last-event-id";

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(backup_events)).routes(routes!(all_events))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct BackupEventsQuery {
    /// Number of the last event that was seen, for programs that cannot send the header `Last-Event-ID`, which wins.
    last_event_id: Option<String>,
    /// Only these kinds, with commas in between.
    kind: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct EventsQuery {
    /// Number of the last event that was seen, for programs that cannot send the header `Last-Event-ID`, which wins.
    last_event_id: Option<String>,
    /// Only these kinds, with commas in between.
    kind: Option<String>,
    /// Only events about the thing with this id.
    subject: Option<String>,
}

/// The events of one backup, from its beginning or from where the reader was, until it is over.
#[utoipa::path(get, path = "/backups/{id}/events", tag = "events", params(("id" = String, Path), BackupEventsQuery),
    responses((status = 200, content_type = "text/event-stream", body = String)))]
async fn backup_events(
    State(app): State<AppState>,
    Path(id): Path<String>,
    QueryParams(query): QueryParams<BackupEventsQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let about = About::Backup(parse_id(&id)?);
    let after = last_event_id(&headers, query.last_event_id.as_deref())?;
    answer(&app, about, kinds(query.kind.as_deref())?, after).await
}

/// All events from now on, or from where the reader was, until the service stops.
#[utoipa::path(get, path = "/events", tag = "events", params(EventsQuery),
    responses((status = 200, content_type = "text/event-stream", body = String)))]
async fn all_events(
    State(app): State<AppState>,
    QueryParams(query): QueryParams<EventsQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let about = query.subject.map_or(About::All, About::Subject);
    let after = last_event_id(&headers, query.last_event_id.as_deref())?;
    answer(&app, about, kinds(query.kind.as_deref())?, after).await
}

async fn answer(app: &AppState, about: About, kinds: Vec<String>, after: Option<i64>) -> Result<Response, Problem> {
    let feed = Feed::open(app, about, kinds, after).await.map_err(|error| match error {
        FeedError::NoBackup(id) => not_found(id.as_str()),
        FeedError::Store(error) => error.into(),
    })?;
    let events = stream::unfold(feed, |mut feed| async move {
        let told = feed.next().await?;
        Some((Ok::<Event, Infallible>(written(told)), feed))
    });
    Ok(Sse::new(events).into_response())
}

/// An event as it goes over the wire.
fn written(told: Told) -> Event {
    let text = |data: &Value| data.to_string();
    match told {
        Told::Stored(event) => {
            Event::default().id(event.sequence.to_string()).event(&event.kind).data(text(&event.told()))
        }
        Told::Progress(data) => Event::default().event(PROGRESS).data(text(&data)),
        Told::Gap { after, next } => Event::default().event("gap").data(text(&json!({"after": after, "next": next}))),
        Told::Heartbeat => Event::default().comment(""),
    }
}

/// What the reader has seen. A browser that comes again sends the header, and the same query as before.
fn last_event_id(headers: &HeaderMap, query: Option<&str>) -> Result<Option<i64>, Problem> {
    let header = match headers.get(LAST_EVENT_ID).map(|value| value.to_str()) {
        Some(Ok(text)) => Some(text),
        Some(Err(_)) => Some("?"),
        None => None,
    };
    let Some(text) = header.or(query).filter(|text| !text.is_empty()) else { return Ok(None) };
    match text.parse::<i64>() {
        Ok(number) if number >= 0 => Ok(Some(number)),
        _ => Err(Problem::new(Code::InvalidField, "Last-Event-ID is no number of an event.")),
    }
}

fn kinds(query: Option<&str>) -> Result<Vec<String>, Problem> {
    let kinds = query.unwrap_or_default().split(',').map(str::trim).filter(|kind| !kind.is_empty());
    kinds
        .map(|kind| match KINDS.contains(&kind) {
            true => Ok(kind.to_owned()),
            false => Err(Problem::new(Code::InvalidField, format!("{kind:?} is none of {}.", KINDS.join(", ")))),
        })
        .collect()
}
