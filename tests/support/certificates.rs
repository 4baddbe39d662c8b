//! Certificates as the README makes them.

use std::path::Path;
use std::process::Command;

/// What `openssl` prints of the client's subject in the README.
pub const CLIENT: &str = "CN=backup-client,O=Example";

/// Runs the commands of the README in a folder: an authority, a server and a client.
pub fn make(folder: &Path) {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let (_, behind) = readme.split_once("## Encrypted NBD").unwrap();
    let script = behind.split("```").nth(1).unwrap().strip_prefix("sh\n").unwrap();
    assert!(script.contains("openssl req -x509"), "{script}");
    let mut bash = Command::new("bash");
    let output = bash.args(["-euo", "pipefail", "-c", script]).current_dir(folder).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "is the Debian package openssl installed? {error}");
    assert_eq!(said.trim_end(), format!("subject={CLIENT}"));
}
