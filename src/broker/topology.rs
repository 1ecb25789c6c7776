//! The exchanges and queues that the daemon lives on: their names, their arguments, and how they are made or checked.
//!
//! Every queue is a durable quorum queue, and all arguments mean the same on RabbitMQ 3.10 and 4.x. Nothing is ever
//! deleted or changed here: what differs is reported.

use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ErrorKind, ExchangeKind};

use super::connection::Connection;
use super::drift::{Known, agree, difference, lock, text};
use super::error::{BrokerError, within};
use crate::config::{TopologyConfig, TopologyMode};

/// The routing key of a sync request.
pub const SYNC_REQUESTED: &str = "sync.requested";
/// No limit, in the only form that 3.10 and 4.x both take: 4.x would otherwise drop a dead letter after 20 looks.
const ANY_NUMBER_OF_LOOKS: i64 = 1_000_000;
const UNROUTED_KEPT_MS: i64 = 7 * 24 * 3600 * 1000;

/// The names of all exchanges and queues, with the prefix of this deployment.
#[derive(Debug, Clone)]
pub struct Names {
    prefix: String,
    /// Exchange that requests are published to.
    pub sync: String,
    /// Exchange that run-completed events are published to.
    pub events: String,
    /// Exchange and queue of dead letters.
    pub dead: String,
    /// Exchange and queue of events that no subscriber's queue took.
    pub unrouted: String,
    /// Queue of requests.
    pub requests: String,
}

impl Names {
    /// All names for a prefix.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        let name = |rest: &str| format!("{prefix}inventory.{rest}");
        Self {
            prefix: prefix.to_owned(),
            sync: name("sync"),
            events: name("events"),
            dead: name("dead"),
            unrouted: name("unrouted"),
            requests: name("sync.requests"),
        }
    }

    /// Queue in which a message waits for a retry.
    #[must_use]
    pub fn retry(&self, tier: RetryTier) -> String {
        format!("{}inventory.retry.{}", self.prefix, tier.suffix())
    }
}

/// How long a message waits before it is asked about again: one tier of the ladder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryTier {
    /// 5 seconds.
    FiveSeconds,
    /// 30 seconds.
    ThirtySeconds,
    /// 2 minutes.
    TwoMinutes,
    /// 10 minutes.
    TenMinutes,
}

impl RetryTier {
    /// The whole ladder, from the bottom.
    pub const ALL: [Self; 4] = [Self::FiveSeconds, Self::ThirtySeconds, Self::TwoMinutes, Self::TenMinutes];

    /// The wait.
    #[must_use]
    pub const fn seconds(self) -> u64 {
        match self {
            Self::FiveSeconds => 5,
            Self::ThirtySeconds => 30,
            Self::TwoMinutes => 120,
            Self::TenMinutes => 600,
        }
    }

    /// For a request whose run another delivery is working on: soon once, then at leisure, for runs take minutes.
    #[must_use]
    pub const fn while_busy(retries: u32) -> Self {
        if retries == 0 { Self::FiveSeconds } else { Self::ThirtySeconds }
    }

    /// For a request that is over a limit: up the ladder, and then on its top.
    #[must_use]
    pub const fn while_deferred(retries: u32) -> Self {
        match retries {
            0 => Self::FiveSeconds,
            1 => Self::ThirtySeconds,
            2 => Self::TwoMinutes,
            _ => Self::TenMinutes,
        }
    }

