//! Configuration keys that set a limit, each tested at its limit; tests of a subject test the keys of that subject.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::sim::{Rule, Which};
use crate::support::daemon::{Process, Replica};
use crate::support::pause::{self, STEPS};
use crate::support::proxy::Proxy;
use crate::support::world::World;
use crate::support::{eventually, invariants};

const TYPES: [&str; 4] = ["mobileApp", "deviceShellScript", "deviceHealthScript", "deviceCompliancePolicy"];

fn slow(delay_ms: u64) -> Rule {
    serde_json::from_value(json!({ "action": { "kind": "slow", "delay_ms": delay_ms } })).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn full_outbox_pauses_consumption_until_half_is_sent() {
    let world = World::new().await;
    world
        .execute(&format!(
            "with skipped as (
               insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status,
                      daemon_version, finished_at)
               select '{}', gen_random_uuid(), 'waiting-' || n, 'x', '{{}}', 'skipped', 'x', clock_timestamp()
                 from generate_series(1, 10) n
               returning tenant_id, id)
             insert into outbox (tenant_id, run_id, due_at)
             select tenant_id, id, clock_timestamp() + interval '1 hour' from skipped",
            world.tenant
        ))
        .await;
    let mut config = world.config();
    config.outbox.high_water = 10;
    let replica = Replica::with(config).await;
    let paused = || replica.daemon().health().paused();
    eventually("consumption pauses", || async { (paused() == Some("backlog")).then_some(()) }).await;
    world.publish(&world.request("waits", &["mobileApp"])).await;
    // Six are left: below the high-water mark, but more than half of it.
    world
        .execute("delete from outbox using inventory_sync_runs r where r.id = run_id and r.idempotency_key ~ '-[1-4]$'")
        .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!((paused(), world.runs("waits").await.len()), (Some("backlog"), 0));
    world.execute("update outbox set due_at = clock_timestamp()").await;
    assert_eq!(world.ended("waits").await["status"], "success");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_lists_bounds_the_lists_of_a_run() {
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
async fn statement_timeout_is_retried() {
    let world = World::new().await;
    invariants::record_history(&world).await;
    pause::at_step(&world, &STEPS[1], 120.0).await;
    let mut config = world.config();
    config.database.statement_timeout_s = 1;
    let _replica = Replica::with(config).await;
    let events = world.subscribe().await;
    let begun = Instant::now();
    world.publish(&world.request("run", &["mobileApp"])).await;
    invariants::assert_all_succeeded(&world, &["run".to_owned()], &events).await;
    assert!(begun.elapsed() < Duration::from_secs(100), "the statement was cancelled: {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn pool_timeout_is_retried() {
    let world = World::new().await;
    invariants::record_history(&world).await;
    world.execute("update tenants set max_concurrent_runs = 100").await;
    pause::at_step(&world, &STEPS[1], 4.0).await;
    let mut config = world.config();
    config.database.max_connections = 1;
    config.database.acquire_timeout_s = 1;
    let _replica = Replica::with(config).await;
    let events = world.subscribe().await;
    let keys: Vec<String> = TYPES.iter().map(|name| format!("k-{name}")).collect();
    for (key, name) in keys.iter().zip(TYPES) {
        world.publish(&world.request(key, &[name])).await;
    }
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    assert!(world.take("inventory.dead").await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn unresponsive_broker_address_is_skipped() {
    let world = World::new().await;
    let frozen = Proxy::to(world.amqp_address()).await;
    frozen.freeze(true);
    let mut config = world.config();
    config.broker.connect_timeout_s = 1;
    config.broker.url = format!("{},{}", world.amqp_through(&frozen), world.amqp_url).into();
    let _replica = Replica::with(config).await;
    assert_eq!(world.sync("run", &["mobileApp"]).await["status"], "success");
}

#[tokio::test(flavor = "multi_thread")]
async fn custom_policy_types_and_deployment_name_are_used() {
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
    let run = world.sync("custom", &["ourScripts", "mobileApp"]).await;
    assert_eq!((&run["status"], &run["error_codes"]), (&json!("partial"), &json!(["unsupported_policy_type"])));
    assert_eq!(world.count("select count(*) from inventory_items where category = 'Ours'").await, 12);
    assert_eq!(events.event_of(&run).await["source"], "/inventoryd/blue");
    std::fs::remove_file(file).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn request_timeout_is_retried() {
    let world = World::new().await;
    let slow_once = json!({ "times": 1, "action": { "kind": "slow", "delay_ms": 20_000 } });
    world.sim.add_rule(serde_json::from_value::<Rule>(slow_once).unwrap());
    let mut config = world.config();
    config.graph.request_timeout_s = 1;
    let _replica = Replica::with(config).await;
    let run = world.sync("run", &["mobileApp"]).await;
    assert_eq!((&run["status"], &run["graph_requests_count"]), (&json!("success"), &json!(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn outbox_larger_than_a_batch_is_sent_in_batches() {
    let world = World::new().await;
    let events = world.subscribe().await;
    let mut config = world.config();
    config.outbox.batch = 2;
    world
        .execute(&format!(
            "with skipped as (
               insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status,
                      daemon_version, finished_at)
               select '{}', gen_random_uuid(), 'waiting-' || n, 'x', '{{}}', 'skipped', 'x', clock_timestamp()
                 from generate_series(1, 25) n
               returning tenant_id, id)
             insert into outbox (tenant_id, run_id, due_at) select tenant_id, id, clock_timestamp() from skipped",
            world.tenant
        ))
        .await;
    let _replica = Replica::with(config).await;
    eventually("all events are published", || async { (events.distinct().len() == 25).then_some(()) }).await;
    eventually("all events are removed", || async {
        (world.count("select count(*) from outbox").await == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn suspicious_drop_thresholds_are_configurable() {
    for (share, min_items, suspicious) in [(0.9, 5, true), (0.5, 5, false), (0.9, 13, false)] {
        let world = World::new().await;
        let mut config = world.config();
        config.run.suspicious_drop_share = share;
        config.run.suspicious_drop_min_items = min_items;
        let _replica = Replica::with(config).await;
        world.sync("first", &["mobileApp"]).await;
        world.sim.delete_objects(world.tenant, "deviceAppManagement/mobileApps", Which::Count(3)).unwrap();
        world.sync("second", &["mobileApp"]).await;
        let found = world.count("select count(*) from inventory_sync_run_types where suspicious_drop").await == 1;
        assert_eq!(found, suspicious, "9 of 12 with {share} of {min_items}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http_listens_on_its_address_and_requires_the_token() {
    let world = World::new().await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");
    let _replica = Process::start(&world, "http", &[("HTTP__LISTEN", &listen), ("HTTP__TOKEN", "open-sesame")]);
    let client = reqwest::Client::new();
    let get = async |path: &str, token: &str| {
        let response = client.get(format!("http://{listen}{path}")).bearer_auth(token).send().await.ok()?;
        Some((response.status().as_u16(), response.text().await.ok()?))
    };
    eventually("ready; the probe needs no token", || async {
        get("/readyz", "").await.filter(|response| response.0 == 200)
    })
    .await;
    for path in ["/metrics", "/status"] {
        assert_eq!(get(path, "guess").await.unwrap().0, 401, "{path}");
    }
    assert!(get("/metrics", "open-sesame").await.unwrap().1.contains("inventoryd_subscribed 1"));
    let status: serde_json::Value = serde_json::from_str(&get("/status", "open-sesame").await.unwrap().1).unwrap();
    assert_eq!((&status["subscribed"], &status["database"]), (&json!(true), &json!("ok")), "{status}");
}
