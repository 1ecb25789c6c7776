//! Log lines: each line of a run names the run.

use serde_json::Value;

use crate::sim::{Action, ErrorBody, Rule};
use crate::support::daemon::Process;
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn every_line_of_a_run_names_the_run_its_tenant_and_its_correlation_id() {
    let world = World::with_three_pages("deviceAppManagement/mobileApps").await;
    world.sim.add_rule(Rule::status(429, Some("1")).path("deviceAppManagement/mobileApps").times(1));
    world.sim.add_rule(Rule::status(403, None).path("deviceManagement/deviceShellScripts"));
    let process = Process::start(&world, "a", &[("TELEMETRY__LOG", "info,inventoryd::graph=debug")]);
    process.wait_for_log("subscribed").await;
    let mut request = world.request("logged", &["mobileApp", "deviceShellScript"]);
    request["correlation_id"] = "ticket-7".into();
    world.publish(&request).await;
    let run = world.ended("logged").await;
    process.wait_for_log("run ended").await;

    let log = process.log();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let at = |text: &str| lines.iter().position(|line| line["message"] == text).expect(text);
    let of_the_run = &lines[at("run started")..=at("run ended")];
    let said = |text: &str| of_the_run.iter().any(|line| line["message"] == text);
    for text in [
        "Graph request succeeded",
        "Graph request failed",
        "Graph throttled the tenant; pausing requests",
        "list not read to the end",
        "type ended",
    ] {
        assert!(said(text), "{text}: {log}");
    }
    for line in of_the_run {
        let span = &line["span"];
        assert_eq!((&span["run_id"], &span["tenant_id"]), (&run["id"], &run["tenant_id"]), "{line}");
        assert_eq!(span["correlation_id"], "ticket-7", "{line}");
        assert!(line["tenant_id"].is_null(), "said once: {line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_client_library_logs_a_link_or_a_token() {
    let world = World::with_three_pages("deviceAppManagement/mobileApps").await;
    world.sim.add_rule(Rule::status(429, Some("1")).path("deviceAppManagement/mobileApps").times(1));
    world.sim.add_rule(Rule::status(503, None).on_token().times(1));
    let process = Process::start(&world, "a", &[("TELEMETRY__LOG", "info")]);
    process.wait_for_log("subscribed").await;
    assert_eq!(world.sync("logged", &["mobileApp"]).await["status"], "success");
    world.sim.add_rule(Rule::status(404, None).path("deviceAppManagement/mobileApps"));
    world.sync("refused", &["mobileApp"]).await;
    let log = process.log();
    assert!(log.contains("run ended"), "{log}");
    for part in ["https://", "http://", "/oauth2/", "skiptoken", "$select", "Bearer", "eyJ", "simulated-secret"] {
        assert!(!log.contains(part), "{part}: {log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_costs_memory_in_proportion_to_its_bytes() {
    const PAGE_MIB: usize = 8;
    /// Bound of the memory of a page in bytes per byte, for objects of a few bytes each.
    const MAX_FACTOR: usize = 24;
    let filled = |before: &str, part: &str, after: &str| {
        let text = format!("{before}{}", part.repeat((PAGE_MIB << 20) / part.len()));
        ErrorBody::Literal(format!("{}{after}", text.trim_end_matches(',')))
    };
    let world = World::new().await;
    let process = Process::start(&world, "a", &[("GRAPH__MAX_TRIES", "1")]);
    process.wait_for_log("subscribed").await;
    world.sync("warm", &["mobileApp"]).await;
    let before = process.peak_mib();
    let shapes = [
        filled("{\"value\":[", "0,", "]}"),
        filled("{\"value\":[", "{},", "]}"),
        filled("{\"value\":[", "{\"a\":1},", "]}"),
        filled("{\"value\":[", "{\"id\":1},", "]}"),
        filled("{\"error\":[", "0,", "]}"),
        filled("{\"value\":[],\"error\":{\"code\":\"x\",\"details\":[", "0,", "]}}"),
        filled("{\"value\":[{\"id\":\"1\",\"displayName\":[", "[],", "]}]}"),
    ];
    for (n, body) in shapes.into_iter().enumerate() {
        let action = Action::Status { status: 200, retry_after: None, body };
        world.sim.add_rule(Rule::new(action).path("deviceAppManagement/mobileApps").times(1));
        world.sync(&format!("shape-{n}"), &["mobileApp"]).await;
        let grown = process.peak_mib() - before;
        assert!(grown < (MAX_FACTOR * PAGE_MIB) as u64, "shape {n}: {grown} MiB for a page of {PAGE_MIB} MiB");
    }
    let lines = process.log().lines().count();
    assert!(lines < 1_000, "{lines} lines: bad objects are logged once a list");
}
