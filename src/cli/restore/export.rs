//! `blockyard restore export`: disks served for as long as the command runs.

use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::error::RestoreCommandError;
use super::{Made, check_id};
use crate::cli::client::{Client, ClientError};
use crate::cli::serve::Stop;
use crate::cli::vm::text;
use crate::cli::{CliError, Exit, Output};
use crate::clock::UtcTime;

/// A third of the time that is left passes between renewals, at least this long: two may fail.
const RENEWAL_MIN: Duration = Duration::from_millis(300);

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
    let mut pause = made.iter().map(|export| between_renewals(&export.document)).min().unwrap_or(RENEWAL_MIN);
    loop {
        tokio::select! {
            () = stop.wait() => return Ok(Exit::Ok),
            () = tokio::time::sleep(pause) => {}
        }
        for export in made.iter() {
            match export.renew(client).await {
                Ok(document) => pause = between_renewals(&document),
                Err(ClientError::Unreachable { .. }) => {}
                Err(ClientError::Refused { status, .. }) if status.as_u16() == 404 => {
                    return Err(RestoreCommandError::Ended.into());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn between_renewals(export: &Value) -> Duration {
    let expires: Option<UtcTime> = export["expires_at"].as_str().and_then(|text| text.parse().ok());
    let left = expires.map_or(0.0, |expires| expires.seconds_since(UtcTime::now()));
    Duration::try_from_secs_f64(left / 3.0).unwrap_or(RENEWAL_MIN).max(RENEWAL_MIN)
}

fn render(document: &Value) -> String {
    let exports = document["exports"].as_array().into_iter().flatten();
    let lines = exports.map(|export| {
        format!("disk {} ready {}\n  {}", export["disk_id"], text(&export["uri"]), text(&export["command"]))
    });
    lines.collect::<Vec<_>>().join("\n")
}
