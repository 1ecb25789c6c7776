//! Dead letters: a message that can never be processed keeps its body, and its headers give the reason.

use lapin::BasicProperties;
use lapin::message::BasicGetMessage;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::world::World;

pub(crate) fn header(letter: &BasicGetMessage, name: &str) -> Option<String> {
    let headers = letter.properties.headers().as_ref()?;
    match headers.inner().get(name)? {
        AMQPValue::LongString(text) => Some(String::from_utf8_lossy(text.as_bytes()).into_owned()),
        other => Some(format!("{other:?}")),
    }
}

async fn dead(world: &World) -> BasicGetMessage {
    eventually("a dead letter arrives", || world.take("inventory.dead")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_reason_keeps_the_body_and_names_the_remedy() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.sync("taken", &["mobileApp"]).await;
    let unknown = World::request_of(Uuid::new_v4(), "k", &["mobileApp"]);
    let mut wrong_type = world.request("k", &["mobileApp"]);
    wrong_type["selection"]["policy_types"] = json!("mobileApp");
    let mut version = world.request("k", &["mobileApp"]);
    version["schema_version"] = json!(2);
    let cases: Vec<(Vec<u8>, &str, &str)> = vec![
        (b"{ nope".to_vec(), "invalid_json", "not JSON"),
        (vec![0xff, 0x00, 0x80], "invalid_json", "not JSON"),
        (bytes(&wrong_type), "invalid_request", "`selection.policy_types` is a string: expected an array"),
        (bytes(&world.request("k", &["roleScopeTag"])), "invalid_request", "selects nothing"),
        (bytes(&version), "unsupported_version", "`schema_version` is 2"),
        (bytes(&unknown), "unknown_tenant", "tenant add"),
        (bytes(&world.request("taken", &["deviceShellScript"])), "idempotency_conflict", "`idempotency_key`"),
        (vec![b' '; 300_000], "message_too_large", "300000 bytes"),
    ];
    for (body, reason, detail) in cases {
        let mut mine = FieldTable::default();
        mine.insert("x-mine".into(), AMQPValue::LongString("kept".into()));
        world
            .publish_bytes(&body, BasicProperties::default().with_headers(mine).with_correlation_id("c-1".into()))
            .await;
        let letter = dead(&world).await;
        assert_eq!(letter.data, body, "{reason}: byte for byte");
        assert_eq!(header(&letter, "x-dead-reason").as_deref(), Some(reason));
        let text = header(&letter, "x-dead-detail").unwrap();
        assert!(text.contains(detail), "{reason}: {text}");
        assert_eq!(header(&letter, "x-mine").as_deref(), Some("kept"));
        assert_eq!(letter.properties.correlation_id().as_ref().map(|id| id.as_str()), Some("c-1"));
        assert!(header(&letter, "x-dead-at").is_some() && header(&letter, "x-dead-by").is_some());
    }
    assert_eq!(world.count("select count(*) from inventory_sync_runs").await, 1, "none of them made a run");
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_type_does_not_stop_the_run() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let mut request = world.request("mixed", &["mobileApp", "noSuchType"]);
    request["selection"]["categories"] = json!(["NoSuchCategory"]);
    world.publish(&request).await;
    let run = world.ended("mixed").await;
    assert_eq!((&run["status"], &run["error_codes"]), (&json!("partial"), &json!(["unsupported_policy_type"])));
    let types = world.rows("select policy_type, status, error_code from inventory_sync_run_types order by 1").await;
    let names: Vec<&Value> = types.iter().map(|row| &row["policy_type"]).collect();
    assert_eq!(names, ["category:NoSuchCategory", "mobileApp", "noSuchType"]);
    let alone = world.sync("alone", &["noSuchType"]).await;
    assert_eq!((&alone["status"], &alone["error_codes"]), (&json!("failed"), &json!(["unsupported_policy_type"])));
}

#[tokio::test(flavor = "multi_thread")]
async fn cloudevents_envelope_is_accepted() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let envelope = json!({ "specversion": "1.0", "id": "1", "source": "/scheduler", "type": "sync.requested",
                           "data": world.request("wrapped", &["mobileApp"]) });
    world.publish_envelope(&envelope).await;
    assert_eq!(world.ended("wrapped").await["status"], "success");
}

fn bytes(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// Output of an `inventoryd dead` command as JSON.
async fn dead_command(world: &World, arguments: &[&str]) -> Value {
    let mut command = world.command(&[&["dead"], arguments, &["--json"]].concat());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn replayed_dead_letter_keeps_its_key_in_a_new_message() {
    let world = World::new().await;
    let replica = Replica::start(&world).await;
    let request = World::request_of(Uuid::new_v4(), "the-key", &["mobileApp"]);
    let mut headers = FieldTable::default();
    for name in ["x-death", "x-delivery-count", "x-first-death-reason", "x-inventoryd-retries"] {
        headers.insert(name.into(), AMQPValue::LongString("old".into()));
    }
    headers.insert("traceparent".into(), AMQPValue::LongString("00-1-2-01".into()));
    let properties = BasicProperties::default().with_headers(headers).with_message_id("m-1".into());
    world.publish_bytes(&bytes(&request), properties).await;
    let listed = eventually("the dead letter is listed", || async {
        dead_command(&world, &["list"]).await.as_array().unwrap().first().cloned()
    })
    .await;
    replica.stop().await;
    let id = listed["id"].as_str().unwrap();
    assert_eq!((&listed["reason"], &listed["message_id"]), (&json!("unknown_tenant"), &json!("m-1")));
    assert_eq!(dead_command(&world, &["show", id]).await["body"], request.to_string());
    assert_eq!(dead_command(&world, &["replay", id]).await["replayed"], json!([id]));
    assert_eq!(dead_command(&world, &["list"]).await, json!([]));
    let again = eventually("the request is in the queue", || world.take("inventory.sync.requests")).await;
    assert_eq!(again.data, bytes(&request), "the same bytes, and with them the same key");
    let fresh = again.properties.message_id().as_ref().map(|id| id.as_str().to_owned()).expect("it has an id");
    assert!(fresh != "m-1" && Uuid::parse_str(&fresh).is_ok(), "{fresh}");
    // The queue adds its own delivery count, starting at zero.
    let forged = |value: &AMQPValue| matches!(value, AMQPValue::LongString(_));
    let left: Vec<&str> = (again.properties.headers().iter().flat_map(|table| table.inner()))
        .filter(|(name, value)| name.as_str() != "x-delivery-count" || forged(value))
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(left, ["traceparent"], "headers of the broker and of the dead letter are removed");
    // A letter that was replayed by mistake can be dropped once it is dead-lettered again.
    let replica = Replica::start(&world).await;
    world.publish_bytes(&again.data, again.properties.clone()).await;
    eventually("the request is dead-lettered again", || async {
        (dead_command(&world, &["list"]).await.as_array().unwrap().len() == 1).then_some(())
    })
    .await;
    assert_eq!(dead_command(&world, &["drop", "--all"]).await["dropped"].as_array().unwrap().len(), 1);
    assert_eq!(dead_command(&world, &["list"]).await, json!([]));
    replica.stop().await;
}
