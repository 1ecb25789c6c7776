//! Policies of the broker that work against the daemon: nothing is lost by reading, and what shows is named.

use std::process::Output;

use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeleteOptions};
use lapin::{Connection, ConnectionProperties};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use crate::support::daemon::{Process, Replica};
use crate::support::servers;
use crate::support::world::World;
use crate::support::{binary, eventually};

const DEAD: &str = "inventory.dead";
const KEPT: &str = "inventory.dead.kept";
const REQUESTS: &str = "inventory.sync.requests";

/// Policy for the queues of one environment whose names start with `queue`; removed on drop.
pub(crate) struct Policy(String);

impl Policy {
    pub(crate) async fn set(world: &World, queue: &str, definition: Value) -> Self {
        let (name, pattern) = (Uuid::new_v4().to_string(), format!("^{}{queue}", world.prefix.replace('.', "\\.")));
        let set = name.clone();
        spawn_blocking(move || servers::rabbitmq().ctl(&["-q", "set_policy", &set, &pattern, &definition.to_string()]))
            .await
            .unwrap();
        Self(name)
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        servers::rabbitmq().ctl(&["-q", "clear_policy", &self.0]);
    }
}

/// Runs the real binary against the real broker.
async fn dead(world: &World, arguments: &[&str]) -> Output {
    let mut command = world.command(&[&["dead"], arguments, &["--json"]].concat());
    let output = spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    output
}

async fn list(world: &World) -> Vec<Value> {
    serde_json::from_slice(&dead(world, &["list"]).await.stdout).unwrap()
}

async fn listed(world: &World, count: usize) -> Vec<Value> {
    eventually(&format!("{count} letters are listed"), || async {
        Some(list(world).await).filter(|letters| letters.len() == count)
    })
    .await
}

