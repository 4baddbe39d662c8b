//! A backup client that comes late: its job is over, and the next job of the VM listens. What it was told leads nowhere.

use blockyard::clock::UtcTime;
use blockyard::node::fake::{Event, Faults, PausePoint};
use blockyard_nbd::Durability;
use blockyard_nbd::client::Client;
use serde_json::Value;

use crate::incremental::rig;
use crate::rig::{self, Plan, Rig, content, id_of};
use crate::support::TestService;

fn waiting() -> Faults {
    Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() }
}

/// A rig of one disk and one port, which each job gets, and whose clients wait before they connect.
async fn crowded() -> Rig {
    let disks = vec![(2000, content(1, 300_032))];
    // A hub that is told to stop does not wait for them.
    let toml = "[server]\ndrain_s = 0\n".to_owned();
    Rig::with(Plan { disks, toml, ports: rig::many_free_ports(1), faults: waiting(), ..Plan::default() }).await
}

/// What the client of a job was told.
fn uris(started: &Value) -> Vec<String> {
    let told =
        |disk: &Value| format!("nbd://127.0.0.1:{}/{}", disk["nbd_port"], disk["nbd_export_name"].as_str().unwrap());
    started["disk_results"].as_array().unwrap().iter().map(told).collect()
}

fn names(started: &Value) -> Vec<&str> {
    let disks = started["disk_results"].as_array().unwrap();
    disks.iter().map(|disk| disk["nbd_export_name"].as_str().unwrap()).collect()
}

/// Holds that nobody gets in by what was told before, nor without a name.
async fn expect_refused(rig: &Rig, old: &[String]) {
    let anonymous = rig.ports.clone().map(|port| format!("nbd://127.0.0.1:{port}/"));
    for uri in old.iter().cloned().chain(anonymous) {
        if let Ok(client) = Client::connect(&uri.parse().unwrap()).await {
            let wrote = client.write(0, vec![0xaa; 512], Durability::BeforeReply).await;
            panic!("{uri} leads to a disk; a write to it: {wrote:?}");
        }
    }
}

/// Waits until so many clients stand before their first connection.
async fn when_waiting(rig: &Rig, count: usize) {
    let waiting = async {
        while rig.node.log().events().iter().filter(|event| **event == Event::Paused).count() < count {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(rig::DEADLINE, waiting).await.expect("no client came");
}

/// Lets the client of the first job go on, and that of the second.
fn resume_both(rig: &Rig) {
    (0..2).for_each(|_| rig.node.resume());
}

#[tokio::test(flavor = "multi_thread")]
async fn late_client_of_a_dead_job_finds_no_export_of_the_next_one() {
    let mut rig = crowded().await;
    let first = rig.start().await;
    assert_eq!(names(&first), ["db-server-disk0"]);
    when_waiting(&rig, 1).await;
    rig.cancel(id_of(&first)).await;
    rig.end_of(id_of(&first)).await;

    // What the first client would write is not what the second has to.
    rig.write(&[(2000, 0, content(4, 4096)), (2000, 200_192, content(5, 512))]);
    let second = rig.start().await;
    assert_eq!(second["disk_results"][0]["nbd_port"], first["disk_results"][0]["nbd_port"]);
    let middle = names(&second)[0].strip_prefix("db-server-").unwrap().strip_suffix("-disk0").unwrap();
    assert_eq!(middle.len(), 26, "{second:#}");
    when_waiting(&rig, 2).await;
    expect_refused(&rig, &uris(&first)).await;
    resume_both(&rig);
    let backup = rig.end_of(id_of(&second)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    rig.expect_restorable(id_of(&second)).await;
    rig.expect_nothing_left(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn late_client_of_a_job_that_died_with_its_hub_finds_no_export_of_the_next_one() {
    let rig = crowded().await;
    let first = rig.start().await;
    when_waiting(&rig, 1).await;
    let Rig { service, node, vm, repository, disks, ports } = rig;
    let folder = service.stop().await;
    let toml = rig::configuration(&node.url(), folder.path(), &ports, "");
    let service = TestService::start_in(folder, &toml).await;
    let hub_url = service.service.url();
    node.reconfigure(|config| config.hub_url = hub_url);
    let rig = Rig { service, node, vm, repository, disks, ports };

    let second = rig.start().await;
    when_waiting(&rig, 2).await;
    expect_refused(&rig, &uris(&first)).await;
    resume_both(&rig);
    assert_eq!(rig.end_of(id_of(&second)).await["state"], "committed");
    rig.expect_restorable(id_of(&second)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn late_client_of_a_dead_job_finds_nobody_where_there_are_ports_enough() {
    let rig = rig("").await;
    rig.node.reconfigure(|config| config.faults = waiting());
    let first = rig.start().await;
    rig.cancel(id_of(&first)).await;
    rig.end_of(id_of(&first)).await;
    let second = rig.start().await;
    assert_eq!(names(&first), names(&second), "nobody needs another name");
    for uri in uris(&first) {
        let error = rig::Nbd::try_connect(&uri).map(drop).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{uri}: {error}");
    }
    when_waiting(&rig, 2).await;
    resume_both(&rig);
    assert_eq!(rig.end_of(id_of(&second)).await["state"], "committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_served_on_its_port_again_when_no_client_can_be_that_late() {
    let rig = crowded().await;
    rig.node.reconfigure(|config| config.faults = Faults::default());
    for (hours, is_plain) in [(0, true), (23, false), (25, true)] {
        // As if all that was had ended so long ago.
        let mut transaction = rig.service.service.app().store.write().await.unwrap();
        let update = "UPDATE backups SET completed_at = ?";
        let ended = UtcTime::now().minus_seconds(hours * 3600);
        sqlx::query(update).bind(ended).execute(&mut *transaction).await.unwrap();
        transaction.commit().await.unwrap();
        let started = rig.start().await;
        assert_eq!(names(&started) == ["db-server-disk0"], is_plain, "after {hours} hours: {started:#}");
        assert_eq!(rig.end_of(id_of(&started)).await["state"], "committed");
    }
}
