//! `blockyard nbd`: one qcow2 image over NBD until it is told to stop; a drop-in for everyday qemu-nbd use.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blockyard_nbd::{Budget, BudgetLimits, Exports, Options, Server, Tls};
use clap::{Args, ValueEnum};
use serde_json::json;

use super::below::Below;
use super::image_error::ImageError;
use super::listen::Place;
use super::serve::Stop;
use super::size::{Size, SizeError};
use super::tls::TlsArguments;
use super::{CliError, Exit, Format, Output};
use crate::config;
use crate::export::{Access, Caching, ImageExport, OpenOptions};
use crate::telemetry;

/// How long requests under way may take to end after the signal.
const DRAIN: Duration = Duration::from_secs(30);
/// The least memory budget, in bytes: what goes round of each half is then as much as one connection may hold.
const MEMORY_BUDGET_MIN: u64 = 32 << 20;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The qcow2 image. Its format is never guessed: another file is refused.
    image: PathBuf,
    #[command(flatten)]
    place: Place,
    /// Name of the export.
    #[arg(long, value_name = "NAME", default_value = "")]
    export: String,
    /// Refuse writes. Several readers may serve one image at once.
    #[arg(long)]
    read_only: bool,
    /// Clients at once; one more is told so.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// Memory for payload, at least 32M: half for writes until they are in the image, half for reads. Below 160M the largest
    /// reads of clients without structured replies are refused.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = memory_budget)]
    memory_budget: Size,
    /// The way to the file: `auto` goes around the page cache for writes, and for large reads of what it does not have, where
    /// the file system takes part; `writeback` does everything through it.
    #[arg(long, value_enum, default_value_t = Cache::Auto)]
    cache: Cache,
    #[command(flatten)]
    tls: TlsArguments,
    #[command(flatten)]
    below: Below,
}

/// How writes reach the file before a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Cache {
    Auto,
    Writeback,
}

fn memory_budget(text: &str) -> Result<Size, String> {
    let Size(bytes) = text.parse().map_err(|error: SizeError| error.to_string())?;
    if bytes >= MEMORY_BUDGET_MIN { Ok(Size(bytes)) } else { Err("must be at least 32M".to_owned()) }
}

pub(super) async fn run(arguments: Arguments, output: &Output) -> Result<Exit, CliError> {
    // Of what happens to clients only what somebody should know.
    telemetry::init(&config::Server { log: "warn".to_owned(), ..config::Server::default() });
    let tls = arguments.tls.load()?;
    // Listened for before anything is opened: a stop during the start is not lost.
    let mut stop = Stop::new()?;
    let access = if arguments.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let caching = match arguments.cache {
        Cache::Auto => Caching::Auto,
        Cache::Writeback => Caching::PageCache,
    };
    let (path, options) = arguments.below.options(&arguments.image, access)?;
    let options = OpenOptions { caching, ..options };
    let export = ImageExport::open(&arguments.export, path, options).await;
    let failed = |error| ImageError::of(&arguments.image, error);
    let export = export.map_err(failed)?;
    let served = serve(&arguments, &export, tls, &mut stop, output).await;
    // Whatever came in between: what was written is made whole, and a failure of that is the one to tell.
    export.image().close().await.map_err(failed)?;
    served
}

async fn serve(
    arguments: &Arguments,
    export: &ImageExport,
    tls: Tls,
    stop: &mut Stop,
    output: &Output,
) -> Result<Exit, CliError> {
    let exports = Exports::new([Arc::new(export.clone()) as Arc<dyn blockyard_nbd::Export>]);
    let exports = exports.map_err(|error| CliError::Export { reason: error.to_string() })?;
    let Size(bytes) = arguments.memory_budget;
    let connections = usize::from(arguments.connections);
    let defaults = BudgetLimits::default();
    let budget = Budget::new(&BudgetLimits { bytes, connections: defaults.connections.max(connections), ..defaults });
    let encrypted = matches!(tls, Tls::Required(_));
    let options = Options { connections_per_export: connections, tls, ..Options::new(budget) };
    let (listener, _socket) = arguments.place.listen(encrypted)?;
    let server = Server::start(listener, exports, options).map_err(|source| CliError::Listening { source })?;
    let uri = server.uris().into_iter().next().unwrap_or_default();
    let ready = match output.format() {
        Format::Text => format!("ready {uri}"),
        Format::Json => json!({"ready": true, "uri": uri}).to_string(),
    };
    output.line(&ready)?;
    stop.wait().await;
    tokio::select! {
        _ = server.stop(DRAIN) => Ok(Exit::Ok),
        () = stop.wait() => Ok(Exit::Interrupted),
    }
}
