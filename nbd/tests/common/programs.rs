//! Programs that others wrote: found, run and bounded in time. A missing one fails its test with the Debian package to
//! install.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Seconds that one program may run: tells done from hung, on the slowest machine.
const LIMIT: &str = "60";

/// Which package brings a program.
fn package(program: &str) -> &str {
    match program {
        "nbdinfo" | "nbdcopy" | "nbdfuse" => "libnbd-bin",
        "nbdsh" => "python3-libnbd",
        "qemu-img" | "qemu-io" | "qemu-nbd" => "qemu-utils",
        "qemu-storage-daemon" => "qemu-utils (in Debian 12: qemu-system-common)",
        "fusermount3" => "fuse3",
        other => other,
    }
}

/// A program of the system under a deadline. Debian's folders come first on its path: a Python of one's own knows no `nbd`
/// module.
fn bounded<S: AsRef<OsStr>>(arguments: &[S]) -> Command {
    let name = arguments[0].as_ref().to_str().unwrap();
    let folders = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
    let found = folders.iter().any(|folder| Path::new(folder).join(name).exists());
    assert!(found, "{name} is missing: apt-get install {}", package(name));
    let search = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("timeout");
    // `timeout` may be asked to end before it knows its child: the child does not survive that.
    command.args(["--kill-after=1", LIMIT, "setpriv", "--pdeathsig", "KILL"]).args(arguments);
    command.env("PATH", format!("/usr/bin:/usr/sbin:{search}")).stdin(Stdio::null());
    command
}

/// Runs a program to its end.
#[track_caller]
pub fn run<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    let output = bounded(arguments).output().unwrap();
    assert_ne!(output.status.code(), Some(124), "{} did not end within {LIMIT} s", line(arguments));
    output
}

/// Runs a program that must succeed, and tells what it wrote.
#[track_caller]
pub fn succeeds<S: AsRef<OsStr>>(arguments: &[S]) -> String {
    let output = run(arguments);
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {}\n{out}\n{error}", line(arguments), output.status);
    out
}

/// Runs a program that must fail, and tells what it complained of.
#[track_caller]
pub fn fails<S: AsRef<OsStr>>(arguments: &[S]) -> String {
    let output = run(arguments);
    assert!(!output.status.success(), "{} succeeded", line(arguments));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn line<S: AsRef<OsStr>>(arguments: &[S]) -> String {
    arguments.iter().map(|argument| argument.as_ref().to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Major and minor version of one of QEMU's programs or of nbdkit.
pub fn version(program: &str) -> (u32, u32) {
    let said = succeeds(&[program, "--version"]);
    let numbers = said.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit())).unwrap();
    let mut numbers = numbers.split('.').map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// A program at work in the background. Dropped, it is ended and waited for.
pub struct Background(Child);

impl Background {
    pub fn start<S: AsRef<OsStr>>(arguments: &[S], configure: impl FnOnce(&mut Command)) -> Self {
        let mut command = bounded(arguments);
        configure(&mut command);
        Self(command.spawn().unwrap())
    }

    /// A server that is handed a listening Unix socket, so that clients may come before it is up. It learns of the socket
    /// as systemd would tell it.
    pub fn server(arguments: &[&str], socket: &str) -> Self {
        // For its message about a missing package.
        drop(bounded(arguments));
        let listener = UnixListener::bind(socket).unwrap();
        let activate = r#"exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@""#;
        let words = [&["sh", "-c", activate, "sh"], arguments].concat();
        Self::start(&words, |command| {
            command.stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(Stdio::null());
        })
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
    }

    /// Waits for its end, which its deadline bounds.
    pub fn wait(mut self) -> ExitStatus {
        self.0.wait().unwrap()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            self.terminate();
            let _ = self.0.wait();
        }
    }
}

/// A program that is talked to, line by line.
pub struct Dialogue {
    program: Background,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Dialogue {
    pub fn start<S: AsRef<OsStr>>(arguments: &[S]) -> Self {
        let mut program = Background::start(arguments, |command| {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        });
        let input = program.0.stdin.take().unwrap();
        let output = BufReader::new(program.0.stdout.take().unwrap());
        Self { program, input, output }
    }

    pub fn say(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    /// Reads up to the first line that holds this, and tells what was read.
    #[track_caller]
    pub fn hear(&mut self, wanted: &str) -> String {
        let mut heard = String::new();
        loop {
            let start = heard.len();
            let more = self.output.read_line(&mut heard).unwrap();
            assert!(more > 0, "it ended without {wanted}: {heard}");
            if heard[start..].contains(wanted) {
                return heard;
            }
        }
    }

    /// Says nothing more and waits for its end.
    pub fn end(self) -> ExitStatus {
        drop(self.input);
        self.program.wait()
    }
}

/// A folder of one test, removed at its end.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("blockyard-foreign-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
