//! Messages that the AMQP client cannot parse affect no other message.

use std::time::Duration;

use lapin::BasicProperties;
use lapin::message::BasicGetMessage;
use serde_json::{Value, json};

use crate::dead_letters::header;
use crate::sim::SimConfig;
use crate::support::daemon::{Process, Replica, peak_mib};
use crate::support::raw_amqp::{self, unreadable};
use crate::support::servers::{self, Private};
use crate::support::world::World;
use crate::support::{DEADLINE, eventually, within};

async fn dead(world: &World) -> BasicGetMessage {
    eventually("a dead letter arrives", || world.take("inventory.dead")).await
}

/// Runs `inventoryd dead` with the real binary.
async fn dead_command(world: &World, arguments: &[&str]) -> Value {
    let mut command = world.command(&[&["dead"], arguments, &["--json"]].concat());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_the_client_cannot_parse_costs_only_itself() {
    let world = World::new().await;
    let listen = format!("127.0.0.1:{}", servers::free_port());
    let _replica = Process::start(&world, "guarded", &[("HTTP__LISTEN", &listen)]);
    world.sync("before", &["mobileApp"]).await;
    for (index, (properties, name)) in unreadable().into_iter().enumerate() {
        let body = world.request(&format!("hostile-{index}"), &["mobileApp"]).to_string();
        raw_amqp::publish(&world, body.as_bytes(), properties).await;
        let letter = dead(&world).await;
        assert_eq!(letter.data, body.as_bytes(), "{name}: byte for byte");
        assert_eq!(header(&letter, "x-dead-reason").as_deref(), Some("unreadable_properties"));
        let detail = header(&letter, "x-dead-detail").unwrap();
        assert!(detail.ends_with(&format!(": {name}")), "{name} is not named in: {detail}");
        let key = format!("good-{index}");
        assert_eq!(world.sync(&key, &["mobileApp"]).await["attempt"], 1, "{name}: the next request is not disturbed");
    }
    assert!(world.take("inventory.dead").await.is_none(), "no other message is dead-lettered");
    // Each message was delivered once, in one session: none was delivered again before it was a dead letter.
    let count = unreadable().len();
    let expected = [
        format!("inventoryd_deliveries_total{{outcome=\"done\"}} {}", count + 1),
        format!("inventoryd_deliveries_total{{outcome=\"rejected\"}} {count}"),
    ];
    eventually("each delivery is settled", || async {
        let metrics = reqwest::get(format!("http://{listen}/metrics")).await.ok()?.text().await.ok()?;
        let counted =
            ["inventoryd_deliveries_total{", "inventoryd_resubscriptions_total{", "inventoryd_acks_lost_total "];
        let is_counted = |line: &str| counted.iter().any(|name| line.starts_with(name)) && !line.ends_with(" 0");
        let mut lines: Vec<&str> = metrics.lines().filter(|line| is_counted(line)).collect();
        lines.sort_unstable();
        (lines == expected).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_commands_work_around_letters_the_client_cannot_parse() {
    let world = World::new().await;
    Replica::start(&world).await.stop().await;
    let body = |index: usize| world.request(&format!("k-{index}"), &["mobileApp"]).to_string();
    for (index, (properties, _)) in unreadable().into_iter().enumerate() {
        raw_amqp::publish(&world, body(index).as_bytes(), properties).await;
    }
    // Dead-lettered by the broker itself, as it did when every delivery ended the session.
    let consumer = world.config();
    let broker = inventoryd::broker::Broker::new(&consumer.broker, &consumer.topology, "test").unwrap();
    let mut subscription = broker.subscribe(8).await.unwrap();
    for _ in 0..unreadable().len() {
        let delivery = subscription.next().await.unwrap().unwrap();
        assert!(delivery.unreadable.is_some());
        assert!(delivery.dead_letter_original().await.unwrap());
    }
    subscription.close(Duration::from_secs(1)).await;
    let count = unreadable().len();
    let listed = eventually("all are listed", || async {
        let listed = dead_command(&world, &["list"]).await;
        (listed.as_array().unwrap().len() == count).then_some(listed)
    })
    .await;
    let id = listed[0]["id"].as_str().unwrap();
    assert_eq!(dead_command(&world, &["show", id]).await["reason"], "rejected");
    assert_eq!(dead_command(&world, &["replay", id]).await["replayed"], json!([id]));
    let again = eventually("it is in the queue", || world.take("inventory.sync.requests")).await;
    assert!((0..count).any(|index| again.data == body(index).as_bytes()), "byte for byte");
    let dropped = dead_command(&world, &["drop", "--all"]).await;
    assert_eq!(dropped["dropped"].as_array().unwrap().len(), count - 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_many_megabytes_is_moved_by_the_broker_and_not_kept() {
    let world = World::new().await;
    let replica = Replica::start(&world).await;
    let body = vec![b' '; 8 * 1024 * 1024];
    world.publish_bytes(&body, BasicProperties::default()).await;
    assert_eq!(world.sync("behind-it", &["mobileApp"]).await["attempt"], 1);
    let listed = eventually("it is listed", || async {
        dead_command(&world, &["list"]).await.as_array().unwrap().first().cloned()
    })
    .await;
    assert_eq!(listed["reason"], "message_too_large");
    let small = World::request_of(uuid::Uuid::new_v4(), "small", &["mobileApp"]).to_string();
    world.publish_bytes(small.as_bytes(), BasicProperties::default()).await;
    eventually("both are dead", || async { (world.depth("inventory.dead").await >= 2).then_some(()) }).await;
    let replayed = dead_command(&world, &["replay", "--all"]).await;
    assert_eq!(replayed["replayed"].as_array().unwrap().len(), 1, "the large letter does not stop the others");
    let letter = dead(&world).await;
    assert!(letter.data == body, "byte for byte");
    replica.stop().await;
}

/// Runs `inventoryd dead list` and returns the letters and the peak of its memory in MiB.
async fn list_with_peak(world: &World) -> (Vec<Value>, u64) {
    let mut command = world.command(&["dead", "list", "--json"]);
    let child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let (id, mut peak) = (child.id(), 0);
    let mut ended = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    let output = loop {
        match tokio::time::timeout(Duration::from_millis(5), &mut ended).await {
            Ok(output) => break output.unwrap(),
            Err(_) => peak = peak_mib(id).unwrap_or(peak).max(peak),
        }
    };
    (serde_json::from_slice(&output.stdout).unwrap(), peak)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_large_bodies_needs_no_memory() {
    const LARGE: usize = 60 * 1024 * 1024;
    let broker = Private::start("rabbitmq", "rabbitmq-large-bodies").await;
    let postgres = tokio::task::spawn_blocking(|| servers::postgres().url.clone()).await.unwrap();
    let world = World::on(SimConfig::default(), &postgres, &broker.url).await;
    let large = vec![b' '; LARGE];
    for _ in 0..8 {
        world.publish_bytes(&large, BasicProperties::default()).await;
    }
    let medium = vec![b' '; 1_000_000];
    for index in 0..40 {
        // Without ids they would be copies of one message.
        let properties = BasicProperties::default().with_message_id(format!("m-{index}").into());
        world.publish_bytes(&medium, properties).await;
    }
    let (none, idle) = list_with_peak(&world).await;
    assert!(none.is_empty());
    let replica = Process::start(&world, "large", &[]);
    // Half a gigabyte takes a slow disk a while.
    let patience = Duration::from_secs(400);
    world.publish(&world.request("behind-them", &["mobileApp"])).await;
    // A copy that a slow broker did not confirm in time is published again, so there may be more.
    within(patience, "all are dead letters", || async { (world.depth("inventory.dead").await >= 48).then_some(()) })
        .await;
    within(patience, "nothing waits", || async { (world.depth("inventory.sync.requests").await == 0).then_some(()) })
        .await;
    world.ended("behind-them").await;
    let daemon = replica.peak_mib();
    assert!(daemon < 150, "{daemon} MiB in the daemon for 520 MiB of messages");
    let (letters, peak) = list_with_peak(&world).await;
    assert_eq!(letters.len(), 48);
    assert!(letters.iter().all(|letter| letter["reason"] == "message_too_large"), "{letters:?}");
    assert_eq!(letters.iter().filter(|letter| letter["bytes"] == LARGE).count(), 8);
    assert!(peak < idle + 32, "{peak} MiB to list them, {idle} MiB to list none");
    let whole = eventually("a letter is read", || world.take("inventory.dead")).await;
    assert!(whole.data == large || whole.data == medium, "byte for byte");
}

#[tokio::test(flavor = "multi_thread")]
async fn session_starts_with_one_request_and_widens() {
    let world = World::new().await;
    Replica::start(&world).await.stop().await;
    for index in 0..4 {
        world.publish(&world.request(&format!("k-{index}"), &["mobileApp"])).await;
    }
    let config = world.config();
    let broker = inventoryd::broker::Broker::new(&config.broker, &config.topology, "test").unwrap();
    let mut subscription = broker.subscribe(4).await.unwrap();
    let first = subscription.next().await.unwrap().unwrap();
    let second = tokio::time::timeout(Duration::from_millis(300), subscription.next()).await;
    assert!(second.is_err(), "only one until the session is widened");
    assert!(subscription.narrow() && subscription.widen(0).await.unwrap().is_empty() && !subscription.narrow());
    for _ in 0..3 {
        let next = tokio::time::timeout(DEADLINE, subscription.next()).await;
        next.expect("the rest arrives").unwrap().unwrap();
    }
    assert!(first.ack().await.unwrap(), "the first can still be settled");
    subscription.close(Duration::from_secs(1)).await;
}
