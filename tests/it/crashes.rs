//! Workers killed, frozen or disconnected at every step of a run.

use std::time::Duration;

use serde_json::{Value, json};

use crate::sim::Rule;
use crate::support::daemon::{Process, Replica};
use crate::support::pause::{self, STEPS, Step};
use crate::support::proxy::Proxy;
use crate::support::world::World;
use crate::support::{eventually, invariants, within};

fn rule(value: Value) -> Rule {
    serde_json::from_value(value).unwrap()
}

async fn running(world: &World, key: &str) {
    eventually("the run begins", || async {
        world.runs(key).await.iter().any(|run| run["status"] == "running").then_some(())
    })
    .await;
}

/// Kills a worker at `step`; another replica finishes the run.
async fn killed_at(step: &Step) {
    let world = World::new().await;
    invariants::record_history(&world).await;
    pause::at_step(&world, step, 2.0).await;
    let victim = Process::start(&world, "victim", &[]);
    world.publish(&world.request("run", &["mobileApp", "deviceShellScript"])).await;
    let events = world.subscribe().await;
    pause::until_paused(&world).await;
    victim.signal("KILL");
    let _successor = Replica::start(&world).await;
    invariants::assert_all(&world, &["run".to_owned()], &events).await;
    let run = &world.runs("run").await[0];
    assert_eq!(run["status"], "success", "{}: {run}", step.name);
    assert_eq!(run["items_observed_count"], 24, "{}: counted once across attempts: {run}", step.name);
    assert_eq!(
        run["items_created_count"], 24,
        "{}: created counts objects that did not exist when the run began: {run}",
        step.name
    );
    assert_eq!(world.count("select count(*) from inventory_items").await, 24);
    assert!(run["attempt"].as_i64().unwrap() <= 2, "{}: {run}", step.name);
}

/// Commits `step` but loses the reply, so that the worker repeats it.
async fn repeated_after_lost_reply(step: &Step) {
    let world = World::new().await;
    invariants::record_history(&world).await;
    pause::in_commit_of(&world, step, 0.7).await;
    let database = Proxy::to(world.database_address()).await;
    let mut config = world.config();
    config.database.url = world.database_through(&database).into();
    // Longer than the test waits: the worker must hand the lease back that it holds without knowing of it.
    config.run.lease_s = 300;
    let _replica = Replica::with(config).await;
    let events = world.subscribe().await;
    world.publish(&world.request("run", &["mobileApp", "deviceShellScript"])).await;
    pause::until_paused(&world).await;
    database.freeze_replies(true);
    pause::until_idle(&world).await;
    database.cut();
    database.freeze_replies(false);
    invariants::assert_all(&world, &["run".to_owned()], &events).await;
    let run = &world.runs("run").await[0];
    assert_eq!(run["status"], "success", "{}: {run}", step.name);
    assert_eq!(run["items_observed_count"], 24, "{}: counted once across repeats: {run}", step.name);
    assert_eq!(
        run["items_created_count"], 24,
        "{}: created counts objects that did not exist when the run began: {run}",
        step.name
    );
    assert_eq!(world.count("select count(*) from inventory_items").await, 24);
    assert_eq!(events.distinct().len(), 1, "{}", step.name);
    assert!(run["attempt"].as_i64().unwrap() <= 2, "{}: {run}", step.name);
}

macro_rules! every_step {
    ($($killed:ident $repeated:ident = $index:literal;)+) => {
        $(#[tokio::test(flavor = "multi_thread")]
        async fn $killed() {
            killed_at(&STEPS[$index]).await;
        }

        #[tokio::test(flavor = "multi_thread")]
        async fn $repeated() {
            repeated_after_lost_reply(&STEPS[$index]).await;
        })+

        #[test]
        fn every_step_has_its_test() {
            assert_eq!(STEPS.len(), [$($index),+].len());
        }
    };
}

every_step! {
    killed_while_admitting admitted_twice = 0;
    killed_while_writing_items items_written_twice = 1;
    killed_while_finishing_a_type type_finished_twice = 2;
    killed_while_ending_the_run run_ended_twice = 3;
    killed_while_writing_the_event event_written_twice = 4;
    killed_while_removing_the_event event_removed_twice = 5;
}

