//! The backup client: copies every disk of one snapshot to the exports it was told, one disk after another.
//!
//! What it does was read from the real one. Per disk: two questions for the change id with number 0, two connections of
//! which one stays idle, a third question with the right number if there may be a delta, then writes and zeroes of up to
//! 32 MiB with one request in flight, hopping between three distant regions, never a flush; telemetry that says `completed`;
//! `/complete` while the connections are open; then the sockets just close.

use std::io;
use std::sync::Arc;

use blockyard_nbd::Durability;
use blockyard_nbd::client::{Client as NbdClient, Uri};

use super::faults::{CompleteFault, PausePoint};
use super::link::{Link, part};
use super::log::{Event, StartCall};
use super::step::{Step, StepFault};
use super::{FakeConfig, FakeDisk, Shared, lock};

/// The regions of a disk that a copy hops between.
const REGIONS: u64 = 3;
/// Where one disk goes.
pub(super) struct Target {
    device_key: u32,
    pub(super) uri: Uri,
    pub(super) disk_id: u32,
}

/// One run of the client.
pub(super) struct Client {
    pub(super) shared: Arc<Shared>,
    pub(super) config: FakeConfig,
    pub(super) call: StartCall,
    /// Bytes of the VM that were sent.
    pub(super) sent_bytes: u64,
    paused: bool,
}

/// Copies the VM of one start call.
pub(super) async fn run(shared: Arc<Shared>, call: StartCall) {
    let mut config = lock(&shared.config).clone();
    if let Some(own) = config.vms.remove(&call.vm_name) {
        config.disks = own;
    }
    let job_id = call.job_id.clone();
    let log_to = Arc::clone(&shared);
    let mut client = Client { shared, config, call, sent_bytes: 0, paused: false };
    let error = client.copy_all().await.err().map(|error| error.to_string());
    log_to.log.push(Event::Ended { job_id, error });
}

impl Client {
    async fn copy_all(&mut self) -> io::Result<()> {
        if self.config.faults.never_connect {
            return Ok(());
        }
        let mut targets = parse_targets(&self.call.nbd_targets, &self.call.job_id)?;
        for tls in targets.iter_mut().filter_map(|target| target.uri.tls.as_mut()) {
            tls.certificates.clone_from(&self.config.certificates);
        }
        if self.config.faults.lie_in_telemetry {
            self.telemetry(Step::Telemetry(0), "completed").await?;
        }
        // In the order of the virtual hardware. A target that is no disk of the VM is never looked at.
        for (index, (key, disk)) in self.config.disks.clone().iter().enumerate() {
            let target = targets.iter().find(|target| target.device_key == *key);
            let target = target.ok_or_else(|| io::Error::other(format!("disk {key} of the snapshot has no target")))?;
            self.copy_disk(index, target, disk).await?;
        }
        if let (true, Some(first)) = (self.config.faults.write_after_complete, targets.first()) {
            let link = NbdClient::connect(&first.uri).await.map_err(io::Error::other)?;
            link.write(0, vec![0xff; 512], Durability::OnFlush).await.map_err(io::Error::other)?;
        }
        Ok(())
    }

    async fn copy_disk(&mut self, index: usize, target: &Target, disk: &FakeDisk) -> io::Result<()> {
        // Is there one at all, and is its epoch that of this disk's snapshot? Both times the real client says disk 0.
        let known = self.change_id(Step::ChangeId(index, 1), 0).await?;
        let compared = self.change_id(Step::ChangeId(index, 2), 0).await?;
        let incremental = !known.is_empty() && epoch(&compared) == epoch(&disk.change_id);
        self.pause_at(PausePoint::BeforeConnect(index)).await;
        let completion = Step::Complete(index);
        if self.config.faults.complete == CompleteFault::BeforeConnect {
            self.complete(completion, target.disk_id, &disk.change_id).await?;
        }
        let mut link = self.connect(index, target).await?;
        self.shared.log.push(Event::Connected { disk_id: target.disk_id });
        let from = match incremental {
            true => self.change_id(Step::ChangeId(index, 3), target.disk_id).await?,
            false => String::new(),
        };
        self.pause_at(PausePoint::Connected(index)).await;
        if self.config.faults.complete == CompleteFault::Early {
            self.complete(completion, target.disk_id, &disk.change_id).await?;
        }
        let ranges = self.ranges(disk, &from);
        let bytes = self.copy(index, &mut link, target, disk, ranges).await?;
        self.shared.log.push(Event::Copied { disk_id: target.disk_id, bytes });
        self.telemetry(Step::Telemetry(index), "completed").await?;
        self.pause_at(PausePoint::BeforeComplete(index)).await;
        self.complete_as_told(completion, target, disk).await?;
        if self.config.faults.leak_connection {
            lock(&self.shared.leaked).push(link.idle);
        }
        Ok(())
    }

    /// What is to be copied, as first byte and end: what changed since `from` where that is known, else the whole disk.
    fn ranges(&self, disk: &FakeDisk, from: &str) -> Vec<(u64, u64)> {
        if let Some(changes) = disk.changes.get(from)
            && epoch(from) == epoch(&disk.change_id)
            && !self.config.faults.full_instead_of_delta
        {
            return changes.iter().map(|(offset, length)| (*offset, offset + length)).collect();
        }
        let mut size = disk.source.size_bytes();
        if self.config.faults.delta_instead_of_full {
            size = size / 2 / 512 * 512;
        }
        // Regions end at whole sectors, the last one at the end of the disk.
        let region = (size / REGIONS).next_multiple_of(512).max(512);
        (0..REGIONS).map(|index| ((index * region).min(size), ((index + 1) * region).min(size))).collect()
    }