    const fn suffix(self) -> &'static str {
        match self {
            Self::FiveSeconds => "5s",
            Self::ThirtySeconds => "30s",
            Self::TwoMinutes => "2m",
            Self::TenMinutes => "10m",
        }
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

/// Makes or checks everything, as the configuration says, and reports all that does not fit at once.
pub(super) async fn ensure(
    wire: &Connection,
    names: &Names,
    config: &TopologyConfig,
    limit: Duration,
    known: &Known,
) -> Result<(), BrokerError> {
    let (channel, mode, problems) = (wire.channel().await?, config.mode, Vec::new());
    let mut check = Check { wire, channel, limit, mode, problems, known };
    for exchange in exchanges(names) {
        check.exchange(&exchange).await?;
    }
    // The target of dead letters comes before the queues that send them there.
    for queue in queues(names, config.delivery_limit) {
        check.queue(&queue).await?;
    }
    if check.problems.is_empty() && config.mode == TopologyMode::Declare {
        check.bind(&names.dead, &names.dead, "").await?;
        check.bind(&names.unrouted, &names.unrouted, "").await?;
        check.bind(&names.requests, &names.sync, SYNC_REQUESTED).await?;
    }
    if check.problems.is_empty() { Ok(()) } else { Err(BrokerError::Drift(check.problems.join("\n"))) }
}

fn exchanges(names: &Names) -> Vec<Exchange> {
    let plain = |name: &String, kind| Exchange { name: name.clone(), kind, arguments: FieldTable::default() };
    let mut events = plain(&names.events, ExchangeKind::Topic);
    events.arguments.insert("alternate-exchange".into(), text(&names.unrouted));
    vec![
        plain(&names.dead, ExchangeKind::Fanout),
        plain(&names.unrouted, ExchangeKind::Fanout),
        plain(&names.sync, ExchangeKind::Direct),
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
    // A dead letter leaves its queue only once the target has it; RabbitMQ asks for reject-publish with that.
    let at_least_once = [("x-dead-letter-strategy", text("at-least-once")), ("x-overflow", text("reject-publish"))];
    let limit = ("x-delivery-limit", AMQPValue::LongLongInt(i64::from(delivery_limit)));
    let any_looks = ("x-delivery-limit", AMQPValue::LongLongInt(ANY_NUMBER_OF_LOOKS));
    let kept = ("x-message-ttl", AMQPValue::LongLongInt(UNROUTED_KEPT_MS));
    let requests = [&at_least_once[..], &[limit, ("x-dead-letter-exchange", text(&names.dead))]].concat();
    let mut queues = vec![
        quorum(&names.dead, std::slice::from_ref(&any_looks)),
        quorum(&names.unrouted, &[any_looks, kept]),
        quorum(&names.requests, &requests),
    ];
    for tier in RetryTier::ALL {
        let wait_ms = i64::try_from(tier.seconds() * 1000).unwrap_or(i64::MAX);
        let back = [
            ("x-message-ttl", AMQPValue::LongLongInt(wait_ms)),
            ("x-dead-letter-exchange", text(&names.sync)),
            ("x-dead-letter-routing-key", text(SYNC_REQUESTED)),
        ];
        queues.push(quorum(&names.retry(tier), &[&at_least_once[..], &back].concat()));
    }
    queues
}

struct Check<'a> {
    wire: &'a Connection,
    channel: Channel,
    limit: Duration,
    mode: TopologyMode,
    problems: Vec<String>,
    known: &'a Known,
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
            let noted = self.problems.len();
            if !self.ask(queue, &what, *passive, &queue.arguments).await? {
                return self.look_further(queue, &what, noted).await;
            }
        }
        Ok(())
    }

    async fn ask(&mut self, queue: &Queue, what: &str, passive: bool, with: &FieldTable) -> Result<bool, BrokerError> {
        let options = QueueDeclareOptions { passive, ..QueueDeclareOptions::durable() };
        let answer = self.channel.queue_declare(queue.name.as_str().into(), options, with.clone());
        let answer = within(self.limit, "declaring queues", answer).await.map(drop);
        self.judge(what, passive, answer).await
    }

    /// The broker names one difference at a time, and agreeing to it brings out the next. That is done once for each
    /// first difference: a queue that is deleted at this moment, as it will be by someone who has read of it, would be
    /// made again with what was agreed to.
    async fn look_further(&mut self, queue: &Queue, what: &str, noted: usize) -> Result<(), BrokerError> {
        let Some(first) = self.problems.get(noted).cloned() else { return Ok(()) };
        let known = lock(self.known).get(&first).cloned();
        if let Some(others) = known {
            self.problems.extend(others);
            return Ok(());
        }
        let mut arguments = queue.arguments.clone();
        while let Some(agreed) = self.problems.last().and_then(|line| agree(&arguments, line)) {
            arguments = agreed;
            let is_there = self.ask(queue, what, true, &arguments).await?;
            if !is_there || self.ask(queue, what, false, &arguments).await? {
                break;
            }
        }
        lock(self.known).insert(first, self.problems[noted + 1..].to_vec());
        Ok(())
    }

    /// To verify is to ask passively whether it is there, and only then to compare, by declaring it as we know it:
    /// that changes nothing, and the broker names the first difference.
    fn steps(&self) -> &'static [bool] {
        match self.mode {
            TopologyMode::Declare => &[false],
            TopologyMode::Verify => &[true, false],
        }
    }

    async fn bind(&self, queue: &str, exchange: &str, key: &str) -> Result<(), BrokerError> {
        let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
        let answer = self.channel.queue_bind(queue.into(), exchange.into(), key.into(), options, arguments);
        within(self.limit, "binding queues", answer).await
    }

    /// Notes what does not fit and says whether to look further. A refusal closes the channel: the next step gets a
    /// new one.
    async fn judge(&mut self, what: &str, passive: bool, answer: Result<(), BrokerError>) -> Result<bool, BrokerError> {
        let Err(error) = answer else { return Ok(true) };
        let Some((code, words)) = refusal(&error) else { return Err(error) };
        self.channel = self.wire.channel().await?;
        match (code, self.mode) {
            (404, _) if passive => self.problems.push(format!("{what}: is missing")),
            // Who may not declare may not compare either: that it is there is all that can be known.
            (403, TopologyMode::Verify) if !passive => {}
            (403, _) => self.problems.push(format!(
                "{what}: this user may not declare it; set topology.mode = \"verify\" if others make it ({words})"
            )),
            _ => self.problems.push(format!("{what}: {}", difference(&words))),
        }
        Ok(false)
    }
}

