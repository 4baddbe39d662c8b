//! How a command ends: the exit codes, and which error has which.

use std::path::PathBuf;
use std::process::ExitCode;

use blockyard_nbd::tls::TlsError;

use super::client::ClientError;
use super::demo::DemoError;
use super::doctor::DoctorError;
use super::image_error::ImageError;
use super::restore::RestoreCommandError;
use crate::config::ConfigError;
use crate::serve::StartError;

/// The exit codes as `--help` tells them.
pub(super) const EXIT_CODES: &str = "\
Exit codes:
    0  done; image check: clean; image compare, point compare: equal
    1  it failed; image compare, point compare: different; doctor: images cannot be written there
    2  the command line, a value or the configuration is wrong;
       image check and repair: errors, or marked as corrupt; image compare: not compared
    3  done, with warnings; image check and repair: leaks, or not closed
    4  what was named does not exist
    5  it exists already, is in use, is running, is protected, or others build upon it
    6  not an image, or a corrupt one; point verify: damaged;
       restore: the point is damaged, or the copy is not what was backed up
    7  the service does not answer, or refuses the token
  130  interrupted by Ctrl-C";

/// The exit codes of every command; scripts may branch on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// It failed.
    Failed = 1,
    /// The command line or the configuration is wrong. Of `image check`, as of `qemu-img check`: the image has errors, or is marked
    /// as corrupt.
    Usage = 2,
    /// Done, with warnings. Of `image check`, as of `qemu-img check`: the image has leaks, or was not closed.
    Warnings = 3,
    /// What was named does not exist.
    NotFound = 4,
    /// Something is in the way, or it is running already.
    Conflict = 5,
    /// Data is damaged.
    Damaged = 6,
    /// The service does not answer, or refuses the token.
    Unreachable = 7,
    /// Ctrl-C.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The threads that it needs cannot be started.
    #[error("the runtime cannot be started")]
    Runtime {
        /// What the system said.
        source: std::io::Error,
    },
    /// The configuration cannot be used.
    #[error("configuration: {0}")]
    Config(#[from] ConfigError),
    /// The service cannot start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The service refused, or did not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A file given on the command line cannot be read.
    #[error("{} cannot be read", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file given on the command line is no JSON.
    #[error("{} is not valid JSON", path.display())]
    NotJson {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Nothing has this name.
    #[error("there is no {noun} named {name:?}")]
    NotFound {
        /// What was looked for.
        noun: &'static str,
        /// By which name.
        name: String,
    },
    /// Several things have this name.
    #[error("{} VMs are named {name:?}: use one of their ids ({})", ids.len(), ids.join(", "))]
    Ambiguous {
        /// The name.
        name: String,
        /// What it may mean.
        ids: Vec<String>,
    },
    /// The service was started anew, or somebody verifies the same point otherwise.
    #[error("the verification is no longer known to the service: ask for it again")]
    VerificationLost,
    /// An image cannot be made, opened or used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Two disks cannot be compared to the end, and what came in between.
    #[error(transparent)]
    NotCompared(Box<CliError>),
    /// An image that nobody may write to, for a command that writes to it.
    #[error(
        "{} is write-protected (no write permission for anybody), as the images of restore points are: it can be served \
         with nbd --read-only; what is to be written to is a copy or an overlay of it",
        path.display()
    )]
    WriteProtected {
        /// The image.
        path: PathBuf,
    },
    /// The folder for backing files is none.
    #[error("--backing-root {} cannot be used", path.display())]
    BackingRoot {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: is it in use?")]
    Bind {
        /// The address, or the path of the socket.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// What was bound cannot be served.
    #[error("the socket cannot be listened on")]
    Listening {
        /// What the system said.
        source: std::io::Error,
    },
    /// A Unix socket where anybody may put one.
    #[error("everybody may write to the folder of {}: put the socket into one of your own", path.display())]
    OpenFolder {
        /// The socket.
        path: PathBuf,
    },
    /// Two places to listen on.
    #[error("a socket was passed (LISTEN_FDS): --bind, --port and --socket cannot be used with it")]
    PassedAndNamed,
    /// Not exactly one socket was passed.
    #[error("{count} sockets were passed (LISTEN_FDS): one image is served on one socket")]
    PassedSockets {
        /// How many.
        count: usize,
    },
    /// A socket was passed that cannot be listened on.
    #[error("the socket that was passed (LISTEN_FDS) is no TCP or Unix socket that listens")]
    PassedSocket {
        /// What is wrong with it.
        source: std::io::Error,
    },
    /// An address that others can reach.
    #[error("{address} is not loopback: without --tls required an image is served to this machine only")]
    NotLoopback {
        /// The address.
        address: std::net::IpAddr,
    },
    /// TLS cannot be used as asked.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Files for TLS that would not be used.
    #[error("certificates are of no use without --tls on or --tls required")]
    TlsOff,
    /// Client certificates are demanded of those only who choose to encrypt.
    #[error(
        "--tls-client-ca keeps nobody out with --tls on, which lets clients in that do not encrypt: use --tls required"
    )]
    TlsOptional,
    /// The export cannot be served under this name.
    #[error("the image cannot be exported: {reason}")]
    Export {
        /// What is wrong with the name.
        reason: String,
    },
    /// The demo ended before its table.
    #[error(transparent)]
    Demo(#[from] DemoError),
    /// A disk cannot be restored.
    #[error(transparent)]
    Restore(#[from] RestoreCommandError),
    /// A folder cannot be examined, or is of no use for images.
    #[error(transparent)]
    Doctor(#[from] DoctorError),
    /// Standard output is gone or full.
    #[error("standard output cannot be written")]
    Output {
        /// What the system said.
        source: std::io::Error,
    },
    /// Signals cannot be waited for.
    #[error("signals cannot be received")]
    Signals {
        /// What the system said.
        source: std::io::Error,
    },
}

impl CliError {
    /// The exit code of this error.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Config(_)
            | Self::Unreadable { .. }
            | Self::NotJson { .. }
            | Self::NotLoopback { .. }
            | Self::OpenFolder { .. }
            | Self::PassedAndNamed
            | Self::PassedSockets { .. }
            | Self::PassedSocket { .. }
            | Self::TlsOff
            | Self::TlsOptional
            | Self::Export { .. } => Exit::Usage,
            Self::Bind { .. } | Self::WriteProtected { .. } => Exit::Conflict,
            Self::Tls(error) => tls_exit(error),
            Self::Start(StartError::Tls(error)) => tls_exit(error),
            Self::Start(StartError::StateInUse { .. } | StartError::Bind { .. }) | Self::Ambiguous { .. } => {
                Exit::Conflict
            }
            Self::NotFound { .. } => Exit::NotFound,
            Self::BackingRoot { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Exit::NotFound,
            Self::BackingRoot { .. } => Exit::Usage,
            Self::Client(error) => error.exit(),
            Self::Image(error) => error.exit(),
            // 1 is the answer "different", which nobody can give here.
            Self::NotCompared(error) => match error.exit() {
                Exit::Failed => Exit::Usage,
                exit => exit,
            },
            Self::Demo(error) => error.exit(),
            Self::Restore(error) => error.exit(),
            Self::Doctor(error) => error.exit(),
            Self::Start(_)
            | Self::VerificationLost
            | Self::Runtime { .. }
            | Self::Listening { .. }
            | Self::Output { .. }
            | Self::Signals { .. } => Exit::Failed,
        }
    }
}

fn tls_exit(error: &TlsError) -> Exit {
    match error {
        TlsError::Unreadable { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Exit::NotFound,
        _ => Exit::Usage,
    }
}
