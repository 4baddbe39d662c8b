//! Repositories that are not there when the service starts: what waits for them, what is held for them meanwhile, and what is
//! done before anything uses them.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use blockyard::node::fake::FakeNode;

use crate::process::sqlite;
use crate::rig::{self, Rig, id_of};
use crate::support::TestService;

/// What a rig has beside its service.
struct Rest {
    node: FakeNode,
    vm: String,
    repository: PathBuf,
    disks: Vec<(u32, Vec<u8>)>,
    ports: RangeInclusive<u16>,
}

async fn stop(rig: Rig) -> (tempfile::TempDir, Rest) {
    let Rig { service, node, vm, repository, disks, ports } = rig;
    (service.stop().await, Rest { node, vm, repository, disks, ports })
}

async fn start(folder: tempfile::TempDir, rest: Rest) -> Rig {
    let Rest { node, vm, repository, disks, ports } = rest;
    let toml = rig::configuration(&node.url(), folder.path(), &ports, "");
    let service = TestService::start_in(folder, &toml).await;
    let hub_url = service.service.url();
    node.reconfigure(|config| config.hub_url = hub_url);
    Rig { service, node, vm, repository, disks, ports }
}

fn away(repository: &Path) -> PathBuf {
    repository.with_extension("away")
}

fn unmount(repository: &Path) {
    std::fs::rename(repository, away(repository)).unwrap();
}

fn mount(repository: &Path) {
    std::fs::rename(away(repository), repository).unwrap();
}

fn database(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("state/blockyard.db")
}

/// Takes the last transaction of a job back, as a crash between the rename and it does.
async fn unrecord(folder: &tempfile::TempDir, vm: &str, id: &str, parent: &str) {
    let undo = format!(
        "DELETE FROM point_disks WHERE point_id = '{id}'; DELETE FROM restore_points WHERE id = '{id}'; \
         UPDATE backups SET state = 'committing', result = 'none', completed_at = NULL WHERE id = '{id}'; \
         INSERT INTO leases (kind, key, owner, boot_id) VALUES ('vm', '{vm}', '{id}', 'a dead boot'), \
         ('pin', '{parent}', '{id}', 'a dead boot');"
    );
    sqlite(&database(folder), &undo).await;
}

async fn delete(rig: &Rig, id: &str) -> crate::support::Answer {
    crate::support::send(rig.service.request(reqwest::Method::DELETE, &format!("/api/v1/points/{id}"))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_waiting_commit_builds_upon_stays_until_its_repository_is_back() {
    let rig = Rig::new().await;
    let full = id_of(&rig.back_up().await).to_owned();
    let incremental = id_of(&rig.back_up().await).to_owned();
    let (folder, rest) = stop(rig).await;
    unrecord(&folder, &rest.vm, &incremental, &full).await;
    unmount(&rest.repository);
    let rig = start(folder, rest).await;
    assert_eq!(rig.backup(&incremental).await["state"], "committing");
    let refused = delete(&rig, &full).await.expect_problem(409, "point_in_use");
    assert!(refused.to_string().contains(&incremental), "{refused:#}");
    let (folder, rest) = stop(rig).await;
    mount(&rest.repository);
    let rig = start(folder, rest).await;
    assert_eq!(rig.backup(&incremental).await["state"], "committed");
    rig.expect_restorable(&incremental).await;
    rig.expect_nothing_left_and_a_backup_works(2).await;
}