/// The code and words of a broker that refused one operation but keeps the connection.
fn refusal(error: &BrokerError) -> Option<(u16, String)> {
    let BrokerError::Lost { source, .. } = error else { return None };
    let error = source.downcast_ref::<lapin::Error>()?;
    match error.kind() {
        ErrorKind::ProtocolError(refused) if error.is_amqp_soft_error() => {
            Some((refused.get_id(), refused.get_message().to_string()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_request_asks_soon_once_and_a_deferred_one_climbs_the_ladder() {
        let busy: Vec<u64> = (0..4).map(|retries| RetryTier::while_busy(retries).seconds()).collect();
        assert_eq!(busy, [5, 30, 30, 30]);
        let deferred: Vec<u64> = (0..6).map(|retries| RetryTier::while_deferred(retries).seconds()).collect();
        assert_eq!(deferred, [5, 30, 120, 600, 600, 600]);
    }

    #[test]
    fn every_name_has_the_prefix_and_dead_letters_have_a_target_declared_before_them() {
        let names = Names::new("blue.");
        let queues = queues(&names, 20);
        let order: Vec<&str> = queues.iter().map(|queue| queue.name.as_str()).collect();
        assert_eq!(order[0], "blue.inventory.dead");
        assert!(order.iter().all(|name| name.starts_with("blue.inventory.")));
        assert_eq!(order.last(), Some(&"blue.inventory.retry.10m"));
        for queue in &queues {
            assert_eq!(queue.arguments.inner().get("x-queue-type"), Some(&text("quorum")));
            let sends_dead_letters = queue.arguments.contains_key("x-dead-letter-exchange");
            assert_eq!(queue.arguments.contains_key("x-dead-letter-strategy"), sends_dead_letters, "{}", queue.name);
        }
    }
}
