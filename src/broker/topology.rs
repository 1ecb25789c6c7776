//! Topology: names and arguments of the exchanges and queues, and their declaration or verification.
//!
//! Every queue is durable, and all but one are quorum queues. All arguments mean the same on RabbitMQ 3.10 and 4.x. Nothing
//! is ever deleted or changed; differences are reported.

use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ErrorKind, ExchangeKind};
use uuid::Uuid;

use super::connection::Connection;
use super::error::{BrokerError, within};
use super::retry_tier::RetryTier;
use crate::config::{TopologyConfig, TopologyMode};

/// Routing key of sync requests.
pub const SYNC_REQUESTED: &str = "sync.requested";
/// Effectively unlimited, in a form that 3.10 and 4.x both accept: by default 4.x drops a dead letter after 20 reads.
const UNLIMITED_DELIVERIES: i64 = 1_000_000;
const UNROUTED_TTL_MS: i64 = 7 * 24 * 3600 * 1000;
/// Code of a channel closed over a missing permission.
pub(super) const ACCESS_REFUSED: u16 = 403;

/// Names of all exchanges and queues, with the prefix of this deployment.
#[derive(Debug, Clone)]
pub struct Names {
    prefix: String,
    /// Exchange for sync requests.
    pub sync: String,
    /// Exchange for run-completed events.
    pub events: String,
    /// Exchange and queue for dead letters.
    pub dead: String,
    /// Exchange and queue for dead letters that a policy of the broker removes from [`Names::dead`].
    pub dead_kept: String,
    /// Exchange and queue for events without a subscriber.
    pub unrouted: String,
    /// Queue of requests.
    pub requests: String,
    /// Exchange that routes copies to the retry queues.
    pub retry: String,
}

impl Names {
    /// Builds all names for a prefix.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        let name = |rest: &str| format!("{prefix}inventory.{rest}");
        Self {
            prefix: prefix.to_owned(),
            sync: name("sync"),
            events: name("events"),
            dead: name("dead"),
            dead_kept: name("dead.kept"),
            unrouted: name("unrouted"),
            requests: name("sync.requests"),
            retry: name("retry"),
        }
    }

    /// Prefix of this deployment, empty by default.
    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// New name for a private queue of a command; within the permissions that the other names need.
    pub(super) fn private_queue(&self, command: &str) -> String {
        format!("{}inventory.{command}.{}", self.prefix, Uuid::new_v4().simple())
    }

    /// Retry queue of a tier.
    #[must_use]
    pub fn retry_queue(&self, tier: RetryTier) -> String {
        format!("{}inventory.retry.{}", self.prefix, tier.suffix())
    }
}

struct Exchange {
    name: String,
    kind: ExchangeKind,
    arguments: FieldTable,
}

struct Queue {
    name: String,
    arguments: FieldTable,
}

/// Deviations of the broker from the configuration.
#[derive(Debug, Default)]
pub(super) struct Deviations {
    /// Missing or different exchanges and queues, one a line.
    pub(super) drift: Vec<String>,
    /// Operations of which this user may not perform one, in the broker's words.
    pub(super) refused: Vec<String>,
}

impl Deviations {
    /// One error for all deviations, in which missing permissions come first.
    pub(super) fn into_result(self) -> Result<(), BrokerError> {
        match (self.refused.is_empty(), self.drift.is_empty()) {
            (true, true) => Ok(()),
            (true, false) => Err(BrokerError::Drift(self.drift.join("\n"))),
            (false, _) => Err(BrokerError::Permissions([self.refused, self.drift].concat().join("\n"))),
        }
    }
}

