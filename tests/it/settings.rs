//! Settings that limit something, each driven to its limit; those with a story of their own have their tests there.

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
async fn a_full_outbox_pauses_consumption_until_half_of_it_is_sent() {
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
    // Six are left: below the mark, but not yet half of it.
    world
        .execute("delete from outbox using inventory_sync_runs r where r.id = run_id and r.idempotency_key ~ '-[1-4]$'")
        .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!((paused(), world.runs("waits").await.len()), (Some("backlog"), 0));
    world.execute("update outbox set due_at = clock_timestamp()").await;
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
    invariants::record_history(&world).await;
    pause::at_step(&world, &STEPS[1], 30.0).await;
    let mut config = world.config();
    config.database.statement_timeout_s = 1;
    let _replica = Replica::with(config).await;
    let events = world.subscribe().await;
    let begun = Instant::now();
    world.publish(&world.request("run", &["mobileApp"])).await;
    invariants::assert_all_succeeded(&world, &["run".to_owned()], &events).await;
    assert!(begun.elapsed() < Duration::from_secs(25), "nobody waited for the statement: {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_gets_no_connection_in_time_tries_again_and_loses_nothing() {
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
async fn a_host_that_does_not_answer_is_left_for_the_next() {
    let world = World::new().await;
    let mute = Proxy::to(world.amqp_address()).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_takes_too_long_is_asked_for_again() {
    let world = World::new().await;
    let slow_once = json!({ "times": 1, "action": { "kind": "slow", "delay_ms": 20_000 } });
    world.sim.add_rule(serde_json::from_value::<Rule>(slow_once).unwrap());
    let mut config = world.config();
    config.graph.request_timeout_s = 1;
    let _replica = Replica::with(config).await;
    let begun = Instant::now();
    let run = world.sync("run", &["mobileApp"]).await;
    assert_eq!((&run["status"], &run["graph_requests_count"]), (&json!("success"), &json!(2)));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_larger_than_a_batch_is_sent_batch_by_batch() {
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
    eventually("all are published", || async { (events.distinct().len() == 25).then_some(()) }).await;
    eventually("and removed", || async { (world.count("select count(*) from outbox").await == 0).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_counts_as_a_suspicious_drop_can_be_said() {
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
async fn the_answers_over_http_are_where_they_are_told_to_be_and_guarded() {
    let world = World::new().await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");
    let _replica = Process::start(&world, "http", &[("HTTP__LISTEN", &listen), ("HTTP__TOKEN", "open-sesame")]);
    let client = reqwest::Client::new();
    let get = async |path: &str, token: &str| {
        let answer = client.get(format!("http://{listen}{path}")).bearer_auth(token).send().await.ok()?;
        Some((answer.status().as_u16(), answer.text().await.ok()?))
    };
    eventually("it is ready, which needs no token", || async { get("/readyz", "").await.filter(|said| said.0 == 200) })
        .await;
    for path in ["/metrics", "/status"] {
        assert_eq!(get(path, "guess").await.unwrap().0, 401, "{path}");
    }
    assert!(get("/metrics", "open-sesame").await.unwrap().1.contains("inventoryd_subscribed 1"));
    let status: serde_json::Value = serde_json::from_str(&get("/status", "open-sesame").await.unwrap().1).unwrap();
    assert_eq!((&status["subscribed"], &status["database"]), (&json!(true), &json!("ok")), "{status}");
}
