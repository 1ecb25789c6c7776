//! Settings that limit something, each driven to its limit; those with a story of their own have their tests there.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::sim::Rule;
use crate::support::daemon::Replica;
use crate::support::holds::{STEPS, hold_at};
use crate::support::proxy::Proxy;
use crate::support::world::World;
use crate::support::{eventually, truths};

const TYPES: [&str; 4] = ["mobileApp", "deviceShellScript", "deviceHealthScript", "deviceCompliancePolicy"];

fn slow(delay_ms: u64) -> Rule {
    serde_json::from_value(json!({ "action": { "kind": "slow", "delay_ms": delay_ms } })).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_outbox_pauses_consumption_until_half_of_it_is_sent() {
    let world = World::new().await;
    world
        .execute(&format!(
            "insert into outbox_events (tenant_id, id, routing_key, payload, claimed_until)
             select '{}', gen_random_uuid(), 'run.completed.x.' || n, '{{}}', clock_timestamp() + interval '1 hour'
               from generate_series(1, 10) n",
            world.tenant
        ))
        .await;
    let mut config = world.config();
    config.outbox.high_water = 10;
    let replica = Replica::with(config).await;
    let paused = || replica.daemon().health().paused();
    eventually("consumption pauses", || async { (paused() == Some("backlog")).then_some(()) }).await;
    world.publish(&world.request("waits", &["mobileApp"])).await;
    // Six are left: below the mark, but not yet half of it.
    world.execute("update outbox_events set sent_at = clock_timestamp() where routing_key ~ '[1-4]$'").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!((paused(), world.runs("waits").await.len()), (Some("backlog"), 0));
    world.execute("update outbox_events set claimed_until = null").await;
    assert_eq!(world.ended("waits").await["status"], "success");
}

#[tokio::test(flavor = "multi_thread")]
async fn so_many_lists_of_a_run_are_read_at_once_and_no_more() {
    for (lists, expected) in [(1, 1), (3, 3)] {
        let world = World::new().await;
        world.sim.add_rule(slow(150));
        let mut config = world.config();
        config.run.concurrent_lists = lists;
        let _replica = Replica::with(config).await;
        world.sync("run", &TYPES).await;
        assert_eq!(world.sim.state().tenants[&world.tenant].concurrent_max, expected, "of {lists}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_takes_too_long_is_given_up_and_the_run_goes_on_elsewhere() {
    let world = World::new().await;
    truths::keep_history(&world).await;
    hold_at(&world, &STEPS[1], 30.0).await;
    let mut config = world.config();
    config.database.statement_timeout_s = 1;
    let _replica = Replica::with(config).await;
    let events = world.subscribe().await;
    let begun = Instant::now();
    world.publish(&world.request("run", &["mobileApp"])).await;
    truths::hold_and_succeed(&world, &["run".to_owned()], &events).await;
    assert!(begun.elapsed() < Duration::from_secs(25), "nobody waited for the statement: {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_gets_no_connection_in_time_tries_again_and_loses_nothing() {
    let world = World::new().await;
    truths::keep_history(&world).await;
    world.execute("update tenants set max_concurrent_runs = 100").await;
    hold_at(&world, &STEPS[1], 4.0).await;
    let mut config = world.config();
    config.database.max_connections = 1;
    config.database.acquire_timeout_s = 1;
    let _replica = Replica::with(config).await;
    let events = world.subscribe().await;
    let keys: Vec<String> = TYPES.iter().map(|name| format!("k-{name}")).collect();
    for (key, name) in keys.iter().zip(TYPES) {
        world.publish(&world.request(key, &[name])).await;
    }
    truths::hold_and_succeed(&world, &keys, &events).await;
    assert!(world.take("inventory.dead").await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_does_not_answer_is_left_for_the_next() {
    let world = World::new().await;
    let mute = Proxy::before(world.amqp_address()).await;
    mute.freeze(true);
    let mut config = world.config();
    config.broker.connect_timeout_s = 1;
    config.broker.url = format!("{},{}", world.amqp_through(&mute), world.amqp_url).into();
    let begun = Instant::now();
    let _replica = Replica::with(config).await;
    assert_eq!(world.sync("run", &["mobileApp"]).await["status"], "success");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_types_of_ones_own_and_the_name_of_the_deployment() {
    let world = World::new().await;
    let file = std::env::temp_dir().join(format!("{}types.toml", world.prefix));
    std::fs::write(
        &file,
        "[[policy_type]]\nkey = \"ourScripts\"\nlabel = \"Scripts\"\ncategory = \"Ours\"\nfoundation = false\n\
         api_version = \"beta\"\npath = \"deviceManagement/deviceShellScripts\"\nshape = \"collection\"\n\
         name = \"displayName\"\nmeta = [\"fileName\"]\nthrottle = \"devices\"\n\
         permission = \"DeviceManagementConfiguration.Read.All\"\n",
    )
    .unwrap();
    let mut config = world.config();
    config.graph.policy_types_file = Some(file.clone());
    config.telemetry.deployment = "blue".to_owned();
    let _replica = Replica::with(config).await;
    let events = world.subscribe().await;
    let run = world.sync("ours", &["ourScripts", "mobileApp"]).await;
    assert_eq!((&run["status"], &run["error_codes"]), (&json!("partial"), &json!(["unsupported_policy_type"])));
    assert_eq!(world.count("select count(*) from inventory_items where category = 'Ours'").await, 12);
    assert_eq!(events.event_of(&run).await["source"], "/inventoryd/blue");
    std::fs::remove_file(file).unwrap();
}
