//! Outcomes of runs: counts agree with rows, and sizes, times and durations stay within their bounds.

use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use crate::sim::Rule;
use crate::support::daemon::Replica;
use crate::support::world::World;
use crate::support::{binary, eventually};

fn rule(value: Value) -> Rule {
    serde_json::from_value(value).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_category_that_is_named_twice_is_one_error() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let request = json!({ "schema_version": 1, "tenant_id": world.tenant, "idempotency_key": "twice",
        "selection": { "policy_types": ["mobileApp", "category:Foo"], "categories": ["Foo"],
                       "include_foundations": false } });
    world.publish(&request).await;
    let run = world.ended("twice").await;
    let failed = world.count("select count(*) from inventory_sync_run_types where status <> 'complete'").await;
    assert_eq!((&run["status"], &run["errors_count"]), (&json!("partial"), &json!(failed)), "{run}");
}

#[tokio::test(flavor = "multi_thread")]
async fn error_context_is_stored_in_4_kib() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.sim.add_rule(rule(json!({ "action": { "kind": "forbidden" } })));
    let request = json!({ "schema_version": 1, "tenant_id": world.tenant, "idempotency_key": "all",
        "selection": { "policy_types": ["*"] } });
    world.publish(&request).await;
    assert_eq!(world.ended("all").await["status"], "failed");
    let bytes = world.count("select octet_length(error_context::text)::bigint from inventory_sync_runs").await;
    assert!((2_000..=4_096).contains(&bytes), "{bytes} bytes");
}

/// Replacement of the database clock, found before the built-in one because `public` comes first in `search_path`.
const CLOCK: &str = "
    create table clock_offset (seconds double precision not null);
    insert into clock_offset values (0);
    create function public.clock_timestamp() returns timestamptz language sql volatile as
      'select pg_catalog.clock_timestamp() + make_interval(secs => seconds) from public.clock_offset';
    create function public.now() returns timestamptz language sql stable as
      'select pg_catalog.now() + make_interval(secs => seconds) from public.clock_offset';";

#[tokio::test(flavor = "multi_thread")]
async fn database_clock_that_steps_back_makes_nothing_missing_that_was_observed() {
    let world = World::new().await;
    let (_, database) = world.database_url.rsplit_once('/').unwrap();
    world.execute(&format!("alter database {database} set search_path = public, pg_catalog; {CLOCK}")).await;
    world.sim.add_rule(rule(json!({ "action": { "kind": "slow", "delay_ms": 2_000 } })));
    let mut config = world.config();
    config.run.lease_s = 600;
    let _replica = Replica::with(config).await;
    world.publish(&world.request("run", &["mobileApp"])).await;
    eventually("the run begins", || async { world.runs("run").await.pop() }).await;
    world.execute("update clock_offset set seconds = -60").await;
    let run = world.ended("run").await;
    assert_eq!((&run["status"], &run["items_observed_count"]), (&json!("success"), &json!(12)), "{run}");
    assert_eq!(world.missing(&run).await, Vec::<Value>::new());
    assert_eq!(world.count("select count(*) from inventory_items_current").await, 12);
    let backwards = "select count(*) from inventory_sync_runs where finished_at < started_at";
    assert_eq!(world.count(backwards).await, 0, "a run ends after it started");
}

#[tokio::test(flavor = "multi_thread")]
async fn pause_without_an_end_is_obeyed() {
    let world = World::new().await;
    let families = ["intune", "devices", "conditional_access", "graph"];
    for family in families {
        world.execute(&format!("insert into tenant_pauses values ('{}', '{family}', 'infinity')", world.tenant)).await;
    }
    let mut config = world.config();
    config.graph.throttle_budget_s = 3;
    let _replica = Replica::with(config).await;
    let run = world.sync("paused", &["mobileApp"]).await;
    assert_eq!((&run["status"], &run["error_codes"]), (&json!("failed"), &json!(["graph_throttled"])), "{run}");
    let asked = world.sim.requests().into_iter().filter(|request| !request.path.ends_with("/token")).count();
    assert_eq!(asked, 0, "Graph is not asked");
}

/// Keys with a number of days, seconds or milliseconds.
const DURATIONS: [&str; 16] = [
    "broker.heartbeat_s",
    "broker.connect_timeout_s",
    "broker.operation_timeout_s",
    "consumer.watchdog_s",
    "consumer.drain_s",
    "consumer.broker_timeout_s",
    "run.lease_s",
    "run.deadline_s",
    "limits.defer_max_s",
    "graph.request_timeout_s",
    "graph.throttle_budget_s",
    "database.acquire_timeout_s",
    "database.statement_timeout_s",
    "outbox.poll_ms",
    "outbox.claim_s",
    "retention.runs_days",
];

#[tokio::test(flavor = "multi_thread")]
async fn durations_that_no_clock_can_count_are_refused_by_their_name() {
    for key in DURATIONS {
        let (section, name) = key.split_once('.').unwrap();
        let variable = format!("INVENTORYD__{}__{}", section.to_uppercase(), name.to_uppercase());
        // As much as the type of the key holds, and what overflows once it is added to a time of today.
        let least = if key.ends_with("_days") { "9999999" } else { "9223372036854775" };
        for value in ["18446744073709551615", "9223372036854775807", least] {
            let mut command = Command::new(binary());
            command.arg("check").env_clear().env(&variable, value).stdin(Stdio::null());
            let output = spawn_blocking(move || command.output().unwrap()).await.unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let refused = output.status.code() == Some(1) && said.contains(key) && !said.contains("panicked");
            assert!(refused, "{key} = {value}: {:?}: {said}", output.status);
        }
    }
}
