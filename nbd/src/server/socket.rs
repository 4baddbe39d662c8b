//! What differs between TCP and Unix sockets: accepting, socket options, and how an address reads as a URI.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::{Shared, connection};
use crate::half_open::Handshaking;

/// After this much silence the peer's system is asked whether it still lives.
const KEEPALIVE: Duration = Duration::from_secs(60);
/// So long may sent bytes wait for the peer's system to acknowledge them.
const USER_TIMEOUT: Duration = Duration::from_secs(120);

/// What an export name or socket path keeps of itself in a URI: RFC 3986's unreserved characters and the slash.
const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// A bound socket to serve.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix stream socket. Whoever bound it removes its file.
    Unix(UnixListener),
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self::Unix(listener)
    }
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Address and port.
    Tcp(SocketAddr),
    /// Path of the socket; empty if it has none.
    Unix(PathBuf),
}

impl Address {
    /// The NBD URI of an export here, `tls` if clients must encrypt.
    pub fn uri(&self, export: &str, tls: bool) -> String {
        let scheme = if tls { "nbds" } else { "nbd" };
        let export = percent_encode(export.as_bytes(), KEPT);
        match self {
            Self::Tcp(address) => format!("{scheme}://{address}/{export}"),
            Self::Unix(path) => {
                let path = percent_encode(path.as_os_str().as_encoded_bytes(), KEPT);
                format!("{scheme}+unix:///{export}?socket={path}")
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl Listener {
    pub(super) fn address(&self) -> io::Result<Address> {
        Ok(match self {
            Self::Tcp(listener) => Address::Tcp(listener.local_addr()?),
            Self::Unix(listener) => {
                Address::Unix(listener.local_addr()?.as_pathname().map(PathBuf::from).unwrap_or_default())
            }
        })
    }

    /// The next connection, and what to call it in the log.
    pub(super) async fn accept(&self) -> io::Result<(Stream, String)> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                if let Err(error) = tune(&stream) {
                    tracing::debug!(%peer, %error, "socket options not set");
                }
                (Stream::Tcp(stream), peer.to_string())
            }
            Self::Unix(listener) => (Stream::Unix(listener.accept().await?.0), "unix".to_owned()),
        })
    }
}

/// An accepted connection.
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub(super) async fn handle(self, shared: Arc<Shared>, handshaking: Handshaking, peer: String) {
        match self {
            Self::Tcp(stream) => {
                let (reader, writer) = stream.into_split();
                connection::handle(shared, handshaking, reader, writer, peer).await;
            }
            Self::Unix(stream) => {
                let (reader, writer) = stream.into_split();
                connection::handle(shared, handshaking, reader, writer, peer).await;
            }
        }
    }
}

/// Replies leave at once ("Protocol phases"), and a peer that vanished is noticed.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 4))?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_percent_encoded_and_bracket_ipv6() {
        let v4 = Address::Tcp("127.0.0.1:10809".parse().unwrap());
        assert_eq!(v4.uri("vm 1/disk?ä", false), "nbd://127.0.0.1:10809/vm%201/disk%3F%C3%A4");
        let v6 = Address::Tcp("[::1]:5".parse().unwrap());
        assert_eq!(v6.uri("", false), "nbd://[::1]:5/");
        assert_eq!(v6.uri("a", true), "nbds://[::1]:5/a");
        let unix = Address::Unix("/run/a b&c".into());
        assert_eq!(unix.uri("d", false), "nbd+unix:///d?socket=/run/a%20b%26c");
        assert_eq!(unix.uri("d", true), "nbds+unix:///d?socket=/run/a%20b%26c");
    }

    #[tokio::test]
    async fn accepted_sockets_send_at_once_and_notice_a_peer_that_vanished() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = Listener::from(TcpListener::bind(address).await.unwrap());
            let Address::Tcp(address) = listener.address().unwrap() else { panic!("not TCP") };
            let _client = TcpStream::connect(address).await.unwrap();
            let (Stream::Tcp(stream), _) = listener.accept().await.unwrap() else { panic!("not TCP") };
            let socket = SockRef::from(&stream);
            assert!(socket.tcp_nodelay().unwrap(), "{address}");
            assert!(socket.keepalive().unwrap(), "{address}");
            assert_eq!(socket.tcp_keepalive_time().unwrap(), KEEPALIVE, "{address}");
            assert_eq!(socket.tcp_keepalive_interval().unwrap(), KEEPALIVE / 4, "{address}");
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(USER_TIMEOUT), "{address}");
        }
    }
}
