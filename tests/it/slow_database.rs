//! Slow database, exhausted pool, lingering transactions: runs take longer, and no lease or attempt is lost.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use crate::sim::{Rule, SimConfig};
use crate::support::daemon::Replica;
use crate::support::world::World;
use crate::support::{binary, eventually, within};

const APPS: &str = "deviceAppManagement/mobileApps";
const LISTS: [(&str, &str); 4] = [
    ("mobileApp", APPS),
    ("deviceShellScript", "deviceManagement/deviceShellScripts"),
    ("deviceHealthScript", "deviceManagement/deviceHealthScripts"),
    ("deviceCompliancePolicy", "deviceManagement/deviceCompliancePolicies"),
];
const TYPES: [&str; 4] = [LISTS[0].0, LISTS[1].0, LISTS[2].0, LISTS[3].0];

/// A world with pages of 500 objects, so that the database is what a run waits for.
async fn world_with_lists_of(sizes: [u32; 4]) -> World {
    let mut config = SimConfig::default();
    config.page_sizes.default = 500;
    let world = World::with_sim(config).await;
    for ((_, path), size) in LISTS.into_iter().zip(sizes) {
        world.sim.set_size(Some(world.tenant), Some(path), size).unwrap();
    }
    world
}

/// Makes each item of the world's tenant take `seconds` to write, as on a slow disk.
async fn slow_rows(world: &World, seconds: f64) {
    let tenant = world.tenant;
    world
        .execute(&format!(
            "create function slow_row() returns trigger language plpgsql as $$ begin
               perform pg_sleep({seconds}); return new; end $$;
             create trigger slow_row before insert on inventory_items for each row
               when (new.tenant_id = '{tenant}') execute function slow_row();"
        ))
        .await;
}

/// The run of `key` once it has ended or was taken over.
async fn ended_or_restarted(world: &World, key: &str) -> Value {
    let settled = |run: &Value| run["status"] != "running" || run["attempt"] != 1;
    eventually(&format!("the run of {key} ends"), || async { world.runs(key).await.into_iter().find(settled) }).await
}

async fn writing(world: &World) {
    let sleepers = "select count(*) from pg_stat_activity
        where datname = current_database() and wait_event = 'PgSleep'";
    eventually("a batch is being written", || async { (world.count(sleepers).await > 0).then_some(()) }).await;
}

