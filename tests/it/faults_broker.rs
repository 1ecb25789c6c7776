//! Broker faults under load: restarts, closed connections, alarms, topology drift. Each test that breaks a whole broker
//! starts a private one.

use std::time::Duration;

use lapin::options::{QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties};
use serde_json::{Value, json};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep;

use crate::sim::{Rule, SimConfig};
use crate::support::daemon::{Process, Replica};
use crate::support::events::Subscriber;
use crate::support::scheduler::{Scheduler, requests};
use crate::support::servers::{self, Private};
use crate::support::world::World;
use crate::support::{eventually, invariants, within};

const ONE_TYPE: &[&str] = &["mobileApp"];

async fn world_on(url: &str) -> World {
    let postgres = spawn_blocking(|| servers::postgres().url.clone()).await.unwrap();
    let world = World::on(SimConfig::default(), &postgres, url).await;
    invariants::record_history(&world).await;
    world
}

fn slow(path: Option<&str>, delay_ms: u64) -> Rule {
    let mut rule = json!({ "action": { "kind": "slow", "delay_ms": delay_ms } });
    if let Some(path) = path {
        rule["path"] = json!(path);
    }
    serde_json::from_value(rule).unwrap()
}

/// Publishes in the background, one request every `pause`.
fn publish_all(urls: &[&str], world: &World, requests: Vec<Value>, pause: Duration) -> JoinHandle<()> {
    let mut scheduler = Scheduler::on(urls, &world.prefix);
    tokio::spawn(async move {
        for request in requests {
            scheduler.publish(&request).await;
            sleep(pause).await;
        }
    })
}

async fn ended_at_least(world: &World, count: i64) {
    let ended = "select count(*) from inventory_sync_runs where finished_at is not null";
    within(Duration::from_secs(90), "runs end", || async { (world.count(ended).await >= count).then_some(()) }).await;
}

