//! `blockyard backup watch`: what happens to a backup until it is over, also across breaks of the link.
//!
//! Bars on a terminal, lines of text elsewhere, one JSON document per event on request.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;
use tokio::time::Instant;

use super::client::{Client, ClientError};
use super::size::readable;
use super::stream::{Message, Messages};
use super::vm::text;
use super::{CliError, Exit, Format, Output};

/// The first pause before a link that broke is made again; it doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long a service that is gone is waited for. A guess: a restart takes seconds.
const PATIENCE: Duration = Duration::from_secs(300);
/// Between two lines about one disk where there are no bars.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

const BAR: &str = "{prefix} {bar:32} {percent:>3}% {binary_bytes:>10} {msg}";
const SPINNER: &str = "{prefix} {spinner} {binary_bytes:>10} {msg}";

/// Follows the backup at `path` until it is over.
pub(super) async fn run(client: &Client, path: &str, output: &Output) -> Result<Exit, CliError> {
    let events = format!("{path}/events");
    let mut screen = Screen::new(output);
    let mut last: Option<String> = None;
    let (mut pause, mut heard) = (PAUSE, None);
    loop {
        match follow(client, &events, &mut last, &mut screen).await {
            Ok(Followed::Over(exit)) => return Ok(exit),
            Ok(Followed::Broken) => {
                heard = Some(Instant::now());
                pause = PAUSE;
            }
            // Nothing is left to tell: events are kept for a while only.
            Ok(Followed::Silent) => match client.get(path, &[]).await {
                Ok(backup) => {
                    heard = Some(Instant::now());
                    if let Some(exit) = exit_of(&backup) {
                        screen.line(&format!("{} {}", text(&backup["state"]), text(&backup["result"])), &backup)?;
                        return Ok(exit);
                    }
                }
                Err(ClientError::Unreachable { .. }) if heard.is_some() => {}
                Err(error) => return Err(error.into()),
            },
            Err(CliError::Client(error @ ClientError::Unreachable { .. })) => match heard {
                // Something was heard before: it may come back.
                Some(at) if Instant::now() - at < PATIENCE => output.note(&format!("{error}; once more …")),
                _ => return Err(error.into()),
            },
            Err(error) => return Err(error),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// How a stream ended.
enum Followed {
    /// With the end of the backup.
    Over(Exit),
    /// Somewhere before.
    Broken,
    /// Without having told anything.
    Silent,
}

/// Shows what comes until the stream ends.
async fn follow(
    client: &Client,
    path: &str,
    last: &mut Option<String>,
    screen: &mut Screen<'_>,
) -> Result<Followed, CliError> {
    let mut stream = client.stream(path, last.as_deref()).await?;
    let mut messages = Messages::default();
    let mut followed = Followed::Silent;
    loop {
        let bytes = match stream.chunk().await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(followed),
            Err(_) => return Ok(Followed::Broken),
        };
        for message in messages.take(&bytes, path)? {
            if let Some(id) = &message.id {
                *last = Some(id.clone());
            }
            followed = Followed::Broken;
            let data: Value = serde_json::from_str(&message.data).unwrap_or_default();
            screen.show(&message, &data)?;
            if let Some(exit) = (message.event == "job.state").then(|| exit_of(&data)).flatten() {
                return Ok(Followed::Over(exit));
            }
        }
    }
}

/// How a backup ended, if it has.
fn exit_of(state: &Value) -> Option<Exit> {
    match text(&state["result"]) {
        "success" => Some(Exit::Ok),
        "warning" => Some(Exit::Warnings),
        "failed" | "cancelled" => Some(Exit::Failed),
        _ => None,
    }
}

/// Where events are shown.
struct Screen<'a> {
    output: &'a Output,
    /// On a terminal.
    bars: Option<MultiProgress>,
    disks: BTreeMap<u64, Disk>,
}

#[derive(Default)]
struct Disk {
    bar: Option<ProgressBar>,
    told: Option<Instant>,
}

impl<'a> Screen<'a> {
    fn new(output: &'a Output) -> Self {
        let bars = output.format() == Format::Text && output.has_notes() && std::io::stderr().is_terminal();
        let bars = bars.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        Self { output, bars, disks: BTreeMap::new() }
    }

    fn show(&mut self, message: &Message, data: &Value) -> Result<(), CliError> {
        if self.output.format() == Format::Json {
            let mut line = data.clone();
            line["kind"] = message.event.as_str().into();
            return self.output.line(&line.to_string());
        }
        match message.event.as_str() {
            "disk.progress" => self.progress(data),
            "job.state" => {
                let code = data["code"].as_str().map(|code| format!(" ({code})")).unwrap_or_default();
                self.line(&format!("{}{code}", text(&data["state"])), data)
            }
            "disk.state" => self.line(&format!("disk {} {}", data["disk_id"], text(&data["state"])), data),
            "job.warning" => {
                self.line(&format!("warning: {}: {}", text(&data["warning"]), text(&data["detail"])), data)
            }
            "alert" => self.line(&format!("alert: {}: {}", text(&data["alert"]), text(&data["detail"])), data),
            "point.committed" => self.line(&format!("restore point {}", text(&data["point_id"])), data),
            "gap" => self.line("some events are gone", data),
            other => self.line(other, data),
        }
    }

    /// A line with its time, above the bars.
    fn line(&self, line: &str, data: &Value) -> Result<(), CliError> {
        if self.output.format() == Format::Json {
            return self.output.line(&data.to_string());
        }
        if !self.output.has_notes() {
            return Ok(());
        }
        let line = match data["at"].as_str() {
            Some(at) => format!("{at} {line}"),
            None => line.to_owned(),
        };
        match &self.bars {
            Some(bars) => bars.suspend(|| self.output.line(&line)),
            None => self.output.line(&line),
        }
    }

    fn progress(&mut self, data: &Value) -> Result<(), CliError> {
        let number = |field: &str| data[field].as_u64().unwrap_or_default();
        let (covered, size) = (number("covered_bytes"), number("size_bytes"));
        let mut words = format!("{}/s", readable(number("rate_bps")));
        if let Some(eta) = data["eta_s"].as_u64() {
            words.push_str(&format!(", {eta} s left"));
        }
        if let Some(bottleneck) = data["bottleneck"].as_str() {
            words.push_str(&format!(", limited by {bottleneck}"));
        }
        let id = number("disk_id");
        let disk = self.disks.entry(id).or_default();
        if let Some(bars) = &self.bars {
            let bar = disk.bar.get_or_insert_with(|| {
                // A template that cannot be read would fail every run on a terminal; the plain style does as well.
                let template = if data["percent"].is_number() { BAR } else { SPINNER };
                let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
                bars.add(ProgressBar::new(size).with_style(style).with_prefix(format!("disk {id}")))
            });
            bar.set_position(covered);
            bar.set_message(words);
            return Ok(());
        }
        let now = Instant::now();
        if covered == 0 || disk.told.is_some_and(|told| now - told < LINE_INTERVAL) {
            return Ok(());
        }
        disk.told = Some(now);
        let done = data["percent"].as_f64().map(|percent| format!("{percent:.1} %, ")).unwrap_or_default();
        self.line(&format!("disk {id} {} of {}, {done}{words}", readable(covered), readable(size)), data)
    }
}
