//! Copies that the broker refuses for good cost no other request anything.

use std::ops::RangeInclusive;

use inventoryd::config::{TopologyMode, WhenFull};
use lapin::BasicProperties;
use lapin::options::{ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, ExchangeKind};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::admission::{running, slow};
use crate::dead_letters::header;
use crate::policies::{Policy, put};
use crate::support::daemon::{Process, Replica};
use crate::support::eventually;
use crate::support::servers::free_port;
use crate::support::world::World;

const DEAD: &str = "inventory.dead";

async fn channel(world: &World) -> (Connection, Channel) {
    let connection = Connection::connect(&world.amqp_url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_fill_a_frame_are_dropped_from_the_dead_letter() {
    let world = World::new().await;
    let replica = Replica::start(&world).await;
    let count = 8;
    for index in 0..count {
        let mut headers = FieldTable::default();
        headers.insert("large".into(), AMQPValue::LongString("x".repeat(130_900).into()));
        headers.insert("team".into(), AMQPValue::LongString("blue".into()));
        let request = World::request_of(Uuid::new_v4(), &format!("stranger-{index}"), &["mobileApp"]);
        let properties = BasicProperties::default().with_headers(headers);
        world.publish_bytes(request.to_string().as_bytes(), properties).await;
    }
    for index in 0..4 {
        assert_eq!(world.sync(&format!("good-{index}"), &["mobileApp"]).await["attempt"], 1);
    }
    for _ in 0..count {
        let letter = eventually("a dead letter arrives", || world.take("inventory.dead")).await;
        assert_eq!(header(&letter, "x-dead-reason").as_deref(), Some("unknown_tenant"));
        assert_eq!(header(&letter, "team").as_deref(), Some("blue"), "small headers stay");
        assert_eq!(header(&letter, "large"), None);
    }
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_that_the_broker_refuses_is_held_without_a_slot() {
    let world = World::new().await;
    Replica::start(&world).await.stop().await;
    let retry = format!("{}inventory.retry", world.prefix);
    let (_connection, channel) = channel(&world).await;
    channel.exchange_delete(retry.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();
    world.sim.add_rule(slow(50_000));
    let mut config = world.config();
    config.topology.mode = TopologyMode::Verify;
    config.limits.when_full = WhenFull::Defer;
    config.consumer.prefetch = 2;
    let replica = Replica::with(config).await;
    // Verification reports the missing exchange and does not subscribe: declared late, it is deleted while running.
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let declare = async || {
        let arguments = FieldTable::default();
        channel.exchange_declare(retry.as_str().into(), ExchangeKind::Direct, durable, arguments).await.unwrap();
        let (queue, options) = (format!("{retry}.5s"), QueueBindOptions::default());
        channel
            .queue_bind(queue.into(), retry.as_str().into(), "5s".into(), options, FieldTable::default())
            .await
            .unwrap();
    };
    declare().await;
    let health = replica.daemon().health();
    eventually("it subscribes", || async { health.subscribed().then_some(()) }).await;
    channel.exchange_delete(retry.as_str().into(), ExchangeDeleteOptions::default()).await.unwrap();

    world.publish(&world.request("first", &["mobileApp"])).await;
    running(&world, "first").await;
    // More deferred requests than slots.
    for index in 0..4 {
        world.publish(&world.request(&format!("deferred-{index}"), &["mobileApp"])).await;
    }
    eventually("all are held", || async { (health.held() == 4).then_some(()) }).await;
    world.sim.remove_rules(None);
    let other = Uuid::new_v4();
    world.register(other, None).await;
    world.publish(&World::request_of(other, "other", &["mobileApp"])).await;
    assert_eq!(world.ended("other").await["status"], json!("success"), "good work goes on");
    assert!(world.take("inventory.dead").await.is_none());
    declare().await;
    eventually("none is held once the cause is removed", || async { (health.held() == 0).then_some(()) }).await;
    for index in 0..4 {
        assert_eq!(world.ended(&format!("deferred-{index}")).await["status"], json!("success"));
    }
    replica.stop().await;
}

/// Page of a replica's HTTP server, once it responds.
async fn page(listen: &str, path: &str) -> Option<String> {
    reqwest::get(format!("http://{listen}{path}")).await.ok()?.text().await.ok()
}

/// Waits until a replica reports such a number of held deliveries in `/status` and in its metric.
async fn held(listen: &str, wanted: RangeInclusive<u64>) {
    eventually(&format!("{wanted:?} deliveries are held"), || async {
        let status: Value = serde_json::from_str(&page(listen, "/status").await?).ok()?;
        let problems = status["problems"].as_array()?;
        let named = problems.iter().any(|problem| problem["component"] == "held_deliveries");
        let held = status["held"].as_u64()?;
        let metrics = page(listen, "/metrics").await?;
        let metric = metrics.lines().find_map(|line| line.strip_prefix("inventoryd_deliveries_held "))?.parse().ok()?;
        (wanted.contains(&held) && wanted.contains(&metric) && named == (held > 0)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_that_do_not_fit_are_held_without_a_slot_or_kept_by_the_broker() {
    let world = World::new().await;
    for body in [b"one", b"two"] {
        put(&world, DEAD, body).await;
    }
    let full = json!({ "max-length": 1, "overflow": "reject-publish" });
    let policy = Policy::set(&world, "inventory\\.dead$", full).await;
    let listen = format!("127.0.0.1:{}", free_port());
    // Held for longer than the test.
    let settings =
        [("HTTP__LISTEN", listen.as_str()), ("CONSUMER__PREFETCH", "64"), ("CONSUMER__BROKER_TIMEOUT_S", "9000")];
    let _replica = Process::start(&world, "full", &settings);
    // More than are held at most.
    let (count, most) = (270, 256);
    for index in 0..count {
        world.publish(&World::request_of(Uuid::new_v4(), &format!("stranger-{index}"), &["mobileApp"])).await;
    }
    held(&listen, most..=count - 1).await;
    let events = world.subscribe().await;
    for index in 0..2 {
        let run = world.sync(&format!("good-{index}"), &["mobileApp"]).await;
        assert_eq!(run["attempt"], 1, "good work goes on");
        events.event_of(&run).await;
    }
    let status: Value = serde_json::from_str(&page(&listen, "/status").await.unwrap()).unwrap();
    for server in ["rabbitmq", "postgresql"] {
        assert_eq!(status["servers"][server]["tested"], true, "{status}");
    }
    let ready = reqwest::get(format!("http://{listen}/readyz")).await.unwrap().status();
    assert!(ready.is_success(), "{ready}");
    assert_eq!(world.depth(DEAD).await, 2);
    tokio::task::spawn_blocking(move || drop(policy)).await.unwrap();
    held(&listen, 0..=0).await;
    let mut reasons = Vec::new();
    while let Some(letter) = world.take(DEAD).await {
        reasons.extend(header(&letter, "x-dead-reason"));
    }
    assert!(reasons.len() as u64 >= most && reasons.iter().all(|reason| reason == "unknown_tenant"), "{reasons:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_held_for_too_long_is_kept_by_the_broker_and_not_delivered_again() {
    let world = World::new().await;
    for body in [b"one", b"two"] {
        put(&world, DEAD, body).await;
    }
    let _policy =
        Policy::set(&world, "inventory\\.dead$", json!({ "max-length": 1, "overflow": "reject-publish" })).await;
    let listen = format!("127.0.0.1:{}", free_port());
    // Deliveries are held for a third of what the broker waits beyond the longest run: 10 s.
    let settings = [("HTTP__LISTEN", listen.as_str()), ("RUN__DEADLINE_S", "60"), ("CONSUMER__BROKER_TIMEOUT_S", "90")];
    let _replica = Process::start(&world, "full", &settings);
    world.publish(&World::request_of(Uuid::new_v4(), "stranger", &["mobileApp"])).await;
    held(&listen, 1..=1).await;
    held(&listen, 0..=0).await;
    let metrics = page(&listen, "/metrics").await.unwrap();
    let settled =
        metrics.lines().filter(|line| line.starts_with("inventoryd_deliveries_total") && !line.ends_with(" 0"));
    assert_eq!(settled.collect::<Vec<_>>(), ["inventoryd_deliveries_total{outcome=\"rejected\"} 1"]);
    assert_eq!((world.depth("inventory.sync.requests").await, world.depth(DEAD).await), (0, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_that_does_not_fit_is_held_without_a_slot() {
    let world = World::new().await;
    let policy =
        Policy::set(&world, "inventory\\.retry\\.", json!({ "max-length": 0, "overflow": "reject-publish" })).await;
    world.sim.add_rule(slow(600_000).tenant(world.tenant));
    let mut config = world.config();
    config.limits.when_full = WhenFull::Defer;
    config.consumer.prefetch = 2;
    let replica = Replica::with(config).await;
    let health = replica.daemon().health();
    world.publish(&world.request("first", &["mobileApp"])).await;
    running(&world, "first").await;
    // A queue over its limit takes one copy whenever it is empty: the others are held, which are more than slots.
    for index in 0..6 {
        world.publish(&world.request(&format!("deferred-{index}"), &["mobileApp"])).await;
    }
    eventually("more are held than there are slots", || async { (health.held() > 2).then_some(()) }).await;
    let other = Uuid::new_v4();
    world.register(other, None).await;
    world.publish(&World::request_of(other, "other", &["mobileApp"])).await;
    assert_eq!(world.ended("other").await["status"], json!("success"), "good work goes on");
    tokio::task::spawn_blocking(move || drop(policy)).await.unwrap();
    eventually("none is held once the policy is removed", || async { (health.held() == 0).then_some(()) }).await;
    let queues = ["5s", "30s", "2m", "10m"].map(|tier| format!("inventory.retry.{tier}"));
    eventually("each waits in a retry queue", || async {
        let mut waiting = 0;
        for queue in &queues {
            waiting += world.depth(queue).await;
        }
        (waiting == 6).then_some(())
    })
    .await;
    world.sim.remove_rules(None);
    assert_eq!(world.ended("first").await["attempt"], 1);
    assert!(world.take(DEAD).await.is_none());
    replica.stop().await;
}
