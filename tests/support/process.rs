//! The real binary as a child process.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a condition may take to come true. Never a measure of speed: the machine may be busy.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// `blockyard serve` in a process of its own. Dropped, it is killed.
pub struct ServeProcess {
    child: Child,
    /// Base URL, as the ready line told it.
    pub url: String,
}

/// The binary of this build, with an environment that no shell of the developer reaches.
pub fn blockyard() -> Command {
    undisturbed(Command::new(env!("CARGO_BIN_EXE_blockyard")))
}

/// The same under a program that is given these arguments before it.
pub fn blockyard_under(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).arg(env!("CARGO_BIN_EXE_blockyard"));
    undisturbed(command)
}

fn undisturbed(mut command: Command) -> Command {
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("BLOCKYARD")) {
        command.env_remove(name);
    }
    command
}

impl ServeProcess {
    /// Starts the service on a free port with its state in `folder` and waits for its ready line.
    pub fn start(folder: &Path, configure: impl FnOnce(&mut Command)) -> Self {
        Self::start_as(blockyard(), folder, configure)
    }

    /// The same by this command, which is the binary or becomes it.
    pub fn start_as(mut command: Command, folder: &Path, configure: impl FnOnce(&mut Command)) -> Self {
        command
            .arg("serve")
            .env("BLOCKYARD__SERVER__BIND", "127.0.0.1:0")
            .env("BLOCKYARD__SERVER__STATE_DIR", folder.join("state"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::OpenOptions::new().create(true).append(true).open(folder.join("log")).unwrap());
        configure(&mut command);
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let url = line.strip_prefix("ready ").and_then(|rest| rest.split_whitespace().next());
        let url = url.unwrap_or_else(|| panic!("no ready line but {line:?}")).to_owned();
        Self { child, url }
    }

    /// Everything that it logged so far.
    pub fn log(folder: &Path) -> String {
        let mut text = String::new();
        std::fs::File::open(folder.join("log")).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by its name, such as TERM.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Sends a signal by its name unless the process has ended.
    pub fn signal_if_alive(&self, name: &str) {
        let pid = self.child.id().to_string();
        // Not waited for yet, so the number is still its own; one that has ended just does not listen.
        let _ = Command::new("kill").args(["-s", name, &pid]).stderr(Stdio::null()).status();
    }

    /// Waits for its end.
    pub fn wait(mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the service did not end");
            std::thread::yield_now();
        }
    }
}

impl Drop for ServeProcess {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
