//! Admission: every decision of the table in the contract, through the real queue.

use serde_json::{Value, json};
use uuid::Uuid;

use inventoryd::config::WhenFull;
use inventoryd::domain::request::SyncRequest;

use crate::sim::Rule;
use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::world::World;

/// Rule that delays every Graph response by `delay_ms`.
pub(crate) fn slow(delay_ms: u64) -> Rule {
    serde_json::from_value(json!({ "action": { "kind": "slow", "delay_ms": delay_ms } })).unwrap()
}

pub(crate) async fn running(world: &World, key: &str) -> Value {
    eventually("the run begins", || async { world.runs(key).await.pop().filter(|run| run["status"] == "running") })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_duplicate_of_a_finished_request_creates_no_run_and_no_event() {
    let world = World::new().await;
    let replica = Replica::start(&world).await;
    let events = world.subscribe().await;
    let run = world.sync("once", &["mobileApp"]).await;
    events.event_of(&run).await;
    let requests = world.sim.state().requests;
    for _ in 0..5 {
        world.publish(&world.request("once", &["mobileApp"])).await;
    }
    world.sync("after", &["deviceShellScript"]).await;
    eventually("the queue is empty", || async { (world.depth("inventory.sync.requests").await == 0).then_some(()) })
        .await;
    replica.stop().await;
    assert_eq!(world.runs("once").await, [run]);
    assert_eq!(world.count("select count(*) from inventory_sync_runs").await, 2);
    assert_eq!(events.received().len(), 2);
    assert!(world.sim.state().requests <= requests + 2, "a duplicate sends no request to Graph");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_of_a_running_selection_is_skipped() {
    let world = World::new().await;
    world.sim.add_rule(slow(50_000));
    let _replica = Replica::start(&world).await;
    let events = world.subscribe().await;
    world.publish(&world.request("first", &["mobileApp"])).await;
    running(&world, "first").await;
    let second = world.sync("second", &["mobileApp"]).await;
    assert_eq!((&second["status"], &second["error_codes"]), (&json!("skipped"), &json!(["lock_contended"])));
    assert_eq!((&second["had_errors"], &second["started_at"]), (&json!(true), &second["finished_at"]));
    world.sim.remove_rules(None);
    assert_eq!(world.ended("first").await["status"], "success");
    let event = events.event_of(&second).await;
    assert_eq!(
        (&event["data"]["status"], &event["data"]["error_codes"]),
        (&json!("skipped"), &json!(["lock_contended"]))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_over_the_tenant_limit_is_skipped() {
    let world = World::new().await;
    world.execute("update tenants set max_concurrent_runs = 1").await;
    world.sim.add_rule(slow(50_000));
    let _replica = Replica::start(&world).await;
    world.publish(&world.request("first", &["mobileApp"])).await;
    running(&world, "first").await;
    let second = world.sync("second", &["deviceShellScript"]).await;
    assert_eq!((&second["status"], &second["error_codes"]), (&json!("skipped"), &json!(["concurrency_limit_tenant"])));
    world.sim.remove_rules(None);
    let other = Uuid::new_v4();
    world.register(other, None).await;
    world.publish(&World::request_of(other, "other", &["mobileApp"])).await;
    assert_eq!(world.ended("other").await["status"], "success", "another tenant has its own limit");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fleet_limit_holds_across_replicas_and_tenants() {
    let world = World::new().await;
    world.sim.add_rule(slow(50_000));
    let mut config = world.config();
    config.limits.fleet_max_runs = 2;
    let _one = Replica::with(config.clone()).await;
    let _two = Replica::with(config).await;
    let tenants: Vec<Uuid> = (0..6).map(|_| Uuid::new_v4()).collect();
    for (number, tenant) in tenants.iter().enumerate() {
        world.register(*tenant, None).await;
        world.publish(&World::request_of(*tenant, &format!("k{number}"), &["mobileApp"])).await;
    }
    let refused = "select count(*) from inventory_sync_runs where status = 'skipped'";
    eventually("all others are refused", || async { (world.count(refused).await == 4).then_some(()) }).await;
    world.sim.remove_rules(None);
    let mut statuses = Vec::new();
    for number in 0..6 {
        let run = world.ended(&format!("k{number}")).await;
        if run["status"] == "skipped" {
            assert_eq!(run["error_codes"], json!(["concurrency_limit_global"]));
        }
        statuses.push(run["status"].as_str().unwrap().to_owned());
    }
    assert_eq!(statuses.iter().filter(|status| *status == "success").count(), 2, "{statuses:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deferred_request_runs_once_a_slot_is_free() {
    let world = World::new().await;
    world.sim.add_rule(slow(50_000));
    let mut config = world.config();
    config.limits.when_full = WhenFull::Defer;
    let _replica = Replica::with(config).await;
    world.publish(&world.request("first", &["mobileApp"])).await;
    running(&world, "first").await;
    world.publish(&world.request("second", &["mobileApp"])).await;
    eventually("the message waits on a retry tier", || async {
        (world.depth("inventory.retry.5s").await == 1).then_some(())
    })
    .await;
    assert!(world.runs("second").await.is_empty(), "a deferred request has no run yet");
    world.sim.remove_rules(None);
    assert_eq!(world.ended("second").await["status"], "success");
    assert_eq!(world.ended("first").await["status"], "success");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_deferred_too_long_is_skipped() {
    let world = World::new().await;
    world.sim.add_rule(slow(50_000));
    let mut config = world.config();
    config.limits.when_full = WhenFull::Defer;
    config.limits.defer_max_s = 5;
    let _replica = Replica::with(config).await;
    world.publish(&world.request("first", &["mobileApp"])).await;
    running(&world, "first").await;
    world.publish(&world.request("second", &["mobileApp"])).await;
    let second = world.ended("second").await;
    assert_eq!((&second["status"], &second["error_codes"]), (&json!("skipped"), &json!(["lock_contended"])));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handed_back_run_is_taken_over_at_once_without_costing_an_attempt() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.sync("warm", &["mobileApp"]).await;
    let tenant = world.tenant;
    // The state that a stopped worker leaves: no owner, an expired lease, one of two types finished.
    let request = world.request("handed", &["mobileApp", "deviceShellScript"]);
    let selection =
        inventoryd::domain::request::SyncRequest::parse(None, request.to_string().as_bytes()).unwrap().selection;
    let run_id = Uuid::now_v7();
    world.execute(&format!(
        "insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status, attempt,
                interruptions, lease_expires_at, daemon_version)
         values ('{tenant}', '{run_id}', 'handed', '{}', '{}', 'running', 7, 6, clock_timestamp(), 'x');
         insert into inventory_sync_run_types values ('{tenant}', '{run_id}', 'mobileApp', 'complete', 5, 5, 5, 0, 0)",
        selection.hash(), selection.canonical_json(),
    )).await;
    world.sim.reset_counters();
    world.publish(&request).await;
    let run = world.ended("handed").await;
    assert_eq!((&run["status"], &run["attempt"], &run["interruptions"]), (&json!("success"), &json!(8), &json!(7)));
    assert_eq!(run["items_observed_count"], 5 + 12, "the finished type keeps its counts");
    assert!(world.sim.requests().iter().all(|r| !r.path.contains("mobileApps")), "a finished type is not read again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_out_of_attempts_fails_as_worker_lost() {
    let world = World::new().await;
    let request = world.request("lost", &["mobileApp"]);
    let selection =
        inventoryd::domain::request::SyncRequest::parse(None, request.to_string().as_bytes()).unwrap().selection;
    world.execute(&format!(
        "insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status, attempt,
                lease_owner, lease_expires_at, daemon_version)
         values ('{}', '{}', 'lost', '{}', '{}', 'running', 5, 'gone', clock_timestamp() - interval '1 s', 'x')",
        world.tenant, Uuid::now_v7(), selection.hash(), selection.canonical_json(),
    )).await;
    let _replica = Replica::start(&world).await;
    let events = world.subscribe().await;
    world.publish(&request).await;
    let run = world.ended("lost").await;
    assert_eq!(
        (&run["status"], &run["error_codes"], &run["attempt"]),
        (&json!("failed"), &json!(["worker_lost"]), &json!(5))
    );
    events.event_of(&run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exhausted_run_of_the_same_selection_fails_and_frees_it() {
    let world = World::new().await;
    let request = world.request("mine", &["mobileApp"]);
    let selection =
        inventoryd::domain::request::SyncRequest::parse(None, request.to_string().as_bytes()).unwrap().selection;
    world
        .execute(&format!(
        "insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status, attempt,
                lease_owner, lease_expires_at, daemon_version)
         values ('{}', '{}', 'theirs', '{}', '{}', 'running', 5, 'gone', clock_timestamp() - interval '1 s', 'x')",
        world.tenant, Uuid::now_v7(), selection.hash(), selection.canonical_json(),
    ))
        .await;
    let _replica = Replica::start(&world).await;
    let events = world.subscribe().await;
    world.publish(&request).await;
    assert_eq!(world.ended("mine").await["status"], "success");
    let theirs = world.ended("theirs").await;
    assert_eq!((&theirs["status"], &theirs["error_codes"]), (&json!("failed"), &json!(["worker_lost"])));
    events.event_of(&theirs).await;
}

/// Inserts a running run of the request whose lease expired an hour ago.
async fn interrupted(world: &World, request: &Value) {
    let body = request.to_string();
    let selection = SyncRequest::parse(None, body.as_bytes()).unwrap().selection;
    let (tenant, run, key) = (world.tenant, Uuid::now_v7(), request["idempotency_key"].as_str().unwrap());
    let (hash, payload) = (selection.hash(), selection.canonical_json());
    world
        .execute(&format!(
            "insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status,
                    lease_owner, lease_expires_at, daemon_version)
             values ('{tenant}', '{run}', '{key}', '{hash}', '{payload}', 'running',
                     'gone', clock_timestamp() - interval '1 hour', 'x')"
        ))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_run_whose_message_is_lost_is_restarted() {
    let world = World::new().await;
    interrupted(&world, &world.request("interrupted", &["mobileApp"])).await;
    let mut config = world.config();
    config.run.restart_after_s = 1;
    let _replica = Replica::with(config).await;
    let events = world.subscribe().await;
    let run = world.ended("interrupted").await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("success"), &json!(2)));
    events.event_of(&run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_request_does_not_end_an_interrupted_run_of_its_selection() {
    let world = World::new().await;
    interrupted(&world, &world.request("interrupted", &["mobileApp"])).await;
    let _replica = Replica::start(&world).await;
    let skipped = world.sync("new", &["mobileApp"]).await;
    assert_eq!((&skipped["status"], &skipped["error_codes"]), (&json!("skipped"), &json!(["lock_contended"])));
    assert_eq!(world.runs("interrupted").await[0]["status"], "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_nothing_restarts_fails_and_casts_doubt_on_missing_items() {
    let world = World::new().await;
    {
        let replica = Replica::start(&world).await;
        assert_eq!(world.sync("before", &["mobileApp", "deviceShellScript"]).await["status"], "success");
        replica.stop().await;
    }
    let request = world.request("interrupted", &["mobileApp", "deviceShellScript"]);
    interrupted(&world, &request).await;
    // The items were seen before the run that is lost.
    world.execute("update inventory_items set last_seen_at = '2020-01-01 00:00Z'").await;
    let mut config = world.config();
    config.run.restart_after_s = 1;
    config.run.give_up_after_s = 3;
    let replica = Replica::with(config).await;
    let events = world.subscribe().await;
    // Nobody consumes: the copies of the request wait in the queue.
    replica.daemon().stop().paused.send_replace(true);
    let run = world.ended("interrupted").await;
    assert_eq!((&run["status"], &run["error_codes"]), (&json!("failed"), &json!(["worker_lost"])));
    assert!(world.depth("inventory.sync.requests").await >= 1, "the request was published again first");
    let types = world
        .rows(
            "select policy_type, t.status, error_code from inventory_sync_run_types t join inventory_sync_runs r
                            on r.tenant_id = t.tenant_id and r.id = t.run_id
                            where idempotency_key = 'interrupted' order by 1",
        )
        .await;
    let lost = |name: &str| json!({ "policy_type": name, "status": "failed", "error_code": "worker_lost" });
    assert_eq!(types, [lost("deviceShellScript"), lost("mobileApp")], "every type of the scope");
    let missing = world.missing(&run).await;
    assert_eq!(missing.len() as i64, run["missing_low_count"].as_i64().unwrap());
    assert!(!missing.is_empty() && missing.iter().all(|item| item["confidence"] == "low"), "{missing:?}");
    events.event_of(&run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_message_waits_in_the_queue_is_taken_over() {
    let world = World::new().await;
    let request = world.request("interrupted", &["mobileApp"]);
    interrupted(&world, &request).await;
    let mut config = world.config();
    config.run.restart_after_s = 1;
    let replica = Replica::with(config).await;
    replica.daemon().stop().paused.send_replace(true);
    eventually("consumption is paused", || async { (!replica.daemon().health().subscribed()).then_some(()) }).await;
    world.publish(&request).await;
    eventually("the request is published again", || async {
        (world.depth("inventory.sync.requests").await >= 2).then_some(())
    })
    .await;
    assert_eq!(world.runs("interrupted").await[0]["status"], "running", "the run is not ended");
    replica.daemon().stop().paused.send_replace(false);
    let run = world.ended("interrupted").await;
    assert_eq!((&run["status"], &run["attempt"]), (&json!("success"), &json!(2)));
}