async fn assert_nothing_ran_twice(world: &World) {
    let again = world.rows("select idempotency_key, attempt from inventory_sync_runs where attempt > 1").await;
    assert!(again.is_empty(), "no worker was lost, so no run was taken over: {again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn broker_killed_and_restarted_loses_nothing() {
    let broker = Private::start("rabbitmq", "faults-killed").await;
    let world = world_on(&broker.url).await;
    world.sim.add_rule(slow(None, 100));
    let events = Subscriber::durable(&[&broker.url], &world.prefix).await;
    let _fleet = (Replica::start(&world).await, Replica::start(&world).await);
    // RabbitMQ writes the registry of new quorum queues after about a second. A queue that is younger when its node is killed
    // confirms nothing for ever, which no client can mend.
    broker.eval("[dets:sync(Table) || Table <- dets:all()].");
    let (keys, requests) = requests(&world, "k", 60, ONE_TYPE).await;
    let publishing = publish_all(&[&broker.url], &world, requests, Duration::from_millis(20));
    for so_far in [10, 30] {
        ended_at_least(&world, so_far).await;
        broker.act(|server| server.command("kill")).await;
        broker.act(|server| server.start_again()).await;
    }
    publishing.await.unwrap();
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    assert_nothing_ran_twice(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeatedly_closed_connections_lose_nothing() {
    let broker = Private::start("rabbitmq", "faults-closed").await;
    let world = world_on(&broker.url).await;
    world.sim.add_rule(slow(None, 100));
    let events = Subscriber::durable(&[&broker.url], &world.prefix).await;
    let _fleet = (Replica::start(&world).await, Replica::start(&world).await);
    let (keys, requests) = requests(&world, "k", 60, ONE_TYPE).await;
    let publishing = publish_all(&[&broker.url], &world, requests, Duration::from_millis(20));
    for so_far in [5, 20, 35] {
        ended_at_least(&world, so_far).await;
        broker.act(|server| server.ctl(&["close_all_connections", "fault"])).await;
    }
    publishing.await.unwrap();
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    assert_nothing_ran_twice(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn consumer_timeout_of_the_broker_runs_nothing_twice() {
    let broker = Private::start("rabbitmq", "faults-timeout").await;
    let world = world_on(&broker.url).await;
    // The broker reads both settings when a channel opens; the daemon starts after this.
    broker.eval(
        "application:set_env(rabbit, consumer_timeout, 3000), application:set_env(rabbit, channel_tick_interval, 500).",
    );
    world.sim.add_rule(slow(Some("deviceAppManagement/mobileApps"), 9_000));
    let events = Subscriber::durable(&[&broker.url], &world.prefix).await;
    let worker = Process::start(&world, "worker", &[]);
    world.publish(&world.request("long", ONE_TYPE)).await;
    let (mut keys, requests) = requests(&world, "k", 30, &["deviceShellScript"]).await;
    let publishing = publish_all(&[&broker.url], &world, requests, Duration::from_millis(150));
    worker.wait_for_log("subscription lost; reconnecting").await;
    keys.push("long".to_owned());
    publishing.await.unwrap();
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    assert_nothing_ran_twice(&world).await;
    let requests = world.sim.requests().iter().filter(|request| request.path.ends_with("mobileApps")).count();
    assert_eq!(requests, 1, "the redelivery started no second run");
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_alarm_delays_events_only() {
    let broker = Private::start("rabbitmq", "faults-alarm").await;
    let world = world_on(&broker.url).await;
    world.sim.add_rule(slow(None, 400));
    let events = Subscriber::durable(&[&broker.url], &world.prefix).await;
    let (keys, requests) = requests(&world, "k", 24, ONE_TYPE).await;
    publish_all(&[&broker.url], &world, requests, Duration::ZERO).await.unwrap();
    let _replica = Replica::start(&world).await;
    ended_at_least(&world, 1).await;
    broker.eval("rabbit_alarm:set_alarm({{resource_limit, memory, node()}, []}).");
    ended_at_least(&world, 24).await;
    // Long enough for a relay that does not pause to claim its events several times.
    sleep(Duration::from_secs(8)).await;
    let unsent = world.count("select count(*) from outbox").await;
    let claims = world.count("select coalesce(max(attempts), 0)::bigint from outbox").await;
    assert!(unsent > 0, "events wait while the alarm lasts");
    assert!(claims <= 1, "a blocked relay claims nothing: {claims} claims");
    broker.eval("rabbit_alarm:clear_alarm({resource_limit, memory, node()}).");
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    assert_nothing_ran_twice(&world).await;
}

async fn channel(world: &World) -> (Connection, Channel) {
    let connection = Connection::connect(&world.amqp_url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

fn request_queue(world: &World) -> String {
    format!("{}inventory.sync.requests", world.prefix)
}

async fn delete_request_queue(world: &World) {
    let (_connection, channel) = channel(world).await;
    channel.queue_delete(request_queue(world).into(), QueueDeleteOptions::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn queue_deleted_under_its_consumers_is_declared_again() {
    let world = World::new().await;
    invariants::record_history(&world).await;
    let events = world.subscribe().await;
    let mut config = world.config();
    // A queue that a publisher declares again at once can keep the consumers of the deleted one, which get nothing.
    config.consumer.watchdog_s = 5;
    let fleet = [Replica::with(config.clone()).await, Replica::with(config).await];
    world.sync("before", ONE_TYPE).await;
    let ready = |one: &Replica| one.daemon().health().subscribed();
    eventually("all are ready", || async { fleet.iter().all(ready).then_some(()) }).await;
    delete_request_queue(&world).await;
    eventually("every replica consumes from a new queue", || async {
        let (_connection, channel) = channel(&world).await;
        let options = QueueDeclareOptions::durable().passive();
        let queue = channel.queue_declare(request_queue(&world).into(), options, FieldTable::default()).await;
        (queue.ok()?.consumer_count() == 2).then_some(())
    })
    .await;
    let (mut keys, requests) = requests(&world, "k", 20, ONE_TYPE).await;
    publish_all(&[&world.amqp_url], &world, requests, Duration::ZERO).await.unwrap();
    eventually("all are ready again", || async { fleet.iter().all(ready).then_some(()) }).await;
    keys.push("before".to_owned());
    invariants::assert_all_succeeded(&world, &keys, &events).await;
}

/// Replaces the request queue by another one with one request in it, and starts a replica.
async fn drifted(name: &'static str, arguments: &[(&str, AMQPValue)]) -> (Private, World, Replica, String) {
    let broker = Private::start("rabbitmq", name).await;
    let world = world_on(&broker.url).await;
    delete_request_queue(&world).await;
    let (_connection, channel) = channel(&world).await;
    let mut table = FieldTable::default();
    for (key, value) in arguments {
        table.insert((*key).into(), value.clone());
    }
    let queue = request_queue(&world);
    channel.queue_declare(queue.as_str().into(), QueueDeclareOptions::durable(), table).await.unwrap();
    let (exchange, nothing) = (format!("{}inventory.sync", world.prefix), FieldTable::default());
    let options = QueueBindOptions::default();
    channel.queue_bind(queue.into(), exchange.into(), "sync.requested".into(), options, nothing).await.unwrap();
    world.publish(&world.request("kept", ONE_TYPE)).await;
    let replica = Replica::start(&world).await;
    let health = replica.daemon().health();
    let problem = eventually("the drift is reported", || async { health.problem() }).await;
    assert!(!health.subscribed(), "a replica that can't consume is not ready");
    assert_eq!(world.depth("inventory.sync.requests").await, 1, "the request stays in the queue");
    (broker, world, replica, problem)
}

/// Deletes the wrong queue, as an operator would, and waits until the replica has declared the right one.
async fn repair(world: &World, replica: Replica) {
    let events = world.subscribe().await;
    delete_request_queue(world).await;
    eventually("the replica is ready", || async { replica.daemon().health().subscribed().then_some(()) }).await;
    assert_eq!(replica.daemon().health().problem(), None);
    world.publish(&world.request("kept", ONE_TYPE)).await;
    invariants::assert_all_succeeded(world, &["kept".to_owned()], &events).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queue_with_other_arguments_is_reported_and_unchanged() {
    let text = |value: &str| AMQPValue::LongString(value.into());
    let (_broker, world, replica, problem) = drifted(
        "faults-drift",
        &[
            ("x-queue-type", text("quorum")),
            ("x-delivery-limit", AMQPValue::LongLongInt(7)),
            ("x-overflow", text("reject-publish")),
        ],
    )
    .await;
    for part in ["inventory.sync.requests: ", "inequivalent arg 'x-"] {
        assert!(problem.contains(part), "{part:?} is not in: {problem}");
    }
    repair(&world, replica).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn classic_request_queue_is_refused() {
    let (_broker, world, replica, problem) = drifted("faults-classic", &[]).await;
    assert!(problem.contains("inventory.sync.requests: "), "{problem}");
    assert!(problem.contains("inequivalent arg 'x-"), "{problem}");
    repair(&world, replica).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cluster_survives_loss_of_a_node_and_waits_for_its_majority() {
    let first = Private::start("rabbitmq", "faults-cluster-1").await;
    let second = Private::join("faults-cluster-2", &first).await;
    let third = Private::join("faults-cluster-3", &first).await;
    let world = world_on(&second.url).await;
    world.sim.add_rule(slow(None, 100));
    let events = Subscriber::durable(&[&second.url], &world.prefix).await;
    let mut config = world.config();
    config.broker.url = [&*first.url, &second.url, &third.url].join(",").into();
    let _fleet = (Replica::with(config.clone()).await, Replica::with(config).await);
    let (mut keys, requests_one) = requests(&world, "a", 60, ONE_TYPE).await;
    let publishing = publish_all(&[&second.url, &third.url], &world, requests_one, Duration::from_millis(50));
    ended_at_least(&world, 10).await;
    first.act(|server| server.command("stop")).await;
    publishing.await.unwrap();
    ended_at_least(&world, 60).await;
    first.act(|server| server.start_again()).await;

    let (more, requests_two) = requests(&world, "b", 60, ONE_TYPE).await;
    keys.extend(more);
    let publishing = publish_all(&[&second.url], &world, requests_two, Duration::from_millis(50));
    ended_at_least(&world, 70).await;
    for node in [&first, &third] {
        node.act(|server| server.command("pause")).await;
    }
    sleep(Duration::from_secs(25)).await;
    for node in [&first, &third] {
        node.act(|server| server.command("resume")).await;
    }
    publishing.await.unwrap();
    ended_at_least(&world, 120).await;
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    assert_nothing_ran_twice(&world).await;
}
