//! Log lines: whoever reads one of a run knows which run it is of.

use serde_json::Value;

use crate::sim::Rule;
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
