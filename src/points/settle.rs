//! What the findings of a verification mean for a point and for everything above it, recorded in one transaction.
//!
//! Trust only falls, but for `unverified`, which becomes `verified`: a point that is suspect or corrupt stays so, and nothing
//! above it is ever verified. A point that could not be read keeps the trust that it has.

use serde_json::json;

use super::Points;
use super::finding::{Finding, Severity, worst};
use super::take::Examined;
use super::verification::{Outcome, VerifiedPoint};
use crate::clock::UtcTime;
use crate::id::BackupId;
use crate::store::events::{self, Actor};
use crate::store::points::{self, PointRow};
use crate::store::{Connection, StoreError, trust};
use crate::words::point::{PointState, Trust};

impl Points {
    /// Decides what was found of a point means, and records it.
    pub(super) async fn settle(&self, id: &BackupId, examined: Examined) -> Result<VerifiedPoint, StoreError> {
        let Examined { mut findings, digests, compared_bytes } = examined;
        let mut transaction = self.shared.store.write().await?;
        let Some(row) = points::find(&mut transaction, id).await?.filter(|row| is_there(row.state)) else {
            let findings = vec![Finding::of_point(Severity::Failed, "not_found", "the point is going")];
            return Ok(VerifiedPoint { point_id: id.clone(), outcome: Outcome::Failed, findings });
        };
        findings.extend(below(&mut transaction, &row).await?);
        let worst = worst(&findings).filter(|worst| worst.severity > Severity::Warning);
        let now = UtcTime::now();
        let outcome = match worst {
            Some(Finding { severity: Severity::Failed, .. }) => Outcome::Failed,
            Some(worst) if worst.severity == Severity::Missing => {
                if row.state == PointState::Committed {
                    points::set_state(&mut transaction, id, PointState::Missing).await?;
                    alert(&mut transaction, &row, "missing", &worst.reason(), now).await?;
                }
                Outcome::Missing
            }
            Some(worst) => {
                let to = if worst.severity == Severity::Corrupt { Trust::Corrupt } else { Trust::Suspect };
                lower(&mut transaction, &row, to, &worst.reason(), now).await?
            }
            None if row.trust == Trust::Suspect => Outcome::Suspect,
            None if row.trust == Trust::Corrupt => Outcome::Corrupt,
            None => {
                if row.trust != Trust::Verified {
                    trust::change(&mut transaction, &row, Trust::Verified, None, now).await?;
                }
                Outcome::Verified
            }
        };
        findings.extend(known_before(&row, outcome, &findings));
        if !matches!(outcome, Outcome::Failed | Outcome::Missing) {
            trust::set_verified(&mut transaction, id, compared_bytes, now).await?;
            if row.state == PointState::Missing {
                points::set_state(&mut transaction, id, PointState::Committed).await?;
            }
        }
        for (disk_id, image, content) in digests {
            let (image, content) = (image.to_string(), content.to_string());
            trust::set_digests(&mut transaction, id, disk_id, Some((&image, &content))).await?;
        }
        transaction.commit().await?;
        for finding in &findings {
            tracing::warn!(point = %id, %outcome, "{}", finding.reason());
        }
        Ok(VerifiedPoint { point_id: id.clone(), outcome, findings })
    }
}

/// What a point that is not trusted was found to have, where nothing that is found now is as bad: whoever is told that it is damaged
/// is told why.
fn known_before(row: &PointRow, outcome: Outcome, found: &[Finding]) -> Option<Finding> {
    let severity = match outcome {
        Outcome::Suspect => Severity::Suspect,
        Outcome::Corrupt => Severity::Corrupt,
        Outcome::Verified | Outcome::Failed | Outcome::Missing => return None,
    };
    let is_told = found.iter().any(|finding| finding.severity == severity);
    let reason = row.trust_reason.as_deref().unwrap_or("the reason is not recorded");
    (!is_told).then(|| Finding::of_point(severity, "found_before", reason))
}

/// Whether the files of a point in this state may be looked at.
pub(super) fn is_there(state: PointState) -> bool {
    matches!(state, PointState::Committed | PointState::Missing)
}

/// What is known of the points below, as far as it forbids that this one is trusted.
async fn below(connection: &mut Connection, row: &PointRow) -> Result<Vec<Finding>, StoreError> {
    let mut findings = Vec::new();
    for (below, state) in points::ancestry(connection, &row.id).await? {
        let Some(lower) = points::find(connection, &below).await?.filter(|_| below != row.id) else { continue };
        match (lower.trust, state) {
            (Trust::Suspect | Trust::Corrupt, _) => {
                findings.push(Finding::of_point(Severity::Suspect, "built_upon", built_upon(&below, lower.trust)));
            }
            (_, PointState::Committed) => {}
            (_, state) => {
                let detail = format!("it builds upon {below}, which is {state}");
                findings.push(Finding::of_point(Severity::Failed, "chain_missing", detail));
            }
        }
    }
    Ok(findings)
}

fn built_upon(below: &BackupId, trust: Trust) -> String {
    format!("it builds upon {below}, which is {trust}")
}

/// Lowers the trust in a point, and in everything above it. One that is as bad already keeps its reason.
async fn lower(
    connection: &mut Connection,
    row: &PointRow,
    to: Trust,
    reason: &str,
    now: UtcTime,
) -> Result<Outcome, StoreError> {
    let outcome = |trust| if trust == Trust::Corrupt { Outcome::Corrupt } else { Outcome::Suspect };
    if row.trust == Trust::Corrupt || row.trust == to {
        return Ok(outcome(row.trust));
    }
    trust::change(connection, row, to, Some(reason), now).await?;
    alert(connection, row, to.as_str(), reason, now).await?;
    let mut above = points::children(connection, &row.id).await?;
    let because = format!("built_upon: {}", built_upon(&row.id, to));
    while let Some(id) = above.pop() {
        let Some(upper) = points::find(connection, &id).await? else { continue };
        // What is suspect already has nothing above it that is not.
        if matches!(upper.trust, Trust::Unverified | Trust::Verified) {
            trust::change(connection, &upper, Trust::Suspect, Some(&because), now).await?;
            above.extend(points::children(connection, &id).await?);
        }
    }
    Ok(outcome(to))
}

/// Wakes a person: a restore point is not what it was.
async fn alert(
    connection: &mut Connection,
    row: &PointRow,
    found: &str,
    reason: &str,
    now: UtcTime,
) -> Result<(), StoreError> {
    let data = json!({
        "alert": "point_damaged", "point_id": row.id, "vm_context_id": row.vm_id, "repository_id": row.repository_id,
        "found": found, "reason": reason,
    });
    events::append(connection, "alert", row.id.as_str(), &data, Actor::Service, now).await?;
    Ok(())
}