/// Publishes `body` straight to a queue.
pub(crate) async fn put(world: &World, queue: &str, body: &[u8]) {
    let connection = Connection::connect(&world.amqp_url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let (key, properties) = (format!("{}{queue}", world.prefix), BasicProperties::default().with_delivery_mode(2));
    let publish = channel.basic_publish("".into(), key.into(), BasicPublishOptions::default(), body, properties);
    assert!(publish.await.unwrap().await.unwrap().is_ack());
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_dead_letters_loses_none_under_a_low_delivery_limit() {
    let world = World::new().await;
    let _policy = Policy::set(&world, "", json!({ "delivery-limit": 2 })).await;
    for body in [b"{ one", b"{ two"] {
        put(&world, DEAD, body).await;
    }
    // A letter that is being moved is in neither queue for a moment.
    for _ in 0..5 {
        listed(&world, 2).await;
    }
    // Other readers can reject what they read, which counts on every version.
    world.exhaust_redeliveries(DEAD).await;
    eventually("both are moved", || async { (world.depth(KEPT).await == 2).then_some(()) }).await;
    for _ in 0..5 {
        listed(&world, 2).await;
    }
    let letters = listed(&world, 2).await;
    assert!(letters.iter().all(|letter| letter["moved"] == "delivery_limit"), "{letters:?}");
    let said = String::from_utf8(dead(&world, &["list"]).await.stderr).unwrap();
    assert!(said.contains("2 of these were moved out of the dead-letter queue by a policy"), "{said}");
    let id = letters[0]["id"].as_str().unwrap();
    let shown: Value = serde_json::from_slice(&dead(&world, &["show", id]).await.stdout).unwrap();
    assert_eq!(shown["body"], "{ one");
    dead(&world, &["replay", id]).await;
    assert_eq!(world.take(REQUESTS).await.expect("it is replayed").data, b"{ one");
    dead(&world, &["drop", "--all", "--yes"]).await;
    assert_eq!((world.depth(DEAD).await, world.depth(KEPT).await), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_moved_by_a_policy_are_named_by_the_start_and_the_check() {
    let world = World::new().await;
    let check = async || {
        let mut command = world.command(&["check", "--connect"]);
        let output = spawn_blocking(move || command.output().unwrap()).await.unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let said = check().await;
    assert!(!said.contains(KEPT), "{said}");
    let versions = said.lines().filter(|line| line.ends_with(": tested")).count();
    assert_eq!(versions, 2, "the versions of both servers are named: {said}");
    put(&world, KEPT, b"{ one").await;
    let said = check().await;
    assert!(said.contains("1 dead letters wait in") && said.contains("inventoryd dead list"), "{said}");
    let replica = Process::start(&world, "start", &[]);
    replica.wait_for_log("inventory.dead.kept, moved there by a policy").await;
    assert_eq!(world.sync("good", &["mobileApp"]).await["status"], "success");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_removed_by_a_policy_are_dead_letters_that_name_it() {
    for (definition, reason) in
        [(json!({ "max-length": 1, "overflow": "drop-head" }), "maxlen"), (json!({ "message-ttl": 1 }), "expired")]
    {
        let world = World::new().await;
        let _policy = Policy::set(&world, "inventory.sync.requests$", definition).await;
        for body in [b"one", b"two"] {
            put(&world, REQUESTS, body).await;
        }
        let letters =
            eventually("a letter arrives", || async { Some(list(&world).await).filter(|letters| !letters.is_empty()) })
                .await;
        assert_eq!((&letters[0]["reason"], &letters[0]["by"]), (&json!(reason), &json!("broker")));
        let said = String::from_utf8(dead(&world, &["list"]).await.stderr).unwrap();
        assert!(said.contains("removed from the requests queue by a TTL or a length limit"), "{said}");
        let shown: Value = {
            let mut command = std::process::Command::new(binary());
            command.args(["explain", reason, "--json"]);
            serde_json::from_slice(&spawn_blocking(move || command.output().unwrap()).await.unwrap().stdout).unwrap()
        };
        assert_eq!(shown["code"], reason);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_of_one_letter_are_one_letter() {
    let world = World::new().await;
    let replica = Replica::start(&world).await;
    // As after a lost acknowledgement: the same message is rejected again.
    for _ in 0..3 {
        world.publish_bytes(b"{ nope", BasicProperties::default().with_message_id("m-1".into())).await;
    }
    world.publish_bytes(b"{ other", BasicProperties::default()).await;
    eventually("all are dead letters", || async { (world.depth(DEAD).await == 4).then_some(()) }).await;
    replica.stop().await;
    let letters = listed(&world, 2).await;
    assert_eq!((&letters[0]["copies"], &letters[1]["copies"]), (&json!(3), &json!(1)));
    let id = letters[0]["id"].as_str().unwrap();
    let shown: Value = serde_json::from_slice(&dead(&world, &["show", id]).await.stdout).unwrap();
    assert_eq!((&shown["body"], &shown["copies"]), (&json!("{ nope"), &json!(3)));
    dead(&world, &["replay", id]).await;
    assert_eq!(world.depth(REQUESTS).await, 1, "replayed once");
    assert_eq!(listed(&world, 1).await[0]["bytes"], 7, "every copy is removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_letters_without_an_id_of_ours_are_numbered() {
    let world = World::new().await;
    for _ in 0..3 {
        put(&world, DEAD, b"the same").await;
    }
    let ids: Vec<String> =
        (listed(&world, 3).await.iter()).map(|letter| letter["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids[1..], [format!("{}-2", ids[0]), format!("{}-3", ids[0])]);
    dead(&world, &["show", &ids[1]]).await;
    dead(&world, &["drop", &ids[1], &ids[0]]).await;
    assert_eq!(listed(&world, 1).await[0]["id"], ids[0].as_str());
}

#[tokio::test(flavor = "multi_thread")]
async fn event_whose_exchange_was_deleted_is_published_again_at_once() {
    let world = World::new().await;
    let mut config = world.config();
    // Far beyond the deadline of the test: an event of unknown outcome would wait that long.
    config.outbox.claim_s = 600;
    let replica = Replica::with(config).await;
    world.sync("before", &["mobileApp"]).await;
    eventually("it is announced", || async { (world.depth("inventory.unrouted").await == 1).then_some(()) }).await;
    let connection = Connection::connect(&world.amqp_url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let exchange = format!("{}inventory.events", world.prefix);
    channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await.unwrap();
    world.sync("after", &["mobileApp"]).await;
    eventually("it is announced", || async { (world.depth("inventory.unrouted").await == 2).then_some(()) }).await;
    replica.stop().await;
}
