//! Protecting a restore point from deletion until a date. As long as that lasts it is kept by everybody and everything, and
//! its end moves only further away, unless somebody insists.

use serde_json::json;

use super::Points;
use crate::clock::UtcTime;
use crate::id::BackupId;
use crate::store::events::{self, Actor};
use crate::store::{StoreError, points};
use crate::words::point::PointState;

/// Whether a protection that still lasts may be made shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortening {
    /// No: it is refused.
    Refused,
    /// Yes: somebody said so in so many words.
    Forced,
}

/// Why a protection was not changed.
#[derive(Debug, thiserror::Error)]
pub enum ProtectError {
    /// There is no such point, or none any more.
    #[error("there is no restore point {0}")]
    NotFound(BackupId),
    /// The date is over.
    #[error("{0} is not in the future")]
    Past(UtcTime),
    /// It would end earlier than it does.
    #[error("{id} is protected until {until}, which is not made shorter")]
    Protected {
        /// The point.
        id: BackupId,
        /// Until when.
        until: UtcTime,
    },
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Points {
    /// Protects a point until a time, or, with nothing, no longer. A protection that lasts can be extended; it is shortened
    /// or ended only by [`Shortening::Forced`].
    ///
    /// # Errors
    /// See [`ProtectError`]. Nothing was changed then.
    pub async fn protect(
        &self,
        id: &BackupId,
        until: Option<UtcTime>,
        shortening: Shortening,
    ) -> Result<(), ProtectError> {
        let now = UtcTime::now();
        if let Some(until) = until.filter(|until| *until <= now) {
            return Err(ProtectError::Past(until));
        }
        let mut transaction = self.shared.store.write().await?;
        let point = points::find(&mut transaction, id).await?;
        let point = point.filter(|point| matches!(point.state, PointState::Committed | PointState::Missing));
        let point = point.ok_or_else(|| ProtectError::NotFound(id.clone()))?;
        let lasting = point.protected_until.filter(|until| *until > now);
        if let Some(lasting) = lasting
            && until.is_none_or(|until| until < lasting)
            && shortening == Shortening::Refused
        {
            return Err(ProtectError::Protected { id: id.clone(), until: lasting });
        }
        points::set_protection(&mut transaction, id, until).await?;
        let data = json!({
            "point_id": id, "until": until, "before": point.protected_until,
            "forced": shortening == Shortening::Forced, "by": Actor::User.as_str(),
        });
        events::append(&mut transaction, "point.protected", id.as_str(), &data, Actor::User, now).await?;
        transaction.commit().await?;
        Ok(())
    }
}
