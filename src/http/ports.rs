//! Ports: which of the configured ones are leased, and to which export.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::AppState;
use crate::id::BackupId;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list_ports))
}

#[derive(Serialize, ToSchema)]
struct PortList {
    /// Ports in all configured ranges together.
    total: usize,
    leased: usize,
    /// Not leased by this service; some of them may be held by other programs.
    available: usize,
    leases: Vec<PortAnswer>,
}

#[derive(Serialize, ToSchema)]
struct PortAnswer {
    port: u16,
    #[schema(value_type = String)]
    job_id: BackupId,
    export_name: String,
    /// Connections open now.
    connections: u64,
    /// Connections refused because the export had enough.
    refused: u64,
}

/// The ports of the service and who has them.
#[utoipa::path(get, path = "/ports", tag = "ports", responses((status = 200, body = PortList)))]
async fn list_ports(State(app): State<AppState>) -> Json<PortList> {
    let leased: BTreeSet<u16> = app.backups.leased_ports().into_iter().collect();
    let configured: BTreeSet<u16> =
        app.config.nodes.values().flat_map(|node| app.config.port_range(node).ports()).collect();
    let mut leases = Vec::new();
    for job in app.backups.running() {
        for disk in job.facts().disks.iter().filter(|disk| leased.contains(&disk.port)) {
            let live = job.live().iter().find(|live| live.disk_id == disk.plan.disk_id);
            let figures = live.map(|live| live.figures.snapshot()).unwrap_or_default();
            leases.push(PortAnswer {
                port: disk.port,
                job_id: job.facts().id.clone(),
                export_name: disk.plan.export_name.clone(),
                connections: figures.connections,
                refused: figures.refused,
            });
        }
    }
    leases.sort_by_key(|lease| lease.port);
    let total = configured.len();
    Json(PortList { total, leased: leased.len(), available: total.saturating_sub(leased.len()), leases })
}
