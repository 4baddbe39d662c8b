//! The commands about backups and points, as the real binary.

use blockyard::node::fake::{Faults, PausePoint};

use crate::rig::Rig;
use crate::support::process::blockyard;

/// Runs a command against the rig's service, away from the threads that serve it.
pub async fn cli(rig: &Rig, arguments: &[&str]) -> (i32, String) {
    let mut command = blockyard();
    command.args(arguments).env("BLOCKYARD_URL", rig.service.service.url());
    command.env("BLOCKYARD_TOKEN_FILE", rig.service.folder.path().join("state/token"));
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap(), format!("{stdout}{stderr}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_are_started_listed_shown_and_cancelled_by_command() {
    let rig = Rig::new().await;
    let start = ["backup", "start", "db-server", "--repository", "main", "--tag", "reason=nightly", "--wait"];
    let (code, text) = cli(&rig, &start).await;
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("committed") && text.contains("success") && text.contains("first_backup"), "{text}");
    let point = rig.points().await.remove(0);
    let id = point["id"].as_str().unwrap();
    assert_eq!(rig.backup(id).await["tags"]["reason"], "nightly");
    for command in [["backup", "show", id], ["point", "show", id]] {
        let (code, text) = cli(&rig, &command).await;
        assert!(code == 0 && text.contains(id), "{text}");
    }
    for command in [["backup", "list"], ["point", "list"]] {
        let (code, text) = cli(&rig, &command).await;
        assert!(code == 0 && text.contains(id), "{text}");
    }
    let (code, text) = cli(&rig, &["backup", "list", "--status", "failed"]).await;
    assert!(code == 0 && !text.contains(id), "{text}");

    rig.node.reconfigure(|config| {
        config.faults = Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
    });
    let (code, text) = cli(&rig, &["backup", "start", &rig.vm, "--repository", "main", "--quiet"]).await;
    assert_eq!((code, text.as_str()), (0, ""));
    let (code, text) = cli(&rig, &["backup", "start", "db-server", "--repository", "main"]).await;
    assert!(code == 5 && text.contains("backup_in_progress"), "{code} {text}");
    let running = rig.service.get("/api/v1/backups?status=running").await.json();
    let running = running["backups"][0]["backup_id"].as_str().unwrap().to_owned();
    let (code, text) = cli(&rig, &["backup", "cancel", &running]).await;
    assert!(code == 0 && text.contains(&running), "{text}");
    assert_eq!(rig.end_of(&running).await["state"], "cancelled");
    rig.expect_nothing_left(1).await;

    for command in [["backup", "show", "x"], ["backup", "cancel", "x"], ["point", "show", "../backups"]] {
        let (code, text) = cli(&rig, &command).await;
        assert!(code == 4 && text.contains("there is no"), "{code} {text}");
    }
    let (code, _) = cli(&rig, &["backup", "start", "nobody", "--repository", "main"]).await;
    assert_eq!(code, 4);
    rig.service.add_repository("empty").await;
    let (code, _) =
        cli(&rig, &["backup", "start", "db-server", "--repository", "empty", "--type", "incremental"]).await;
    assert_eq!(code, 2);
}
