//! The figures of the service as Prometheus reads them. Nothing is counted here: each scrape reads the counters where they
//! are kept.
//!
//! Names begin with `blockyard_`; labels are only `op`, `kind`, `code` and `state`, whose values are lists of this program.
//! Names of exports, VMs and peers are never among them: there is no end to those. `docs/metrics.md` describes each metric
//! and a test holds the two equal.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use blockyard_nbd::ErrorKind;
use blockyard_nbd::budget::Usage;
use blockyard_nbd::stats::{Latency, Operation};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::app::App;
use crate::listeners::live::Totals;
use crate::points::verification::Outcome;
use crate::points::verify;
use crate::restore::Restored;
use crate::words::JobState;
use crate::words::point::Trust;

pub use prometheus_text::CONTENT_TYPE;

/// Everything that is told, in the text format 0.0.4; `trust` is how many points have which.
///
/// # Errors
/// The library refuses to write, which it has no reason to.
pub fn text(app: &App, trust: &[(Trust, u64)]) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("blockyard");
    registry.register_collector(Box::new(Scrape::of(app, trust)));
    let mut text = String::new();
    prometheus_text::encode(&mut text, &registry)?;
    Ok(text)
}

/// All figures at one moment.
#[derive(Debug)]
struct Scrape {
    nbd: Totals,
    exports: usize,
    usage: Usage,
    ports_leased: usize,
    ports: usize,
    restore_exports: usize,
    restored: Restored,
    jobs: BTreeMap<JobState, u64>,
    jobs_ended: BTreeMap<JobState, u64>,
    verifications: verify::Totals,
    trust: Vec<(Trust, u64)>,
}

impl Scrape {
    fn of(app: &App, trust: &[(Trust, u64)]) -> Self {
        let mut jobs = BTreeMap::new();
        for job in app.backups.running() {
            *jobs.entry(job.view().state).or_default() += 1;
        }
        Self {
            exports: app.listeners.live().all().len(),
            nbd: app.listeners.live().totals(),
            usage: app.listeners.usage(),
            ports_leased: app.backups.leased_ports().len() + app.restores.leased_ports().len(),
            ports: app.config.all_ports().len(),
            restore_exports: app.restores.all().len(),
            restored: app.restores.restored(),
            jobs,
            jobs_ended: app.backups.ended(),
            verifications: app.points.verification_totals(),
            trust: trust.to_vec(),
        }
    }
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        self.encode_requests(&mut page)?;
        self.encode_connections(&mut page)?;
        self.encode_payload(&mut page)?;
        self.encode_jobs(&mut page)?;
        self.encode_points(&mut page)?;
        self.encode_restores(&mut page)
    }
}

impl Scrape {
    fn encode_requests(&self, page: &mut Page<'_>) -> fmt::Result {
        let counts = &self.nbd.exports.counts;
        let latency = Operation::ALL.map(|operation| (operation.name(), counts.latency_of(operation)));
        page.histograms(
            "nbd_request_duration_seconds",
            "NBD requests that are over, by command: from the header to the last byte of the reply",
            "op",
            latency,
        )?;
        page.gauge("nbd_requests_in_flight", "NBD requests received and not over", counts.in_flight())?;
        page.counters(
            "nbd_bytes",
            "Bytes read for clients, and bytes that exports took as written, zeroed or trimmed",
            "kind",
            [
                ("read", counts.bytes_read),
                ("written", counts.bytes_written),
                ("zeroed", counts.bytes_zeroed),
                ("trimmed", counts.bytes_trimmed),
            ],
        )?;
        page.counters(
            "nbd_errors",
            "NBD requests answered with an error, by its name",
            "code",
            ErrorKind::ALL.map(|kind| (kind.name(), counts.errors_of(kind))),
        )?;
        page.counter("nbd_extents", "Extents told in answer to BLOCK_STATUS", counts.extents)?;
        page.counter(
            "nbd_writes_without_payload_flag",
            "WRITEs with an extended header that lacked the flag PAYLOAD_LEN; it is done without",
            counts.writes_without_payload_flag,
        )
    }

    fn encode_connections(&self, page: &mut Page<'_>) -> fmt::Result {
        let Totals { exports, listeners } = &self.nbd;
        page.gauge("nbd_exports", "Exports that are served", size(self.exports))?;
        let (sockets, limit) = (self.usage.connections, self.usage.max_connections);
        page.gauge("nbd_sockets", "Connections of all listeners, those in the handshake included", size(sockets))?;
        page.gauge(
            "nbd_sockets_limit",
            "The most connections of all listeners that there may be; beyond it clients are refused",
            size(limit),
        )?;
        page.gauge("nbd_connections", "Connections that have an export open", exports.connections)?;
        page.counter("nbd_connections_accepted", "Connections that a listener took", listeners.accepted)?;
        page.counter("nbd_connections_opened", "Connections that got as far as an open export", exports.accepted)?;
        page.counters(
            "nbd_connections_refused",
            "Refusals of connections because there were enough: of the export, of the process, \
             and of the process without being told why",
            "kind",
            [("export", exports.refused), ("process", listeners.refused), ("untold", listeners.dropped)],
        )?;
        page.counter(
            "nbd_connections_stalled",
            "Connections closed because the client stopped in the middle of a message or did not collect its replies",
            exports.stalled,
        )?;
        page.counters(
            "nbd_handshakes_closed",
            "Handshakes closed: timed out, evicted because too many were under way, or rejected because the client \
             broke a rule, those of TLS and certificates included",
            "kind",
            [("timed_out", listeners.timed_out), ("evicted", listeners.evicted), ("rejected", listeners.rejected)],
        )
    }

