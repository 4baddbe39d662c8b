//! Ports: which of the configured ones are leased, and to which export.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::AppState;
use crate::id::{BackupId, ExportId};

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new().routes(routes!(list_ports))
}

#[derive(Serialize, ToSchema)]
struct PortList {
    /// Ports in all configured ranges together, those of `[restore]` too.
    total: usize,
    leased: usize,
    /// Not leased by this service; some of them may be held by other programs.
    available: usize,
    leases: Vec<PortAnswer>,
}

#[derive(Serialize, ToSchema)]
struct PortAnswer {
    port: u16,
    /// The job that receives a disk there; `null` for a disk that is restored.
    #[schema(value_type = Option<String>)]
    job_id: Option<BackupId>,
    /// The export by which a disk is restored; `null` for a job's.
    #[schema(value_type = Option<String>)]
    export_id: Option<ExportId>,
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
    let total = app.config.all_ports().len();
    let mut leases = Vec::new();
    for job in app.backups.running() {
        for disk in job.facts().disks.iter().filter(|disk| leased.contains(&disk.port)) {
            let live = job.live().iter().find(|live| live.disk_id == disk.plan.disk_id);
            let figures = live.map(|live| live.figures.snapshot()).unwrap_or_default();
            leases.push(PortAnswer {
                port: disk.port,
                job_id: Some(job.facts().id.clone()),
                export_id: None,
                export_name: disk.plan.export_name.clone(),
                connections: figures.connections,
                refused: figures.refused,
            });
        }
    }
    for export in app.restores.all() {
        let figures = export.figures().snapshot();
        leases.push(PortAnswer {
            port: export.facts().port,
            job_id: None,
            export_id: Some(export.facts().id.clone()),
            export_name: export.facts().export_name.clone(),
            connections: figures.connections,
            refused: figures.refused,
        });
    }
    leases.sort_by_key(|lease| lease.port);
    let leased = leased.len() + app.restores.leased_ports().len();
    Json(PortList { total, leased, available: total.saturating_sub(leased), leases })
}
