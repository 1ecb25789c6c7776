//! Runs against Graph that throttles, breaks, refuses and misleads.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::sim::Rule;
use crate::support::daemon::{Process, Replica};
use crate::support::eventually;
use crate::support::world::World;

const APPS: &str = "deviceAppManagement/mobileApps";

fn rule(value: Value) -> Rule {
    serde_json::from_value(value).unwrap()
}

/// A run of one type under one rule.
async fn under(rule_value: Value) -> (World, Value) {
    let world = World::with_three_pages(APPS).await;
    world.sim.add_rule(rule(rule_value));
    let replica = Replica::start(&world).await;
    let run = world.sync("run", &["mobileApp"]).await;
    replica.stop().await;
    (world, run)
}

fn fails_with(run: &Value, code: &str) {
    assert_eq!((&run["status"], &run["error_codes"]), (&json!("failed"), &json!([code])), "{run}");
    assert_eq!(run["had_errors"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_throttled_request_succeeds_after_its_retry_after() {
    for (status, retry_after, least_ms) in
        [(429, json!("1"), 1000), (429, json!("0.5"), 500), (503, json!("date:2"), 1000), (429, Value::Null, 0)]
    {
        let (_, run) = under(json!({ "path": APPS, "times": 1,
            "action": { "kind": "status", "status": status, "retry_after": retry_after } }))
        .await;
        assert_eq!(run["status"], "success", "{status} {retry_after}");
        assert_eq!((&run["graph_throttled_count"], &run["items_observed_count"]), (&json!(1), &json!(60)));
        let waited = run["graph_throttle_wait_ms"].as_i64().unwrap();
        // A few of the milliseconds that were asked for have passed before the waiting begins.
        assert!((least_ms - 100..least_ms + 5_000).contains(&waited), "{status} {retry_after}: waited {waited} ms");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_throttling_ends_within_the_budget_with_retry_after_s() {
    let world = World::new().await;
    world
        .sim
        .add_rule(rule(json!({ "path": APPS, "action": { "kind": "status", "status": 429, "retry_after": "2" } })));
    let mut config = world.config();
    config.graph.throttle_budget_s = 5;
    config.graph.max_tries = 1;
    let _replica = Replica::with(config).await;
    let events = world.subscribe().await;
    let begun = Instant::now();
    let run = world.sync("for-ever", &["mobileApp"]).await;
    fails_with(&run, "graph_throttled");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert!(run["graph_throttle_wait_ms"].as_i64().unwrap() <= 6_000, "{run}");
    let event = events.event_of(&run).await;
    assert!(event["data"]["retry_after_s"].as_i64().unwrap() >= 2, "{event}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_page_is_requested_again() {
    for action in [
        json!({ "kind": "truncate" }),
        json!({ "kind": "drop" }),
        json!({ "kind": "status", "status": 504 }),
        json!({ "kind": "status", "status": 500 }),
        json!({ "kind": "slow_body", "chunk_bytes": 512, "pause_ms": 5 }),
    ] {
        let (world, run) = under(json!({ "path": APPS, "page": 2, "times": 1, "action": action })).await;
        assert_eq!((&run["status"], &run["items_observed_count"]), (&json!("success"), &json!(60)), "{action}: {run}");
        let tries = world.sim.requests().iter().filter(|request| request.page == 2).count();
        assert_eq!(tries, if action["kind"] == "slow_body" { 1 } else { 2 }, "{action}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_failure_has_its_own_code() {
    for (action, code) in [
        (json!({ "kind": "forbidden" }), "graph_forbidden"),
        (json!({ "kind": "unauthorized_nested" }), "graph_forbidden"),
        (json!({ "kind": "not_licensed" }), "graph_not_applicable"),
        (json!({ "kind": "wrong_content" }), "graph_bad_response"),
        (json!({ "kind": "status", "status": 502 }), "graph_unavailable"),
        (json!({ "kind": "drop" }), "graph_unavailable"),
        (json!({ "kind": "status", "status": 418 }), "graph_bad_request"),
        (json!({ "kind": "foreign_link", "host": "graph.evil.example" }), "graph_foreign_link"),
        (json!({ "kind": "repeat_link" }), "graph_paging_loop"),
        (json!({ "kind": "no_new_ids" }), "graph_paging_loop"),
    ] {
        let (_, run) = under(json!({ "path": APPS, "action": action })).await;
        fails_with(&run, code);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_credential_fails_the_run_without_a_request_to_graph() {
    let (world, run) = under(json!({ "on": "token", "action": { "kind": "status", "status": 400 } })).await;
    fails_with(&run, "credential_unavailable");
    assert!(world.sim.requests().iter().all(|request| request.path.ends_with("/token")), "Graph was not asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_token_is_replaced() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.sync("first", &["mobileApp"]).await;
    world.sim.expire_tokens(None);
    assert_eq!(world.sync("second", &["mobileApp"]).await["status"], "success");
    assert_eq!(world.sim.state().tokens_issued, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_of_graph_are_not_stored() {
    let (world, run) = under(json!({ "path": APPS, "action": { "kind": "secret_in_error", "status": 403 } })).await;
    assert_eq!(run["status"], "failed");
    let everything = format!(
        "{} {:?} {:?}",
        run,
        world.rows("select * from inventory_sync_run_types").await,
        world.rows("select * from inventory_sync_runs").await
    );
    for secret in ["Bearer", "eyJ", "https://", "http://", "token="] {
        assert!(!everything.contains(secret), "{secret}: {everything}");
    }
    assert_eq!(run["error_context"]["mobileApp"]["http_status"], 403);
    assert!(run["error_context"]["mobileApp"]["request_id"].is_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_select_is_dropped_and_remembered_per_tenant() {
    let world = World::new().await;
    world.sim.add_rule(rule(json!({ "path": APPS, "action": { "kind": "refuse_select", "property": "publisher" } })));
    let _replica = Replica::start(&world).await;
    let first = world.sync("first", &["mobileApp"]).await;
    assert_eq!((&first["status"], &first["graph_select_refused_count"]), (&json!("success"), &json!(1)));
    let kept = world.count("select count(*) from inventory_items where meta_jsonb::text ~ 'SECRET|largeIcon'").await;
    assert_eq!(kept, 0, "what comes without $select is still sanitized");
    let second = world.sync("second", &["mobileApp"]).await;
    assert_eq!((&second["graph_requests_count"], &second["graph_select_refused_count"]), (&json!(1), &json!(0)));
    let other = Uuid::new_v4();
    world.register(other, None).await;
    world.publish(&World::request_of(other, "other", &["mobileApp"])).await;
    let other = world.ended("other").await;
    assert_eq!(
        other["graph_select_refused_count"], 1,
        "another tenant's Graph is asked with it: it may be another ring"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_page_does_not_end_a_list() {
    let (_, run) = under(json!({ "path": APPS, "page": 1, "times": 1, "action": { "kind": "empty_page" } })).await;
    assert_eq!((&run["status"], &run["items_observed_count"]), (&json!("success"), &json!(60)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_without_an_id_is_one_error_of_its_type() {
    let (_, run) = under(json!({ "path": APPS, "page": 1, "times": 1, "action": { "kind": "missing_id" } })).await;
    assert_eq!((&run["status"], &run["error_codes"]), (&json!("partial"), &json!(["graph_bad_response"])), "{run}");
    assert!(run["errors_count"].as_i64().unwrap() >= 1);
    assert!(run["items_observed_count"].as_i64().unwrap() >= 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_past_its_deadline_ends_with_what_was_read() {
    let world = World::new().await;
    world.sim.add_rule(rule(json!({ "path": APPS, "action": { "kind": "slow", "delay_ms": 10_000 } })));
    let mut config = world.config();
    config.run.deadline_s = 2;
    let _replica = Replica::with(config).await;
    let run = world.sync("late", &["mobileApp", "deviceShellScript"]).await;
    assert_eq!((&run["status"], &run["error_codes"]), (&json!("partial"), &json!(["deadline_exceeded"])));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_uses_http2_with_its_headers_and_ids() {
    let world = World::with_three_pages(APPS).await;
    let _replica = Replica::start(&world).await;
    world.sync("run", &["mobileApp"]).await;
    let requests = world.sim.requests();
    let graph: Vec<_> = requests.iter().filter(|request| request.path.ends_with("mobileApps")).collect();
    assert!(graph.iter().all(|request| request.http_version.contains('2')), "{graph:?}");
    assert!(graph.iter().all(|request| uuid::Uuid::try_parse(&request.client_request_id).is_ok()));
    assert_eq!(graph.iter().map(|request| request.page).collect::<Vec<_>>(), [1, 2, 3]);
    let ours = concat!("inventoryd/", env!("CARGO_PKG_VERSION"));
    assert!(requests.len() > graph.len(), "tokens were requested");
    assert!(
        requests.iter().all(|request| request.user_agent == ours),
        "one User-Agent for Graph and tokens: {requests:?}"
    );
    assert!(
        graph.iter().all(|request| request.prefer == "include-unknown-enum-members"),
        "a link does not carry headers: every page is asked for with them"
    );
    assert!(graph[0].query.contains("$select=") || graph[0].query.contains("%24select="), "{}", graph[0].query);
}

#[tokio::test(flavor = "multi_thread")]
async fn status_names_the_cause_and_cure_of_a_missing_token_and_of_a_broken_connection() {
    let world = World::new().await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");
    let _replica = Process::start(&world, "status", &[("HTTP__LISTEN", &listen)]);
    let problems = async || -> Vec<Value> {
        let status = reqwest::get(format!("http://{listen}/status")).await.unwrap();
        let status: Value = serde_json::from_str(&status.text().await.unwrap()).unwrap();
        status["problems"].as_array().unwrap().iter().filter(|one| one["component"] == "graph").cloned().collect()
    };
    world.sim.add_rule(rule(json!({ "on": "token", "times": 1, "action": { "kind": "status", "status": 401 } })));
    fails_with(&world.sync("no-token", &["mobileApp"]).await, "credential_unavailable");
    let found = problems().await;
    let message = found[0]["message"].as_str().unwrap();
    for part in ["AADSTS7000215", "secret is wrong", "not to its id", "credential default", &world.tenant.to_string()] {
        assert!(message.contains(part), "{part}: {message}");
    }
    // A failed request answers all others for a few seconds.
    eventually("a token is issued", || async {
        let key = Uuid::new_v4().to_string();
        (world.sync(&key, &["mobileApp"]).await["status"] == "success").then_some(())
    })
    .await;
    assert_eq!(problems().await, [Value::Null; 0]);
    world.sim.add_rule(rule(json!({ "path": APPS, "times": 4, "action": { "kind": "drop" } })));
    fails_with(&world.sync("dropped", &["mobileApp"]).await, "graph_unavailable");
    let found = problems().await;
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0]["message"].as_str().unwrap().contains("no response from Graph: "), "{found:?}");
    assert_eq!(world.sync("good", &["mobileApp"]).await["status"], "success");
    assert_eq!(problems().await, [Value::Null; 0]);
}
