//! Which disk the backup client means when it asks for the change id of disk 0.
//!
//! It asks twice per disk before it connects and says 0 each time, because it learns the number of a disk from its export.
//! The answer decides whether it copies a delta of that disk or the whole. A wrong guess costs time and never data: it compares
//! the epoch of what it was told with that of the disk it means, and asks again with the right number before it copies a delta.

/// One disk of a running job, as far as the guess goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) disk_id: u32,
    pub(super) device_key: u32,
    /// A connection is open now.
    pub(super) connected: bool,
    pub(super) sealed: bool,
}

/// The disk that is meant by 0, among `disks`; `last_order` is the order in which the VM's disks were copied last time.
pub(super) fn meant_by_zero(disks: &[Progress], last_order: &[u32]) -> Option<u32> {
    let being_copied = |disk: &&Progress| disk.disk_id == 0 && disk.connected && !disk.sealed;
    if let Some(disk) = disks.iter().find(being_copied) {
        return Some(disk.disk_id);
    }
    let place = |disk: &&Progress| {
        let last = last_order.iter().position(|disk_id| *disk_id == disk.disk_id);
        (last.unwrap_or(usize::MAX), disk.device_key)
    };
    disks.iter().filter(|disk| !disk.sealed).min_by_key(place).map(|disk| disk.disk_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks() -> Vec<Progress> {
        let keys = [2016, 2000, 16_000];
        let disk = |(disk_id, device_key)| Progress { disk_id, device_key, connected: false, sealed: false };
        (0..).zip(keys).map(disk).collect()
    }

    #[test]
    fn without_a_last_time_disks_come_in_the_order_of_their_keys() {
        let mut disks = disks();
        for expected in [Some(1), Some(0), Some(2), None] {
            assert_eq!(meant_by_zero(&disks, &[]), expected);
            disks.iter_mut().filter(|disk| Some(disk.disk_id) == expected).for_each(|disk| disk.sealed = true);
        }
    }

    #[test]
    fn the_last_order_wins_and_unknown_disks_come_last() {
        let mut disks = disks();
        assert_eq!(meant_by_zero(&disks, &[7, 2, 0]), Some(2));
        disks[2].sealed = true;
        assert_eq!(meant_by_zero(&disks, &[7, 2, 0]), Some(0));
        disks[0].sealed = true;
        assert_eq!(meant_by_zero(&disks, &[7, 2, 0]), Some(1));
    }

    #[test]
    fn disk_0_means_itself_while_it_is_copied() {
        let mut disks = disks();
        disks[0].connected = true;
        assert_eq!(meant_by_zero(&disks, &[2, 1, 0]), Some(0));
        disks[0].sealed = true;
        assert_eq!(meant_by_zero(&disks, &[2, 1, 0]), Some(2));
    }
}
