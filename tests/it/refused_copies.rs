//! Copies that the broker refuses for good cost no other request anything.

use inventoryd::config::{TopologyMode, WhenFull};
use lapin::BasicProperties;
use lapin::options::{ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, ExchangeKind};
use serde_json::json;
use uuid::Uuid;

use crate::admission::{running, slow};
use crate::dead_letters::header;
use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::world::World;

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
