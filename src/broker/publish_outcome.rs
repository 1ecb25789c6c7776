//! Outcome of publishing one message.

use super::error::BrokerError;

/// Result of publishing one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishOutcome {
    /// Stored by every queue it was routed to.
    Confirmed,
    /// Routed to no queue, so stored nowhere.
    Unroutable,
    /// Not sent: no usable connection.
    Unsent,
    /// Not stored: nacked by the broker, by a full queue for instance.
    Refused,
    /// Not stored, and a retry cannot help before an operator acts: no permission, or no such exchange.
    Denied,
    /// Possibly stored. Publish again with the same message id; receivers deduplicate by it.
    Unknown,
}

impl PublishOutcome {
    /// True if the message was certainly not stored.
    #[must_use]
    pub const fn not_stored(self) -> bool {
        matches!(self, Self::Unsent | Self::Refused | Self::Denied)
    }

    /// Text form for logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Confirmed => "confirmed",
            Self::Unroutable => "unroutable",
            Self::Unsent => "unsent",
            Self::Refused => "refused",
            Self::Denied => "denied",
            Self::Unknown => "unknown",
        }
    }

    pub(super) fn into_result(self, what: &'static str) -> Result<(), BrokerError> {
        let problem = match self {
            Self::Confirmed => return Ok(()),
            Self::Unroutable => "no queue is bound for it",
            Self::Unsent => "the broker is not reachable",
            Self::Refused => "the broker refused it",
            Self::Denied => "the exchange is missing, or this user may not write to it",
            Self::Unknown => "the broker did not confirm it in time; it may have been stored",
        };
        Err(BrokerError::NotTaken(format!("{what}: {problem}")))
    }
}