    fn encode_payload(&self, page: &mut Page<'_>) -> fmt::Result {
        let Usage { input, output, input_peak, output_peak, limit, .. } = self.usage;
        let kind = "kind";
        page.gauges(
            "nbd_payload_bytes",
            "NBD payload in memory: write for data on their way to an image, read for data on their way to a client",
            kind,
            [("write", input), ("read", output)],
        )?;
        page.gauges(
            "nbd_payload_peak_bytes",
            "The most NBD payload that ever was in memory at once",
            kind,
            [("write", input_peak), ("read", output_peak)],
        )?;
        page.gauges(
            "nbd_payload_limit_bytes",
            "The most NBD payload that may be in memory; beyond it clients wait",
            kind,
            [("write", limit), ("read", limit)],
        )
    }

    fn encode_restores(&self, page: &mut Page<'_>) -> fmt::Result {
        page.gauge("restore_exports", "Exports of restore points that are open", size(self.restore_exports))?;
        page.counters(
            "restored_bytes",
            "Bytes read from restore points, zeroes and holes included: through exports, and by raw downloads",
            "kind",
            [("export", self.restored.export_bytes), ("raw", self.restored.raw_bytes)],
        )
    }

    fn encode_jobs(&self, page: &mut Page<'_>) -> fmt::Result {
        page.gauge("ports_leased", "Ports that listeners of this service have", size(self.ports_leased))?;
        page.gauge("ports", "Ports in all configured ranges together", size(self.ports))?;
        let of = |jobs: &BTreeMap<JobState, u64>, state: JobState| jobs.get(&state).copied().unwrap_or(0);
        let states = |terminal: bool| JobState::ALL.iter().filter(move |state| state.is_terminal() == terminal);
        page.gauges(
            "jobs",
            "Backup jobs that are not over, by state",
            "state",
            states(false).map(|state| (state.as_str(), of(&self.jobs, *state))),
        )?;
        page.counters(
            "jobs_ended",
            "Backup jobs that ran in this process and are over, by their last state",
            "state",
            states(true).map(|state| (state.as_str(), of(&self.jobs_ended, *state))),
        )
    }

    fn encode_points(&self, page: &mut Page<'_>) -> fmt::Result {
        let verify::Totals { outcomes, time, bytes } = &self.verifications;
        page.counters(
            "verifications",
            "Verifications that are over, by what came of the worst of their points",
            "state",
            Outcome::ALL.iter().map(|outcome| (outcome.as_str(), outcomes.get(outcome).copied().unwrap_or(0))),
        )?;
        page.seconds("verification_seconds", "Time that verifications took, without waiting for their turn", *time)?;
        page.counter("verification_bytes", "Bytes that verifications hashed, of files and of virtual disks", *bytes)?;
        let of = |trust| self.trust.iter().find(|(of, _)| *of == trust).map_or(0, |(_, points)| *points);
        page.gauges(
            "points",
            "Restore points that are there, by what is known of their content",
            "state",
            Trust::ALL.iter().map(|trust| (trust.as_str(), of(*trust))),
        )
    }
}

fn size(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

/// What is written, metric by metric.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn metric<'s>(&'s mut self, name: &'s str, help: &str, kind: MetricType) -> Result<MetricEncoder<'s>, fmt::Error> {
        self.0.encode_descriptor(name, help, None, kind)
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.metric(name, help, MetricType::Gauge)?.encode_gauge(&value)
    }

    fn gauges(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = (&'static str, u64)>,
    ) -> fmt::Result {
        let mut metric = self.metric(name, help, MetricType::Gauge)?;
        values.into_iter().try_for_each(|(of, value)| metric.encode_family(&[(label, of)])?.encode_gauge(&value))
    }

    /// The name is written with `_total` behind it.
    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.metric(name, help, MetricType::Counter)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    /// A counter of seconds, which has fractions.
    fn seconds(&mut self, name: &str, help: &str, time: Duration) -> fmt::Result {
        self.metric(name, help, MetricType::Counter)?.encode_counter::<NoLabelSet, _, u64>(&time.as_secs_f64(), None)
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = (&'static str, u64)>,
    ) -> fmt::Result {
        let mut metric = self.metric(name, help, MetricType::Counter)?;
        values.into_iter().try_for_each(|(of, value)| {
            metric.encode_family(&[(label, of)])?.encode_counter::<NoLabelSet, _, u64>(&value, None)
        })
    }

    fn histograms<'l>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = (&'static str, &'l Latency)>,
    ) -> fmt::Result {
        let bounds = Latency::bounds().into_iter().map(|bound| bound.as_secs_f64()).chain([f64::INFINITY]);
        let mut metric = self.metric(name, help, MetricType::Histogram)?;
        values.into_iter().try_for_each(|(of, latency)| {
            let buckets: Vec<(f64, u64)> = bounds.clone().zip(latency.buckets).collect();
            let seconds = latency.sum_ns as f64 / 1e9;
            metric.encode_family(&[(label, of)])?.encode_histogram::<NoLabelSet>(
                seconds,
                latency.count(),
                &buckets,
                None,
            )
        })
    }
}
