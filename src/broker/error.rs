//! What can go wrong with the broker, in words for an operator.

use std::error::Error;
use std::time::Duration;

/// Why something asked of the broker did not happen. No text of it ever holds a password.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The configuration can't be used; the text names the key and the cure.
    #[error("{0}")]
    Config(String),
    /// None of the addresses let us in; the text says why for each.
    #[error("no broker could be reached: {0}")]
    Unreachable(String),
    /// The broker speaks, but lacks what the queues need.
    #[error(
        "{address} runs {found}: RabbitMQ 3.10 or newer is needed, for delays and safe dead letters on quorum queues"
    )]
    TooOld {
        /// Host and port.
        address: String,
        /// Product and version, as it says itself.
        found: String,
    },
    /// Exchanges or queues are missing, or differ from what the configuration wants. Nothing was changed or deleted.
    #[error("the exchanges and queues on the broker do not fit the configuration (nothing was changed):\n{0}")]
    Drift(String),
    /// No answer in time; whether it was done is unknown.
    #[error("{doing}: no answer from the broker within {after:?}")]
    TimedOut {
        /// What was being done.
        doing: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// The connection or channel is lost, or the broker refused.
    #[error("{doing}: {source}")]
    Lost {
        /// What was being done.
        doing: &'static str,
        /// The client's own words.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The message did not get where it should.
    #[error("{0}")]
    NotTaken(String),
}

impl BrokerError {
    /// For `map_err`: the client's error with what was being done.
    pub(super) fn while_doing(doing: &'static str) -> impl FnOnce(lapin::Error) -> Self {
        move |error| Self::Lost { doing, source: Box::new(error) }
    }
}

/// Awaits an answer of the client, but not for ever: a blocked or frozen broker never answers.
pub(super) async fn within<T>(
    limit: Duration,
    doing: &'static str,
    answer: impl Future<Output = lapin::Result<T>>,
) -> Result<T, BrokerError> {
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => answer.map_err(BrokerError::while_doing(doing)),
        Err(_) => Err(BrokerError::TimedOut { doing, after: limit }),
    }
}
