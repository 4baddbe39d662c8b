//! The disks of a VM as callers describe and see them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::problem::{Code, Problem};
use super::vms::check_text;
use crate::store::vms::{DEVICE_KEY_MAX, DISK_SIZE_MAX, DiskDescription, SECTOR_BYTES, UNIT_MAX, VmDisk};

/// VMware numbers the disks of the first SCSI controller 2000 + unit.
const FIRST_SCSI_KEY: u32 = 2000;

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DiskBody {
    /// VMware's number of the disk.
    #[schema(example = 2000)]
    device_key: Option<u32>,
    /// Unit on the first SCSI controller; gives the key 2000 + unit where `device_key` is not known.
    unit_number: Option<u32>,
    /// Capacity in bytes, a multiple of 512.
    #[schema(example = 42_949_672_960_u64)]
    size_bytes: u64,
    #[schema(example = "[ds1] db/db.vmdk")]
    vmdk_path: Option<String>,
    /// With the device key it says which disk this is; the path does where it is not known.
    vmdk_uuid: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct DiskAnswer {
    /// Our number of the disk; given once, never to another one.
    disk_id: u32,
    device_key: u32,
    unit_number: Option<u32>,
    size_bytes: u64,
    vmdk_path: Option<String>,
    vmdk_uuid: Option<String>,
    /// Whether the VM has it now.
    present: bool,
}

impl From<VmDisk> for DiskAnswer {
    fn from(disk: VmDisk) -> Self {
        Self {
            disk_id: disk.disk_id,
            device_key: disk.device_key,
            unit_number: disk.unit_number,
            size_bytes: disk.size_bytes,
            vmdk_path: disk.vmdk_path,
            vmdk_uuid: disk.vmdk_uuid,
            present: disk.present,
        }
    }
}

/// Checks the disks of one VM. The first fault is answered, with a pointer to it.
pub(super) fn describe(bodies: Vec<DiskBody>) -> Result<Vec<DiskDescription>, Problem> {
    let mut first_with_key = BTreeMap::new();
    let mut disks = Vec::with_capacity(bodies.len());
    for (index, body) in bodies.into_iter().enumerate() {
        let disk = describe_one(index, body)?;
        if let Some(first) = first_with_key.insert(disk.device_key, index) {
            let detail = format!("disks {first} and {index} have the device key {}", disk.device_key);
            return Err(Problem::new(Code::DiskKeyDuplicate, &detail).with_error(format!("/disks/{index}"), detail));
        }
        disks.push(disk);
    }
    Ok(disks)
}

fn describe_one(index: usize, body: DiskBody) -> Result<DiskDescription, Problem> {
    let fault = |code: Code, field: &str, detail: String| {
        Problem::new(code, &detail).with_error(format!("/disks/{index}{field}"), detail)
    };
    if body.unit_number.is_some_and(|unit| unit > UNIT_MAX) {
        return Err(fault(Code::InvalidField, "/unit_number", format!("unit_number must be 0 to {UNIT_MAX}")));
    }
    let device_key = match (body.device_key, body.unit_number) {
        (Some(key), _) if key > DEVICE_KEY_MAX => {
            return Err(fault(Code::InvalidField, "/device_key", format!("device_key must be 1 to {DEVICE_KEY_MAX}")));
        }
        // 0 is what programs send that never learned the key.
        (None | Some(0), None) => {
            return Err(fault(Code::DiskKeyMissing, "", format!("disk {index} needs device_key or unit_number")));
        }
        (None | Some(0), Some(unit)) => FIRST_SCSI_KEY + unit,
        (Some(key), _) => key,
    };
    if body.size_bytes == 0 || body.size_bytes > DISK_SIZE_MAX || !body.size_bytes.is_multiple_of(SECTOR_BYTES) {
        let detail = format!("size_bytes must be above 0 and a multiple of 512, not {}", body.size_bytes);
        return Err(fault(Code::DiskSizeInvalid, "/size_bytes", detail));
    }
    let vmdk_path = body.vmdk_path.filter(|path| !path.is_empty());
    let vmdk_uuid = body.vmdk_uuid.filter(|uuid| !uuid.is_empty());
    for (field, text) in [("vmdk_path", &vmdk_path), ("vmdk_uuid", &vmdk_uuid)] {
        if let Some(text) = text {
            check_text(&format!("/disks/{index}/{field}"), text)?;
        }
    }
    Ok(DiskDescription { device_key, unit_number: body.unit_number, vmdk_uuid, vmdk_path, size_bytes: body.size_bytes })
}
