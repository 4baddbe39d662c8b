//! `blockyard point verify` and `compare`: whether restore points are what was committed, and where two of them differ.

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::{path_of, rows};
use crate::cli::client::Client;
use crate::cli::size::readable;
use crate::cli::vm::text;
use crate::cli::{CliError, Exit, Output, table};

/// How long one question for the end stays open: with a bar to move, and without.
const WAIT_WITH_BAR_S: &str = "1";
const WAIT_S: &str = "60";
const BAR: &str = "verify {bar:32} {percent:>3}% {binary_bytes:>10} {binary_bytes_per_sec:>12}";

#[derive(Debug, Args)]
pub(in crate::cli) struct Verify {
    /// Id of the restore point.
    id: String,
    /// Read the virtual disks too, through their chains, and compare their content.
    #[arg(long)]
    content: bool,
    /// Leave out what the point builds upon.
    #[arg(long)]
    point_only: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Compare {
    /// Id of a restore point.
    first: String,
    /// Id of another one.
    second: String,
}

pub(super) async fn verify(client: &Client, arguments: &Verify, output: &Output) -> Result<Exit, CliError> {
    let path = path_of(&arguments.id)?;
    let scope = if arguments.point_only { "point" } else { "chain" };
    let body = json!({"scope": scope, "content": arguments.content});
    let begun = client.post(&format!("{path}/verify"), &body).await?;
    let bar = (output.has_notes() && std::io::stderr().is_terminal()).then(bar);
    let wait = if bar.is_some() { WAIT_WITH_BAR_S } else { WAIT_S };
    let ended = loop {
        let verification = client.get(&path, &[("wait", wait)]).await?["verification"].take();
        if verification["id"] != begun["id"] {
            return Err(CliError::VerificationLost);
        }
        if let Some(bar) = &bar {
            bar.set_length(verification["bytes_total"].as_u64().unwrap_or(0));
            bar.set_position(verification["bytes_done"].as_u64().unwrap_or(0));
        }
        if verification["state"] == "ended" {
            break verification;
        }
    };
    if let Some(bar) = bar {
        bar.abandon();
    }
    output.answer(&ended, render)?;
    let warned = rows(&ended["points"]).iter().any(|point| !rows(&point["findings"]).is_empty());
    Ok(match text(&ended["outcome"]) {
        "verified" if warned => Exit::Warnings,
        "verified" => Exit::Ok,
        "failed" => Exit::Failed,
        _ => Exit::Damaged,
    })
}

fn bar() -> ProgressBar {
    // A template that cannot be read would fail every run on a terminal; the plain style does as well.
    let style = ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn counted(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

fn render(verification: &Value) -> String {
    let number = |field: &str| verification[field].as_u64().unwrap_or(0);
    let points = rows(&verification["points"]).len() as u64;
    let mut done = vec![
        counted(points, "point"),
        counted(number("files"), "file"),
        format!("{} read", readable(number("bytes_read"))),
    ];
    // Only the first verification of a point has something to compare; of others nothing at all would sound like nothing checked.
    if number("bytes_compared") > 0 {
        done.push(format!("{} compared with what was received", readable(number("bytes_compared"))));
    }
    let [id, outcome] = ["point_id", "outcome"].map(|field| text(&verification[field]));
    let mut lines = vec![format!("{id}: {outcome} ({})", done.join(", "))];
    for point in rows(&verification["points"]) {
        let id = text(&point["point_id"]);
        lines.push(format!("  {id}  {}", text(&point["outcome"])));
        lines.extend(rows(&point["findings"]).iter().map(|finding| {
            let words = ["severity", "code", "file", "detail"].map(|field| text(&finding[field]));
            format!("    {}", words.join("  "))
        }));
    }
    lines.join("\n")
}

pub(super) async fn compare(client: &Client, arguments: &Compare, output: &Output) -> Result<Exit, CliError> {
    path_of(&arguments.second)?;
    let path = format!("{}/compare", path_of(&arguments.first)?);
    let compared = client.get(&path, &[("with", &arguments.second)]).await?;
    output.answer(&compared, |compared| {
        let rows: Vec<Vec<String>> = rows(&compared["disks"])
            .iter()
            .map(|disk| {
                let size = |field: &str| disk[field].as_u64().map_or_else(|| "-".to_owned(), readable);
                let sizes = ["size_bytes", "other_size_bytes", "differing_bytes"].map(size);
                [disk["disk_id"].to_string(), text(&disk["status"]).to_owned()].into_iter().chain(sizes).collect()
            })
            .collect();
        table::render(&["disk", "status", "size", "other size", "differing"], &rows)
    })?;
    Ok(match text(&compared["status"]) {
        "equal" => Exit::Ok,
        "different" => Exit::Failed,
        _ => Exit::Warnings,
    })
}
