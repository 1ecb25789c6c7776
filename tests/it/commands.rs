//! Command line of the real binary: exit codes, standard output and standard error.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::sim::{Rule, Which};
use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::world::World;

/// Result of a command.
#[derive(Debug)]
struct Completed {
    code: i32,
    out: String,
    err: String,
}

impl Completed {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }
}

fn command(world: &World, arguments: &[&str]) -> Command {
    world.command(arguments)
}

async fn call(world: &World, arguments: &[&str]) -> Completed {
    let mut command = command(world, arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Completed { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

/// Waits for a dead letter and returns it.
async fn only_dead_letter(world: &World) -> Value {
    eventually("a dead letter is listed", || async {
        call(world, &["dead", "list", "--json"]).await.json().as_array().unwrap().first().cloned()
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn registered_tenant_is_synced_and_reported() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let tenant = Uuid::new_v4().to_string();
    let request = ["request", "--tenant", &tenant, "--types", "mobileApp", "--no-foundations", "--wait", "--json"];
    let unknown = call(&world, &request).await;
    assert_eq!(unknown.code, 1);
    assert!(unknown.err.contains("inventoryd tenant add"), "{unknown:?}");
    assert_eq!(call(&world, &["tenant", "add", &tenant, "--name", "Contoso"]).await.code, 0);
    let run = call(&world, &request).await;
    assert_eq!(
        (run.code, &run.json()["status"], &run.json()["types"][0]["status"]),
        (0, &json!("success"), &json!("complete"))
    );
    assert!(run.err.contains("✓ mobileApp"), "progress for people: {}", run.err);
    let listed = call(&world, &["runs", "list", "--tenant", &tenant]).await.out;
    assert!(listed.contains(run.json()["run_id"].as_str().unwrap()) && listed.contains("Contoso"), "{listed}");
    let id = Uuid::parse_str(&tenant).unwrap();
    world.sim.delete_objects(id, "deviceAppManagement/mobileApps", Which::Count(2)).unwrap();
    assert_eq!(call(&world, &request).await.code, 0);
    let missing = call(&world, &["missing", "--tenant", &tenant, "--json"]).await.json();
    assert_eq!((&missing["high"], &missing["low"]), (&json!(2), &json!(0)));
    assert_eq!(call(&world, &["tenant", "disable", &tenant]).await.code, 0);
    let skipped = call(&world, &request).await;
    assert_eq!((skipped.code, &skipped.json()["error_codes"]), (1, &json!(["tenant_disabled"])));
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letter_is_shown_replayed_and_dropped() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let tenant = Uuid::new_v4().to_string();
    let published = call(&world, &["request", "--tenant", &tenant, "--types", "mobileApp", "--key", "k"]).await;
    assert_eq!(published.code, 0, "{published:?}");
    let letter = only_dead_letter(&world).await;
    let id = letter["id"].as_str().unwrap();
    for _ in 0..2 {
        let shown = call(&world, &["dead", "show", &id[..6], "--json"]).await.json();
        assert_eq!(shown["reason"], "unknown_tenant", "showing a letter does not remove it");
        assert!(shown["body"].as_str().unwrap().contains(&tenant), "{shown}");
    }
    assert_eq!(call(&world, &["tenant", "add", &tenant]).await.code, 0);
    assert_eq!(call(&world, &["dead", "replay", id, "--json"]).await.json()["replayed"], json!([id]));
    assert_eq!(world.ended("k").await["status"], "success");
    let file = std::env::temp_dir().join(format!("{}bad.json", world.prefix));
    std::fs::write(&file, "{ nope").unwrap();
    let bad = call(&world, &["request", "--from-file", file.to_str().unwrap()]).await;
    std::fs::remove_file(&file).unwrap();
    assert!(bad.code == 0 && bad.out.contains("invalid_json"), "{bad:?}");
    assert_eq!(only_dead_letter(&world).await["reason"], "invalid_json");
    assert_eq!(call(&world, &["dead", "drop", "abcdef"]).await.code, 1, "unknown id");
    assert_eq!(call(&world, &["dead", "drop", "--reason", "invalid_json"]).await.code, 0);
    assert_eq!(call(&world, &["dead", "list", "--json"]).await.json(), json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn events_tail_prints_published_events() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let mut tail = command(&world, &["events", "tail", "--binding", "run.completed.success.*", "--max", "1", "--json"]);
    let mut tail = tail.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut err = BufReader::new(tail.stderr.take().unwrap());
    let listening = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        err.read_line(&mut line).map(|_| line).unwrap()
    });
    assert!(listening.await.unwrap().starts_with("listening"));
    assert_eq!(world.sync("partial", &["mobileApp", "noSuchType"]).await["status"], "partial");
    let run = world.sync("success", &["mobileApp"]).await;
    let ended = tokio::task::spawn_blocking(move || tail.wait_with_output().unwrap()).await.unwrap();
    assert!(ended.status.success());
    let event: Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!((&event["id"], &event["data"]["status"]), (&run["id"], &json!("success")));
    let empty = call(&world, &["events", "tail", "--max", "1", "--timeout-s", "1"]).await;
    assert_eq!((empty.code, empty.out.as_str()), (1, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_names_missing_permissions() {
    let world = World::new().await;
    let rule = json!({ "path": "deviceAppManagement/mobileApps", "action": { "kind": "forbidden" } });
    world.sim.add_rule(serde_json::from_value::<Rule>(rule).unwrap());
    let tenant = world.tenant.to_string();
    let examine = ["doctor", "--tenant", &tenant, "--no-foundations", "--types"];
    let found = call(&world, &[&examine[..], &["mobileApp,deviceShellScript", "--json"]].concat()).await;
    assert_eq!((found.code, &found.json()["working"]), (1, &json!(1)));
    assert_eq!(found.json()["missing_permissions"], json!(["DeviceManagementApps.Read.All"]));
    assert_eq!(found.json()["readable_types"], json!(["deviceShellScript"]), "a request that would succeed now");
    let granted = json!(["DeviceManagementApps.Read.All", "DeviceManagementConfiguration.Read.All"]);
    assert_eq!(found.json()["granted_permissions"], granted, "what the token holds");
    let shown = call(&world, &[&examine[..], &["mobileApp,deviceShellScript"]].concat()).await.out;
    assert!(shown.contains("a request that succeeds now: --types deviceShellScript"), "{shown}");
    let link = format!("{}/{tenant}/adminconsent?client_id=", world.sim.base_url());
    assert!(found.json()["consent_link"].as_str().unwrap().starts_with(&link), "{found:?}");
    let shown = call(&world, &[&examine[..], &["mobileApp"]].concat()).await.out;
    assert!(shown.contains("consent: DeviceManagementApps.Read.All") && shown.contains(&link), "{shown}");
    assert_eq!(call(&world, &[&examine[..], &["deviceShellScript"]].concat()).await.code, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_explains_a_missing_token_as_text_and_json() {
    let world = World::new().await;
    let rule = json!({ "on": "token", "action": { "kind": "status", "status": 401 } });
    world.sim.add_rule(serde_json::from_value::<Rule>(rule).unwrap());
    let tenant = world.tenant.to_string();
    let found = call(&world, &["doctor", "--tenant", &tenant, "--json"]).await;
    let token = &found.json()["token"];
    assert_eq!((found.code, &token["failure"]["graph_code"]), (1, &json!("AADSTS7000215")), "{found:?}");
    assert!(token["cause"].as_str().unwrap().contains("secret is wrong"), "{token}");
    let shown = call(&world, &["doctor", "--tenant", &tenant]).await.err;
    assert!(shown.contains("AADSTS7000215") && shown.contains("not to its id"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_shares_pauses_with_the_daemon() {
    let world = World::new().await;
    let rule = json!({ "path": "deviceAppManagement/mobileApps", "times": 1,
                       "action": { "kind": "status", "status": 429, "retry_after": "3" } });
    world.sim.add_rule(serde_json::from_value::<Rule>(rule).unwrap());
    let tenant = world.tenant.to_string();
    assert_eq!(call(&world, &["doctor", "--tenant", &tenant, "--types", "mobileApp"]).await.code, 0);
    assert_eq!(world.count("select count(*) from tenant_pauses where family = 'intune'").await, 1);
    world.execute("update tenant_pauses set paused_until = clock_timestamp() + interval '5 seconds'").await;
    let begun = std::time::Instant::now();
    let examined = call(&world, &["doctor", "--tenant", &tenant, "--types", "mobileApp"]).await;
    assert_eq!(examined.code, 0, "{examined:?}");
    assert!(begun.elapsed() > std::time::Duration::from_secs(3), "a pause of the daemon is waited for");
}

#[tokio::test(flavor = "multi_thread")]
async fn closed_standard_output_succeeds_and_wrong_usage_exits_with_2() {
    let world = World::new().await;
    let mut child = command(&world, &["types"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ended = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    assert_eq!((ended.status.code(), ended.stderr.as_slice()), (Some(0), &b""[..]));
    let wrong = call(&world, &["request", "--tenant", "nobody", "--all"]).await;
    assert_eq!((wrong.code, wrong.out.as_str()), (2, ""));
    let checked = call(&world, &["check", "--changed"]).await;
    assert!(checked.code == 0 && checked.out.contains("[redacted]") && !checked.out.contains("simulated-secret"));
}

#[tokio::test(flavor = "multi_thread")]
async fn inventoryd_config_names_the_file_unless_an_option_does() {
    let world = World::new().await;
    let file = |name: &str, prefetch: u16| {
        let path = std::env::temp_dir().join(format!("{}{name}.toml", world.prefix));
        std::fs::write(&path, format!("[consumer]\nprefetch = {prefetch}\n")).unwrap();
        path
    };
    let (of_variable, of_option) = (file("variable", 7), file("option", 9));
    let prefetch = |options: &[&str]| {
        let mut command = command(&world, &[options, &["check", "--json"]].concat());
        let output = command.env("INVENTORYD_CONFIG", &of_variable).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let keys: Value = serde_json::from_slice(&output.stdout).unwrap();
        keys.as_array().unwrap().iter().find(|key| key["key"] == "consumer.prefetch").unwrap().clone()
    };
    let row = |value: &str, path: &std::path::Path| json!({ "key": "consumer.prefetch", "value": value, "origin": { "file": path.to_str().unwrap() } });
    assert_eq!(prefetch(&[]), row("7", &of_variable));
    assert_eq!(prefetch(&["--config", of_option.to_str().unwrap()]), row("9", &of_option));
    for path in [&of_variable, &of_option] {
        std::fs::remove_file(path).unwrap();
    }
    for arguments in [["check"], ["serve"]] {
        let output = command(&world, &arguments).env("INVENTORYD_CONFIG", &of_variable).output().unwrap();
        let problem = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{problem}");
        let expected = format!("configuration file {}: No such file", of_variable.display());
        assert!(problem.contains(&expected), "{problem}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_huge_timeout_is_no_timeout() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let (tenant, longest) = (world.tenant.to_string(), u64::MAX.to_string());
    let ask = ["request", "--tenant", &tenant, "--types", "mobileApp", "--wait", "--timeout-s", &longest];
    let asked = call(&world, &ask).await;
    assert_eq!(asked.code, 0, "{asked:?}");
    let mut tail = command(&world, &["events", "tail", "--max", "1", "--json", "--timeout-s", &longest]);
    let tail = tail.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let heard = tokio::task::spawn_blocking(move || tail.wait_with_output().unwrap());
    while !heard.is_finished() {
        world.sync(&Uuid::new_v4().to_string(), &["mobileApp"]).await;
    }
    assert!(heard.await.unwrap().status.success());
}
