//! The backup client: copies every disk of one snapshot to the exports it was told, one disk after another.
//!
//! What it does was read from the real one. Per disk: two questions for the change id with number 0, two connections of
//! which one stays idle, a third question with the right number if there may be a delta, then writes and zeroes of up to
//! 32 MiB with one request in flight, hopping between three distant regions, never a flush; telemetry that says `completed`;
//! `/complete` while the connections are open; then the sockets just close.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use blockyard_nbd::client::{Client as NbdClient, Uri};
use blockyard_nbd::{Durability, ZeroFlags};
use bytes::Bytes;
use serde_json::json;

use super::faults::{CompleteFault, PausePoint};
use super::log::{Event, StartCall};
use super::{FakeConfig, FakeDisk, Shared, lock};

/// The regions of a disk that a copy hops between.
const REGIONS: u64 = 3;
/// How often a failed request is sent on the same socket, and the pauses in between: 1, 2 and 4 of these.
const ATTEMPTS: u32 = 4;
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// Where one disk goes.
struct Target {
    device_key: u32,
    uri: Uri,
    disk_id: u32,
}

/// One run of the client.
struct Client {
    shared: Arc<Shared>,
    config: FakeConfig,
    call: StartCall,
    /// Bytes of the VM that were sent.
    sent_bytes: u64,
    paused: bool,
}

