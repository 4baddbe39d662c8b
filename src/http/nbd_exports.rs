//! Exports: what is served over NBD now, to whom, and what was done with it.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use blockyard_nbd::ErrorKind;
use blockyard_nbd::server::Address;
use blockyard_nbd::stats::{ConnectionSnapshot, Counts, Latency, ListenerSnapshot, Operation};
use blockyard_nbd::transmission::Mode;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::AppState;
use crate::clock::UtcTime;
use crate::id::{BackupId, ExportId};
use crate::listeners::live::LiveExport;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list_exports))
}

#[derive(Serialize, ToSchema)]
struct ExportList {
    total: usize,
    exports: Vec<ExportAnswer>,
}

#[derive(Serialize, ToSchema)]
struct ExportAnswer {
    name: String,
    /// Where it is served: address and port, or the path of a socket.
    #[schema(example = "127.0.0.1:10100")]
    address: String,
    /// Absent for a Unix socket.
    port: Option<u16>,
    /// The job that receives the disk; `null` for a disk that is restored.
    #[schema(value_type = Option<String>)]
    job_id: Option<BackupId>,
    /// The export by which a disk is restored; `null` for a job's.
    #[schema(value_type = Option<String>)]
    export_id: Option<ExportId>,
    /// The restore point of that disk.
    #[schema(value_type = Option<String>)]
    point_id: Option<BackupId>,
    disk_id: u32,
    size_bytes: u64,
    read_only: bool,
    /// What became of connections to this address before they reached the export.
    listener: ListenerAnswer,
    /// Connections that ever reached the export.
    connections_accepted: u64,
    /// Connections refused because the export had enough.
    connections_refused: u64,
    /// Connections closed because the client stalled.
    connections_stalled: u64,
    /// What all connections did, the closed ones included.
    counts: CountsAnswer,
    /// The connections that are open now, oldest first.
    connections: Vec<ConnectionAnswer>,
}

#[derive(Serialize, ToSchema)]
struct ListenerAnswer {
    accepted: u64,
    /// Turned away with a reason because the process had enough connections.
    refused: u64,
    /// Closed without a word because too many were being told that reason.
    dropped: u64,
    /// Closed because the handshake took too long.
    timed_out: u64,
    /// Closed because too many handshakes were under way.
    evicted: u64,
    /// Closed because the client broke a rule of the handshake.
    rejected: u64,
}

#[derive(Serialize, ToSchema)]
struct ConnectionAnswer {
    /// Its number among the connections of the export.
    id: u64,
    /// Address and port of the client.
    peer: String,
    #[schema(value_type = String, format = DateTime)]
    since: UtcTime,
    /// `simple`, `structured` or `extended`.
    reply_mode: &'static str,
    /// The subject of the client's certificate.
    tls_subject: Option<String>,
    counts: CountsAnswer,
}

#[derive(Serialize, ToSchema)]
struct CountsAnswer {
    requests: u64,
    /// Requests whose reply is still to come or to be sent.
    in_flight: u64,
    bytes_read: u64,
    bytes_written: u64,
    /// By WRITE_ZEROES.
    bytes_zeroed: u64,
    bytes_trimmed: u64,
    /// Extents told in answer to BLOCK_STATUS.
    extents: u64,
    /// WRITEs with an extended header that lacked the flag PAYLOAD_LEN.
    writes_without_payload_flag: u64,
    /// Requests answered with an error, by its name (`EIO`); those that never happened are left out.
    #[schema(value_type = BTreeMap<String, u64>)]
    errors: BTreeMap<&'static str, u64>,
    /// How long requests took, from their header to the last byte of their reply; commands never sent are left out.
    latency: Vec<LatencyAnswer>,
}

#[derive(Serialize, ToSchema)]
struct LatencyAnswer {
    /// `read`, `write`, `flush`, `trim`, `cache`, `write_zeroes`, `block_status` or `other`.
    op: &'static str,
    /// Requests that are over.
    count: u64,
    /// All of their durations together.
    sum_us: u64,
    /// Ascending; empty ones are left out.
    buckets: Vec<BucketAnswer>,
}