#[tokio::test(flavor = "multi_thread")]
async fn renewal_that_meets_the_end_of_its_run_is_no_lost_lease() {
    let world = World::new().await;
    // The lease of 15 s is renewed every 5 s, at least once while the end is committed.
    pause::in_commit_of(&world, &STEPS[3], 7.0).await;
    let worker = Process::start(&world, "worker", &[]);
    let run = world.sync("run", &["mobileApp"]).await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("success"), &json!(1)), "{run}");
    worker.wait_for_log("run ended").await;
    let log = worker.log();
    // That the row stays locked until the next tick is reported, and is no failure.
    assert!(!log.contains("lease lost") && !log.contains("\"leases could not be renewed"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_mid_page_and_between_pages() {
    let world = World::with_three_pages("deviceAppManagement/mobileApps").await;
    invariants::record_history(&world).await;
    world.sim.add_rule(rule(json!({ "path": "deviceAppManagement/mobileApps", "page": 2, "times": 1,
        "action": { "kind": "slow_body", "chunk_bytes": 64, "pause_ms": 100 } })));
    let victim = Process::start(&world, "victim", &[("RUN__BATCH_ROWS", "10")]);
    world.publish(&world.request("run", &["mobileApp"])).await;
    let events = world.subscribe().await;
    eventually("the first page is written", || async {
        (world.count("select count(*) from inventory_items").await > 0).then_some(())
    })
    .await;
    victim.signal("KILL");
    let _successor = Replica::start(&world).await;
    invariants::assert_all(&world, &["run".to_owned()], &events).await;
    let run = &world.runs("run").await[0];
    assert_eq!(
        (&run["status"], &run["attempt"], &run["items_observed_count"]),
        (&json!("success"), &json!(2), &json!(60))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_the_commit_and_the_ack() {
    let world = World::new().await;
    invariants::record_history(&world).await;
    let broker = Proxy::to(world.amqp_address()).await;
    world.sim.add_rule(rule(json!({ "action": { "kind": "slow", "delay_ms": 800 } })));
    let victim = Process::start(&world, "victim", &[("BROKER__URL", &world.amqp_through(&broker))]);
    world.publish(&world.request("run", &["mobileApp"])).await;
    let events = world.subscribe().await;
    running(&world, "run").await;
    broker.freeze(true);
    world.ended("run").await;
    victim.signal("KILL");
    broker.cut();
    let _successor = Replica::start(&world).await;
    invariants::assert_all(&world, &["run".to_owned()], &events).await;
    eventually("the redelivery is acknowledged as a duplicate", || async {
        (world.depth("inventory.sync.requests").await == 0).then_some(())
    })
    .await;
    assert_eq!(world.runs("run").await[0]["attempt"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_frozen_past_its_lease_is_fenced_when_it_wakes() {
    let world = World::with_three_pages("deviceAppManagement/mobileApps").await;
    invariants::record_history(&world).await;
    world.sim.add_rule(rule(json!({ "path": "deviceAppManagement/mobileApps", "page": 2, "times": 1, "action": { "kind": "slow", "delay_ms": 3_000 } })));
    let zombie = Process::start(&world, "zombie", &[]);
    world.publish(&world.request("run", &["mobileApp"])).await;
    let events = world.subscribe().await;
    running(&world, "run").await;
    zombie.signal("STOP");
    let _successor = Replica::start(&world).await;
    let run = within(Duration::from_secs(120), "the successor ends the run", || async {
        world.runs("run").await.into_iter().find(|run| run["status"] != "running")
    })
    .await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("success"), &json!(2)));
    zombie.signal("CONT");
    zombie.wait_for_log("lease lost").await;
    invariants::assert_all(&world, &["run".to_owned()], &events).await;
    assert_eq!(world.runs("run").await[0], run, "the zombie changed nothing");
    world.sync("next", &["deviceShellScript"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_broker_disconnects_lose_nothing() {
    let world = World::new().await;
    invariants::record_history(&world).await;
    world.execute("update tenants set max_concurrent_runs = 100").await;
    let broker = Proxy::to(world.amqp_address()).await;
    let mut config = world.config();
    config.broker.url = world.amqp_through(&broker).into();
    let _replica = Replica::with(config).await;
    let events = world.subscribe().await;
    let types = [
        "mobileApp",
        "deviceShellScript",
        "deviceConfiguration",
        "windowsUpdateRing",
        "roleScopeTag",
        "deviceHealthScript",
    ];
    let mut keys = Vec::new();
    for round in 0..30 {
        let key = format!("k{round}");
        world.publish(&world.request(&key, &[types[round % 4], types[4 + round % 2]])).await;
        keys.push(key);
        if round % 5 == 4 {
            let so_far = world.count("select count(*) from inventory_sync_runs").await;
            broker.cut();
            eventually("the session is rebuilt", || async {
                let now = world.count("select count(*) from inventory_sync_runs").await;
                (now > so_far || now == i64::try_from(keys.len()).unwrap()).then_some(())
            })
            .await;
        }
    }
    invariants::assert_all(&world, &keys, &events).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_outage_costs_no_attempt_and_no_message() {
    let world = World::new().await;
    invariants::record_history(&world).await;
    world.execute("update tenants set max_concurrent_runs = 100").await;
    let database = Proxy::to(world.database_address()).await;
    let mut config = world.config();
    config.database.url = world.database_through(&database).into();
    let replica = Replica::with(config).await;
    let events = world.subscribe().await;
    world.sync("before", &["mobileApp"]).await;
    database.refuse(true);
    database.cut();
    let mut keys = vec!["before".to_owned()];
    for number in 0..10 {
        let key = format!("k{number}");
        world.publish(&world.request(&key, &["mobileApp"])).await;
        keys.push(key);
    }
    eventually("consumption stops", || async { (!replica.daemon().health().subscribed()).then_some(()) }).await;
    database.refuse(false);
    invariants::assert_all(&world, &keys, &events).await;
    assert_eq!(
        world.take("inventory.dead").await.map(|letter| letter.data.clone()),
        None,
        "no message is dead-lettered"
    );
}
