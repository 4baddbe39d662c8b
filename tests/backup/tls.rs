//! Backups through listeners that demand TLS.

use blockyard::node::fake::{Faults, PausePoint};

use crate::rig::{Nbd, Plan, Rig, id_of};
use crate::support::certificates::{self, CLIENT};

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_goes_through_tls_and_by_no_other_way() {
    let folder = tempfile::tempdir().unwrap();
    certificates::make(folder.path());
    let file = |name: &str| folder.path().join(name).display().to_string();
    let toml = format!(
        "[nbd]\ntls = \"required\"\nadvertise_host = \"localhost\"\ncert_file = \"{}\"\nkey_file = \"{}\"\n\
         client_ca_file = \"{}\"\nallow_subjects = [\"{CLIENT}\"]\n",
        file("server-cert.pem"),
        file("server-key.pem"),
        file("ca-cert.pem"),
    );
    let faults = Faults { pause: Some(PausePoint::BeforeConnect(0)), ..Faults::default() };
    let rig = Rig::with(Plan { toml, faults, ..Plan::default() }).await;
    rig.node.reconfigure(|config| config.certificates = Some(folder.path().to_owned()));
    let started = rig.start().await;
    let targets = started["nbd_targets_string"].as_str().unwrap();
    assert!(targets.split(',').all(|target| target.contains(":nbds://localhost:")), "{targets}");
    assert_eq!(rig.backup(id_of(&started)).await["nbd_targets_string"], targets);
    rig.paused().await;
    let plain = format!("nbd://127.0.0.1:{}/db-server-disk0", rig.ports.start());
    let refused = tokio::task::spawn_blocking(move || Nbd::try_connect(&plain).err().unwrap().to_string());
    let refused = refused.await.unwrap();
    assert!(refused.starts_with("0x80000005"), "TLS is required: {refused}");
    rig.node.resume();
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}");
    rig.expect_restorable(id_of(&started)).await;
    rig.expect_nothing_left(1).await;
}
