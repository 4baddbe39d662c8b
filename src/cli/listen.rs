//! Where `blockyard nbd` listens: a TCP port, a Unix socket that it makes, or a socket that was passed to it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use blockyard_nbd::server::Listener;
use clap::Args;
use listenfd::ListenFd;
use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use tokio::net::{TcpListener, UnixListener};

use super::CliError;

/// Connections that the system keeps for us while we accept others.
const BACKLOG: i32 = 1024;
const PORT: u16 = 10809;

#[derive(Debug, Args)]
pub(super) struct Place {
    /// Address to listen on; others than loopback only with `--tls required` [default: 127.0.0.1].
    #[arg(long, value_name = "ADDR")]
    bind: Option<IpAddr>,
    /// TCP port; 0 takes a free one and prints it [default: 10809].
    #[arg(long, value_name = "N")]
    port: Option<u16>,
    /// Listen on this Unix socket (mode 0600) instead, in a folder that not everybody may write to.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["bind", "port"])]
    socket: Option<PathBuf>,
}

impl Place {
    /// Binds the socket, or takes the one that was passed by systemd, or by whoever does as it does (`LISTEN_FDS`). The file
    /// of a socket made here is removed with the second value. Addresses other than loopback are for encrypted images only.
    pub(super) fn listen(&self, encrypted: bool) -> Result<(Listener, Option<SocketFile>), CliError> {
        let mut passed = ListenFd::from_env();
        match (passed.len(), &self.socket) {
            (0, Some(path)) => listen_unix(path).map(|(listener, file)| (listener.into(), Some(file))),
            (0, None) => self.listen_tcp(encrypted).map(|listener| (listener, None)),
            _ if self.socket.is_some() || self.bind.is_some() || self.port.is_some() => Err(CliError::PassedAndNamed),
            (1, _) => take(&mut passed, encrypted).map(|listener| (listener, None)),
            (count, _) => Err(CliError::PassedSockets { count }),
        }
    }

    fn listen_tcp(&self, encrypted: bool) -> Result<Listener, CliError> {
        let address = SocketAddr::new(self.bind.unwrap_or(Ipv4Addr::LOCALHOST.into()), self.port.unwrap_or(PORT));
        may_listen_on(address.ip(), encrypted)?;
        let bind = || {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            // A port whose last connections have just been closed is free.
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            socket.listen(BACKLOG)?;
            TcpListener::from_std(socket.into())
        };
        bind().map(Listener::from).map_err(|source| CliError::Bind { address: address.to_string(), source })
    }
}

/// Whether an image may be served on this address.
fn may_listen_on(address: IpAddr, encrypted: bool) -> Result<(), CliError> {
    if address.is_loopback() || encrypted { Ok(()) } else { Err(CliError::NotLoopback { address }) }
}

/// The one socket that was passed.
fn take(passed: &mut ListenFd, encrypted: bool) -> Result<Listener, CliError> {
    let unusable = |source| CliError::PassedSocket { source };
    let listens = |socket: SockRef| match socket.is_listener() {
        Ok(true) => Ok(()),
        Ok(false) => Err(unusable(io::Error::new(io::ErrorKind::InvalidInput, "nothing listens on it"))),
        Err(error) => Err(unusable(error)),
    };
    // A socket that is no TCP listener stays for the second look.
    if let Ok(Some(listener)) = passed.take_tcp_listener(0) {
        listens(SockRef::from(&listener))?;
        may_listen_on(listener.local_addr().map_err(unusable)?.ip(), encrypted)?;
        listener.set_nonblocking(true).map_err(unusable)?;
        return TcpListener::from_std(listener).map(Listener::from).map_err(unusable);
    }
    let listener = passed.take_unix_listener(0).map_err(unusable)?;
    let listener = listener.ok_or_else(|| unusable(io::ErrorKind::NotFound.into()))?;
    listens(SockRef::from(&listener))?;
    listener.set_nonblocking(true).map_err(unusable)?;
    UnixListener::from_std(listener).map(Listener::from).map_err(unusable)
}

/// A Unix socket that nobody else may connect to, not even for the moment between its making and its mode.
fn listen_unix(path: &Path) -> Result<(UnixListener, SocketFile), CliError> {
    let failed = |source| CliError::Bind { address: path.display().to_string(), source };
    if open_to_everybody(path).map_err(failed)? {
        return Err(CliError::OpenFolder { path: path.to_owned() });
    }
    let bind = || {
        remove_stale(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.bind(&SockAddr::unix(path)?)?;
        let file = SocketFile::of(path)?;
        // Connecting is refused until the socket listens.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        socket.listen(BACKLOG)?;
        Ok((UnixListener::from_std(socket.into())?, file))
    };
    bind().map_err(failed)
}

/// Whether everybody may write to the folder of the socket: then anybody could put a socket there under this name while we do
/// not run, and be sent what was meant for us.
fn open_to_everybody(path: &Path) -> io::Result<bool> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    Ok(std::fs::metadata(folder)?.mode() & 0o002 != 0)
}

/// Removes a socket that a killed process left behind: one that nobody listens on.
fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|facts| facts.file_type().is_socket());
    if is_socket {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        // A server that lives but is too busy to accept must not be waited for.
        socket.set_nonblocking(true)?;
        let connected = socket.connect(&SockAddr::unix(path)?);
        if connected.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// The name of a Unix socket in the file system, removed at the end.
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and number, so that the socket of a successor is left alone.
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            // Somebody may have removed it already, and then there is nothing to do.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|facts| (facts.dev(), facts.ino()))
}
