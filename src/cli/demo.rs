//! `blockyard demo`: the whole product without VMware, with bars while it works and a table when it is done.

use std::path::PathBuf;

use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::serve::Stop;
use super::size::readable;
use super::{CliError, Exit, Format, Output, table};
use crate::config::Server;
use crate::demo::{Demo, DemoError, Options, Progress, Report};
use crate::telemetry;

/// Characters of a SHA-256 that a table shows: enough to see that two are the same.
const HASH_SHOWN: usize = 16;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// A disk image to back up instead of the generated ones: raw, or qcow2 when it begins with its magic bytes. May be
    /// repeated. The file is only read.
    #[arg(long = "disk", value_name = "FILE")]
    disks: Vec<PathBuf>,
    /// Keep state, repository and generated disks in this folder, which must be empty or missing.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Leave service and fake node running until Ctrl-C, to be tried with curl.
    #[arg(long)]
    serve: bool,
}

pub(super) async fn run(arguments: Arguments, output: &Output) -> Result<Exit, CliError> {
    telemetry::init(&Server { log: "error".to_owned(), ..Server::default() });
    let mut stop = Stop::new()?;
    // Removed at the end, however that comes, unless it is to be kept.
    let temporary = match &arguments.keep {
        Some(_) => None,
        None => Some(tempfile::tempdir().map_err(|source| {
            CliError::Demo(DemoError::File { path: std::env::temp_dir(), source })
        })?),
    };
    let folder = match (&arguments.keep, &temporary) {
        (Some(folder), _) => folder.clone(),
        (None, Some(folder)) => folder.path().join("demo"),
        (None, None) => return Ok(Exit::Usage),
    };
    let options = Options { folder, disks: arguments.disks.clone() };
    tokio::select! {
        exit = show(&arguments, &options, output) => exit,
        () = stop.wait() => Ok(if arguments.serve { Exit::Ok } else { Exit::Interrupted }),
    }
}

async fn show(arguments: &Arguments, options: &Options, output: &Output) -> Result<Exit, CliError> {
    output.note(if options.disks.is_empty() { "Making three disks …" } else { "Opening the disks …" });
    let demo = Demo::set_up(options).await?;
    let bars = Bars::new(output);
    let report = demo.run(|progress| bars.show(progress)).await;
    bars.finish();
    let report = report?;
    print(arguments, &report, output)?;
    let exit = if report.all_equal() { Exit::Ok } else { Exit::Failed };
    if arguments.serve {
        match output.format() {
            Format::Text => {
                output.line(&format!("url   {}", demo.url()))?;
                output.line(&format!("token {}", demo.token_file().display()))?;
                output.note("Running until Ctrl-C.");
            }
            Format::Json => {
                output.line(&json!({"url": demo.url(), "token_file": demo.token_file()}).to_string())?;
            }
        }
        // Ended by the signal that the caller waits for.
        std::future::pending::<()>().await;
    }
    demo.take_down().await;
    Ok(exit)
}

fn print(arguments: &Arguments, report: &Report, output: &Output) -> Result<(), CliError> {
    let document = serde_json::to_value(report).unwrap_or_default();
    output.answer(&document, |_| {
        let rows: Vec<Vec<String>> = report
            .disks
            .iter()
            .map(|disk| {
                let short = |hash: &str| hash.chars().take(HASH_SHOWN).collect::<String>();
                vec![
                    disk.disk_id.to_string(),
                    readable(disk.read_bytes),
                    readable(disk.stored_bytes),
                    format!("{:.2}", disk.seconds),
                    short(&disk.source_sha256),
                    short(&disk.restored_sha256),
                    if disk.equal { "equal" } else { "DIFFERENT" }.to_owned(),
                ]
            })
            .collect();
        let headings = ["disk", "read", "stored", "seconds", "SHA-256 of source", "SHA-256 of restore", ""];
        let place = match (&arguments.keep, arguments.serve) {
            (None, false) => "The images are removed now; --keep DIR keeps them.".to_owned(),
            _ => format!("The images are in {}", report.path.display()),
        };
        let verdict = if report.all_equal() {
            "Every disk came back over NBD exactly as it was."
        } else {
            "A disk did NOT come back as it was."
        };
        format!("{}\n\n{verdict}\n{place}", table::render(&headings, &rows))
    })
}

/// One bar per disk, on a terminal only.
struct Bars {
    all: MultiProgress,
    bars: std::cell::RefCell<Vec<ProgressBar>>,
}

impl Bars {
    fn new(output: &Output) -> Self {
        // The target itself draws nothing when standard error is no terminal.
        let hidden = output.is_quiet() || output.format() == Format::Json;
        let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        Self { all: MultiProgress::with_draw_target(target), bars: std::cell::RefCell::default() }
    }

    fn show(&self, progress: &[Progress]) {
        let mut bars = self.bars.borrow_mut();
        while bars.len() < progress.len() {
            let bar = self.all.add(ProgressBar::new(0));
            let template = "disk {prefix:>2} {bar:32} {bytes:>11} of {total_bytes:<11} {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bars.push(bar);
        }
        for (bar, disk) in bars.iter().zip(progress) {
            bar.set_length(disk.size_bytes);
            bar.set_prefix(disk.disk_id.to_string());
            bar.set_position(disk.covered_bytes);
            bar.set_message(disk.state.clone());
        }
    }

    fn finish(&self) {
        self.bars.borrow().iter().for_each(ProgressBar::abandon);
    }
}
