//! What the client calls over HTTP: change ids, telemetry, completion, and the ways in which a call can fail to arrive or
//! its answer to come back.

use std::io;

use reqwest::RequestBuilder;
use serde_json::json;

use super::client::Client;
use super::log::Event;
use super::step::{Step, StepFault};

/// What the client got for a call.
struct Reply {
    status: u16,
    body: String,
}

impl Client {
    pub(super) async fn change_id(&mut self, step: Step, disk_id: u32) -> io::Result<String> {
        let url = format!("{}/api/v1/backups/changeid", self.config.hub_url);
        let name = self.call.vm_path.rsplit('/').next().unwrap_or_default().to_owned();
        let http = self.shared.http.clone();
        let ask = move || http.get(&url).query(&[("vm_name", name.as_str()), ("disk_id", &disk_id.to_string())]);
        // Anything but 200 and one flat object of strings means that there is none.
        let body = match self.call_hub(step, ask).await {
            Ok(reply) if reply.status == 200 => reply.body,
            Ok(_) | Err(_) => String::new(),
        };
        let flat: std::collections::BTreeMap<String, String> = serde_json::from_str(&body).unwrap_or_default();
        let change_id = flat.get("change_id").cloned().unwrap_or_default();
        self.shared.log.push(Event::ChangeId { disk_id, change_id: change_id.clone() });
        Ok(change_id)
    }

    /// Any status but 200 ends the client's work.
    pub(super) async fn complete(&mut self, step: Step, disk_id: u32, change_id: &str) -> io::Result<()> {
        let url = format!("{}/api/v1/backups/{}/complete", self.config.hub_url, self.call.job_id);
        let body = json!({"change_id": change_id, "disk_id": disk_id, "bytes_transferred": 0});
        let http = self.shared.http.clone();
        let Reply { status, body } = self.call_hub(step, move || http.post(&url).json(&body)).await?;
        self.shared.log.push(Event::Completed { disk_id, status, body });
        if status == 200 { Ok(()) } else { Err(io::Error::other(format!("/complete was answered {status}"))) }
    }

    pub(super) async fn telemetry(&mut self, step: Step, word: &str) -> io::Result<()> {
        let url = format!("{}/api/v1/telemetry/backup/{}", self.config.hub_url, self.call.job_id);
        let total: u64 = self.config.disks.values().map(|disk| disk.source.size_bytes()).sum();
        let body = json!({
            "job_id": self.call.job_id, "job_type": "backup", "status": word, "current_phase": "transferring",
            "bytes_transferred": self.sent_bytes, "total_bytes": total, "transfer_speed_bps": 0, "eta_seconds": 0,
            "progress_percent": 100.0, "disks": [], "timestamp": crate::clock::UtcTime::now(),
        });
        let http = self.shared.http.clone();
        let Reply { status, .. } = self.call_hub(step, move || http.post(&url).json(&body)).await?;
        self.shared.log.push(Event::Telemetry { sent: word.to_owned(), status });
        Ok(())
    }

    /// One call, as it goes at this step.
    async fn call_hub(&mut self, step: Step, request: impl Fn() -> RequestBuilder) -> io::Result<Reply> {
        let fault = self.fault_at(step);
        match fault {
            None | Some(StepFault::BrokenOff | StepFault::Reconnect) => send(request()).await,
            Some(StepFault::Refused | StepFault::Die) => Err(io::ErrorKind::ConnectionRefused.into()),
            Some(StepFault::Hang) => std::future::pending().await,
            Some(StepFault::Late) => {
                self.pause().await;
                send(request()).await
            }
            Some(StepFault::Slow(pause)) => {
                tokio::time::sleep(pause).await;
                send(request()).await
            }
            Some(StepFault::Status(status)) => Ok(Reply { status, body: "not this time".to_owned() }),
            Some(StepFault::Malformed) => Ok(Reply { body: "<html>".to_owned(), ..send(request()).await? }),
            Some(StepFault::Truncated) => {
                let reply = send(request()).await?;
                Ok(Reply { body: reply.body.chars().take(reply.body.len() / 2).collect(), ..reply })
            }
            Some(StepFault::Lost) => {
                send(request()).await?;
                Err(io::ErrorKind::ConnectionReset.into())
            }
            Some(StepFault::Twice) => {
                send(request()).await?;
                send(request()).await
            }
            Some(StepFault::TwiceAtOnce) => {
                let (first, second) = tokio::join!(send(request()), send(request()));
                first?;
                second
            }
            Some(StepFault::Garbled) => {
                send(request().body("{\"disk_id\": ")).await?;
                send(request()).await
            }
        }
    }
}

async fn send(request: RequestBuilder) -> io::Result<Reply> {
    let answer = request.send().await.map_err(io::Error::other)?;
    let status = answer.status().as_u16();
    Ok(Reply { status, body: answer.text().await.map_err(io::Error::other)? })
}
