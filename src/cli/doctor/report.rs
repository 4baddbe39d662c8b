//! What was found, in words and as a document. `docs/disks.md` tells how to read it.

use std::path::PathBuf;
use std::time::Duration;

use blockyard_qcow2::storage::Way;
use serde_json::{Value, json};

use super::measure::{Rate, Speed};
use super::mount::Mount;
use super::probe::Support;
use crate::cli::size::readable;

/// A disk that has data on stable storage sooner than this has most likely not put it there.
const SYNC_MIN: Duration = Duration::from_micros(20);
/// From here on flushes are what a backup waits for.
const SYNC_MAX: Duration = Duration::from_millis(50);

/// Everything that was found out about a folder.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) folder: PathBuf,
    pub(super) mount: Mount,
    pub(super) support: Support,
    pub(super) speed: Speed,
}

impl Report {
    /// What somebody should know before images are put there.
    fn warnings(&self) -> Vec<String> {
        let (mount, support) = (&self.mount, &self.support);
        let entry = mount.entry.as_ref();
        let is_memory = entry.is_some_and(|entry| entry.is_memory());
        let sync = support.fdatasync;
        let mut warnings = Vec::new();
        let mut warn = |is_so: bool, warning: &str| {
            if is_so {
                warnings.push(warning.to_owned());
            }
        };
        warn(
            entry.is_some_and(|entry| entry.is_network()),
            "a network file system: what a flush promises is what the server keeps",
        );
        warn(is_memory, "a file system in memory: images are gone after a restart of the machine");
        warn(mount.free_bytes < mount.total_bytes / 10, "less than 10 % of the space is free");
        warn(
            sync < SYNC_MIN && !is_memory,
            "fdatasync ends so soon that the disk probably does not wait for stable storage: a power cut may cost what was \
             flushed",
        );
        warn(sync > SYNC_MAX, "fdatasync takes long: so does every flush");
        warn(
            !support.has_fallocate,
            "no fallocate: a full disk is met when data is written, after it was acknowledged",
        );
        warn(!support.has_locks, "locks do not hold: nothing keeps a second program from writing to an image in use");
        warnings
    }

    /// How images are written, and why.
    fn verdict(&self) -> String {
        let mode = &self.speed.mode;
        let why = |error: &dyn std::fmt::Display| error.to_string();
        match (mode.way(), mode.direct.as_ref().map_err(|error| why(error)), mode.ring.map_err(|error| why(&error))) {
            (Way::Direct, _, Err(ring)) => format!(
                "Images here are written around the page cache in pieces of {} and more, smaller ones through it, because \
                 the file system announces direct I/O, but there is no io_uring: {ring}.",
                readable(Way::DIRECT_BYTES_MIN as u64)
            ),
            (Way::PageCache, Err(direct), _) => {
                format!("Images here are written through the page cache because there is no direct I/O: {direct}.")
            }
            _ => {
                "Images here are written around the page cache, many pieces at once, because the file system announces \
                  direct I/O and the system has io_uring."
                    .to_owned()
            }
        }
    }

    /// The fields that `docs/disks.md` names.
    pub(super) fn document(&self) -> Value {
        let (mount, support, mode) = (&self.mount, &self.support, &self.speed.mode);
        let entry = mount.entry.as_ref();
        let rate = |rate: Rate| {
            let seconds = rate.time.as_secs_f64();
            json!({"bytes": rate.bytes, "seconds": seconds, "mib_per_s": rate.mib_per_s()})
        };
        json!({
            "folder": self.folder,
            "file_system": entry.map(|entry| &entry.file_system),
            "device": entry.map(|entry| &entry.device),
            "mount_point": entry.map(|entry| &entry.mount_point),
            "free_bytes": mount.free_bytes,
            "total_bytes": mount.total_bytes,
            "mode": match mode.way() {
                Way::Ring => "ring",
                Way::Direct => "direct",
                Way::PageCache => "page-cache",
            },
            "direct_io": {
                "available": mode.direct.is_ok(),
                "block_bytes": mode.direct.ok().map(|alignment| alignment.block),
                "memory_bytes": mode.direct.ok().map(|alignment| alignment.memory),
                "reason": mode.direct.err().map(|why| why.to_string()),
            },
            "io_uring": {"available": mode.ring.is_ok(), "reason": mode.ring.err().map(|why| why.to_string())},
            "fallocate": support.has_fallocate,
            "punch_hole": support.has_punch,
            "locks": support.has_locks,
            "rename_noreplace": support.has_rename_noreplace,
            "fdatasync_us": u64::try_from(support.fdatasync.as_micros()).unwrap_or(u64::MAX),
            "fdatasyncs": support.syncs,
            "sequential": rate(self.speed.sequential),
            "random": rate(self.speed.random),
            "warnings": self.warnings(),
            "verdict": self.verdict(),
        })
    }

