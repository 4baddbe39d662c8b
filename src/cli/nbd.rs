//! `blockyard nbd`: one qcow2 image over NBD until it is told to stop; a drop-in for everyday qemu-nbd use.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blockyard_nbd::server::Listener;
use blockyard_nbd::{Budget, BudgetLimits, Exports, Options, Server, Tls};
use clap::{Args, ValueEnum};
use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::{TcpListener, UnixListener};

use super::below::Below;
use super::image_error::ImageError;
use super::serve::Stop;
use super::tls::TlsArguments;
use super::{CliError, Exit, Format, Output};
use crate::config;
use crate::export::{Access, Caching, ImageExport, OpenOptions};
use crate::telemetry;

/// How long requests under way may take to end after the signal.
const DRAIN: Duration = Duration::from_secs(30);
/// Connections that the system keeps for us while we accept others.
const BACKLOG: i32 = 1024;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The qcow2 image. Its format is never guessed: another file is refused.
    image: PathBuf,
    /// Address to listen on; others than loopback only with `--tls required`.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1")]
    bind: IpAddr,
    /// TCP port; 0 takes a free one and prints it.
    #[arg(long, value_name = "N", default_value_t = 10809)]
    port: u16,
    /// Listen on this Unix socket (mode 0600) instead.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["bind", "port"])]
    socket: Option<PathBuf>,
    /// Name of the export.
    #[arg(long, value_name = "NAME", default_value = "")]
    export: String,
    /// Refuse writes. Several readers may serve one image at once.
    #[arg(long)]
    read_only: bool,
    /// Clients at once; one more is told so.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// How the image is written: `auto` writes large pieces around the page cache where the file system takes part,
    /// `writeback` everything through it.
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

pub(super) async fn run(arguments: Arguments, output: &Output) -> Result<Exit, CliError> {
    // Of what happens to clients only what somebody should know.
    telemetry::init(&config::Server { log: "warn".to_owned(), ..config::Server::default() });
    let tls = arguments.tls.load()?;
    if !arguments.bind.is_loopback() && !matches!(tls, Tls::Required(_)) {
        return Err(CliError::NotLoopback { address: arguments.bind });
    }
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
    let options = Options {
        connections_per_export: usize::from(arguments.connections),
        tls,
        ..Options::new(Budget::new(&BudgetLimits::default()))
    };
    let (listener, _socket) = listen(arguments).await?;
    let server = Server::start(listener, exports, options).map_err(|source| bind_error(arguments, source))?;
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

fn bind_error(arguments: &Arguments, source: std::io::Error) -> CliError {
    let address = match &arguments.socket {
        Some(path) => path.display().to_string(),
        None => SocketAddr::new(arguments.bind, arguments.port).to_string(),
    };
    CliError::Bind { address, source }
}

async fn listen(arguments: &Arguments) -> Result<(Listener, Option<SocketFile>), CliError> {
    let bound = match &arguments.socket {
        Some(path) => listen_unix(path).map(|(listener, file)| (Listener::from(listener), Some(file))),
        None => TcpListener::bind((arguments.bind, arguments.port)).await.map(|listener| (listener.into(), None)),
    };
    bound.map_err(|source| bind_error(arguments, source))
}

/// A Unix socket that nobody else may connect to, not even for the moment between its making and its mode.
fn listen_unix(path: &Path) -> std::io::Result<(UnixListener, SocketFile)> {
    remove_stale(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(path)?)?;
    let file = SocketFile(path.to_owned());
    // Connecting is refused until the socket listens.
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    socket.listen(BACKLOG)?;
    Ok((UnixListener::from_std(socket.into())?, file))
}

/// Removes a socket that a killed process left behind: one that nobody listens on.
fn remove_stale(path: &Path) -> std::io::Result<()> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|facts| facts.file_type().is_socket());
    let refused = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
    if is_socket && std::os::unix::net::UnixStream::connect(path).err().is_some_and(refused) {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// The name of a Unix socket in the file system, removed at the end.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody may have removed it already, and then there is nothing to do.
        let _ = std::fs::remove_file(&self.0);
    }
}