/// Declares or verifies everything, as configured. Continues after a deviation, so that all are found at once.
pub(super) async fn ensure(
    connection: &Connection,
    names: &Names,
    config: &TopologyConfig,
    limit: Duration,
) -> Result<Deviations, BrokerError> {
    let (channel, mode, found) = (connection.channel().await?, config.mode, Deviations::default());
    let mut check = Check { connection, channel, limit, mode, found };
    for exchange in exchanges(names) {
        check.exchange(&exchange).await?;
    }
    // Dead-letter targets are declared before the queues that refer to them.
    for queue in queues(names, config.delivery_limit) {
        check.queue(&queue).await?;
    }
    if check.found.drift.is_empty() && check.found.refused.is_empty() && mode == TopologyMode::Declare {
        check.bind(&names.dead_kept, &names.dead_kept, "").await?;
        check.bind(&names.dead, &names.dead, "").await?;
        check.bind(&names.unrouted, &names.unrouted, "").await?;
        check.bind(&names.requests, &names.sync, SYNC_REQUESTED).await?;
        for tier in RetryTier::ALL {
            check.bind(&names.retry_queue(tier), &names.retry, tier.suffix()).await?;
        }
    }
    Ok(check.found)
}

fn exchanges(names: &Names) -> Vec<Exchange> {
    let plain = |name: &String, kind| Exchange { name: name.clone(), kind, arguments: FieldTable::default() };
    let mut events = plain(&names.events, ExchangeKind::Topic);
    events.arguments.insert("alternate-exchange".into(), text(&names.unrouted));
    vec![
        plain(&names.dead_kept, ExchangeKind::Fanout),
        plain(&names.dead, ExchangeKind::Fanout),
        plain(&names.unrouted, ExchangeKind::Fanout),
        plain(&names.sync, ExchangeKind::Direct),
        plain(&names.retry, ExchangeKind::Direct),
        events,
    ]
}

fn queues(names: &Names, delivery_limit: u32) -> Vec<Queue> {
    let quorum = |name: &str, more: &[(&str, AMQPValue)]| {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), text("quorum"));
        for (key, value) in more {
            arguments.insert((*key).into(), value.clone());
        }
        Queue { name: name.to_owned(), arguments }
    };
    // At-least-once dead-lettering: a message leaves its queue only once the target has stored it. RabbitMQ requires
    // reject-publish with it.
    let at_least_once = [("x-dead-letter-strategy", text("at-least-once")), ("x-overflow", text("reject-publish"))];
    let limit = ("x-delivery-limit", AMQPValue::LongLongInt(i64::from(delivery_limit)));
    let unlimited = ("x-delivery-limit", AMQPValue::LongLongInt(UNLIMITED_DELIVERIES));
    let ttl = ("x-message-ttl", AMQPValue::LongLongInt(UNROUTED_TTL_MS));
    let requests = [&at_least_once[..], &[limit, ("x-dead-letter-exchange", text(&names.dead))]].concat();
    // Of an argument and a policy the broker applies the lower: a policy for every queue could delete a dead letter after a
    // few reads. It is moved instead, to a classic queue, which has no delivery limit.
    let dead = [&at_least_once[..], &[unlimited.clone(), ("x-dead-letter-exchange", text(&names.dead_kept))]].concat();
    let mut classic = FieldTable::default();
    classic.insert("x-queue-type".into(), text("classic"));
    let mut queues = vec![
        Queue { name: names.dead_kept.clone(), arguments: classic },
        quorum(&names.dead, &dead),
        quorum(&names.unrouted, &[unlimited, ttl]),
        quorum(&names.requests, &requests),
    ];
    for tier in RetryTier::ALL {
        let wait_ms = i64::try_from(tier.seconds() * 1000).unwrap_or(i64::MAX);
        let back = [
            ("x-message-ttl", AMQPValue::LongLongInt(wait_ms)),
            ("x-dead-letter-exchange", text(&names.sync)),
            ("x-dead-letter-routing-key", text(SYNC_REQUESTED)),
        ];
        queues.push(quorum(&names.retry_queue(tier), &[&at_least_once[..], &back].concat()));
    }
    queues
}

struct Check<'a> {
    connection: &'a Connection,
    channel: Channel,
    limit: Duration,
    mode: TopologyMode,
    found: Deviations,
}

