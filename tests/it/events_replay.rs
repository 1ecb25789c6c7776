//! `events replay`: a subscriber that was away for longer than its queue kept events receives the same events again.

use std::process::Output;

use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use crate::support::daemon::Replica;
use crate::support::events::Subscriber;
use crate::support::eventually;
use crate::support::world::World;

async fn replay(world: &World, arguments: &[&str]) -> Output {
    let mut command = world.command(&[&["events", "replay"], arguments].concat());
    let output = spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    output
}

/// The events that arrive, once there are `count` of them, by id.
async fn arrived(events: &Subscriber, count: usize) -> Vec<Value> {
    eventually("the events arrive", || async { (events.received().len() >= count).then_some(()) }).await;
    events.distinct().into_values().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn replayed_events_are_those_that_were_published() {
    let world = World::new().await;
    let other = Uuid::new_v4();
    world.register(other, None).await;
    let replica = Replica::start(&world).await;
    let events = world.subscribe().await;
    let before = world.rows("select to_char(now() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') as t").await;
    let before = before[0]["t"].as_str().unwrap().to_owned();
    world.sync("success", &["mobileApp"]).await;
    world.sync("partial", &["mobileApp", "noSuchType"]).await;
    world.publish(&World::request_of(other, "other", &["deviceShellScript"])).await;
    world.ended("other").await;
    let published = arrived(&events, 3).await;
    replica.stop().await;

    // A replay needs no running daemon.
    let again = world.subscribe().await;
    replay(&world, &["--since", &before]).await;
    assert_eq!(arrived(&again, 3).await, published, "the same events, word for word");
    assert_eq!(again.received().len(), 3, "once each");

    let of_tenant = world.subscribe().await;
    replay(&world, &["--since", &before, "--tenant", &other.to_string()]).await;
    let events = arrived(&of_tenant, 1).await;
    assert_eq!((events.len(), &events[0]["data"]["idempotency_key"]), (1, &json!("other")));

    let partial = world.subscribe().await;
    replay(&world, &["--since", &before, "--status", "partial"]).await;
    let events = arrived(&partial, 1).await;
    assert_eq!((events.len(), &events[0]["data"]["idempotency_key"]), (1, &json!("partial")));

    let none = world.subscribe().await;
    replay(&world, &["--since", &before, "--until", &before]).await;
    assert_eq!(none.received(), Vec::<Value>::new());
    assert_eq!(again.received().len(), 5, "every subscriber of the exchange gets what is replayed to it");
}
