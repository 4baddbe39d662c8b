//! `blockyard nbd` in a process of its own.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use crate::process::{DEADLINE, blockyard};
use crate::tools::text;

/// A served image. Dropped, it is killed.
pub struct NbdServer {
    child: Child,
    /// As the ready line told it.
    pub uri: String,
}

impl NbdServer {
    /// Serves an image on a free port and waits until clients may come.
    pub fn start(image: &Path, arguments: &[&str]) -> Self {
        let mut command = blockyard();
        command.args(["nbd", text(image)]).args(arguments);
        if !arguments.contains(&"--socket") {
            command.args(["--port", "0"]);
        }
        Self::of(command)
    }

    /// Starts it in this way and waits until clients may come.
    pub fn of(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let Some(uri) = line.strip_prefix("ready ") else {
            let mut error = String::new();
            child.stderr.as_mut().unwrap().read_to_string(&mut error).unwrap();
            panic!("no ready line but {line:?} {error}");
        };
        Self { child, uri: uri.trim_end().to_owned() }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    pub fn wait(mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the server did not end");
            std::thread::yield_now();
        }
    }

    /// What it wrote to standard error until its end.
    pub fn said(mut self) -> String {
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        said
    }

    /// Ends it as a user does; the image must have been closed.
    pub fn stop(self) {
        self.signal("TERM");
        let status = self.wait();
        assert_eq!(status.code(), Some(0));
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
