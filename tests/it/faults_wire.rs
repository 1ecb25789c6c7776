//! Network faults: connections cut or frozen at critical moments, redeliveries, shutdowns, and a wrong clock.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::sim::Rule;
use crate::support::daemon::{Process, Replica};
use crate::support::pause::{self, ENQUEUING_THE_EVENT};
use crate::support::proxy::Proxy;
use crate::support::scheduler::requests;
use crate::support::servers;
use crate::support::world::World;
use crate::support::{eventually, invariants, within};

const ONE_TYPE: &[&str] = &["mobileApp"];

fn rule(value: Value) -> Rule {
    serde_json::from_value(value).unwrap()
}

fn slow(delay_ms: u64) -> Rule {
    rule(json!({ "action": { "kind": "slow", "delay_ms": delay_ms } }))
}

async fn new_world() -> World {
    let world = World::new().await;
    invariants::record_history(&world).await;
    world
}

async fn running(world: &World, key: &str) {
    eventually("the run starts", || async {
        world.runs(key).await.iter().any(|run| run["status"] == "running").then_some(())
    })
    .await;
}

async fn ended_at_least(world: &World, count: i64) {
    let ended = "select count(*) from inventory_sync_runs where finished_at is not null";
    within(Duration::from_secs(90), "runs end", || async { (world.count(ended).await >= count).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unpublished_event_is_released_to_another_replica() {
    let world = new_world().await;
    world.sim.add_rule(slow(50_000));
    let events = world.subscribe().await;
    let broker = Proxy::to(world.amqp_address()).await;
    let mut cut_off = world.config();
    cut_off.broker.url = world.amqp_through(&broker).into();
    cut_off.outbox.claim_s = 600;
    let _cut_off = Replica::with(cut_off).await;
    world.publish(&world.request("run", ONE_TYPE)).await;
    running(&world, "run").await;
    broker.refuse(true);
    broker.cut();
    world.sim.remove_rules(None);
    let run = world.ended("run").await;
    let claims = "select count(*) from outbox where due_at <= clock_timestamp() and attempts = 0";
    eventually("the claim of the event is released", || async { (world.count(claims).await == 1).then_some(()) }).await;
    let _other = Replica::start(&world).await;
    assert_eq!(events.event_of(&run).await["id"], run["id"]);
    invariants::assert_all_succeeded(&world, &["run".to_owned()], &events).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn graph_connections_cut_mid_page_lose_nothing() {
    let world = World::with_three_pages("deviceAppManagement/mobileApps").await;
    invariants::record_history(&world).await;
    world.sim.add_rule(rule(json!({ "action": { "kind": "slow_body", "chunk_bytes": 1_024, "pause_ms": 10 } })));
    let graph = Proxy::to(world.sim.address()).await;
    let through = format!("https://{}", graph.address);
    let mut config = world.config();
    (config.graph.base_url, config.graph.authority) = (through.clone(), through);
    config.graph.max_tries = 12;
    let _replica = Replica::with(config).await;
    let events = world.subscribe().await;
    let (keys, requests) = requests(&world, "k", 40, ONE_TYPE).await;
    for request in &requests {
        world.publish(request).await;
    }
    let ended = "select count(*) from inventory_sync_runs where finished_at is not null";
    let mut cuts = 0;
    while world.count(ended).await < 40 && cuts < 40 {
        sleep(Duration::from_millis(rand::random_range(50..300))).await;
        graph.cut();
        cuts += 1;
    }
    invariants::assert_all(&world, &keys, &events).await;
    assert!(cuts >= 5, "connections were cut: {cuts}");
    let incomplete = "select * from inventory_sync_runs where not (status = 'success' and items_observed_count = 60
                  or status = 'failed' and error_codes in (array['graph_unavailable'], array['token_service_unavailable']))";
    let incomplete = world.rows(incomplete).await;
    assert!(
        incomplete.is_empty(),
        "a list is complete with each object counted once, or its run failed: {incomplete:?}"
    );
    let complete = world.count("select count(*) from inventory_sync_runs where status = 'success'").await;
    assert!(complete >= 20, "most lists succeed: {complete} of 40");
}

/// Cuts the connection of a worker to the database during the commit that ends its run, so that the outcome is unknown.
async fn cut_during_commit(commits: bool) {
    let world = new_world().await;
    pause::in_commit_of(&world, ENQUEUING_THE_EVENT, 2.0).await;
    let database = Proxy::to(world.database_address()).await;
    let victim = Process::start(&world, "victim", &[("DATABASE__URL", &world.database_through(&database))]);
    let events = world.subscribe().await;
    world.publish(&world.request("run", ONE_TYPE)).await;
    pause::until_paused(&world).await;
    database.freeze(true);
    if commits {
        world.ended("run").await;
    } else {
        let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                    where datname = current_database() and wait_event = 'PgSleep'";
        assert_eq!(world.count(end).await, 1);
    }
    database.cut();
    database.freeze(false);
    let _successor = Replica::start(&world).await;
    invariants::assert_all_succeeded(&world, &["run".to_owned()], &events).await;
    let run = &world.runs("run").await[0];
    assert_eq!(run["attempt"], if commits { 1 } else { 2 }, "{run}");
    assert_eq!(events.distinct().len(), 1);
    eventually("the message is settled", || async {
        (world.depth("inventory.sync.requests").await + world.depth("inventory.retry.5s").await == 0).then_some(())
    })
    .await;
    assert_eq!(world.runs("run").await, std::slice::from_ref(run), "the redelivery changed nothing");
    drop(victim);
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_cut_after_the_commit() {
    cut_during_commit(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_cut_before_the_commit() {
    cut_during_commit(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_cut_between_publish_and_confirm() {
    let world = new_world().await;
    world.sim.add_rule(slow(500));
    let broker = Proxy::to(world.amqp_address()).await;
    let mut config = world.config();
    config.broker.url = world.amqp_through(&broker).into();
    let _replica = Replica::with(config).await;
    let events = world.subscribe().await;
    // The first event opens the publishing connection, so that the second only has to be sent.
    let first = world.sync("first", ONE_TYPE).await;
    events.event_of(&first).await;
    world.publish(&world.request("second", ONE_TYPE)).await;
    running(&world, "second").await;
    broker.freeze_replies(true);
    let second = world.ended("second").await;
    events.event_of(&second).await;
    assert_eq!(world.count("select count(*) from outbox").await, 1, "nothing is confirmed");
    broker.cut();
    broker.freeze_replies(false);
    invariants::assert_all_succeeded(&world, &["first".to_owned(), "second".to_owned()], &events).await;
    eventually("an event of unknown outcome is published again with the same id", || async {
        (events.received().iter().filter(|event| event["id"] == second["id"]).count() >= 2).then_some(())
    })
    .await;
}

/// Freezes one direction of a connection under load, for longer than every time limit.
async fn freeze_one_direction(world: &World, proxy: &Proxy, freeze: fn(&Proxy, bool)) {
    let events = world.subscribe().await;
    let (keys, requests) = requests(world, "k", 40, ONE_TYPE).await;
    for (number, request) in requests.iter().enumerate() {
        world.publish(request).await;
        if number == 20 {
            ended_at_least(world, 5).await;
            freeze(proxy, true);
        }
    }
    sleep(Duration::from_secs(12)).await;
    freeze(proxy, false);
    ended_at_least(world, 40).await;
    invariants::assert_all_succeeded(world, &keys, &events).await;
}

async fn freeze_broker(freeze: fn(&Proxy, bool)) {
    let world = new_world().await;
    world.sim.add_rule(slow(200));
    let proxy = Proxy::to(world.amqp_address()).await;
    let mut config = world.config();
    config.broker.url = world.amqp_through(&proxy).into();
    config.consumer.prefetch = 4;
    let _replica = Replica::with(config).await;
    freeze_one_direction(&world, &proxy, freeze).await;
}

async fn freeze_database(freeze: fn(&Proxy, bool)) {
    let world = new_world().await;
    world.sim.add_rule(slow(200));
    let proxy = Proxy::to(world.database_address()).await;
    let mut config = world.config();
    config.database.url = world.database_through(&proxy).into();
    config.consumer.prefetch = 4;
    let _replica = Replica::with(config).await;
    freeze_one_direction(&world, &proxy, freeze).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_requests_to_the_broker_lose_nothing() {
    freeze_broker(Proxy::freeze_requests).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_replies_of_the_broker_lose_nothing() {
    freeze_broker(Proxy::freeze_replies).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_requests_to_the_database_lose_nothing() {
    freeze_database(Proxy::freeze_requests).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_replies_of_the_database_lose_nothing() {
    freeze_database(Proxy::freeze_replies).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redelivery_during_a_run_starts_no_second_run() {
    let world = new_world().await;
    world.sim.add_rule(slow(50_000));
    let broker = Proxy::to(world.amqp_address()).await;
    let mut config = world.config();
    config.broker.url = world.amqp_through(&broker).into();
    let _first = Replica::with(config).await;
    let events = world.subscribe().await;
    world.publish(&world.request("run", ONE_TYPE)).await;
    running(&world, "run").await;
    let _second = Replica::start(&world).await;
    broker.refuse(true);
    broker.cut();
    eventually("the second replica schedules a retry", || async {
        (world.depth("inventory.retry.5s").await == 1).then_some(())
    })
    .await;
    assert_eq!(world.runs("run").await[0]["status"], "running");
    world.sim.remove_rules(None);
    broker.refuse(false);
    invariants::assert_all_succeeded(&world, &["run".to_owned()], &events).await;
    assert_eq!(world.runs("run").await[0]["attempt"], 1);
    let requests = world.sim.requests().iter().filter(|request| request.path.ends_with("mobileApps")).count();
    assert_eq!(requests, 1, "only the first replica sent a request to Graph");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_shutdowns_under_load_lose_nothing() {
    let world = new_world().await;
    world.sim.add_rule(slow(1_200));
    let events = world.subscribe().await;
    let (keys, requests) = requests(&world, "k", 40, ONE_TYPE).await;
    let mut victim = Process::start(&world, "victim", &[]);
    for request in &requests {
        world.publish(request).await;
    }
    eventually("runs are in progress", || async {
        let running = "select count(*) from inventory_sync_runs where status = 'running'";
        (world.count(running).await >= 8).then_some(())
    })
    .await;
    let _others = (Replica::start(&world).await, Replica::start(&world).await);
    victim.signal("TERM");
    victim.wait_for_log("draining").await;
    victim.signal("TERM");
    assert!(victim.ended(Duration::from_secs(8)).await.success(), "{}", victim.log());
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    let lost = "select count(*) from inventory_sync_runs where attempt - interruptions <> 1";
    assert_eq!(world.count(lost).await, 0, "a requeued run costs no attempt");
}

#[tokio::test(flavor = "multi_thread")]
async fn replica_clock_ten_minutes_ahead_has_no_effect() {
    let Some(library) = spawn_blocking(servers::faketime).await.unwrap() else {
        println!("SKIPPED: libfaketime is missing and could not be installed (Debian: apt-get install libfaketime)");
        return;
    };
    let world = new_world().await;
    world.sim.add_rule(slow(900));
    world.sim.set_size(None, Some("deviceAppManagement/mobileApps"), 100).unwrap();
    let events = world.subscribe().await;
    let foreign =
        [("LD_PRELOAD", library.to_str().unwrap()), ("FAKETIME", "+10m"), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")];
    let lease = [("RUN__LEASE_S", "15"), ("CONSUMER__PREFETCH", "4")];
    let ahead = Process::start_under(&world, "ahead", &lease, &foreign);
    let _right = Process::start(&world, "right", &lease);
    ahead.wait_for_log("subscribed").await;
    let (keys, requests) = requests(&world, "k", 40, ONE_TYPE).await;
    for request in &requests {
        world.publish(request).await;
    }
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    let off = "select count(*) from inventory_sync_runs where attempt <> 1 or finished_at > clock_timestamp()
                or started_at > clock_timestamp() or finished_at < started_at";
    assert_eq!(
        world.count(off).await,
        0,
        "no run changed its worker, and every timestamp is by the clock of the database"
    );
    assert!(ahead.log().contains("run ended"), "the replica processed requests");
    let now = time_of_log(&ahead.log());
    let right = world.count("select extract(epoch from clock_timestamp())::bigint").await;
    assert!((500..700).contains(&(now - right)), "the clock of the replica is ahead: {now}, {right}");
}

/// Time of the last line of a log, in Unix seconds.
fn time_of_log(log: &str) -> i64 {
    let line: Value = serde_json::from_str(log.lines().last().expect("it has logged")).expect("a line is JSON");
    let text = line["timestamp"].as_str().expect("a line has a time");
    let time = time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).unwrap();
    time.unix_timestamp()
}