/// Copies the VM of one start call.
pub(super) async fn run(shared: Arc<Shared>, call: StartCall) {
    let config = lock(&shared.config).clone();
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
        // The order of the virtual hardware.
        targets.sort_by_key(|target| target.device_key);
        if self.config.faults.lie_in_telemetry {
            self.telemetry("completed").await?;
        }
        for (index, target) in targets.iter().enumerate() {
            let disk = self.config.disks.get(&target.device_key).cloned().ok_or_else(|| {
                io::Error::other(format!("disk {} of the targets is not in the snapshot", target.device_key))
            })?;
            self.copy_disk(index, target, &disk).await?;
        }
        if self.config.disks.len() != targets.len() {
            return Err(io::Error::other("a disk of the snapshot has no target"));
        }
        if let (true, Some(first)) = (self.config.faults.write_after_complete, targets.first()) {
            let link = NbdClient::connect(&first.uri).await.map_err(io::Error::other)?;
            link.write(0, vec![0xff; 512], Durability::OnFlush).await.map_err(io::Error::other)?;
        }
        Ok(())
    }

    async fn copy_disk(&mut self, index: usize, target: &Target, disk: &FakeDisk) -> io::Result<()> {
        // Is there one at all, and is its epoch that of this disk's snapshot? Both times the real client says disk 0.
        let known = self.change_id(0).await?;
        let compared = self.change_id(0).await?;
        let incremental = !known.is_empty() && epoch(&compared) == epoch(&disk.change_id);
        self.pause_at(PausePoint::BeforeConnect(index)).await;
        if self.config.faults.complete == CompleteFault::BeforeConnect {
            self.complete(target.disk_id, &disk.change_id).await?;
        }
        let link = NbdClient::connect(&target.uri).await.map_err(io::Error::other)?;
        let idle = NbdClient::connect(&target.uri).await.map_err(io::Error::other)?;
        self.shared.log.push(Event::Connected { disk_id: target.disk_id });
        let from = if incremental { self.change_id(target.disk_id).await? } else { String::new() };
        self.pause_at(PausePoint::Connected(index)).await;
        if self.config.faults.complete == CompleteFault::Early {
            self.complete(target.disk_id, &disk.change_id).await?;
        }
        let ranges = self.ranges(disk, &from);
        let bytes = self.copy(&link, target, disk, ranges).await?;
        self.shared.log.push(Event::Copied { disk_id: target.disk_id, bytes });
        self.telemetry("completed").await?;
        self.pause_at(PausePoint::BeforeComplete(index)).await;
        self.complete_as_told(target, disk).await?;
        if self.config.faults.leak_connection {
            lock(&self.shared.leaked).push(idle);
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
        link: &NbdClient,
        target: &Target,
        disk: &FakeDisk,
        mut positions: Vec<(u64, u64)>,
    ) -> io::Result<u64> {
        let mut copied = 0;
        while positions.iter().any(|(position, end)| position < end) {
            for (position, end) in &mut positions {
                let length = (*end - *position).min(self.config.request_bytes as u64);
                if length == 0 {
                    continue;
                }
                self.send(link, target, disk, *position, length).await?;
                *position += length;
                copied += length;
            }
        }
        Ok(copied)
    }

    async fn send(
        &mut self,
        link: &NbdClient,
        target: &Target,
        disk: &FakeDisk,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        if let Some(PausePoint::AfterBytes(bytes)) = self.config.faults.pause
            && self.sent_bytes >= bytes
        {
            self.pause().await;
        }
        if self.config.faults.die_after_bytes.is_some_and(|bytes| self.sent_bytes >= bytes) {
            return Err(io::Error::other("the client died"));
        }
        let request = u32::try_from(length).map_err(io::Error::other)?;
        let data = Bytes::from(disk.source.read(offset, request as usize).await?);
        let zero = if self.config.faults.sampled_zeroes { sampled_zero(&data) } else { is_zero(&data) };
        let mut pause = RETRY_PAUSE;
        for attempt in 1..=ATTEMPTS {
            let sent = if zero {
                link.zero(offset, length, ZeroFlags::default(), Durability::OnFlush).await
            } else {
                link.write(offset, data.clone(), Durability::OnFlush).await
            };
            match sent {
                Ok(()) => break,
                Err(error) => {
                    let failed = Event::WriteFailed { disk_id: target.disk_id, error: error.to_string() };
                    self.shared.log.push(failed);
                    if attempt == ATTEMPTS {
                        return Err(io::Error::other(error));
                    }
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
            }
        }
        self.sent_bytes += length;
        Ok(())
    }

    async fn complete_as_told(&mut self, target: &Target, disk: &FakeDisk) -> io::Result<()> {
        match self.config.faults.complete {
            CompleteFault::Never => return Ok(()),
            CompleteFault::Disk(disk_id) => return self.complete(disk_id, &disk.change_id).await,
            CompleteFault::None | CompleteFault::Early | CompleteFault::BeforeConnect => {
                self.complete(target.disk_id, &disk.change_id).await?;
            }
            CompleteFault::Twice => {
                self.complete(target.disk_id, &disk.change_id).await?;
                self.complete(target.disk_id, &disk.change_id).await?;
            }
            CompleteFault::OtherChangeId => {
                self.complete(target.disk_id, &disk.change_id).await?;
                self.complete(target.disk_id, "00 00/0").await?;
            }
        }
        Ok(())
    }

    async fn change_id(&self, disk_id: u32) -> io::Result<String> {
        let url = format!("{}/api/v1/backups/changeid", self.config.hub_url);
        let name = self.call.vm_path.rsplit('/').next().unwrap_or_default();
        let request = self.shared.http.get(url).query(&[("vm_name", name), ("disk_id", &disk_id.to_string())]);
        let answer = request.send().await.map_err(io::Error::other)?;
        // Anything but 200 and one flat object of strings means that there is none.
        let flat = answer.json::<std::collections::BTreeMap<String, String>>().await.unwrap_or_default();
        let change_id = flat.get("change_id").cloned().unwrap_or_default();
        self.shared.log.push(Event::ChangeId { disk_id, change_id: change_id.clone() });
        Ok(change_id)
    }

    /// Any status but 200 ends the client's work.
    async fn complete(&self, disk_id: u32, change_id: &str) -> io::Result<()> {
        let url = format!("{}/api/v1/backups/{}/complete", self.config.hub_url, self.call.job_id);
        let body = json!({"change_id": change_id, "disk_id": disk_id, "bytes_transferred": 0});
        let answer = self.shared.http.post(url).json(&body).send().await.map_err(io::Error::other)?;
        let status = answer.status().as_u16();
        let body = answer.text().await.map_err(io::Error::other)?;
        self.shared.log.push(Event::Completed { disk_id, status, body });
        if status == 200 { Ok(()) } else { Err(io::Error::other(format!("/complete was answered {status}"))) }
    }

    async fn telemetry(&self, word: &str) -> io::Result<()> {
        let url = format!("{}/api/v1/telemetry/backup/{}", self.config.hub_url, self.call.job_id);
        let total: u64 = self.config.disks.values().map(|disk| disk.source.size_bytes()).sum();
        let body = json!({
            "job_id": self.call.job_id, "job_type": "backup", "status": word, "current_phase": "transferring",
            "bytes_transferred": self.sent_bytes, "total_bytes": total, "transfer_speed_bps": 0, "eta_seconds": 0,
            "progress_percent": 100.0, "disks": [], "timestamp": crate::clock::UtcTime::now(),
        });
        let answer = self.shared.http.post(url).json(&body).send().await.map_err(io::Error::other)?;
        let status = answer.status().as_u16();
        self.shared.log.push(Event::Telemetry { sent: word.to_owned(), status });
        Ok(())
    }

    async fn pause_at(&mut self, point: PausePoint) {
        if self.config.faults.pause == Some(point) {
            self.pause().await;
        }
    }

    /// Waits once; a client that was resumed goes on to its end.
    async fn pause(&mut self) {
        if !std::mem::replace(&mut self.paused, true) {
            self.shared.log.push(Event::Paused);
            self.shared.resume.notified().await;
        }
    }
}

fn is_zero(data: &[u8]) -> bool {
    data.iter().all(|&byte| byte == 0)
}

/// A large chunk judged by its beginning, its quarters and its end.
fn sampled_zero(data: &[u8]) -> bool {
    const SAMPLED: usize = 4 << 20;
    const SAMPLE: usize = 8 << 10;
    if data.len() < SAMPLED {
        return is_zero(data);
    }
    let last = data.len() - SAMPLE;
    (0..=4).all(|quarter| data.get(last / 4 * quarter..).is_some_and(|rest| is_zero(&rest[..SAMPLE.min(rest.len())])))
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
