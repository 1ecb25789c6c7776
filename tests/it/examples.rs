//! Programs and bindings of config/README.md, run unchanged against a real broker and a real replica.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use lapin::options::ExchangeDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties, ExchangeKind};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use crate::support::clients::{Language, shell_line};
use crate::support::daemon::Replica;
use crate::support::events::Subscriber;
use crate::support::world::{World, declare_topology};
use crate::support::{DEADLINE, binary, eventually, servers};

/// Tenant of the documented examples.
const TENANT: Uuid = uuid::uuid!("6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d");

/// A program that goes on until it is killed, and the lines that it prints.
struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
        let (sender, lines) = mpsc::channel();
        let stdout: ChildStdout = child.stdout.take().expect("it is piped");
        spawn_blocking(move || BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|l| sender.send(l)));
        Self { child, lines }
    }

    /// The next line that it prints.
    async fn line(self) -> (Self, String) {
        let next = move || {
            let line = self.lines.recv_timeout(DEADLINE).expect("it prints a line");
            (self, line)
        };
        spawn_blocking(next).await.expect("it is done")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A world whose replica has a virtual host for itself and no prefix there: the names are the documented ones. The topology
/// is complete on return; a replica declares it only after its start.
async fn plain_world() -> (World, Replica, String) {
    let (world, url) = (World::new().await, servers::virtual_host().await);
    world.register(TENANT, None).await;
    let mut config = world.config();
    config.topology.prefix = String::new();
    config.broker.url = url.as_str().into();
    declare_topology(&config).await;
    let replica = Replica::with(config).await;
    (world, replica, url)
}

/// Documented program and its language.
type Program = (Language, &'static str);

/// Runs a publisher to its end; none where its language can't be had.
async fn publish((language, file): Program, key: &str, url: &str) -> Option<Output> {
    let mut program = language.program(file).await?;
    program.args([&TENANT.to_string(), key]).env("AMQP_URL", url);
    Some(spawn_blocking(move || program.output().expect("it runs")).await.expect("it is done"))
}

/// One language publishes and another receives; an event that is published twice is received once.
async fn publish_and_receive(publisher: Program, (language, file): Program) {
    let Some(mut program) = language.program(file).await else { return };
    let (world, replica, url) = plain_world().await;
    let binding = format!("run.completed.*.{TENANT}");
    program.args(["reports", &binding]).env("AMQP_URL", &url);
    let (mut subscriber, listening) = Running::start(program).line().await;
    assert_eq!(listening, format!("listening for {binding}"));
    for key in ["nightly", "hourly"] {
        let Some(published) = publish(publisher, key, &url).await else { return };
        assert!(published.status.success(), "{published:?}");
        assert_eq!(String::from_utf8_lossy(&published.stdout).trim(), format!("published {key}"));
        let run = world.ended(key).await;
        let line;
        (subscriber, line) = subscriber.line().await;
        assert_eq!(line, format!("success {TENANT} {}", run["id"].as_str().unwrap()));
        eventually("the event is marked", || async {
            (world.count("select count(*) from outbox").await == 0).then_some(())
        })
        .await;
        // Every event is published once more: subscribers must recognise the repeats.
        world
            .execute("insert into outbox (tenant_id, run_id, due_at) select tenant_id, id, clock_timestamp() from inventory_sync_runs")
            .await;
    }
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn python_publishes_and_node_receives() {
    publish_and_receive((Language::Python, "publish.py"), (Language::Node, "subscribe.mjs")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn node_publishes_and_python_receives() {
    publish_and_receive((Language::Node, "publish.mjs"), (Language::Python, "subscribe.py")).await;
}

/// A message that no queue takes is not published, and the publisher says so.
#[tokio::test(flavor = "multi_thread")]
async fn publishers_notice_that_no_queue_took_the_message() {
    let url = servers::virtual_host().await;
    let connection = Connection::connect(&url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let exchange = "inventory.sync".into();
    channel.exchange_declare(exchange, ExchangeKind::Direct, options, FieldTable::default()).await.unwrap();
    for (language, file) in [(Language::Python, "publish.py"), (Language::Node, "publish.mjs")] {
        let Some(ended) = publish((language, file), "nobody", &url).await else { continue };
        assert!(!ended.status.success() && ended.stdout.is_empty(), "{ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shell_publishes_and_watches() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.register(TENANT, None).await;
    let folder = binary().parent().unwrap().to_owned();
    let shell = |line: &str| {
        let mut command = Command::new("bash");
        let path = format!("{}:/usr/bin:/bin", folder.display());
        command.args(["-c", &format!("exec {line}")]).env_clear().envs(world.patient_variables()).env("PATH", path);
        command
    };
    let mut tail =
        shell(shell_line("inventoryd events tail ")).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(tail.stderr.take().unwrap());
    let listening = spawn_blocking(move || {
        let mut line = String::new();
        stderr.read_line(&mut line).map(|_| line).unwrap()
    });
    assert!(listening.await.unwrap().starts_with("listening"));
    let mut ask = shell(shell_line("inventoryd request --tenant "));
    let asked = spawn_blocking(move || ask.output().unwrap()).await.unwrap();
    assert!(asked.status.success(), "{asked:?}");
    let mut stdout = BufReader::new(tail.stdout.take().unwrap());
    let seen = spawn_blocking(move || {
        let mut line = String::new();
        stdout.read_line(&mut line).map(|_| line).unwrap()
    });
    let seen = seen.await.unwrap();
    tail.kill().unwrap();
    tail.wait().unwrap();
    assert!(seen.contains("success") && seen.contains(&TENANT.to_string()), "{seen}");
}

/// Each documented binding with its description.
fn bindings() -> Vec<(&'static str, &'static str)> {
    let rows = include_str!("../../config/README.md").lines().filter_map(|line| line.strip_prefix("| `run.completed."));
    let cells = rows.filter_map(|row| row.trim_end_matches(" |").split_once("` | "));
    cells.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_binding_receives_exactly_its_documented_events() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    world.register(TENANT, None).await;
    let mut subscribers = Vec::new();
    for (rest, what) in bindings() {
        let binding = format!("run.completed.{rest}");
        subscribers.push((what, Subscriber::bound(&world.amqp_url, &world.prefix, &binding).await));
    }
    let everything = world.subscribe().await;
    for (key, tenant, policy_type) in [
        ("a-success", TENANT, "mobileApp"),
        ("a-failed", TENANT, "noSuchType"),
        ("b-success", world.tenant, "mobileApp"),
        ("b-failed", world.tenant, "noSuchType"),
    ] {
        world.publish(&World::request_of(tenant, key, &[policy_type])).await;
        everything.event_of(&world.ended(key).await).await;
    }
    let keys = |subscriber: &Subscriber| -> BTreeSet<String> {
        let key = |event: serde_json::Value| event["data"]["idempotency_key"].as_str().unwrap().to_owned();
        subscriber.distinct().into_values().map(key).collect()
    };
    let expected = |what: &str| -> BTreeSet<String> {
        let keys: &[&str] = match what {
            "everything" => &["a-success", "a-failed", "b-success", "b-failed"],
            "all failures" => &["a-failed", "b-failed"],
            "one tenant" => &["a-success", "a-failed"],
            "failures of one tenant" => &["a-failed"],
            _ => panic!("what are {what}?"),
        };
        keys.iter().map(|key| (*key).to_owned()).collect()
    };
    assert_eq!(subscribers.len(), 4);
    for (what, subscriber) in &subscribers {
        eventually(what, || async { (keys(subscriber) == expected(what)).then_some(()) }).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(subscribers.iter().all(|(what, subscriber)| keys(subscriber) == expected(what)), "and no more");
}
