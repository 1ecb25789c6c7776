//! Reasons for leaving the consume loop.

use crate::broker::BrokerError;

/// Reason for leaving the inner consume loop.
pub(super) enum LoopExit {
    Drain,
    /// The intake paused or resumed.
    IntakeChanged,
    Lost(&'static str, Option<BrokerError>),
}

/// Describes the loss of a subscription that came without an error.
pub(super) fn what_ended(cause: &str) -> &'static str {
    match cause {
        "watchdog" => "requests are ready but none arrived",
        _ => {
            "the broker ended the subscription: the connection was closed, the queue was deleted or moved, or a delivery \
             exceeded the consumer timeout"
        }
    }
}
