//! The broker module without a daemon: topology and its drift, outcomes of published messages, dead letters.

use std::collections::BTreeSet;
use std::time::Duration;

use inventoryd::broker::{
    Broker, BrokerError, DeadLetter, Delivery, Names, Outgoing, PublishOutcome, RetryTier, Subscription,
};
use inventoryd::config::{Config, TopologyMode};
use inventoryd::domain::failure::{DeadReason, Rejection};
use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, ExchangeDeleteOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use uuid::Uuid;

use crate::support::{DEADLINE, eventually, servers};

/// Broker under test with its own prefix, and a direct connection to the same server.
pub struct Rig {
    pub config: Config,
    pub broker: Broker,
    pub channel: Channel,
    connection: Connection,
}

impl Rig {
    pub async fn new() -> Self {
        let url = tokio::task::spawn_blocking(|| servers::rabbitmq().url.clone()).await.unwrap();
        Self::on(&url).await
    }

    pub async fn on(url: &str) -> Self {
        let prefix = format!("t{}.", Uuid::new_v4().simple());
        let variables = [
            ("BROKER__URL", url),
            ("TOPOLOGY__PREFIX", &prefix),
            ("BROKER__HEARTBEAT_S", "5"),
            ("BROKER__OPERATION_TIMEOUT_S", "3"),
            ("BROKER__CONNECT_TIMEOUT_S", "3"),
        ];
        let variables = variables.iter().map(|(key, value)| (format!("INVENTORYD__{key}"), (*value).to_owned()));
        let config = Config::load_with(None, variables.collect()).unwrap();
        let broker = Broker::new(&config.broker, &config.topology, "test").unwrap();
        let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { config, broker, channel, connection }
    }

    fn broker_with(&self, change: impl FnOnce(&mut Config)) -> Broker {
        let mut config = self.config.clone();
        change(&mut config);
        Broker::new(&config.broker, &config.topology, "test").unwrap()
    }

    pub fn names(&self) -> &Names {
        self.broker.names()
    }

    pub async fn publish(&self, body: &[u8], properties: BasicProperties) {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let (exchange, properties) = (self.names().sync.as_str().into(), properties.with_delivery_mode(2));
        let publish = self.channel.basic_publish(exchange, "sync.requested".into(), options, body, properties);
        let confirm = publish.await.unwrap().await.unwrap();
        assert!(confirm.is_ack() && confirm.take_message().is_none());
    }

    async fn depth(&self, queue: &str) -> u32 {
        let channel = self.connection.create_channel().await.unwrap();
        let options = QueueDeclareOptions::durable().passive();
        channel.queue_declare(queue.into(), options, FieldTable::default()).await.unwrap().message_count()
    }

    pub async fn delete_queue(&self, queue: &str) {
        self.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    }
}

pub fn event(key: &str) -> Outgoing {
    Outgoing::event(Uuid::new_v4(), key, "{}".to_owned(), Some("c"), Some("00-a-b-01"))
}

pub async fn next(subscription: &mut Subscription) -> Delivery {
    let next = tokio::time::timeout(DEADLINE, subscription.next()).await;
    next.expect("a delivery arrives").expect("the stream has not ended").expect("the connection is open")
}

fn strings(table: &[(&str, &str)]) -> FieldTable {
    let mut arguments = FieldTable::default();
    for (key, value) in table {
        arguments.insert((*key).into(), AMQPValue::LongString((*value).into()));
    }
    arguments
}

