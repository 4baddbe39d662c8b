//! `Idempotency-Key`: a start request that is repeated gets the first answer again and starts nothing.

use axum::http::header::{CONTENT_TYPE, LOCATION};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::answer::{BackupAnswer, StartAnswer};
use super::refusal;
use crate::app::AppState;
use crate::backup::idempotency::{Claimed, HeldKey, IdempotencyKey, KeyError};
use crate::backup::{NewBackup, StartError};
use crate::http::extract::parse_json;
use crate::http::problem::{Code, Finished, Problem};
use crate::id::BackupId;
use crate::store::backups;
use crate::store::idempotency::{KeyRow, StoredAnswer};
use crate::words::JobState;

const KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// On an answer that was given before.
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
/// Longest key, in characters.
const KEY_MAX: usize = 255;

/// The key of a request, with the digest of its body: of the document, not of its spelling, as a caller that builds the
/// request anew may order its members otherwise.
pub(super) fn key(headers: &HeaderMap, body: &[u8]) -> Result<Option<IdempotencyKey>, Problem> {
    let Some(value) = headers.get(KEY) else { return Ok(None) };
    let key = value.to_str().unwrap_or_default();
    if !(1..=KEY_MAX).contains(&key.len()) {
        let detail = format!("Idempotency-Key must have 1 to {KEY_MAX} printable ASCII characters.");
        return Err(Problem::new(Code::InvalidField, detail));
    }
    let document: Value = parse_json(body)?;
    let digest = Sha256::digest(document.to_string());
    let body_hash = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Some(IdempotencyKey { key: key.to_owned(), body_hash }))
}

/// Starts the backup that a key stands for, or repeats what became of it. The start and the storing of its answer go on when
/// the caller hangs up: that is when it comes again.
pub(super) async fn start(
    app: &AppState,
    mut new: NewBackup,
    key: IdempotencyKey,
    instance: &'static str,
) -> Result<Response, Problem> {
    match app.backups.claim_key(&key).await.map_err(|error| refused(&error))? {
        Claimed::Used(row) => {
            let mut response = replay(app, row, instance).await?;
            response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
            Ok(response)
        }
        Claimed::New(held) => {
            new.idempotency_key = Some(key);
            let app = AppState::clone(app);
            let first = tokio::spawn(async move { first(&app, new, held, instance).await });
            first.await.map_err(|_| Problem::internal(&StartError::Panicked))?
        }
    }
}

fn refused(error: &KeyError) -> Problem {
    match error {
        KeyError::Reused => {
            Problem::new(Code::IdempotencyKeyReused, "The Idempotency-Key was used with another body before.")
        }
        KeyError::InProgress => Problem::new(
            Code::IdempotencyInProgress,
            "The first request with this Idempotency-Key has not been answered yet.",
        ),
        KeyError::Store(error) => Problem::from_store(error),
    }
}

async fn first(app: &AppState, new: NewBackup, held: HeldKey, instance: &str) -> Result<Response, Problem> {
    let (id, answer) = match app.backups.start(new).await {
        Ok(started) => {
            let body = serde_json::to_string(&StartAnswer::new(&started, &app.config.nbd));
            let body = body.map_err(|error| Problem::internal(&error))?;
            (started.facts.id.clone(), StoredAnswer { status: 200, body })
        }
        Err(error) => {
            // What made no job is told and forgotten: a repeat is looked at anew.
            let Some(id) = error.backup_id().cloned() else { return Err(refusal::start_refused(error)) };
            (id, document(refusal::start_refused(error), instance)?)
        }
    };
    if let Err(error) = app.backups.store_answer(&held, &answer).await {
        // A repeat is answered from the record of the job.
        tracing::error!(job_id = %id, error = &error as &dyn std::error::Error, "an answer could not be stored");
    }
    Ok(response(&id, answer))
}

/// The stored answer. Where the process died before it could be given, what became of the job: as it is now while it goes on or
/// when it was committed, else that it has ended, which no repeat with this key will change.
async fn replay(app: &AppState, row: KeyRow, instance: &str) -> Result<Response, Problem> {
    if let Some(answer) = row.answer {
        return Ok(response(&row.backup_id, answer));
    }
    let mut connection = app.store.read().await?;
    let backup = backups::load(&mut connection, &row.backup_id).await?;
    let answer = if backup.state.is_ending() && backup.state != JobState::Committed {
        let detail = format!(
            "The service was restarted before it answered the first request with this Idempotency-Key. The backup is {}; a \
             new attempt needs a new key.",
            backup.state
        );
        let problem = refusal::with_backup(Problem::new(Code::BackupEnded, detail), &row.backup_id);
        document(problem, instance)?
    } else {
        let now = BackupAnswer::load(app, &mut connection, backup).await?;
        StoredAnswer { status: 200, body: serde_json::to_string(&now).map_err(|error| Problem::internal(&error))? }
    };
    Ok(response(&row.backup_id, answer))
}

fn document(problem: Problem, instance: &str) -> Result<StoredAnswer, Problem> {
    let status = problem.code().status().as_u16();
    let body = serde_json::to_string(&problem.into_document(instance)).map_err(|error| Problem::internal(&error))?;
    Ok(StoredAnswer { status, body })
}

fn response(id: &BackupId, answer: StoredAnswer) -> Response {
    // What was stored is what was sent.
    let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, answer.body).into_response();
    let headers = response.headers_mut();
    if status.is_success() {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Ok(location) = HeaderValue::from_str(&format!("/api/v1/backups/{id}")) {
            headers.insert(LOCATION, location);
        }
    } else {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        response.extensions_mut().insert(Finished);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(body: &str) -> String {
        let headers = HeaderMap::from_iter([(KEY, HeaderValue::from_static("k"))]);
        key(&headers, body.as_bytes()).unwrap().unwrap().body_hash
    }

    #[test]
    fn the_digest_is_that_of_the_document_and_not_of_its_spelling() {
        assert_eq!(hash(r#"{"a": 1, "b": {"d": 2, "c": 3}}"#), hash(r#"{"b":{"c":3,"d":2},"a":1}"#));
        assert_ne!(hash(r#"{"a": 1}"#), hash(r#"{"a": "1"}"#));
        assert_eq!(hash("{}").len(), 64);
    }

    #[test]
    fn keys_are_one_to_255_characters_of_ascii() {
        let with = |value: HeaderValue| key(&HeaderMap::from_iter([(KEY, value)]), b"{}");
        assert!(key(&HeaderMap::new(), b"{}").unwrap().is_none());
        assert!(with(HeaderValue::from_str(&"k".repeat(255)).unwrap()).is_ok());
        for value in [String::new(), "k".repeat(256), "ä".to_owned()] {
            let problem = with(HeaderValue::from_bytes(value.as_bytes()).unwrap()).unwrap_err();
            assert_eq!(problem.code(), Code::InvalidField, "{value}");
        }
    }
}
