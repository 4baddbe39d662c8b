//! `qemu-storage-daemon` pushes a backup of a whole disk: the nearest thing to what the service is for.

use serde_json::{Value, json};

use super::{NAME, Place, Target};
use crate::programs::{Dialogue, succeeds};

pub fn backs_up_into_the_export(target: &Target) {
    let source = target.source(4);
    let server = match target.place() {
        Place::Tcp { host, port } => json!({"type": "inet", "host": host, "port": port}),
        Place::Unix(path) => json!({"type": "unix", "path": path}),
    };
    let nodes = [
        json!({"driver": "file", "node-name": "file", "filename": source}),
        json!({"driver": "raw", "node-name": "source", "file": "file"}),
        json!({"driver": "nbd", "node-name": "target", "server": server, "export": NAME}),
    ];
    let nodes = nodes.map(|node| node.to_string());
    let nodes = nodes.iter().flat_map(|node| ["--blockdev", node]);
    let monitor = ["--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor"];
    let line: Vec<&str> = ["qemu-storage-daemon"].into_iter().chain(nodes).chain(monitor).collect();
    let mut daemon = Dialogue::start(&line);
    daemon.hear("QMP");
    let mut ask = |command: Value, until: &str| {
        daemon.say(&command.to_string());
        let heard = daemon.hear(until);
        assert!(!heard.contains("\"error\""), "{command}: {heard}");
    };
    ask(json!({"execute": "qmp_capabilities"}), "return");
    let backup = json!({"job-id": "backup", "device": "source", "target": "target", "sync": "full"});
    ask(json!({"execute": "blockdev-backup", "arguments": backup}), "BLOCK_JOB_COMPLETED");
    ask(json!({"execute": "quit"}), "return");
    assert!(daemon.end().success());
    succeeds(&["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", &source, &target.uri]);
}
