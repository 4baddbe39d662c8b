//! VMs and repositories over REST: exact bodies, bad input, disk numbers, paging.

use serde_json::json;

use crate::support::TestService;

#[tokio::test]
async fn a_vm_is_added_and_answered_as_the_contract_says() {
    let service = TestService::start().await;
    let body = json!({"name": "db-server", "vcenter_host": "vc.example", "path": "/DC1/vm/prod/db-server", "uuid": "4213", "node": "default",
        "disks": [{"device_key": 2000, "size_bytes": 42_949_672_960_u64, "vmdk_path": "[ds1] db/db.vmdk", "vmdk_uuid": "6000C29"},
                  {"unit_number": 1, "size_bytes": 214_748_364_800_u64, "vmdk_path": "[ds1] db/db_1.vmdk"}]});
    service.post("/api/v1/vms", &body).await.expect_status(201);
}
