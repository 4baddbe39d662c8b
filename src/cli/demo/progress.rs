//! How far each disk is: bars on a terminal, a line per finished disk elsewhere, nothing when nobody wants to know.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};

use crate::cli::Output;
use crate::cli::size::readable;

const BAR: &str = "{prefix} {bar:32} {percent:>3}% {binary_bytes:>10} {binary_bytes_per_sec:>12}";

/// The progress of one step over all disks.
#[derive(Debug)]
pub(super) struct Progress {
    output: Output,
    disks: Vec<DiskProgress>,
}

#[derive(Debug)]
struct DiskProgress {
    name: String,
    expected_bytes: u64,
    done: AtomicBool,
    /// On a terminal.
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Nothing done yet of so many bytes of each disk. `step` is a verb.
    pub(super) fn new(step: &str, bytes: &[u64], output: &Output) -> Self {
        let bars = (output.has_notes() && std::io::stderr().is_terminal())
            .then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        // A template that cannot be read would fail every run on a terminal; the plain style does as well.
        let style = ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar());
        let disks = bytes.iter().enumerate().map(|(index, &expected_bytes)| {
            let name = format!("{step} disk {index}");
            let bar = bars.as_ref().map(|bars| {
                let bar = ProgressBar::new(expected_bytes).with_finish(ProgressFinish::Abandon);
                bars.add(bar.with_style(style.clone()).with_prefix(name.clone()))
            });
            DiskProgress { name, expected_bytes, done: AtomicBool::new(false), bar }
        });
        Self { output: *output, disks: disks.collect() }
    }

    /// So many bytes of a disk are done.
    pub(super) fn set(&self, disk: usize, bytes: u64) {
        let Some(disk) = self.disks.get(disk) else { return };
        if let Some(bar) = &disk.bar {
            bar.set_position(bytes);
        }
        if bytes >= disk.expected_bytes && !disk.done.swap(true, Ordering::Relaxed) {
            match &disk.bar {
                Some(bar) => bar.finish(),
                None => self.output.note(&format!("{}: {}", disk.name, readable(bytes))),
            }
        }
    }
}
