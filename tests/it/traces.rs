//! Traces: one trace per request, from message to event; an unavailable collector has no other effect.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::json;
use tokio::net::TcpListener;

use crate::sim::Rule;
use crate::support::collector::{Collector, Span};
use crate::support::daemon::Process;
use crate::support::eventually;
use crate::support::world::World;

const APPS: &str = "deviceAppManagement/mobileApps";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// Publishes a request with the trace context of its publisher.
async fn publish(world: &World, key: &str, sampled: bool) {
    let mut headers = FieldTable::default();
    let traceparent = format!("00-{TRACE}-{CALLER}-0{}", u8::from(sampled));
    headers.insert("traceparent".into(), AMQPValue::LongString(traceparent.into()));
    headers.insert("tracestate".into(), AMQPValue::LongString("vendor=blue".into()));
    let body = serde_json::to_vec(&world.request(key, &["mobileApp", "deviceShellScript"])).unwrap();
    world.publish_bytes(&body, BasicProperties::default().with_headers(headers)).await;
}

fn exporting_to(endpoint: &str) -> [(&str, &str); 2] {
    [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint), ("OTEL_BSP_SCHEDULE_DELAY", "100")]
}

/// Number of spans by their path of names from the root of the trace.
fn paths(spans: &[Span]) -> BTreeMap<String, usize> {
    let by_id: BTreeMap<&str, &Span> = spans.iter().map(|span| (span.span_id.as_str(), span)).collect();
    let mut paths = BTreeMap::new();
    for span in spans {
        let mut names = vec![span.name.as_str()];
        let mut above = &span.parent_id;
        while let Some(parent) = by_id.get(above.as_str()) {
            names.push(&parent.name);
            above = &parent.parent_id;
        }
        assert_eq!(above, CALLER, "{span:?} is a descendant of the message");
        names.reverse();
        *paths.entry(names.join(" ")).or_default() += 1;
    }
    paths
}

#[tokio::test(flavor = "multi_thread")]
async fn request_is_one_trace_from_message_to_event() {
    let world = World::with_three_pages(APPS).await;
    world.sim.add_rule(Rule::status(429, Some("1")).path(APPS).times(1));
    let (collector, events) = (Collector::start().await, world.subscribe().await);
    let endpoint = format!("http://{}/", collector.address);
    let mut process = Process::start_under(&world, "a", &[], &exporting_to(&endpoint));
    publish(&world, "traced", true).await;
    let run = world.ended("traced").await;
    assert_eq!(run["status"], "success");
    let event = events.event_of(&run).await;
    process.signal("TERM");
    assert!(process.ended(Duration::from_secs(15)).await.success(), "{}", process.log());

    let spans = collector.spans();
    assert!(
        spans.iter().all(|span| span.trace_id == TRACE && span.trace_state == "vendor=blue" || span.name == "publish"),
        "{spans:#?}"
    );
    let expected = [
        ("delivery", 1),
        ("delivery run", 1),
        ("delivery run finish", 1),
        ("delivery run list", 2),
        ("delivery run list page", 4),
        ("delivery run list upsert", 1),
        ("delivery run publish", 1),
    ];
    assert_eq!(paths(&spans), expected.map(|(path, count)| (path.to_owned(), count)).into());
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    let traceparent = format!("00-{TRACE}-{}-01", named("run").span_id);
    assert_eq!((&event["traceparent"], &run["traceparent"]), (&json!(traceparent), &json!(traceparent)));
    assert_eq!(named("delivery").attributes["outcome"], "done");
    assert_eq!(named("run").attributes["run_id"], run["id"].as_str().unwrap());
    assert!(spans.iter().any(|span| span.name == "list" && span.attributes["path"] == APPS), "{spans:#?}");
    let attributes = format!("{:?}", spans.iter().map(|span| &span.attributes).collect::<Vec<_>>());
    for secret in ["skiptoken", "Bearer", "https://", "simulated-secret"] {
        assert!(!attributes.contains(secret), "{secret} in {attributes}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unsampled_trace_is_propagated_and_not_exported() {
    let world = World::new().await;
    let (collector, events) = (Collector::start().await, world.subscribe().await);
    let endpoint = format!("http://{}", collector.address);
    let mut process = Process::start_under(&world, "a", &[], &exporting_to(&endpoint));
    publish(&world, "unsampled", false).await;
    let event = events.event_of(&world.ended("unsampled").await).await;
    process.signal("TERM");
    assert!(process.ended(Duration::from_secs(15)).await.success(), "{}", process.log());
    assert_eq!(collector.spans().len(), 0);
    let traceparent = event["traceparent"].as_str().unwrap();
    assert!(traceparent.starts_with(&format!("00-{TRACE}-")) && traceparent.ends_with("-00"), "{traceparent}");
    assert!(!traceparent.contains(CALLER), "{traceparent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_collector_the_event_keeps_the_trace_context() {
    let world = World::new().await;
    let events = world.subscribe().await;
    let _process = Process::start(&world, "a", &[]);
    publish(&world, "plain", true).await;
    let event = events.event_of(&world.ended("plain").await).await;
    assert_eq!(event["traceparent"], format!("00-{TRACE}-{CALLER}-01"));
}

#[tokio::test(flavor = "multi_thread")]
async fn unavailable_collector_loses_traces_only() {
    let world = World::new().await;
    let events = world.subscribe().await;
    // One closes every connection, the other never responds.
    let (closing, silent) =
        (TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let endpoints = [&closing, &silent].map(|listener| format!("http://{}", listener.local_addr().unwrap()));
    let refused = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&refused);
    tokio::spawn(async move {
        while closing.accept().await.is_ok() {
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    for (name, endpoint) in ["closing", "silent"].iter().zip(&endpoints) {
        let mut process = Process::start_under(&world, name, &[], &exporting_to(endpoint));
        for key in ["one", "two"].map(|key| format!("{name}-{key}")) {
            let before = refused.load(Ordering::Relaxed);
            publish(&world, &key, true).await;
            let run = world.ended(&key).await;
            assert_eq!(run["status"], "success");
            events.event_of(&run).await;
            if *name == "closing" {
                eventually("a batch is refused", || async { (refused.load(Ordering::Relaxed) > before).then_some(()) })
                    .await;
            }
        }
        process.signal("TERM");
        assert!(process.ended(Duration::from_secs(10)).await.success(), "{}", process.log());
        let warnings = process.log().matches("the trace collector is failing").count();
        assert_eq!(warnings, usize::from(*name == "closing"), "{}", process.log());
    }
}
