//! One connection from accept to close: caps, the handshake and its deadline, in plain text and after STARTTLS in TLS, opening
//! the export, then the session.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, join, split};
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::Instrument;

use super::Shared;
use crate::half_open::Handshaking;
use crate::handshake::{Action, Handshake, Negotiated, Policy, Stance, TlsPolicy};
use crate::session::{Connection, Ending, Phase, reached, serve};
use crate::stats::{ClientFacts, Place};
use crate::tls::{self, Tls};
use crate::wire::option::greeting;
use crate::{Device, Error, ErrorKind};

/// Bytes read at once during the handshake.
const CHUNK: usize = 4096;

/// How a handshake ended.
enum Outcome {
    Entered(Box<Entered>),
    /// Shake hands in TLS, and go on with this handshake.
    StartTls(Box<Handshake>),
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

/// A connection that has not reached the transmission phase.
struct Entrance {
    shared: Arc<Shared>,
    peer: String,
    phase: watch::Receiver<Phase>,
    handshaking: Handshaking,
    deadline: Instant,
    /// It is only told why it is turned away.
    is_refusal: bool,
    /// Of the client's certificate.
    subject: Option<String>,
}

impl Entrance {
    /// Does a part of the handshake in the time that is left of it; an error is why that is over.
    async fn within<T>(&mut self, part: impl Future<Output = T>) -> Result<T, &'static str> {
        tokio::select! {
            biased;
            () = reached(&mut self.phase, Phase::Cut) => Err("the server stops"),
            () = self.handshaking.evicted() => {
                self.shared.stats.evicted.fetch_add(1, Relaxed);
                Err("too many connections in the handshake")
            }
            done = timeout_at(self.deadline, part) => done.map_err(|_| {
                self.shared.stats.timed_out.fetch_add(u64::from(!self.is_refusal), Relaxed);
                "the handshake took too long"
            }),
        }
    }
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
    R: AsyncRead + Unpin + Send + 'static,
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
    let limits = &shared.limits;
    let (stance, time) = match refusal {
        None => (Stance::Welcome, limits.handshake_deadline),
        Some(_) => (Stance::Refused(format!("too many connections ({max} of {max})")), limits.refusal_deadline),
    };
    let tls = match shared.tls {
        Tls::Off => TlsPolicy::Off,
        Tls::On(_) => TlsPolicy::On,
        Tls::Required(_) => TlsPolicy::Required,
    };
    let policy = Policy { list: shared.list, tls, options: limits.options, option_bytes: limits.option_bytes };
    let handshake = Handshake::new(shared.exports.facts().clone(), policy, stance);
    let deadline = Instant::now() + time;
    let (phase, is_refusal) = (shared.phase.subscribe(), refusal.is_some());
    let mut entrance = Entrance { shared, peer, phase, handshaking, deadline, is_refusal, subject: None };
    let shared = entrance.shared.clone();
    let greeted = async {
        match send(&mut writer, &greeting()).await {
            Ok(()) => negotiate(&shared, &mut reader, &mut writer, handshake).await,
            Err(_) => GONE,
        }
    };
    match entrance.within(greeted).await.unwrap_or_else(Outcome::Over) {
        // Boxed, so that a connection in plain text does not take the memory of one in TLS.
        Outcome::StartTls(handshake) => Box::pin(start_tls(entrance, reader, writer, *handshake)).await,
        outcome => conclude(entrance, reader, writer, outcome).await,
    }
}

/// Goes on in TLS. A handshake there that fails ends the connection: what was acknowledged cannot be taken back.
async fn start_tls<R, W>(mut entrance: Entrance, reader: R, writer: W, handshake: Handshake)
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let Some(acceptor) = entrance.shared.tls.acceptor() else { return };
    // Under the name of the peer, which who judges its certificate does not know.
    let span = tracing::error_span!("tls", peer = entrance.peer);
    let accepted = acceptor.accept(join(reader, writer)).into_fallible().instrument(span);
    let stream = match entrance.within(accepted).await {
        Ok(Ok(stream)) => stream,
        Ok(Err((error, stream))) => {
            entrance.shared.stats.rejected.fetch_add(1, Relaxed);
            tracing::info!(peer = entrance.peer, %error, "TLS handshake failed");
            let (reader, writer) = stream.into_inner();
            // An alert says why.
            return conclude(entrance, reader, writer, Outcome::Refused("the TLS handshake failed")).await;
        }
        Err(reason) => return tracing::debug!(peer = entrance.peer, reason, "handshake ended"),
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    entrance.subject = certificate.and_then(|certificate| tls::subject(certificate));
    let (mut reader, mut writer) = split(stream);
    let shared = entrance.shared.clone();
    let outcome = entrance.within(negotiate(&shared, &mut reader, &mut writer, handshake)).await;
    conclude(entrance, reader, writer, outcome.unwrap_or_else(Outcome::Over)).await;
}

/// What follows the handshake.
async fn conclude<R, W>(entrance: Entrance, reader: R, mut writer: W, outcome: Outcome)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let Entrance { shared, peer, handshaking, subject, .. } = entrance;
    match outcome {
        Outcome::Entered(entered) => {
            drop(handshaking);
            transmit(&shared, reader, writer, *entered, &peer, subject).await;
        }
        Outcome::Refused(reason) => {
            tracing::debug!(%peer, reason, "handshake ended");
            let heard_out = timeout(shared.limits.linger, async {
                let _ = writer.shutdown().await;
                let mut sink = reader.take(shared.limits.linger_bytes);
                let _ = tokio::io::copy(&mut sink, &mut tokio::io::sink()).await;
            });
            // It still makes room for others when there are too many.
            tokio::select! {
                _ = heard_out => {}
                () = handshaking.evicted() => {}
            }
        }
        Outcome::Over(reason) => tracing::debug!(%peer, reason, "handshake ended"),
        // Inside TLS the handshake does not ask for it.
        Outcome::StartTls(_) => {}
    }
}

const GONE: Outcome = Outcome::Over("the peer went away");

async fn negotiate<R, W>(shared: &Shared, reader: &mut R, writer: &mut W, mut handshake: Handshake) -> Outcome
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut phase = shared.phase.subscribe();
    let mut chunk = vec![0; CHUNK];
    let mut opened = None;
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
            Action::StartTls => return Outcome::StartTls(Box::new(handshake.secured())),
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

async fn transmit<R, W>(shared: &Shared, reader: R, writer: W, entered: Entered, peer: &str, subject: Option<String>)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let Entered { negotiated, device, place, rest } = entered;
    let Some(facts) = shared.exports.facts().get(negotiated.export) else { return };
    let terms = negotiated.terms(facts);
    tracing::debug!(peer, export = facts.name, ?terms, subject, "connected");
    let seat = place.transmit(ClientFacts { peer: peer.to_owned(), mode: terms.mode, tls_subject: subject });
    let connection = Connection::new(device, terms, shared.limits.clone(), &shared.budget, seat);
    let ending = serve(connection, reader, writer, &rest, shared.phase.subscribe()).await;
    match ending {
        Ending::Disconnected | Ending::Stopped => tracing::debug!(peer, export = facts.name, ?ending, "closed"),
        _ => tracing::info!(peer, export = facts.name, ?ending, "closed"),
    }
}
