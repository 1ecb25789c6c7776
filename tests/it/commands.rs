//! The command line as its users call it: the real binary, its exit code, its two outputs.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::sim::{Rule, Which};
use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::world::World;

/// What a command came to.
#[derive(Debug)]
struct Said {
    code: i32,
    out: String,
    err: String,
}

impl Said {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }
}

fn command(world: &World, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_inventoryd"));
    command.args(arguments).env_clear().envs(world.variables()).stdin(Stdio::null());
    command
}

async fn call(world: &World, arguments: &[&str]) -> Said {
    let mut command = command(world, arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Said { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

/// The only dead letter, once there is one.
async fn the_dead_letter(world: &World) -> Value {
    eventually("a dead letter is listed", || async {
        call(world, &["dead", "list", "--json"]).await.json().as_array().unwrap().first().cloned()
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_is_registered_asked_for_and_followed_to_its_end() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let tenant = Uuid::new_v4().to_string();
    let ask = ["request", "--tenant", &tenant, "--types", "mobileApp", "--no-foundations", "--wait", "--json"];
    let stranger = call(&world, &ask).await;
    assert_eq!(stranger.code, 1);
    assert!(stranger.err.contains("inventoryd tenant add"), "{stranger:?}");
    assert_eq!(call(&world, &["tenant", "add", &tenant, "--name", "Contoso"]).await.code, 0);
    let run = call(&world, &ask).await;
    assert_eq!(
        (run.code, &run.json()["status"], &run.json()["types"][0]["status"]),
        (0, &json!("success"), &json!("complete"))
    );
    assert!(run.err.contains("✓ mobileApp"), "progress for people: {}", run.err);
    let listed = call(&world, &["runs", "list", "--tenant", &tenant]).await.out;
    assert!(listed.contains(run.json()["run_id"].as_str().unwrap()) && listed.contains("Contoso"), "{listed}");
    let id = Uuid::parse_str(&tenant).unwrap();
    world.sim.delete_objects(id, "deviceAppManagement/mobileApps", Which::Count(2)).unwrap();
    assert_eq!(call(&world, &ask).await.code, 0);
    let missing = call(&world, &["missing", "--tenant", &tenant, "--json"]).await.json();
    assert_eq!((&missing["high"], &missing["low"]), (&json!(2), &json!(0)));
    assert_eq!(call(&world, &["tenant", "disable", &tenant]).await.code, 0);
    let skipped = call(&world, &ask).await;
    assert_eq!((skipped.code, &skipped.json()["error_codes"]), (1, &json!(["tenant_disabled"])));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_looked_at_replayed_and_dropped() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let tenant = Uuid::new_v4().to_string();
    let published = call(&world, &["request", "--tenant", &tenant, "--types", "mobileApp", "--key", "k"]).await;
    assert_eq!(published.code, 0, "{published:?}");
    let letter = the_dead_letter(&world).await;
    let id = letter["id"].as_str().unwrap();
    for _ in 0..2 {
        let shown = call(&world, &["dead", "show", &id[..6], "--json"]).await.json();
        assert_eq!(shown["reason"], "unknown_tenant", "looking at it takes nothing away");
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
    assert_eq!(the_dead_letter(&world).await["reason"], "invalid_json");
    assert_eq!(call(&world, &["dead", "drop", "abcdef"]).await.code, 1, "no such letter");
    assert_eq!(call(&world, &["dead", "drop", "--reason", "invalid_json"]).await.code, 0);
    assert_eq!(call(&world, &["dead", "list", "--json"]).await.json(), json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_shown_as_they_pass_by() {
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
    let quiet = call(&world, &["events", "tail", "--max", "1", "--timeout-s", "1"]).await;
    assert_eq!((quiet.code, quiet.out.as_str()), (1, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_names_what_to_grant() {
    let world = World::new().await;
    let rule = json!({ "path": "deviceAppManagement/mobileApps", "action": { "kind": "forbidden" } });
    world.sim.add_rule(serde_json::from_value::<Rule>(rule).unwrap());
    let tenant = world.tenant.to_string();
    let examine = ["doctor", "--tenant", &tenant, "--no-foundations", "--types"];
    let found = call(&world, &[&examine[..], &["mobileApp,deviceShellScript", "--json"]].concat()).await;
    assert_eq!((found.code, &found.json()["working"]), (1, &json!(1)));
    assert_eq!(found.json()["missing_permissions"], json!(["DeviceManagementApps.Read.All"]));
    let link = format!("{}/{tenant}/adminconsent?client_id=", world.sim.base_url());
    assert!(found.json()["consent_link"].as_str().unwrap().starts_with(&link), "{found:?}");
    let shown = call(&world, &[&examine[..], &["mobileApp"]].concat()).await.out;
    assert!(shown.contains("consent: DeviceManagementApps.Read.All") && shown.contains(&link), "{shown}");
    assert_eq!(call(&world, &[&examine[..], &["deviceShellScript"]].concat()).await.code, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_explains_a_missing_token_and_prints_json_then_too() {
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
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_away_and_a_wrong_call_are_answered_in_order() {
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
