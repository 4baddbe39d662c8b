//! A repository on a mount that hangs: everybody is refused in time, nothing piles up, and other repositories are served.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;

use blockyard::node::fake::{Faults, PausePoint};
use reqwest::Method;
use serde_json::{Value, json};

use crate::privileged::privileged;
use crate::process::{Child, Running};
use crate::rig::{self, id_of};

/// How often each request is repeated while the mount hangs.
const TRIES: usize = 12;
/// Whoever waits for the mount itself has no answer after this.
const ANSWERED: Duration = Duration::from_secs(60);
/// How many threads may have come besides: far below one for each try.
const MORE_THREADS: usize = 24;

/// A file system that never answers, over whatever a folder has, until dropped: the kernel waits for one in user space that nobody
/// serves, as it does for a server that is gone.
struct Hung {
    folder: PathBuf,
    daemon: Option<File>,
}

impl Hung {
    fn over(folder: &Path) -> Self {
        let daemon = File::options().read(true).write(true).open("/dev/fuse").expect("/dev/fuse, as root has it");
        let options = "fd=0,rootmode=40000,user_id=0,group_id=0,allow_other";
        let mut mount = privileged("mount");
        mount.args(["-i", "-t", "fuse", "-o", options, "hung"]).arg(folder);
        let output = mount.stdin(Stdio::from(daemon.try_clone().unwrap())).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "mount (needs root, or sudo without a password): {said}");
        Self { folder: folder.to_owned(), daemon: Some(daemon) }
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        // Everybody who waits is answered with an error.
        drop(self.daemon.take());
        let _ = privileged("umount").arg("-l").arg(&self.folder).status();
    }
}

async fn send(running: &Running, method: &Method, path: &str, body: &Value) -> (u16, String) {
    let url = format!("{}{path}", running.process.url);
    let request = running.http.request(method.clone(), url).bearer_auth(&running.token);
    let request = if *method == Method::GET { request } else { request.json(body) };
    let answer = tokio::time::timeout(ANSWERED, request.send()).await;
    let answer = answer.unwrap_or_else(|_| panic!("{method} {path} is not answered")).unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

fn threads(running: &Running) -> usize {
    std::fs::read_dir(format!("/proc/{}/task", running.process.id())).unwrap().count()
}

async fn back_up(running: &Running, vm: &str, repository: &str) -> Value {
    let body = json!({"vm_context_id": vm, "repository_id": repository, "backup_type": "auto"});
    let started = running.post("/backups/vm", &body).await;
    running.end_of(id_of(&started)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_that_hangs_refuses_everybody_in_time_and_holds_up_nobody_else() {
    let child = Child::with_disks(vec![(2000, rig::content(1, 1 << 20))], Faults::default()).await;
    let running = child.start();
    let vm = child.furnish(&running).await;
    let other = child.folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    running.post("/repositories", &json!({"id": "other", "name": "other", "path": other})).await;
    let first = id_of(&back_up(&running, &vm, "main").await).to_owned();
    let second = id_of(&back_up(&running, &vm, "main").await).to_owned();
    let before = threads(&running);

    let hung = Hung::over(&child.repository());
    let start = json!({"vm_context_id": vm, "repository_id": "main", "backup_type": "auto"});
    let again = json!({"id": "again", "name": "again", "path": child.repository()});
    let unavailable = 503;
    let requests = [
        (Method::POST, "/api/v1/backups/vm".to_owned(), start, unavailable),
        (Method::POST, "/api/v1/repositories/main/check".to_owned(), json!({}), unavailable),
        (Method::POST, "/api/v1/repositories/main/import".to_owned(), json!({}), unavailable),
        (Method::POST, format!("/api/v1/points/{second}/exports"), json!({"disk_id": 0}), unavailable),
        (Method::DELETE, format!("/api/v1/points/{second}"), json!({}), unavailable),
        (Method::GET, format!("/api/v1/points/{second}/compare?with={first}"), json!({}), 200),
        (Method::POST, format!("/api/v1/points/{first}/verify"), json!({}), 202),
        (Method::GET, "/api/v1/repositories/main".to_owned(), json!({}), 200),
        (Method::GET, "/readyz".to_owned(), json!({}), unavailable),
        (Method::POST, "/api/v1/repositories".to_owned(), again, 400),
    ];
    let asked = requests.iter().flat_map(|request| std::iter::repeat_n(request, TRIES));
    let answers = asked.map(|(method, path, body, expected)| {
        let running = &running;
        async move {
            let (status, text) = send(running, method, path, body).await;
            assert_eq!(status, *expected, "{method} {path}: {text}");
        }
    });
    futures_util::future::join_all(answers).await;
    let after = threads(&running);
    assert!(
        after < before + MORE_THREADS,
        "{before} threads before, {after} after {} requests",
        requests.len() * TRIES
    );

    // Nobody else waits for it.
    let backup = back_up(&running, &vm, "other").await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    drop(hung);
    let back = async {
        while send(&running, &Method::GET, "/readyz", &json!({})).await.0 != 200 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(rig::DEADLINE, back).await.expect("not ready again");
    let backup = back_up(&running, &vm, "main").await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_that_hangs_does_not_keep_the_service_from_starting() {
    let pause = Faults { pause: Some(PausePoint::AfterBytes(1 << 19)), ..Faults::default() };
    let child = Child::with_disks(vec![(2000, rig::content(1, 1 << 20))], pause).await;
    let running = child.start();
    let vm = child.furnish(&running).await;
    let other = child.folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    running.post("/repositories", &json!({"id": "other", "name": "other", "path": other})).await;
    let started = running.back_up(&vm).await;
    child.paused().await;
    running.process.signal("KILL");
    running.process.wait();
    child.node.resume();

    let hung = Hung::over(&child.repository());
    let (started_up, in_time) = mpsc::channel();
    let waiting = std::thread::spawn(move || in_time.recv_timeout(ANSWERED).ok().map(|()| hung));
    let running = child.start();
    started_up.send(()).unwrap();
    let hung = waiting.join().unwrap().expect("the start waits for the mount");
    // It cannot have been published, so that its end needs no answer.
    let backup = running.get(&format!("/backups/{}", id_of(&started))).await;
    assert_eq!((&backup["state"], &backup["code"]), (&json!("failed"), &json!("service_restart")), "{backup:#}");
    child.node.reconfigure(|config| config.faults = Faults::default());
    let backup = back_up(&running, &vm, "other").await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    drop(hung);
    assert_eq!(rig::backup_directories(&child.repository()), [format!("{}.partial", id_of(&started))]);
    let back = async {
        let check = "/api/v1/repositories/main/check";
        while send(&running, &Method::POST, check, &json!({})).await.0 != 200 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(rig::DEADLINE, back).await.expect("not usable again");
    assert!(rig::backup_directories(&child.repository()).is_empty(), "what it staged is cleared up");
    let backup = back_up(&running, &vm, "main").await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
}
