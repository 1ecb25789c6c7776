//! `inventoryd request --wait` reports within seconds why no run starts.

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use lapin::BasicProperties;
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::sim::SimConfig;
use crate::support::daemon::Replica;
use crate::support::servers::{self, Private};
use crate::support::world::World;
use crate::support::{binary, eventually};

/// Far above what each report takes, far below the default of an hour.
const SOON: Duration = Duration::from_secs(30);

fn arguments(world: &World) -> Vec<String> {
    let tenant = world.tenant.to_string();
    ["request", "--tenant", &tenant, "--types", "mobileApp", "--no-foundations", "--wait"].map(str::to_owned).to_vec()
}

async fn wait_for_end(world: &World, more: &[&str]) -> Output {
    wait_as(world, &world.amqp_url, more).await
}

async fn wait_as(world: &World, broker_url: &str, more: &[&str]) -> Output {
    let mut command = world.command(&[]);
    command.args(arguments(world)).args(more).env("INVENTORYD__BROKER__URL", broker_url);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    tokio::time::timeout(SOON, output).await.expect("the command ends within seconds").unwrap()
}

/// Address of the broker with a new user whose permissions are limited to the names of this environment.
async fn limited_user(world: &World, name: &str, configure: &'static str) -> String {
    let (user, prefix) = (format!("{}{name}", world.prefix), world.prefix.clone());
    let url = world.amqp_url.replace("guest:guest", &format!("{user}:secret"));
    assert!(url.contains(&user), "{url}");
    let grant = move || {
        let server = servers::rabbitmq();
        let ours = format!("^{}inventory\\.", prefix.replace('.', "\\."));
        server.ctl(&["-q", "add_user", &user, "secret"]);
        server.ctl(&["-q", "set_permissions", &user, &configure.replace("OURS", &ours), &ours, &ours]);
    };
    tokio::task::spawn_blocking(grant).await.unwrap();
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_lettered_request_ends_the_wait_with_its_reason() {
    let world = World::new().await;
    let mut variables = world.variables();
    // A daemon that knows fewer types than the publisher, so that it rejects what the publisher takes for valid.
    let types = std::env::temp_dir().join(format!("{}types.toml", world.prefix));
    let known = include_str!("../../config/policy_types.toml");
    let (before, after) = known.split_once("key = \"mobileApp\"").unwrap();
    let known = format!("{before}key = \"mobileApp\"{}", after.replacen("foundation = false", "foundation = true", 1));
    std::fs::write(&types, known).unwrap();
    variables.insert("INVENTORYD__GRAPH__POLICY_TYPES_FILE".to_owned(), types.to_str().unwrap().to_owned());
    let replica = Replica::with(inventoryd::config::Config::load_with(None, variables).unwrap()).await;
    let documented = limited_user(&world, "documented", "OURS").await;
    let output = wait_as(&world, &documented, &[]).await;
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("dead-lettered: invalid_request: `selection` selects nothing"), "{text}");
    let letter = eventually("the letter is in the queue", || world.take("inventory.dead")).await;
    assert!(String::from_utf8_lossy(&letter.data).contains("mobileApp"), "watching takes nothing away");
    let verifying = limited_user(&world, "verifying", "^$").await;
    let mut command = Command::new(binary());
    command.args(arguments(&world)).args(["--timeout-s", "3"]).env_clear().envs(world.variables());
    command.env("INVENTORYD__BROKER__URL", &verifying).env("INVENTORYD__TOPOLOGY__MODE", "verify").stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("may not declare a private queue") && text.contains("within --timeout-s"), "{text}");
    replica.stop().await;
    std::fs::remove_file(&types).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_without_consumers_is_named_and_waited_for() {
    let world = World::new().await;
    let mut command = tokio::process::Command::new(binary());
    command.args(arguments(&world)).args(["--key", "late"]).env_clear().envs(world.variables());
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line =
        tokio::time::timeout(SOON, lines.next_line()).await.expect("it is said within seconds").unwrap().unwrap();
    assert!(line.contains("no daemon consumes the request queue"), "{line}");
    let replica = Replica::start(&world).await;
    let status = tokio::time::timeout(crate::support::DEADLINE, child.wait()).await.unwrap().unwrap();
    assert!(status.success(), "the run of a daemon that starts later is followed");
    replica.stop().await;
    let output = wait_for_end(&world, &["--key", "never", "--timeout-s", "4"]).await;
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("within --timeout-s: no daemon consumes"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_of_the_broker_ends_the_wait() {
    let broker = Private::start("rabbitmq", "rabbitmq-wait-alarm").await;
    let postgres = tokio::task::spawn_blocking(|| servers::postgres().url.clone()).await.unwrap();
    let world = World::on(SimConfig::default(), &postgres, &broker.url).await;
    broker.act(|server| server.ctl(&["set_vm_memory_high_watermark", "0"])).await;
    let begun = Instant::now();
    let output = wait_for_end(&world, &[]).await;
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("the broker has an alarm"), "{text}");
    assert!(begun.elapsed() < SOON);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_in_unusual_forms_are_run_or_rejected_by_name() {
    let world = World::new().await;
    let replica = Replica::start(&world).await;
    let marked = format!("\u{feff}{}", world.request("marked", &["mobileApp"]));
    world.publish_bytes(marked.as_bytes(), BasicProperties::default()).await;
    let deep = format!("{{\"extra\":{}1e999999{},", "[".repeat(200), "]".repeat(200));
    let deep = world.request("deep", &["mobileApp"]).to_string().replacen('{', &deep, 1);
    world.publish_bytes(deep.as_bytes(), BasicProperties::default()).await;
    let envelope = json!({ "specversion": "1.0", "id": "1", "source": "/s", "type": "t",
                           "data": world.request("cased", &["mobileApp"]) });
    let cased = BasicProperties::default().with_content_type("Application/CloudEvents+JSON; Charset=UTF-8".into());
    world.publish_bytes(envelope.to_string().as_bytes(), cased).await;
    for key in ["marked", "deep", "cased"] {
        assert_ne!(world.ended(key).await["status"], "failed", "{key}");
    }
    let gzip = BasicProperties::default().with_content_encoding("deflate".into());
    world.publish_bytes(b"\x78\x9c\x03", gzip).await;
    let letter = eventually("a dead letter arrives", || world.take("inventory.dead")).await;
    let detail = crate::dead_letters::header(&letter, "x-dead-detail").unwrap();
    assert!(detail.contains("content_encoding is deflate"), "{detail}");
    replica.stop().await;
}
