//! Messages as they travel, against the schemas that describe them: ours, and that of CloudEvents.

use boon::{Compiler, Schemas};
use lapin::BasicProperties;
use lapin::message::BasicGetMessage;
use lapin::types::AMQPValue;
use serde_json::{Map, Value, json};

use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::world::World;

/// The schema of CloudEvents 1.0, as its authors publish it.
const CLOUD_EVENTS: &str = include_str!("../fixtures/cloudevents/schema-1.0.json");
const EVENT: &str = include_str!("../../config/schemas/event.json");
const REQUEST: &str = include_str!("../../config/schemas/request.json");
const DEAD_LETTER: &str = include_str!("../../config/schemas/dead-letter.json");

/// Violations of a schema in a document, formats included.
fn problems(schema: &str, document: &Value) -> Result<(), String> {
    let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
    compiler.enable_format_assertions();
    compiler.add_resource("schema.json", serde_json::from_str(schema).unwrap()).unwrap();
    let compiled = compiler.compile("schema.json", &mut schemas).unwrap();
    schemas.validate(document, compiled).map_err(|error| format!("{error:#}\n{document:#}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_is_a_cloud_event_and_fits_its_own_schema() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let events = world.subscribe().await;
    let traced = BasicProperties::default().with_headers(
        [("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")]
            .map(|(name, value)| (name.into(), AMQPValue::LongString(value.into())))
            .into_iter()
            .collect::<std::collections::BTreeMap<_, _>>()
            .into(),
    );
    world.publish_bytes(world.request("traced", &["mobileApp"]).to_string().as_bytes(), traced).await;
    world.publish(&world.request("partial", &["mobileApp", "noSuchType"])).await;
    world.publish(&world.request("failed", &["noSuchType"])).await;
    let ended = [world.ended("traced").await, world.ended("partial").await, world.ended("failed").await];
    world.execute("update tenants set enabled = false").await;
    let skipped = world.sync("skipped", &["mobileApp"]).await;
    for run in ended.iter().chain([&skipped]) {
        let event = events.event_of(run).await;
        assert_eq!(problems(CLOUD_EVENTS, &event), Ok(()));
        assert_eq!(problems(EVENT, &event), Ok(()));
        let extension = |name: &str| name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        // `data_base64` is the one name with an underscore, and not ours.
        assert!(event.as_object().unwrap().keys().all(|name| extension(name)), "names as CloudEvents wants them");
        assert!(serde_json::to_vec(&event).unwrap().len() < 64 * 1024, "small enough for every intermediary");
    }
    let mut nameless = events.event_of(&skipped).await;
    nameless.as_object_mut().unwrap().remove("id");
    assert!(problems(CLOUD_EVENTS, &nameless).is_err() && problems(EVENT, &nameless).is_err());
}

#[test]
fn the_documented_request_fits_its_schema() {
    let page = include_str!("../../config/README.md");
    let example = page.split("```json\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let mut request: Value = serde_json::from_str(example).unwrap();
    assert_eq!(problems(REQUEST, &request), Ok(()));
    request["idempotency_key"] = json!("two words");
    assert!(problems(REQUEST, &request).is_err());
}

/// A message as its schema describes it: headers and body.
fn document(letter: &BasicGetMessage) -> Value {
    let headers = letter.properties.headers().iter().flat_map(|table| table.inner());
    let headers: Map<String, Value> = headers.map(|(name, value)| (name.to_string(), json_of(value))).collect();
    json!({ "headers": headers, "body": String::from_utf8_lossy(&letter.data) })
}

fn json_of(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::LongString(text) => json!(String::from_utf8_lossy(text.as_bytes())),
        AMQPValue::LongLongInt(number) => json!(number),
        AMQPValue::Timestamp(seconds) => json!(seconds),
        AMQPValue::FieldArray(array) => array.as_slice().iter().map(json_of).collect(),
        AMQPValue::FieldTable(table) => {
            Value::Object(table.inner().iter().map(|(name, value)| (name.to_string(), json_of(value))).collect())
        }
        other => panic!("no header of ours or of the broker's is {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_of_daemon_and_broker_fit_their_schema() {
    let world = World::new().await;
    let replica = Replica::start(&world).await;
    world.publish_bytes(b"\xff no JSON", BasicProperties::default()).await;
    let rejected = eventually("a dead letter arrives", || world.take("inventory.dead")).await;
    replica.stop().await;
    assert_eq!(problems(DEAD_LETTER, &document(&rejected)), Ok(()));
    assert_eq!(document(&rejected)["headers"]["x-dead-reason"], "invalid_json");

    world.publish(&world.request("never answered", &["mobileApp"])).await;
    world.exhaust_redeliveries("inventory.sync.requests").await;
    let given_up = eventually("the broker's dead letter arrives", || world.take("inventory.dead")).await;
    assert_eq!(problems(DEAD_LETTER, &document(&given_up)), Ok(()));
    assert_eq!(document(&given_up)["headers"]["x-death"][0]["reason"], "delivery_limit");

    let bare = json!({ "headers": { "x-dead-id": "1" }, "body": "" });
    assert!(problems(DEAD_LETTER, &bare).is_err());
}