    /// A part of each range in turn, until all are copied.
    async fn copy(
        &mut self,
        index: usize,
        link: &mut Link,
        target: &Target,
        disk: &FakeDisk,
        mut positions: Vec<(u64, u64)>,
    ) -> io::Result<u64> {
        let total = positions.iter().map(|(position, end)| end - position).sum();
        let mut copied = 0;
        while positions.iter().any(|(position, end)| position < end) {
            for (position, end) in &mut positions {
                let length = (*end - *position).min(self.config.request_bytes as u64);
                if length == 0 {
                    continue;
                }
                let step = part(copied, length, total).map(|part| Step::Write(index, part));
                self.send(link, target, disk, (*position, length), step).await?;
                *position += length;
                copied += length;
            }
        }
        Ok(copied)
    }

    async fn complete_as_told(&mut self, step: Step, target: &Target, disk: &FakeDisk) -> io::Result<()> {
        match self.config.faults.complete {
            CompleteFault::Never => return Ok(()),
            CompleteFault::Disk(disk_id) => return self.complete(step, disk_id, &disk.change_id).await,
            CompleteFault::None | CompleteFault::Early | CompleteFault::BeforeConnect => {
                self.complete(step, target.disk_id, &disk.change_id).await?;
            }
            CompleteFault::Twice => {
                self.complete(step, target.disk_id, &disk.change_id).await?;
                self.complete(step, target.disk_id, &disk.change_id).await?;
            }
            CompleteFault::OtherChangeId => {
                self.complete(step, target.disk_id, &disk.change_id).await?;
                self.complete(step, target.disk_id, "00 00/0").await?;
            }
        }
        Ok(())
    }

    /// What goes wrong at this step: once.
    pub(super) fn fault_at(&mut self, step: Step) -> Option<StepFault> {
        let found = self.config.faults.step.filter(|(at, _)| *at == step)?;
        self.config.faults.step = None;
        self.shared.log.push(Event::WentWrong { step });
        Some(found.1)
    }

    async fn pause_at(&mut self, point: PausePoint) {
        if self.config.faults.pause == Some(point) {
            self.pause().await;
        }
    }

    /// Waits once; a client that was resumed goes on to its end.
    pub(super) async fn pause(&mut self) {
        if !std::mem::replace(&mut self.paused, true) {
            self.shared.log.push(Event::Paused);
            self.shared.resume.notified().await;
        }
    }
}

/// The part of a change id that names the history it belongs to.
fn epoch(change_id: &str) -> &str {
    change_id.split('/').next().unwrap_or_default()
}

/// Takes the string apart as the real client does: at commas, then at the first colon, then as a URL. A pair that does not
/// parse is dropped without a word, and of two with one key the later wins.
fn parse_targets(targets: &str, job_id: &str) -> io::Result<Vec<Target>> {
    let mut parsed = std::collections::BTreeMap::new();
    for pair in targets.split(',') {
        let Some(target) = parse_target(pair, job_id) else { continue };
        parsed.insert(target.device_key, target);
    }
    if parsed.is_empty() {
        return Err(io::Error::other("there is no target"));
    }
    Ok(parsed.into_values().collect())
}

fn parse_target(pair: &str, job_id: &str) -> Option<Target> {
    let (key, uri) = pair.split_once(':')?;
    let uri: Uri = uri.parse().ok()?;
    let disk_id = disk_number_in_job(job_id).or_else(|| disk_number_at_end(&uri.export)).unwrap_or(0);
    Some(Target { device_key: key.parse().ok()?, uri, disk_id })
}

/// `-disk<digits>-` inside the job id overrides every disk number.
fn disk_number_in_job(job_id: &str) -> Option<u32> {
    let (_, rest) = job_id.split_once("-disk")?;
    rest.split_once('-')?.0.parse().ok()
}

/// `disk(\d+)$`
fn disk_number_at_end(export: &str) -> Option<u32> {
    let digits = export.bytes().rev().take_while(u8::is_ascii_digit).count();
    let (name, number) = export.split_at_checked(export.len() - digits)?;
    name.ends_with("disk").then(|| number.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_taken_apart_as_the_real_client_does() {
        let targets =
            parse_targets("2016:nbd://127.0.0.1:10101/vm-disk1,2000:nbd://127.0.0.1:10100/vm-disk0", "backup-1")
                .unwrap();
        let found: Vec<(u32, u32)> = targets.iter().map(|target| (target.device_key, target.disk_id)).collect();
        assert_eq!(found, [(2000, 0), (2016, 1)]);
        assert_eq!(targets[0].uri, "nbd://127.0.0.1:10100/vm-disk0".parse().unwrap());
        assert!(parse_targets("", "backup-1").is_err());
        assert_eq!(parse_targets("x,2000:nbd://h:1/a-disk7", "backup-1").unwrap().len(), 1);
    }

    #[test]
    fn disk_numbers_come_from_the_end_of_the_export_unless_the_job_id_holds_one() {
        assert_eq!(disk_number_at_end("web-disk2-a-disk11"), Some(11));
        assert_eq!(disk_number_at_end("web-disk2-a"), None);
        assert_eq!(disk_number_in_job("backup-01JD8Z3M6Q9V4T2R7XK5N0WCHB"), None);
        assert_eq!(disk_number_in_job("backup-web-disk2-1"), Some(2));
    }
}
