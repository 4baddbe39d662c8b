//! `blockyard restore export`: disks served for as long as the command runs.

use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::error::RestoreCommandError;
use super::{Made, check_id};
use crate::cli::client::{Client, ClientError};
use crate::cli::serve::Stop;
use crate::cli::vm::text;
use crate::cli::{CliError, Exit, Output};
use crate::clock::UtcTime;
use crate::telemetry::Chain;

/// A third of the time that is left passes between renewals, at least this long: two may fail.
const RENEWAL_MIN: Duration = Duration::from_millis(300);
/// Between two looks at the service. A guess: whoever relies on the exports should learn within seconds that they are gone, and
/// a question that the service answers from memory costs nothing.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(in crate::cli) struct Export {
    /// Id of the restore point.
    point: String,
    /// Number of a disk; all of them when left out.
    #[arg(long, value_name = "N")]
    disk: Option<u32>,
    /// Take writes into a file that is removed with the export, so that a system can be started from it.
    #[arg(long)]
    overlay: bool,
    /// Serve a point that is known to be damaged, as far as that is possible.
    #[arg(long)]
    accept_damage: bool,
}

pub(super) async fn run(export: Export, output: &Output) -> Result<Exit, CliError> {
    check_id(&export.point)?;
    // Listened for before anything is made: what was made is ended.
    let mut stop = Stop::new()?;
    let client = Client::from_environment()?;
    let mut made = Vec::new();
    let served = Box::pin(serve(&export, &client, &mut made, &mut stop, output)).await;
    for export in &made {
        export.end(&client).await;
    }
    served
}

async fn serve(
    export: &Export,
    client: &Client,
    made: &mut Vec<Made>,
    stop: &mut Stop,
    output: &Output,
) -> Result<Exit, CliError> {
    let disks = match export.disk {
        Some(disk) => vec![disk.into()],
        None => {
            let point = client.get(&format!("/points/{}", export.point), &[]).await?;
            let disks = point["disks"].as_array().into_iter().flatten();
            disks.map(|disk| disk["disk_id"].clone()).collect()
        }
    };
    let mode = if export.overlay { "overlay" } else { "read-only" };
    for disk in disks {
        let body = json!({"disk_id": disk, "mode": mode, "accept_damage": export.accept_damage});
        let export = Made::make(client, &export.point, &body).await?;
        export.warnings().for_each(|warning| output.note(&format!("warning: {warning}")));
        made.push(export);
    }
    let documents: Vec<&Value> = made.iter().map(|export| &export.document).collect();
    output.answer(&json!({"exports": documents}), render)?;
    output.note("serving until Ctrl-C");
    tokio::select! {
        () = stop.wait() => Ok(Exit::Ok),
        error = keep(made, client, output) => Err(error),
    }
}

/// Renews the exports and looks after the service, until they are over; returns why.
async fn keep(made: &[Made], client: &Client, output: &Output) -> CliError {
    let mut lease = Lease::of(made.iter().map(|export| &export.document));
    let mut is_troubled = false;
    loop {
        let pause = lease.renewal.saturating_duration_since(Instant::now()).clamp(RENEWAL_MIN, LOOK_INTERVAL);
        tokio::time::sleep(pause).await;
        let asked = if lease.renewal <= Instant::now() {
            renew(made, client).await.map(|renewed| lease = renewed)
        } else {
            look(made, client).await
        };
        match asked {
            Ok(()) => is_troubled = false,
            Err(KeepError::Ended) => return RestoreCommandError::Ended.into(),
            // The listeners of the exports were in the same process.
            Err(KeepError::Service(error)) if error.is_nobody_there() => {
                return RestoreCommandError::ServiceEnded { source: error }.into();
            }
            Err(KeepError::Service(error)) if !error.may_pass() || lease.end <= Instant::now() => return error.into(),
            Err(KeepError::Service(error)) => {
                if !is_troubled {
                    output.note(&format!("warning: {}; once more …", Chain(&error)));
                }
                is_troubled = true;
            }
        }
    }
}

/// Why exports cannot be kept.
enum KeepError {
    /// One of them is over.
    Ended,
    /// The service said something else, or nothing.
    Service(ClientError),
}

/// How long the exports last without anybody's doing.
#[derive(Clone, Copy, Debug)]
struct Lease {
    /// When they should be renewed.
    renewal: Instant,
    /// When the first of them is over.
    end: Instant,
}

impl Lease {
    fn of<'a>(exports: impl Iterator<Item = &'a Value>) -> Self {
        let left = exports.map(|export| {
            let expires: Option<UtcTime> = export["expires_at"].as_str().and_then(|text| text.parse().ok());
            let left = expires.map_or(0.0, |expires| expires.seconds_since(UtcTime::now()));
            Duration::try_from_secs_f64(left).unwrap_or_default()
        });
        let left = left.min().unwrap_or_default();
        let now = Instant::now();
        Self { renewal: now + (left / 3).max(RENEWAL_MIN), end: now + left }
    }
}

async fn renew(made: &[Made], client: &Client) -> Result<Lease, KeepError> {
    let mut documents = Vec::with_capacity(made.len());
    for export in made {
        documents.push(export.renew(client).await.map_err(|error| match error {
            ClientError::Refused { status, .. } if status.as_u16() == 404 => KeepError::Ended,
            error => KeepError::Service(error),
        })?);
    }
    Ok(Lease::of(documents.iter()))
}

/// Whether the service still has the exports: one that was started anew does not.
async fn look(made: &[Made], client: &Client) -> Result<(), KeepError> {
    let served = client.get("/exports", &[]).await.map_err(KeepError::Service)?;
    let served = served["exports"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is_served = |export: &Made| served.iter().any(|served| served["id"] == export.document["id"]);
    if made.iter().all(is_served) { Ok(()) } else { Err(KeepError::Ended) }
}

fn render(document: &Value) -> String {
    let exports = document["exports"].as_array().into_iter().flatten();
    let lines = exports.map(|export| {
        format!("disk {} ready {}\n  {}", export["disk_id"], text(&export["uri"]), text(&export["command"]))
    });
    lines.collect::<Vec<_>>().join("\n")
}
