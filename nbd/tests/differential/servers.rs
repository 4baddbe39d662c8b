//! The servers that are compared, each on a Unix socket with the same disk.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use blockyard_nbd::{Exports, Handle, Options, Server};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;

use crate::common::devices::{Disk as Export, Mem};
use crate::common::servers::options;
use crate::conversation::{Player, is_over};
use crate::programs::{Background, Folder};
use crate::script::{DESCRIPTION, Disk, NAME, SIZE, Script};

/// Whose server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ours,
    QemuNbd,
    NbdkitMemory,
    NbdkitFile,
}

/// A server at work; ended when it is dropped.
pub enum Running {
    Ours(Ours),
    Theirs(Theirs),
}

/// Our server.
pub struct Ours {
    pub handle: Handle,
    // After the handle, so that it outlives what runs on it.
    pub runtime: Runtime,
    pub folder: Folder,
}

/// A server in a process of its own.
pub struct Theirs {
    pub process: Background,
    folder: Folder,
}

impl Ours {
    pub fn start(export: Export, options: Options) -> Self {
        let (runtime, folder) = (Runtime::new().unwrap(), Folder::new());
        let exports = Exports::single(Arc::new(export)).unwrap();
        let handle = runtime.block_on(async {
            let listener = UnixListener::bind(folder.file("socket")).unwrap();
            Server::start(listener, exports, options).unwrap()
        });
        Self { handle, runtime, folder }
    }

    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.folder.file("socket")).unwrap()
    }
}

impl Theirs {
    pub fn start(folder: Folder, line: &[&str]) -> Self {
        Self { process: Background::server(line, &folder.file("socket")), folder }
    }

    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.folder.file("socket")).unwrap()
    }
}

impl Running {
    pub fn start(kind: Kind, disk: Disk) -> Self {
        let size = if disk == Disk::Odd { 1000 } else { SIZE };
        let folder = Folder::new();
        let (bytes, file) = (size.to_string(), folder.file("disk.raw"));
        let read_only: &[&str] = if disk == Disk::ReadOnly { &["-r"] } else { &[] };
        let description = format!("exportdesc=fixed:{DESCRIPTION}");
        // With it nbdkit knows one name, as the others do.
        let named = ["exportname=disk0", "default-export=disk0", "exportname-strict=true", "exportname-list=explicit"];
        let nbdkit = |plugin: &[&str]| {
            let named = [&named[..], &[&description]].concat();
            [&["nbdkit", "-f", "--filter=exportname"], read_only, plugin, &named].concat().join("\n")
        };
        let line = match kind {
            Kind::Ours => {
                let mut export = Export::new(NAME, size, Mem::new(size));
                export.read_only = disk == Disk::ReadOnly;
                return Self::Ours(Ours::start(export, options()));
            }
            Kind::QemuNbd => {
                let line = ["qemu-nbd", "-t", "-e", "0", "-A", "-f", "raw", "-x", NAME, "-D", DESCRIPTION];
                [&line[..], read_only, &["--discard=unmap", &file]].concat().join("\n")
            }
            Kind::NbdkitMemory => nbdkit(&["memory", &bytes]),
            Kind::NbdkitFile => nbdkit(&["file", &file]),
        };
        std::fs::File::create(&file).unwrap().set_len(size).unwrap();
        Self::Theirs(Theirs::start(folder, &line.split('\n').collect::<Vec<_>>()))
    }

    /// Holds a conversation; `None` if it has nothing to tell about this server.
    pub fn play(&self, script: &Script) -> Option<Vec<String>> {
        let stream = match self {
            Self::Ours(server) => server.connect(),
            Self::Theirs(server) => server.connect(),
        };
        let mut player = Player::new(stream);
        let mut lines = Vec::new();
        for step in &script.steps {
            lines.push(player.step(step, script.facts));
            if lines.last().is_some_and(|line| is_over(line)) {
                break;
            }
        }
        (player.extended() || !script.extended).then_some(lines)
    }
}

/// A read that does not wait: how many bytes were there, or why not.
pub fn glance(stream: &mut UnixStream) -> io::Result<usize> {
    stream.set_nonblocking(true)?;
    let read = io::Read::read(stream, &mut [0; 18]);
    stream.set_nonblocking(false)?;
    read
}