/// Share of the duration of the run of `key` that had passed at `moment`, an SQL expression.
async fn share_of_run(world: &World, key: &str, moment: &str) -> f64 {
    let query = format!(
        "select extract(epoch from ({moment}) - started_at)::float8 / extract(epoch from finished_at - started_at)::float8
           from inventory_sync_runs where idempotency_key = '{key}'"
    );
    sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(&world.db).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn run_that_writes_for_longer_than_its_lease_keeps_it() {
    let world = world_with_lists_of([2_500; 4]).await;
    slow_rows(&world, 0.01).await;
    let config = world.config();
    assert!(config.run.lease_s < 25, "the rows take longer than the lease");
    let _replica = Replica::with(config).await;
    world.publish(&world.request("slow", &TYPES)).await;
    let run = ended_or_restarted(&world, "slow").await;
    assert_eq!(
        (&run["status"], &run["attempt"], &run["items_observed_count"]),
        (&json!("success"), &json!(1), &json!(10_000)),
        "a slow success: {run}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn finished_type_is_recorded_while_other_lists_are_written() {
    let world = world_with_lists_of([12, 1_200, 1_200, 1_200]).await;
    slow_rows(&world, 0.01).await;
    let mut config = world.config();
    // Longer than the run, so that its lease has no part in this.
    config.run.lease_s = 600;
    let _replica = Replica::with(config).await;
    world.publish(&world.request("slow", &TYPES)).await;
    let run = ended_or_restarted(&world, "slow").await;
    assert_eq!(run["status"], "success", "{run}");
    let recorded = "select finished_at from inventory_sync_run_types where policy_type = 'mobileApp'";
    let share = share_of_run(&world, "slow", recorded).await;
    assert!(share < 0.5, "12 objects beside 3,600 were recorded after {:.0} % of the run", share * 100.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_a_running_selection_delay_no_other_request() {
    let world = world_with_lists_of([1_500; 4]).await;
    let other = Uuid::new_v4();
    world.register(other, None).await;
    slow_rows(&world, 0.01).await;
    let mut config = world.config();
    config.consumer.prefetch = 8;
    config.database.max_connections = 12;
    config.run.lease_s = 600;
    let _replica = Replica::with(config).await;
    world.publish(&world.request("slow", &TYPES)).await;
    writing(&world).await;
    for number in 0..7 {
        world.publish(&world.request(&format!("again-{number}"), &TYPES)).await;
    }
    world.publish(&World::request_of(other, "other", &["mobileApp"])).await;
    let run = ended_or_restarted(&world, "slow").await;
    assert_eq!(run["status"], "success", "{run}");
    for number in 0..7 {
        let key = format!("again-{number}");
        let skipped = world.ended(&key).await;
        assert_eq!((&skipped["status"], &skipped["error_codes"]), (&json!("skipped"), &json!(["lock_contended"])));
    }
    assert_eq!(world.ended("other").await["status"], "success");
    let decided = "select max(started_at) from inventory_sync_runs where idempotency_key <> 'slow'";
    let share = share_of_run(&world, "slow", decided).await;
    assert!(share < 0.5, "the last of eight requests was admitted after {:.0} % of the slow run", share * 100.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn transaction_left_open_on_one_run_costs_no_other_run_its_lease() {
    let world = world_with_lists_of([100, 12, 12, 12]).await;
    let other = Uuid::new_v4();
    world.register(other, None).await;
    slow_rows(&world, 0.05).await;
    // Longer than a lease that is not renewed.
    world.sim.add_rule(rule(json!({ "tenant": other, "action": { "kind": "slow", "delay_ms": 25_000 } })));
    let _replica = Replica::start(&world).await;
    world.publish(&World::request_of(other, "other", &["mobileApp"])).await;
    world.publish(&world.request("stuck", &["mobileApp"])).await;
    writing(&world).await;
    // A session whose client has disconnected, which the server has not noticed yet, keeps the row of the run: it is next in
    // line when the connection of the writer breaks.
    let mut dead = PgConnection::connect(&world.database_url).await.unwrap();
    let lock = tokio::spawn(async move {
        let lock = "begin; select from inventory_sync_runs where idempotency_key = 'stuck' for update";
        sqlx::raw_sql(lock).execute(&mut dead).await.unwrap();
        dead
    });
    let in_line = "select count(*) from pg_stat_activity
        where datname = current_database() and wait_event_type = 'Lock' and query like '%for update'";
    eventually("it waits for the row", || async { (world.count(in_line).await == 1).then_some(()) }).await;
    let break_writer = "select count(pg_terminate_backend(pid)) from pg_stat_activity
        where datname = current_database() and application_name = 'inventoryd' and wait_event = 'PgSleep'";
    assert_eq!(world.count(break_writer).await, 1);
    let dead = lock.await.unwrap();
    let run = ended_or_restarted(&world, "other").await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("success"), &json!(1)), "{run}");
    dead.close().await.unwrap();
    assert_eq!(world.ended("stuck").await["status"], "success", "it goes on once the row is free");
}

#[tokio::test(flavor = "multi_thread")]
async fn run_waits_for_a_connection_without_starting_again() {
    let world = world_with_lists_of([400; 4]).await;
    slow_rows(&world, 0.01).await;
    let mut config = world.config();
    config.database.max_connections = 1;
    config.database.acquire_timeout_s = 2;
    config.run.batch_rows = 400;
    config.run.lease_s = 60;
    let replica = Replica::with(config).await;
    world.publish(&world.request("crowded", &TYPES)).await;
    let run = ended_or_restarted(&world, "crowded").await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("success"), &json!(1)), "waiting is no outage: {run}");
    assert_eq!(replica.daemon().health().paused(), None);
    let asked = i64::try_from(world.sim.state().tenants[&world.tenant].requests).unwrap();
    assert_eq!(run["graph_requests_count"], asked, "Graph was asked once for each page");
}

#[tokio::test(flavor = "multi_thread")]
async fn deadline_counts_from_the_start_of_the_run_over_all_attempts() {
    let world = World::new().await;
    // Longer than both attempts: only the deadline ends the list.
    world.sim.add_rule(rule(json!({ "path": APPS, "action": { "kind": "slow", "delay_ms": 55_000 } })));
    let mut config = world.config();
    config.run.deadline_s = 24;
    config.consumer.drain_s = 0;
    let first = Replica::with(config.clone()).await;
    world.publish(&world.request("long", &["mobileApp"])).await;
    let waited = "select count(*) from inventory_sync_runs where clock_timestamp() - started_at > interval '14 s'";
    within(Duration::from_secs(60), "the first attempt takes most of the time", || async {
        (world.count(waited).await == 1).then_some(())
    })
    .await;
    first.stop().await;
    let _second = Replica::with(config).await;
    let run = world.ended("long").await;
    assert_eq!((&run["attempt"], &run["error_codes"]), (&json!(2), &json!(["deadline_exceeded"])), "{run}");
    let took = "select extract(epoch from finished_at - started_at)::bigint from inventory_sync_runs";
    let took = world.count(took).await;
    assert!(took < 36, "the deadline of 24 s ended the run after {took} s");
}

#[tokio::test(flavor = "multi_thread")]
async fn throttle_budget_counts_over_all_attempts() {
    let world = World::new().await;
    let throttled = json!({ "kind": "status", "status": 429, "retry_after": "4" });
    world.sim.add_rule(rule(json!({ "path": APPS, "action": throttled })));
    let mut config = world.config();
    config.graph.throttle_budget_s = 10;
    config.consumer.drain_s = 0;
    let first = Replica::with(config.clone()).await;
    world.publish(&world.request("throttled", &["mobileApp"])).await;
    // Two of three waits that fit into the budget.
    let asked = || world.sim.state().tenants.get(&world.tenant).map_or(0, |tenant| tenant.requests);
    within(Duration::from_secs(60), "Graph has refused twice", || async { (asked() >= 2).then_some(()) }).await;
    first.stop().await;
    let _second = Replica::with(config).await;
    let run = world.ended("throttled").await;
    assert_eq!((&run["attempt"], &run["error_codes"]), (&json!(2), &json!(["graph_throttled"])), "{run}");
    let waited = run["graph_throttle_wait_ms"].as_i64().unwrap();
    assert!((1..=10_000).contains(&waited), "both attempts waited {waited} ms with a budget of 10 s");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_warns_of_more_lists_than_the_connections_can_serve() {
    for (prefetch, warned) in [("8", false), ("64", true)] {
        let mut command = Command::new(binary());
        command.arg("check").env_clear().env("INVENTORYD__CONSUMER__PREFETCH", prefetch).stdin(Stdio::null());
        let output = spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "a warning is no error: {said}");
        assert_eq!(said.contains("database.max_connections"), warned, "prefetch {prefetch}: {said}");
    }
}

fn rule(value: Value) -> Rule {
    serde_json::from_value(value).unwrap()
}
