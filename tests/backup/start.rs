//! Starting.

use crate::rig::{Rig, id_of};

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_three_disks_is_committed_and_restorable() {
    let rig = Rig::new().await;
    let started = rig.start().await;
    let backup = rig.end_of(id_of(&started)).await;
    assert_eq!(backup["state"], "committed", "{backup:#}\n{:#?}", rig.node.log().events());
    assert_eq!(backup["result"], "success", "{backup:#}");
    rig.expect_restorable(id_of(&started)).await;
    rig.expect_nothing_left(1).await;
}