#[tokio::test(flavor = "multi_thread")]
async fn topology_declaration_is_idempotent() {
    let rig = Rig::new().await;
    let verify = rig.broker_with(|config| config.topology.mode = TopologyMode::Verify);
    let missing = verify.ensure_topology().await.unwrap_err();
    assert!(matches!(missing, BrokerError::Drift(_)));
    assert_eq!(missing.to_string().matches(": missing").count(), 14, "{missing}");
    rig.broker.ensure_topology().await.unwrap();
    rig.broker.ensure_topology().await.unwrap();
    verify.ensure_topology().await.unwrap();
    assert!(rig.broker.version().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn topology_drift_is_reported_and_changes_nothing() {
    let rig = Rig::new().await;
    rig.broker.ensure_topology().await.unwrap();
    let other = rig.broker_with(|config| config.topology.delivery_limit = 7).ensure_topology().await.unwrap_err();
    let problem = other.to_string();
    let line = problem.lines().nth(1).unwrap();
    assert!(line.starts_with(&format!("queue {}: ", rig.names().requests)), "{problem}");
    assert!(line.contains("inequivalent arg 'x-delivery-limit'"), "{problem}");

    let tier = rig.names().retry_queue(RetryTier::TwoMinutes);
    rig.delete_queue(&rig.names().requests).await;
    rig.delete_queue(&tier).await;
    let durable = QueueDeclareOptions::durable();
    rig.channel.queue_declare(rig.names().requests.as_str().into(), durable, FieldTable::default()).await.unwrap();
    let mut arguments = strings(&[("x-queue-type", "quorum"), ("x-dead-letter-exchange", &rig.names().sync)]);
    arguments.insert("x-message-ttl".into(), AMQPValue::LongInt(7));
    rig.channel.queue_declare(tier.as_str().into(), durable, arguments).await.unwrap();
    let verify = rig.broker_with(|config| config.topology.mode = TopologyMode::Verify);
    for broker in [&rig.broker, &verify] {
        let Err(drift @ BrokerError::Drift(_)) = broker.subscribe(4).await else {
            panic!("a classic queue is refused")
        };
        let drift = drift.to_string();
        assert_eq!(drift.lines().count(), 3, "one line for each queue that differs: {drift}");
        for queue in [&rig.names().requests, &tier] {
            let line = drift.lines().find(|line| line.starts_with(&format!("queue {queue}: "))).unwrap();
            assert!(line.contains("inequivalent arg 'x-"), "{drift}");
        }
    }
    let url = servers::rabbitmq().url.clone();
    let second = rig.broker_with(|config| config.broker.url = format!("amqp://127.0.0.1:1,{url}").into());
    assert!(matches!(second.ensure_topology().await, Err(BrokerError::Drift(_))), "the second host answers");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_flight_deliveries_can_be_settled_after_a_cancel() {
    let rig = Rig::new().await;
    let mut subscription = rig.broker.subscribe(4).await.unwrap();
    let mut seen = BTreeSet::new();
    for number in 0..6 {
        rig.publish(format!("{number}").as_bytes(), BasicProperties::default()).await;
    }
    let first = next(&mut subscription).await;
    assert!(subscription.widen(0).await.unwrap().is_empty());
    let in_flight = [first, next(&mut subscription).await];
    subscription.cancel().await.unwrap();
    let ready = || async { (subscription.ready().await.unwrap() == 4).then_some(()) };
    eventually("buffered deliveries are requeued, those in flight are not", ready).await;
    for delivery in in_flight {
        assert!(delivery.ack().await.unwrap());
        seen.insert(delivery.body.clone());
    }
    subscription.resume().await.unwrap();
    for _ in 0..4 {
        let delivery = next(&mut subscription).await;
        assert!(delivery.ack().await.unwrap());
        seen.insert(delivery.body.clone());
    }
    assert_eq!(seen.len(), 6);
    subscription.close(Duration::from_secs(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_queue_ends_the_stream_and_is_declared_again() {
    let rig = Rig::new().await;
    let mut subscription = rig.broker.subscribe(4).await.unwrap();
    rig.delete_queue(&rig.names().requests).await;
    let end = tokio::time::timeout(DEADLINE, subscription.next()).await.expect("the subscription ends");
    assert!(end.is_none());
    let mut again = rig.broker.subscribe(4).await.unwrap();
    rig.publish(b"x", BasicProperties::default()).await;
    assert!(next(&mut again).await.ack().await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn unroutable_events_of_a_batch_are_reported_individually() {
    let rig = Rig::new().await;
    let mut tail = rig.broker.tail_events("run.completed.success.#").await.unwrap();
    // The two hundred events are one batch, which takes long on a busy machine.
    let publisher = rig.broker_with(|config| config.broker.operation_timeout_s = 30).publisher();
    assert_eq!(publisher.publish(vec![event("run.completed.failed.t")]).await, [PublishOutcome::Confirmed]);
    assert_eq!(rig.depth(&rig.names().unrouted).await, 1, "the unrouted queue stores events without a subscriber");
    let unrouted = rig.names().unrouted.as_str().into();
    rig.channel.exchange_delete(unrouted, ExchangeDeleteOptions::default()).await.unwrap();
    for round in 0..10 {
        let fits = |number: usize| !(number * 7 + round).is_multiple_of(5);
        let key = |number| if fits(number) { "run.completed.success.t" } else { "run.completed.failed.t" };
        let expected: Vec<PublishOutcome> = (0..200)
            .map(|number| if fits(number) { PublishOutcome::Confirmed } else { PublishOutcome::Unroutable })
            .collect();
        assert_eq!(publisher.publish((0..200).map(|number| event(key(number))).collect()).await, expected);
    }
    assert_eq!(tail.next().await.unwrap().unwrap().routing_key, "run.completed.success.t");
    publisher.close().await;
    assert_eq!(
        publisher.publish(vec![event("run.completed.success.t")]).await,
        [PublishOutcome::Confirmed],
        "a closed publisher reconnects"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_retry_tier_is_declared_again() {
    let rig = Rig::new().await;
    let mut subscription = rig.broker.subscribe(2).await.unwrap();
    let publisher = rig.broker.publisher();
    rig.publish(b"x", BasicProperties::default()).await;
    let delivery = next(&mut subscription).await;
    assert!(subscription.widen(0).await.unwrap().is_empty());
    assert_eq!(publisher.publish(vec![event("run.completed.success.t")]).await, [PublishOutcome::Confirmed]);
    rig.delete_queue(&rig.names().retry_queue(RetryTier::FiveSeconds)).await;
    assert_eq!(publisher.schedule_retry(&delivery, RetryTier::FiveSeconds).await, PublishOutcome::Unroutable);
    assert_eq!(publisher.schedule_retry(&delivery, RetryTier::FiveSeconds).await, PublishOutcome::Confirmed);
    rig.broker.publish_request(b"{}".to_vec(), "application/json", None).await.unwrap();
    assert_eq!(next(&mut subscription).await.body, b"{}");
}

/// One dead letter rejected after a retry, and one that the broker dead-lettered at its delivery limit.
async fn two_dead_letters(rig: &Rig, subscription: &mut Subscription) {
    let publisher = rig.broker.publisher();
    // The broker refuses a copy with the user id of another user, and routes a copy with a CC to other queues.
    let mut headers = strings(&[("team", "blue")]);
    headers.insert("CC".into(), AMQPValue::FieldArray(vec![AMQPValue::LongString("nowhere".into())].into()));
    let properties = BasicProperties::default().with_headers(headers).with_message_id("m-1".into());
    rig.publish(b"\xff bad", properties.with_user_id("guest".into())).await;
    let delivery = next(subscription).await;
    assert_eq!(publisher.schedule_retry(&delivery, RetryTier::FiveSeconds).await, PublishOutcome::Confirmed);
    assert!(delivery.ack().await.unwrap());
    let retried = next(subscription).await;
    assert_eq!((retried.retries, retried.deferred_s), (1, 5));
    let rejection = Rejection::new(DeadReason::InvalidJson, "not JSON: line 1");
    assert_eq!(publisher.dead_letter(&retried, &rejection, "test").await, PublishOutcome::Confirmed);
    assert!(retried.ack().await.unwrap());
    rig.publish(b"poison", BasicProperties::default()).await;
    while rig.depth(&rig.names().dead).await < 2 {
        if let Ok(Some(Ok(delivery))) = tokio::time::timeout(Duration::from_millis(500), subscription.next()).await {
            delivery.fail().await.unwrap();
        }
    }
}

async fn list(rig: &Rig) -> Vec<DeadLetter> {
    let mut letters = rig.broker.dead_letters().await.unwrap();
    let list = letters.list(10, |_| true).await.unwrap();
    letters.close().await;
    list
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_listed_replayed_and_dropped() {
    let rig = Rig::new().await;
    let mut subscription = rig.broker.subscribe(2).await.unwrap();
    two_dead_letters(&rig, &mut subscription).await;
    for _ in 0..25 {
        let reasons: Vec<String> = list(&rig).await.into_iter().map(|letter| letter.reason).collect();
        assert_eq!(reasons, ["invalid_json", "delivery_limit"], "listing removes nothing");
    }
    let seen = list(&rig).await;
    assert_eq!(
        (seen[0].detail.as_deref(), seen[0].by.as_str(), seen[0].retries),
        (Some("not JSON: line 1"), "test", 1)
    );
    assert!(seen.iter().all(|letter| letter.at.is_some()) && seen[1].by == "broker");

    let mut letters = rig.broker.dead_letters().await.unwrap();
    let bad = letters.find(&seen[0].id[..8]).await.unwrap().unwrap();
    letters.replay(&bad).await.unwrap();
    letters.close().await;
    let replayed = next(&mut subscription).await;
    assert_eq!((replayed.body.as_slice(), replayed.retries), (&b"\xff bad"[..], 0));
    assert!(replayed.ack().await.unwrap());

    // The broker returns what was only read a moment after its channel has closed.
    let (mut letters, poison) = eventually("the other letter is returned", || async {
        let mut letters = rig.broker.dead_letters().await.unwrap();
        let poison = letters.next().await.unwrap()?;
        Some((letters, poison))
    })
    .await;
    assert_eq!(poison.body, b"poison");
    letters.discard(&poison).await.unwrap();
    assert!(letters.discard(&poison).await.is_err(), "a letter is discarded once");
    letters.close().await;
    assert_eq!(rig.depth(&rig.names().dead).await, 0);
}