    /// A line for each finding, with what it means.
    pub(super) fn text(&self) -> String {
        let (mount, support, mode) = (&self.mount, &self.support, &self.speed.mode);
        let either = |is_so: bool, yes: &str, no: &str| if is_so { format!("yes: {yes}") } else { format!("no: {no}") };
        let rate = |rate: Rate, piece: &str| {
            let (speed, bytes, time) = (rate.mib_per_s(), readable(rate.bytes), rate.time.as_secs_f64());
            format!("{speed:.1} MiB/s ({bytes} in writes of {piece}, on stable storage after {time:.2} s)")
        };
        let file_system = match &mount.entry {
            Some(entry) => format!("{} on {}, mounted at {}", entry.file_system, entry.device, entry.mount_point),
            None => "unknown: the system does not tell".to_owned(),
        };
        let direct = match mode.direct {
            Ok(alignment) => {
                format!("yes, in multiples of {} bytes: payload is not copied to the page cache", alignment.block)
            }
            Err(why) => format!("no: {why}"),
        };
        let ring = match mode.ring {
            Ok(()) if mode.way() == Way::Ring => "yes: one thread keeps many writes under way".to_owned(),
            Ok(()) => "yes, but of no use without direct I/O".to_owned(),
            Err(why) => format!("no: {why}"),
        };
        let fallocate = either(
            support.has_fallocate,
            "on a full disk a request is refused, and the image stays healthy",
            "a full disk is met when data is written, after it was acknowledged",
        );
        let punch = either(
            support.has_punch,
            "space that no cluster uses is given back at the close",
            "space that no cluster uses stays with the file",
        );
        let locks = either(support.has_locks, "a second writer is kept out", "a second writer is not kept out");
        let rename = either(
            support.has_rename_noreplace,
            "a name is never taken over",
            "a restore point is published by a plain rename, which replaces empty folders only",
        );
        let sync = format!("{:.3} ms, the median of {}", support.fdatasync.as_secs_f64() * 1e3, support.syncs);
        let space = format!("{} free of {}", readable(mount.free_bytes), readable(mount.total_bytes));
        let lines = [
            ("folder", self.folder.display().to_string()),
            ("file system", file_system),
            ("space", space),
            ("direct I/O", direct),
            ("io_uring", ring),
            ("fallocate", fallocate),
            ("hole punching", punch),
            ("locks", locks),
            ("exclusive rename", rename),
            ("fdatasync", sync),
            ("sequential writes", rate(self.speed.sequential, "1 MiB")),
            ("random writes", rate(self.speed.random, "4 KiB")),
        ];
        let mut text: String =
            lines.iter().map(|(name, found)| format!("{:<20}{found}\n", format!("{name}:"))).collect();
        for warning in self.warnings() {
            text += &format!("{:<20}{warning}\n", "warning:");
        }
        text + &self.verdict()
    }
}

#[cfg(test)]
mod tests {
    use blockyard_qcow2::storage::{Alignment, Mode, NoDirect, NoRing};

    use super::*;
    use crate::cli::doctor::mount::Entry;

    const DIRECT: Alignment = Alignment { block: 512, memory: 4 };

    type Weakness = Box<dyn FnOnce(&mut Report)>;

    /// A folder where nothing is to be warned of.
    fn good() -> Report {
        let entry = Entry { file_system: "ext4".into(), device: "/dev/sda1".into(), mount_point: "/srv".into() };
        let rate = Rate { bytes: 64 << 20, time: Duration::from_millis(500) };
        Report {
            folder: "/srv/backups".into(),
            mount: Mount { entry: Some(entry), free_bytes: 50 << 30, total_bytes: 100 << 30 },
            support: Support {
                has_fallocate: true,
                has_punch: true,
                has_locks: true,
                has_rename_noreplace: true,
                fdatasync: Duration::from_millis(1),
                syncs: 20,
            },
            speed: Speed { mode: Mode { direct: Ok(DIRECT), ring: Ok(()) }, sequential: rate, random: rate },
        }
    }

    #[test]
    fn each_mode_has_its_verdict_with_the_reason() {
        let with = |direct, ring| {
            let mut report = good();
            report.speed.mode = Mode { direct, ring };
            (report.document()["mode"].as_str().unwrap().to_owned(), report.verdict())
        };
        let (mode, verdict) = with(Ok(DIRECT), Ok(()));
        assert!(mode == "ring" && verdict.contains("around the page cache, many pieces at once"), "{verdict}");
        let (mode, verdict) = with(Ok(DIRECT), Err(NoRing::Forbidden));
        assert!(
            mode == "direct" && verdict.contains("128.0 KiB") && verdict.contains("io_uring_disabled"),
            "{verdict}"
        );
        let (mode, verdict) = with(Err(NoDirect::NotAnnounced), Ok(()));
        assert!(mode == "page-cache" && verdict.contains("STATX_DIOALIGN"), "{verdict}");
        let (mode, verdict) = with(Err(NoDirect::RefusedLater), Err(NoRing::Missing));
        assert!(mode == "page-cache" && verdict.contains("refused"), "{verdict}");
    }

    #[test]
    fn a_good_folder_has_no_warning_and_each_weakness_has_one() {
        assert_eq!(good().warnings(), Vec::<String>::new());
        let file_system = |name: &str| {
            let name = name.to_owned();
            move |report: &mut Report| report.mount.entry.as_mut().unwrap().file_system = name
        };
        let weaknesses: [(&str, Weakness); 7] = [
            ("network", Box::new(file_system("nfs4"))),
            ("memory", Box::new(file_system("tmpfs"))),
            ("10 %", Box::new(|report| report.mount.free_bytes = 9 << 30)),
            ("so soon", Box::new(|report| report.support.fdatasync = Duration::from_micros(19))),
            ("takes long", Box::new(|report| report.support.fdatasync = Duration::from_millis(51))),
            ("fallocate", Box::new(|report| report.support.has_fallocate = false)),
            ("locks", Box::new(|report| report.support.has_locks = false)),
        ];
        for (word, weaken) in weaknesses {
            let mut report = good();
            weaken(&mut report);
            let warnings = report.warnings();
            assert!(warnings.len() == 1 && warnings[0].contains(word), "{word}: {warnings:?}");
            assert!(report.text().contains("\nwarning:"), "{word}");
        }
    }
}
