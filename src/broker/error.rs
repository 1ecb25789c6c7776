//! Broker errors, in words for an operator.

use std::error::Error;
use std::time::Duration;

/// Failure of a broker operation. No text of it ever contains a password.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// Invalid configuration; the text names the key and the cure.
    #[error("{0}")]
    Config(String),
    /// No address accepted a connection; the text gives the reason for each.
    #[error("no broker could be reached: {0}")]
    Unreachable(String),
    /// Unsupported broker version or product.
    #[error("{address} runs {found}, which is not supported; upgrade to RabbitMQ 3.10 or newer")]
    TooOld {
        /// Host and port.
        address: String,
        /// Product and version reported by the broker.
        found: String,
    },
    /// Exchanges or queues are missing or differ from the configuration. Nothing was changed or deleted.
    #[error("exchanges or queues on the broker differ from the configuration (nothing was changed):\n{0}")]
    Drift(String),
    /// Permissions that this user lacks, one exchange or queue a line, and the command that grants them.
    #[error("the user of broker.url lacks permissions:\n{0}")]
    Permissions(String),
    /// No answer in time; the operation may or may not have been performed.
    #[error("{doing}: no answer from the broker within {after:?}")]
    TimedOut {
        /// Operation, as a gerund phrase.
        doing: &'static str,
        /// Time limit that passed.
        after: Duration,
    },
    /// Lost connection or channel, or a refusal by the broker.
    #[error("{doing}: {source}")]
    Lost {
        /// Operation, as a gerund phrase.
        doing: &'static str,
        /// Error of the AMQP client.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The broker accepts no messages because of a memory or disk alarm; the message may be stored once that is over.
    #[error(
        "the broker has an alarm ({0}) and stores no messages; free its memory or disk, then repeat with the same key"
    )]
    Alarm(String),
    /// Message that was not stored where it belongs.
    #[error("{0}")]
    NotTaken(String),
}

impl BrokerError {
    /// Adapter for `map_err` that adds the operation to the client's error.
    pub(super) fn while_doing(doing: &'static str) -> impl FnOnce(lapin::Error) -> Self {
        move |error| Self::Lost { doing, source: Box::new(error) }
    }
}

/// Awaits an answer of the client for at most `limit`: a blocked or frozen broker never answers.
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