impl Check<'_> {
    async fn exchange(&mut self, exchange: &Exchange) -> Result<(), BrokerError> {
        let what = format!("exchange {}", exchange.name);
        for passive in self.steps() {
            let options = ExchangeDeclareOptions { passive: *passive, durable: true, ..Default::default() };
            let answer = self.channel.exchange_declare(
                exchange.name.as_str().into(),
                exchange.kind.clone(),
                options,
                exchange.arguments.clone(),
            );
            let answer = within(self.limit, "declaring exchanges", answer).await;
            if !self.judge(&what, *passive, answer).await? {
                break;
            }
        }
        Ok(())
    }

    async fn queue(&mut self, queue: &Queue) -> Result<(), BrokerError> {
        let what = format!("queue {}", queue.name);
        for passive in self.steps() {
            if !self.declare(queue, &what, *passive).await? {
                break;
            }
        }
        Ok(())
    }

    async fn declare(&mut self, queue: &Queue, what: &str, passive: bool) -> Result<bool, BrokerError> {
        let options = QueueDeclareOptions { passive, ..QueueDeclareOptions::durable() };
        let answer = self.channel.queue_declare(queue.name.as_str().into(), options, queue.arguments.clone());
        let answer = within(self.limit, "declaring queues", answer).await.map(drop);
        self.judge(what, passive, answer).await
    }

    /// Passive flags of the declarations. Verification first checks existence with a passive declare; only then it
    /// declares with our arguments, which changes nothing and makes the broker name the first difference.
    fn steps(&self) -> &'static [bool] {
        match self.mode {
            TopologyMode::Declare => &[false],
            TopologyMode::Verify => &[true, false],
        }
    }

    async fn bind(&mut self, queue: &str, exchange: &str, key: &str) -> Result<(), BrokerError> {
        let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
        let answer = self.channel.queue_bind(queue.into(), exchange.into(), key.into(), options, arguments);
        let answer = within(self.limit, "binding queues", answer).await;
        self.judge(&format!("queue {queue}, binding to exchange {exchange}"), false, answer).await.map(drop)
    }

    /// Records a refusal and returns whether to continue. A refusal closes the channel: the next step gets a new one.
    async fn judge(&mut self, what: &str, passive: bool, answer: Result<(), BrokerError>) -> Result<bool, BrokerError> {
        let Err(error) = answer else { return Ok(true) };
        let Some((code, words)) = refusal(&error) else { return Err(error) };
        self.channel = self.connection.channel().await?;
        match (code, self.mode) {
            (404, _) if passive => self.found.drift.push(format!("{what}: missing")),
            // Without the configure permission only existence can be verified, and since RabbitMQ 4 not even that without any
            // permission.
            (ACCESS_REFUSED, TopologyMode::Verify) => {}
            (ACCESS_REFUSED, TopologyMode::Declare) => self.found.refused.push(format!("{what}: {words}")),
            _ => self.found.drift.push(format!("{what}: {words}")),
        }
        Ok(false)
    }
}

/// Code and text of a channel error: the broker refused one operation and keeps the connection.
pub(super) fn refusal(error: &BrokerError) -> Option<(u16, String)> {
    let BrokerError::Lost { source, .. } = error else { return None };
    refusal_of(source.downcast_ref::<lapin::Error>()?)
}

/// Code and text of a channel error.
pub(super) fn refusal_of(error: &lapin::Error) -> Option<(u16, String)> {
    match error.kind() {
        ErrorKind::ProtocolError(refused) if error.is_amqp_soft_error() => {
            Some((refused.get_id(), refused.get_message().to_string()))
        }
        _ => None,
    }
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_prefix_and_dead_letter_targets_are_declared_first() {
        let names = Names::new("blue.");
        let queues = queues(&names, 20);
        let order: Vec<&str> = queues.iter().map(|queue| queue.name.as_str()).collect();
        assert_eq!(order[..2], ["blue.inventory.dead.kept", "blue.inventory.dead"]);
        assert!(order.iter().all(|name| name.starts_with("blue.inventory.")));
        assert_eq!(order.last(), Some(&"blue.inventory.retry.10m"));
        for queue in &queues {
            let kind = if queue.name == names.dead_kept { "classic" } else { "quorum" };
            assert_eq!(queue.arguments.inner().get("x-queue-type"), Some(&text(kind)));
            let sends_dead_letters = queue.arguments.contains_key("x-dead-letter-exchange");
            assert_eq!(queue.arguments.contains_key("x-dead-letter-strategy"), sends_dead_letters, "{}", queue.name);
        }
    }
}
