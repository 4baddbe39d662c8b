//! Discovery before a job, for VMs of nodes that have `refresh_before_start`: the job is planned on the disks that the VM has
//! now, or not at all.

use tokio::time::Instant;

use super::Shared;
use super::check::find_vm;
use super::start::{StartError, VmChoice, in_progress};
use crate::store::leases::{self, LeaseKind};

/// Refreshes the VM if its node is set so. Nobody waits beyond `deadline`: callers are to be answered by then.
///
/// # Errors
/// The VM cannot be named or is being backed up already, or its disks cannot be known. Nothing was begun.
pub(super) async fn refresh(shared: &Shared, choice: &VmChoice, deadline: Instant) -> Result<(), StartError> {
    let mut connection = shared.store.read().await?;
    let vm = find_vm(&mut connection, choice).await?;
    if !shared.config.nodes.get(&vm.node).is_some_and(|node| node.refresh_before_start) {
        return Ok(());
    }
    // Asked again when the VM is claimed; this saves a caller who cannot have it the time of a discovery. A job that has given the
    // VM back is in nobody's way, whatever it still waits for.
    let holder = match shared.registry.holder(&vm.id) {
        Some(holder) => Some(holder),
        None => leases::holder(&mut connection, LeaseKind::Vm, vm.id.as_str()).await?,
    };
    if let Some(active) = holder {
        return Err(in_progress(shared, &vm, active));
    }
    drop(connection);
    shared.discovery.refresh(&vm.id, Some(deadline.saturating_duration_since(Instant::now()))).await?;
    Ok(())
}
