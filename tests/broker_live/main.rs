//! The broker room against a private RabbitMQ that the test may break: `INVENTORYD_BROKER_LIVE=DIR` names the folder of
//! a running `deploy/instance rabbitmq`. Run with `--test-threads=1`.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use inventoryd::broker::{Broker, BrokerError, Fate, Outgoing, Rung};
use inventoryd::config::{Config, TopologyMode};
use inventoryd::domain::failure::{DeadReason, Rejection};
use lapin::options::*;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use uuid::Uuid;

fn dir() -> Option<String> {
    std::env::var("INVENTORYD_BROKER_LIVE").ok()
}

fn instance(arguments: &[&str]) -> String {
    let mut all = vec!["rabbitmq", arguments[0]];
    let folder = dir().unwrap();
    all.push(&folder);
    all.extend(&arguments[1..]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/instance");
    let output = Command::new(script).args(&all).output().unwrap();
    assert!(output.status.success(), "{all:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

struct Rig {
    config: Config,
    broker: Broker,
    channel: Channel,
    connection: Connection,
}

impl Rig {
    async fn new() -> Option<Self> {
        dir()?;
        let url = instance(&["url"]);
        let prefix = format!("t{}.", Uuid::new_v4().simple());
        let vars = [
            ("INVENTORYD__BROKER__URL", url.as_str()),
            ("INVENTORYD__TOPOLOGY__PREFIX", &prefix),
            ("INVENTORYD__BROKER__HEARTBEAT_S", "5"),
            ("INVENTORYD__BROKER__OPERATION_TIMEOUT_S", "3"),
            ("INVENTORYD__BROKER__CONNECT_TIMEOUT_S", "3"),
        ];
        let vars = vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let config = Config::load_with(None, vars).unwrap();
        let broker = Broker::new(&config.broker, &config.topology, "live-test").unwrap();
        let connection = Connection::connect(&url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Some(Self { config, broker, channel, connection })
    }

    fn broker_with(&self, change: impl FnOnce(&mut Config)) -> Broker {
        let mut config = self.config.clone();
        change(&mut config);
        Broker::new(&config.broker, &config.topology, "live-test").unwrap()
    }

    async fn publish(&self, body: &[u8], properties: BasicProperties) {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let exchange = self.broker.names().sync.as_str().into();
        let confirm = self
            .channel
            .basic_publish(exchange, "sync.requested".into(), options, body, properties.with_delivery_mode(2))
            .await
            .unwrap()
            .await
            .unwrap();
        assert!(confirm.is_ack() && confirm.take_message().is_none());
    }

    async fn depth(&self, queue: &str) -> u32 {
        let channel = self.connection.create_channel().await.unwrap();
        let options = QueueDeclareOptions::durable().passive();
        channel.queue_declare(queue.into(), options, FieldTable::default()).await.unwrap().message_count()
    }
}

fn event(key: &str) -> (Uuid, Outgoing) {
    let id = Uuid::new_v4();
    (id, Outgoing::event(id, key, "{}".to_owned(), Some("c"), Some("00-a-b-01")))
}

#[tokio::test(flavor = "multi_thread")]
async fn topology_is_made_twice_and_drift_is_told() {
    let Some(rig) = Rig::new().await else { return };
    let verify = rig.broker_with(|c| c.topology.mode = TopologyMode::Verify);
    let missing = verify.ensure_topology().await.unwrap_err();
    println!("MISSING: {missing}");
    assert!(matches!(missing, BrokerError::Drift(_)) && missing.to_string().contains("is missing"));
    rig.broker.ensure_topology().await.unwrap();
    rig.broker.ensure_topology().await.unwrap();
    verify.ensure_topology().await.unwrap();
    println!("version {:?}", rig.broker.version());
    let names = rig.broker.names().clone();
    let other = rig.broker_with(|c| c.topology.delivery_limit = 7);
    println!("LIMIT: {:?}", other.ensure_topology().await);
    rig.channel.queue_delete(names.requests.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    rig.channel
        .queue_declare(names.requests.as_str().into(), QueueDeclareOptions::durable(), FieldTable::default())
        .await
        .unwrap();
    rig.channel
        .queue_delete(names.retry(Rung::TwoMinutes).as_str().into(), QueueDeleteOptions::default())
        .await
        .unwrap();
    let mut args = FieldTable::default();
    args.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    args.insert("x-message-ttl".into(), AMQPValue::LongInt(7));
    args.insert("x-dead-letter-exchange".into(), AMQPValue::LongString(names.sync.as_str().into()));
    rig.channel
        .queue_declare(names.retry(Rung::TwoMinutes).as_str().into(), QueueDeclareOptions::durable(), args)
        .await
        .unwrap();
    for broker in [&rig.broker, &verify] {
        let drift = broker.ensure_topology().await.unwrap_err();
        println!("DRIFT: {drift}");
        assert!(matches!(drift, BrokerError::Drift(_)));
        assert!(drift.to_string().contains("x-queue-type"), "{drift}");
        assert!(
            drift.to_string().contains("x-message-ttl is 7 on the broker, the configuration wants 120000"),
            "{drift}"
        );
        assert!(matches!(broker.subscribe(4).await, Err(BrokerError::Drift(_))));
    }
    let wrong =
        rig.broker_with(|c| c.broker.url = "amqp://guest:hunter2@127.0.0.1:1/,amqp://guest:hunter2@127.0.0.1:2".into());
    let error = wrong.ensure_topology().await.unwrap_err().to_string();
    println!("AWAY: {error}");
    let url = instance(&["url"]).replace("guest:guest", "guest:hunter2");
    let wrong = rig.broker_with(|c| c.broker.url = url.clone().into());
    let error = wrong.ensure_topology().await.unwrap_err().to_string();
    println!("LOGIN: {error}");
    assert!(!error.contains("hunter2"));
    let wrong = rig.broker_with(|c| c.broker.url = instance(&["url"]).replace("%2f", "nosuch").into());
    println!("VHOST: {}", wrong.ensure_topology().await.unwrap_err());
    let second = rig.broker_with(|c| c.broker.url = format!("amqp://127.0.0.1:1,{}", instance(&["url"])).into());
    assert!(matches!(second.ensure_topology().await, Err(BrokerError::Drift(_))), "the second host is tried");
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_are_taken_four_at_a_time() {
    let Some(rig) = Rig::new().await else { return };
    let mut subscription = rig.broker.subscribe(4).await.unwrap();
    for n in 0..50 {
        rig.publish(format!("m{n}").as_bytes(), BasicProperties::default()).await;
    }
    let mut seen = BTreeSet::new();
    while seen.len() < 50 {
        let mut hand = Vec::new();
        while let Ok(Some(delivery)) = tokio::time::timeout(Duration::from_millis(150), subscription.next()).await {
            hand.push(delivery.unwrap());
            assert!(hand.len() <= 4);
        }
        assert!(!hand.is_empty());
        for delivery in hand {
            assert!(seen.insert(delivery.body.clone()));
            assert!(delivery.ack().await.unwrap());
        }
    }
    assert_eq!(subscription.ready().await.unwrap(), 0);
    rig.publish(b"later", BasicProperties::default()).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    subscription.cancel().await.unwrap();
    assert_eq!(subscription.ready().await.unwrap(), 1);
    subscription.resume().await.unwrap();
    let later = subscription.next().await.unwrap().unwrap();
    assert!(later.redelivered && later.usable());
    subscription.cancel().await.unwrap();
    assert!(later.ack().await.unwrap(), "settled after the consumer was cancelled");
    subscription.close(Duration::from_secs(2)).await;
    assert!(!later.usable());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_queue_ends_the_stream() {
    let Some(rig) = Rig::new().await else { return };
    let mut subscription = rig.broker.subscribe(4).await.unwrap();
    rig.channel.queue_delete(rig.broker.names().requests.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    let end = tokio::time::timeout(Duration::from_secs(5), subscription.next()).await.unwrap();
    println!("END {:?}", end.as_ref().map(|e| e.as_ref().map(|_| ()).map_err(ToString::to_string)));
    assert!(end.is_none());
    drop(subscription);
    let mut again = rig.broker.subscribe(4).await.unwrap();
    rig.publish(b"x", BasicProperties::default()).await;
    assert!(again.next().await.unwrap().unwrap().ack().await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unroutable_one_in_a_batch_is_known_by_its_id() {
    let Some(rig) = Rig::new().await else { return };
    rig.broker.ensure_topology().await.unwrap();
    let publisher = rig.broker.publisher();
    let names = rig.broker.names().clone();
    let mut tail = rig.broker.tail_events("run.completed.success.#").await.unwrap();
    // With the net in place the event is stored as unrouted and so confirmed.
    let (_, net) = event("run.completed.failed.t");
    assert_eq!(publisher.publish(vec![net]).await, [Fate::Confirmed]);
    assert_eq!(rig.depth(&names.unrouted).await, 1);
    rig.channel.exchange_delete(names.unrouted.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
    for round in 0..20 {
        let mut expected = Vec::new();
        let mut batch = Vec::new();
        for n in 0..200 {
            let fits = (n * 7 + round) % 5 != 0;
            let (_, message) = event(if fits { "run.completed.success.t" } else { "run.completed.failed.t" });
            expected.push(if fits { Fate::Confirmed } else { Fate::Unroutable });
            batch.push(message);
        }
        assert_eq!(publisher.publish(batch).await, expected, "round {round}");
    }
    let first = tail.next().await.unwrap().unwrap();
    assert_eq!(first.routing_key, "run.completed.success.t");
    publisher.close().await;
    let (_, message) = event("run.completed.success.t");
    assert_eq!(publisher.publish(vec![message]).await, [Fate::Confirmed], "it opens again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_is_survived_by_what_was_confirmed() {
    let Some(rig) = Rig::new().await else { return };
    let mut subscription = rig.broker.subscribe(4).await.unwrap();
    let publisher = rig.broker.publisher();
    rig.publish(b"before", BasicProperties::default()).await;
    let held = subscription.next().await.unwrap().unwrap();
    let (_, message) = event("run.completed.success.t");
    assert_eq!(publisher.publish(vec![message]).await, [Fate::Confirmed]);
    instance(&["kill"]);
    let begun = Instant::now();
    let end = tokio::time::timeout(Duration::from_secs(15), subscription.next()).await.expect("the loss is noticed");
    println!("LOSS after {:?}: {:?}", begun.elapsed(), end.map(|e| e.map(|_| ()).map_err(|e| e.to_string())));
    println!("ACK {:?} usable {}", held.ack().await, held.usable());
    let (_, message) = event("run.completed.success.t");
    let begun = Instant::now();
    println!("PUBLISH while away: {:?} after {:?}", publisher.publish(vec![message]).await, begun.elapsed());
    let away = rig.broker.subscribe(4).await;
    println!("SUBSCRIBE while away: {}", away.err().unwrap());
    instance(&["start"]);
    let mut again = rig.broker.subscribe(4).await.unwrap();
    let back = tokio::time::timeout(Duration::from_secs(10), again.next()).await.unwrap().unwrap().unwrap();
    assert_eq!((back.body.as_slice(), back.redelivered), (&b"before"[..], true));
    assert!(back.ack().await.unwrap());
    let (_, message) = event("run.completed.success.t");
    assert_eq!(publisher.publish(vec![message]).await, [Fate::Confirmed]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_broker_is_noticed_and_left() {
    let Some(rig) = Rig::new().await else { return };
    let mut subscription = rig.broker.subscribe(4).await.unwrap();
    let publisher = rig.broker.publisher();
    let (_, message) = event("run.completed.success.t");
    assert_eq!(publisher.publish(vec![message]).await, [Fate::Confirmed]);
    instance(&["pause"]);
    let (_, message) = event("run.completed.success.t");
    let begun = Instant::now();
    let fates = publisher.publish(vec![message]).await;
    println!("FROZEN publish {fates:?} after {:?}", begun.elapsed());
    assert_eq!(fates, [Fate::Unknown]);
    let begun = Instant::now();
    let end = tokio::time::timeout(Duration::from_secs(20), subscription.next())
        .await
        .expect("missing heartbeats are noticed");
    println!("FROZEN loss after {:?}: {:?}", begun.elapsed(), end.map(|e| e.map(|_| ()).map_err(|e| e.to_string())));
    let begun = Instant::now();
    drop(subscription);
    println!("SUBSCRIBE frozen: {} after {:?}", rig.broker.subscribe(4).await.err().unwrap(), begun.elapsed());
    let threads = || {
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter(|t| {
                std::fs::read_to_string(t.as_ref().unwrap().path().join("comm"))
                    .unwrap_or_default()
                    .starts_with("lapin-io")
            })
            .count()
    };
    println!("io threads: {}", threads());
    instance(&["resume"]);
    let (_, message) = event("run.completed.success.t");
    let mut fates = publisher.publish(vec![message]).await;
    for _ in 0..10 {
        if fates == [Fate::Confirmed] {
            break;
        }
        let (_, message) = event("run.completed.success.t");
        fates = publisher.publish(vec![message]).await;
    }
    assert_eq!(fates, [Fate::Confirmed]);
    rig.broker.subscribe(4).await.unwrap().close(Duration::from_secs(1)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    println!("io threads at the end: {} (ours and the test's own)", threads());
    assert!(threads() <= 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_memory_alarm_blocks_publishing_and_not_consuming() {
    let Some(rig) = Rig::new().await else { return };
    let mut subscription = rig.broker.subscribe(4).await.unwrap();
    let publisher = rig.broker.publisher();
    rig.publish(b"one", BasicProperties::default()).await;
    rig.publish(b"two", BasicProperties::default()).await;
    let (_, message) = event("run.completed.success.t");
    assert_eq!(publisher.publish(vec![message]).await, [Fate::Confirmed]);
    instance(&["ctl", "set_vm_memory_high_watermark", "0"]);
    let mut fates = Vec::new();
    for _ in 0..3 {
        let begun = Instant::now();
        let (_, message) = event("run.completed.success.t");
        let fate = publisher.publish(vec![message]).await[0];
        println!("ALARM publish {fate:?} after {:?}, blocked {}", begun.elapsed(), publisher.blocked());
        fates.push(fate);
    }
    assert!(publisher.blocked());
    assert_eq!(fates, [Fate::Unknown, Fate::Refused, Fate::Refused]);
    for _ in 0..2 {
        let delivery =
            tokio::time::timeout(Duration::from_secs(3), subscription.next()).await.unwrap().unwrap().unwrap();
        assert!(delivery.ack().await.unwrap(), "acks go through");
    }
    assert_eq!(subscription.ready().await.unwrap(), 0);
    let begun = Instant::now();
    publisher.close().await;
    println!("ALARM close after {:?}", begun.elapsed());
    instance(&["ctl", "set_vm_memory_high_watermark", "0.6"]);
    let (_, message) = event("run.completed.success.t");
    let mut fate = publisher.publish(vec![message]).await[0];
    if fate != Fate::Confirmed {
        println!("after the alarm first {fate:?}");
        let (_, message) = event("run.completed.success.t");
        fate = publisher.publish(vec![message]).await[0];
    }
    assert_eq!(fate, Fate::Confirmed);
    assert!(!publisher.blocked());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_that_ends_unblocks_the_same_connection() {
    let Some(rig) = Rig::new().await else { return };
    let publisher = rig.broker.publisher();
    let (_, message) = event("run.completed.success.t");
    assert_eq!(publisher.publish(vec![message]).await, [Fate::Confirmed]);
    instance(&["ctl", "set_vm_memory_high_watermark", "0"]);
    let (_, message) = event("run.completed.success.t");
    assert_eq!(publisher.publish(vec![message]).await, [Fate::Unknown]);
    assert!(publisher.blocked());
    instance(&["ctl", "set_vm_memory_high_watermark", "0.6"]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!publisher.blocked(), "noticed while idle");
    let (_, message) = event("run.completed.success.t");
    assert_eq!(publisher.publish(vec![message]).await, [Fate::Confirmed]);
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_looked_at_replayed_and_dropped() {
    let Some(rig) = Rig::new().await else { return };
    let names = rig.broker.names().clone();
    let mut subscription = rig.broker.subscribe(2).await.unwrap();
    let publisher = rig.broker.publisher();
    let mut headers = FieldTable::default();
    headers.insert("tenant-team".into(), AMQPValue::LongString("blue".into()));
    headers.insert("CC".into(), AMQPValue::FieldArray(vec![AMQPValue::LongString("nowhere".into())].into()));
    let properties = BasicProperties::default()
        .with_headers(headers)
        .with_message_id("m-1".into())
        .with_user_id("guest".into())
        .with_content_type("application/json".into());
    rig.publish(b"\xff bad", properties).await;
    let delivery = subscription.next().await.unwrap().unwrap();
    assert_eq!(publisher.park(&delivery, Rung::FiveSeconds).await, Fate::Confirmed);
    assert!(delivery.ack().await.unwrap());
    let begun = Instant::now();
    let parked = subscription.next().await.unwrap().unwrap();
    println!(
        "PARKED for {:?}: retries {} deferred {} redelivered {}",
        begun.elapsed(),
        parked.retries,
        parked.deferred_s,
        parked.redelivered
    );
    assert_eq!((parked.retries, parked.deferred_s), (1, 5));
    let rejection = Rejection::new(DeadReason::InvalidJson, "not JSON: line 1");
    assert_eq!(publisher.bury(&parked, &rejection, "live-test").await, Fate::Confirmed);
    assert!(parked.ack().await.unwrap());
    rig.publish(b"poison", BasicProperties::default().with_content_type("application/json".into())).await;
    let mut tries = 0;
    while let Ok(Some(Ok(delivery))) = tokio::time::timeout(Duration::from_secs(3), subscription.next()).await {
        tries += 1;
        delivery.fail().await.unwrap();
    }
    println!("POISON delivered {tries} times");
    assert!((20..=22).contains(&tries));
    for _ in 0..25 {
        let mut letters = rig.broker.dead_letters().await.unwrap();
        let list = letters.list(10).await.unwrap();
        assert_eq!(list.len(), 2, "looking takes nothing away");
        letters.close().await;
    }
    let mut letters = rig.broker.dead_letters().await.unwrap();
    let list = letters.list(10).await.unwrap();
    for letter in &list {
        println!(
            "DEAD {} {} {:?} {:?} {} {:?} retries {}",
            letter.id, letter.reason, letter.detail, letter.at, letter.by, letter.message_id, letter.retries
        );
    }
    let reasons: Vec<&str> = list.iter().map(|letter| letter.reason.as_str()).collect();
    assert_eq!(reasons, ["invalid_json", "delivery_limit"]);
    letters.close().await;
    let mut letters = rig.broker.dead_letters().await.unwrap();
    let bad = letters.find(&list[0].id[..8]).await.unwrap().unwrap();
    assert_eq!(bad.body, b"\xff bad");
    letters.replay(&bad).await.unwrap();
    letters.close().await;
    let replayed = subscription.next().await.unwrap().unwrap();
    assert_eq!(
        (replayed.body.as_slice(), replayed.retries, replayed.deferred_s, replayed.redelivered),
        (&b"\xff bad"[..], 0, 0, false)
    );
    println!("REPLAYED {replayed:?}");
    assert!(replayed.ack().await.unwrap());
    let mut letters = rig.broker.dead_letters().await.unwrap();
    let poison = letters.next().await.unwrap().unwrap();
    assert_eq!(poison.reason, "delivery_limit");
    letters.discard(&poison).await.unwrap();
    assert!(letters.discard(&poison).await.is_err());
    letters.close().await;
    assert_eq!(rig.depth(&names.dead).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_rung_is_made_again() {
    let Some(rig) = Rig::new().await else { return };
    let names = rig.broker.names().clone();
    let mut subscription = rig.broker.subscribe(2).await.unwrap();
    let publisher = rig.broker.publisher();
    rig.publish(b"x", BasicProperties::default()).await;
    let delivery = subscription.next().await.unwrap().unwrap();
    let (_, message) = event("run.completed.success.t");
    publisher.publish(vec![message]).await;
    rig.channel
        .queue_delete(names.retry(Rung::FiveSeconds).as_str().into(), QueueDeleteOptions::default())
        .await
        .unwrap();
    assert_eq!(publisher.park(&delivery, Rung::FiveSeconds).await, Fate::Unroutable);
    assert_eq!(publisher.park(&delivery, Rung::FiveSeconds).await, Fate::Confirmed);
    rig.broker.publish_request(b"{}".to_vec(), "application/json", None).await.unwrap();
    assert_eq!(subscription.next().await.unwrap().unwrap().body, b"{}");
}