#[derive(Serialize, ToSchema)]
struct BucketAnswer {
    /// The longest duration in it; the shortest is above that of the bucket before. Absent in the last, which has no bound.
    le_us: Option<u64>,
    count: u64,
}

/// What is served over NBD now, with its connections and what was counted.
#[utoipa::path(get, path = "/nbd/exports", tag = "ports", responses((status = 200, body = ExportList)))]
async fn list_exports(State(app): State<AppState>) -> Json<ExportList> {
    let exports: Vec<_> = app.listeners.live().all().iter().map(|export| ExportAnswer::new(export)).collect();
    Json(ExportList { total: exports.len(), exports })
}

impl ExportAnswer {
    fn new(export: &LiveExport) -> Self {
        let port = match &export.address {
            Address::Tcp(address) => Some(address.port()),
            Address::Unix(_) => None,
        };
        // Before the whole, so that no connection shows more than the export.
        let connections = export.figures.connections().into_iter().map(ConnectionAnswer::new).collect();
        let figures = export.figures.snapshot();
        Self {
            name: export.name.clone(),
            address: export.address.to_string(),
            port,
            job_id: export.disk.job_id().cloned(),
            export_id: export.disk.restored_from().map(|(export_id, _)| export_id.clone()),
            point_id: export.disk.restored_from().map(|(_, point_id)| point_id.clone()),
            disk_id: export.disk.disk_id(),
            size_bytes: export.size_bytes,
            read_only: export.read_only,
            listener: ListenerAnswer::new(export.figures.listener()),
            connections_accepted: figures.accepted,
            connections_refused: figures.refused,
            connections_stalled: figures.stalled,
            counts: CountsAnswer::new(&figures.counts),
            connections,
        }
    }
}

impl ListenerAnswer {
    fn new(figures: ListenerSnapshot) -> Self {
        let ListenerSnapshot { accepted, refused, dropped, timed_out, evicted, rejected } = figures;
        Self { accepted, refused, dropped, timed_out, evicted, rejected }
    }
}

impl ConnectionAnswer {
    fn new(connection: ConnectionSnapshot) -> Self {
        Self {
            id: connection.id,
            peer: connection.client.peer,
            since: connection.since.into(),
            reply_mode: match connection.client.mode {
                Mode::Simple => "simple",
                Mode::Structured => "structured",
                Mode::Extended => "extended",
            },
            tls_subject: connection.client.tls_subject,
            counts: CountsAnswer::new(&connection.counts),
        }
    }
}

impl CountsAnswer {
    fn new(counts: &Counts) -> Self {
        let errors = ErrorKind::ALL.map(|kind| (kind.name(), counts.errors_of(kind)));
        let latency = Operation::ALL.map(|operation| LatencyAnswer::new(operation, counts.latency_of(operation)));
        Self {
            requests: counts.requests,
            in_flight: counts.in_flight(),
            bytes_read: counts.bytes_read,
            bytes_written: counts.bytes_written,
            bytes_zeroed: counts.bytes_zeroed,
            bytes_trimmed: counts.bytes_trimmed,
            extents: counts.extents,
            writes_without_payload_flag: counts.writes_without_payload_flag,
            errors: errors.into_iter().filter(|(_, count)| *count > 0).collect(),
            latency: latency.into_iter().filter(|latency| latency.count > 0).collect(),
        }
    }
}

impl LatencyAnswer {
    fn new(operation: Operation, latency: &Latency) -> Self {
        let micros = |bound: std::time::Duration| u64::try_from(bound.as_micros()).unwrap_or(u64::MAX);
        let bounds = Latency::bounds().into_iter().map(|bound| Some(micros(bound))).chain([None]);
        let buckets = bounds.zip(latency.buckets).map(|(le_us, count)| BucketAnswer { le_us, count });
        Self {
            op: operation.name(),
            count: latency.count(),
            sum_us: latency.sum_ns / 1000,
            buckets: buckets.filter(|bucket| bucket.count > 0).collect(),
        }
    }
}
