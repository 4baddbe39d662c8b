//! One connection from accept to close: caps, the handshake and its deadline, opening the export, then the session.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::timeout;

use super::Shared;
use super::half_open::Handshaking;
use crate::handshake::{Action, Handshake, Negotiated, Policy, Stance};
use crate::session::{Connection, Ending, Phase, reached, serve};
use crate::stats::{ClientFacts, Place};
use crate::wire::option::greeting;
use crate::{Device, Error, ErrorKind};

/// Bytes read at once during the handshake.
const CHUNK: usize = 4096;

/// How a handshake ended.
enum Outcome {
    Entered(Box<Entered>),
    /// Close; what was sent must still reach the peer.
    Refused(&'static str),
    /// Close; there is nobody to talk to.
    Over(&'static str),
}

struct Entered {
    negotiated: Negotiated,
    device: Arc<dyn Device>,
    place: Place,
    rest: Vec<u8>,
}

/// Serves one stream to its end. `handshaking` was taken when it was accepted, so that the oldest is the oldest; `peer` is for
/// the log.
pub(super) async fn handle<R, W>(
    shared: Arc<Shared>,
    handshaking: Handshaking,
    mut reader: R,
    mut writer: W,
    peer: String,
) where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let (budget, stats) = (&shared.budget, &shared.stats);
    stats.accepted.fetch_add(1, Relaxed);
    let place = budget.connections.clone().try_acquire_owned().ok();
    // Beyond the cap a few at a time are told why, and only for a moment.
    let refusal = match place {
        Some(_) => None,
        None => match budget.refusals.clone().try_acquire_owned() {
            Ok(refusal) => {
                stats.refused.fetch_add(1, Relaxed);
                Some(refusal)
            }
            Err(_) => {
                stats.dropped.fetch_add(1, Relaxed);
                return;
            }
        },
    };
    let max = budget.max_connections;
    let (stance, deadline) = match refusal {
        None => (Stance::Welcome, shared.limits.handshake_deadline),
        Some(_) => (Stance::Refused(format!("too many connections ({max} of {max})")), shared.limits.linger),
    };
    let mut phase = shared.phase.subscribe();
    let outcome = tokio::select! {
        biased;
        () = reached(&mut phase, Phase::Cut) => Outcome::Over("the server stops"),
        () = handshaking.evicted() => {
            stats.evicted.fetch_add(1, Relaxed);
            Outcome::Over("too many connections in the handshake")
        }
        outcome = timeout(deadline, negotiate(&shared, &mut reader, &mut writer, stance)) => {
            outcome.unwrap_or_else(|_| {
                stats.timed_out.fetch_add(u64::from(refusal.is_none()), Relaxed);
                Outcome::Over("the handshake took too long")
            })
        }
    };
    drop(handshaking);
    match outcome {
        Outcome::Entered(entered) => transmit(&shared, reader, writer, *entered, &peer).await,
        Outcome::Refused(reason) => {
            tracing::debug!(%peer, reason, "handshake ended");
            let _ = timeout(shared.limits.linger, async {
                let _ = writer.shutdown().await;
                let mut sink = reader.take(shared.limits.linger_bytes);
                let _ = tokio::io::copy(&mut sink, &mut tokio::io::sink()).await;
            })
            .await;
        }
        Outcome::Over(reason) => tracing::debug!(%peer, reason, "handshake ended"),
    }
}

async fn negotiate<R, W>(shared: &Shared, reader: &mut R, writer: &mut W, stance: Stance) -> Outcome
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    const GONE: Outcome = Outcome::Over("the peer went away");
    let mut phase = shared.phase.subscribe();
    let limits = &shared.limits;
    let policy = Policy { list: shared.list, options: limits.options, option_bytes: limits.option_bytes };
    let mut handshake = Handshake::new(shared.exports.facts().clone(), policy, stance);
    let mut chunk = vec![0; CHUNK];
    let mut opened = None;
    if send(writer, &greeting()).await.is_err() {
        return GONE;
    }
    loop {
        if *phase.borrow_and_update() != Phase::Running {
            handshake.shut_down();
        }
        match handshake.next_action() {
            Action::Wait => tokio::select! {
                read = reader.read(&mut chunk) => match read {
                    Ok(count) if count > 0 => handshake.feed(&chunk[..count]),
                    _ => return GONE,
                },
                _ = phase.changed() => {}
            },
            Action::Send(bytes) => {
                if send(writer, &bytes).await.is_err() {
                    return GONE;
                }
            }
            Action::Open(export) => {
                let result = open(shared, export, &phase).await;
                handshake.opened(result.map(|both| opened = Some(both)));
            }
            Action::Enter(negotiated) => {
                let Some((device, place)) = opened else { return Outcome::Over("entered without a device") };
                let rest = handshake.into_rest();
                return Outcome::Entered(Box::new(Entered { negotiated, device, place, rest }));
            }
            Action::Aborted => return Outcome::Refused("the client aborted"),
            Action::Close(reason) => {
                shared.stats.rejected.fetch_add(1, Relaxed);
                return Outcome::Refused(reason);
            }
        }
    }
}

async fn send<W: AsyncWrite + Unpin>(writer: &mut W, bytes: &[u8]) -> std::io::Result<()> {
    writer.write_all(bytes).await?;
    writer.flush().await
}

/// Takes a place in the export, then opens it, so that a full export costs nothing.
async fn open(
    shared: &Shared,
    export: usize,
    phase: &watch::Receiver<Phase>,
) -> Result<(Arc<dyn Device>, Place), Error> {
    let unknown = || Error::new(ErrorKind::Invalid, "there is no such export");
    let entry = shared.exports.entries().get(export).ok_or_else(unknown)?;
    let cap = shared.connections_per_export;
    let full = || Error::new(ErrorKind::NotPermitted, format!("too many connections ({cap} of {cap})"));
    let place = entry.stats.enter(cap).ok_or_else(full)?;
    let device = entry.open().await?;
    if *phase.borrow() != Phase::Running {
        return Err(Error::new(ErrorKind::Shutdown, "the server is shutting down"));
    }
    Ok((device, place))
}

async fn transmit<R, W>(shared: &Shared, reader: R, writer: W, entered: Entered, peer: &str)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let Entered { negotiated, device, place, rest } = entered;
    let Some(facts) = shared.exports.facts().get(negotiated.export) else { return };
    let terms = negotiated.terms(facts);
    let seat = place.transmit(ClientFacts { peer: peer.to_owned(), mode: terms.mode, tls_subject: None });
    tracing::debug!(peer, export = facts.name, ?terms, "connected");
    let connection = Connection::new(device, terms, shared.limits.clone(), &shared.budget, seat);
    let ending = serve(connection, reader, writer, &rest, shared.phase.subscribe()).await;
    match ending {
        Ending::Disconnected | Ending::Stopped => tracing::debug!(peer, export = facts.name, ?ending, "closed"),
        _ => tracing::info!(peer, export = facts.name, ?ending, "closed"),
    }
}
