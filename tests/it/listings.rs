//! Listings of the command line: their content, their JSON against the published schemas, and their form on a terminal.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Duration;

use boon::{Compiler, Schemas};
use lapin::BasicProperties;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::sim::Which;
use crate::support::daemon::Replica;
use crate::support::world::World;
use crate::support::{binary, eventually};

const APPS: &str = "deviceAppManagement/mobileApps";

/// Exit code and the two outputs of a command.
type Output = (i32, String, String);

async fn call_as(variables: BTreeMap<String, String>, arguments: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.args(arguments).env_clear().envs(variables).stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

async fn call(world: &World, arguments: &[&str]) -> Output {
    call_as(world.patient_variables(), arguments).await
}

/// JSON output of a command that succeeds.
async fn read(world: &World, arguments: &[&str]) -> Value {
    let (code, out, err) = call(world, &[arguments, &["--json"]].concat()).await;
    assert_eq!(code, 0, "{arguments:?}: {err}");
    serde_json::from_str(&out).unwrap()
}

/// Runs a command on a terminal of so many columns, with `input` typed; returns exit code and screen.
async fn on_terminal(world: &World, columns: u16, arguments: &[&str], input: &'static str) -> (i32, String) {
    let line = format!("stty cols {columns}; exec {} {}", binary().display(), arguments.join(" "));
    let mut command = Command::new("script");
    command
        .args(["-qefc", &line, "/dev/null"])
        .env_clear()
        .envs(world.patient_variables())
        .env("PATH", "/usr/bin:/bin");
    command.env("TERM", "xterm").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let run = move || {
        use std::io::Write;
        let mut child = command.spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}

fn ids(items: &Value) -> Vec<&str> {
    let mut ids: Vec<&str> =
        items.as_array().unwrap().iter().map(|item| item["external_id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    ids
}

fn names(ids: &[String]) -> Vec<&str> {
    let mut ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    ids.sort_unstable();
    ids
}

/// What two runs of one selection found: renamed, added and deleted objects.
struct Changes {
    old: String,
    new: String,
    renamed: String,
    added: Vec<String>,
    deleted: Vec<String>,
}

async fn two_runs(world: &World) -> Changes {
    let id = |run: &Value| run["id"].as_str().unwrap().to_owned();
    let old = id(&world.sync("old", &["mobileApp", "deviceShellScript"]).await);
    let deleted = world.sim.delete_objects(world.tenant, APPS, Which::Count(2)).unwrap();
    let renamed = world.sim.rename_object(world.tenant, APPS, Which::Index(4), "Renamed, \"quoted\"").unwrap();
    let added = world.sim.add_objects(world.tenant, APPS, 1).unwrap();
    let new = id(&world.sync("new", &["mobileApp", "deviceShellScript"]).await);
    Changes { old, new, renamed, added, deleted }
}

#[tokio::test(flavor = "multi_thread")]
async fn items_are_listed_by_type_by_change_and_as_missing() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let changes = two_runs(&world).await;
    let tenant = world.tenant.to_string();
    let list = ["items", "list", "--tenant", &tenant];
    let current = read(&world, &list).await;
    assert_eq!(current.as_array().unwrap().len(), 23);
    let in_view = world.rows("select external_id from inventory_items_current order by 1").await;
    let in_view: Vec<&str> = in_view.iter().map(|row| row["external_id"].as_str().unwrap()).collect();
    let mut listed = ids(&current);
    listed.sort_unstable();
    let mut in_view = in_view;
    in_view.sort_unstable();
    assert_eq!(listed, in_view, "the list is the view of the SQL interface");
    let apps = read(&world, &[&list[..], &["--type", "mobileApp"]].concat()).await;
    assert_eq!(apps.as_array().unwrap().len(), 11);
    assert!(apps[0]["meta"].is_object());
    let missing = read(&world, &[&list[..], &["--missing"]].concat()).await;
    assert_eq!(ids(&missing), names(&changes.deleted));
    let since = world.runs("new").await[0]["started_at"].as_str().unwrap().to_owned();
    let changed = read(&world, &[&list[..], &["--changed-since", &since]].concat()).await;
    let expected = [&changes.added[..], std::slice::from_ref(&changes.renamed)].concat();
    assert_eq!(ids(&changed), names(&expected));
    let (code, csv, _) = call(&world, &[&list[..], &["--csv", "--type", "mobileApp"]].concat()).await;
    assert_eq!((code, csv.lines().count()), (0, 12));
    assert!(
        csv.starts_with("policy_type,external_id,display_name,") && csv.contains("\"Renamed, \"\"quoted\"\"\""),
        "{csv}"
    );
    let short = read(&world, &["items", "list", "--tenant", &tenant[..8]]).await;
    assert_eq!(short, current, "a unique prefix of the tenant's id is enough");
    let stranger = Uuid::new_v4().to_string();
    let (code, _, err) = call(&world, &["items", "list", "--tenant", &stranger]).await;
    assert!(code == 1 && err.contains("not registered"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_lists_the_items_of_its_own_tenant_only() {
    let world = World::new().await;
    let replica = Replica::start(&world).await;
    world.sync("run", &["mobileApp"]).await;
    replica.stop().await;
    let other = Uuid::new_v4();
    world.register(other, None).await;
    world.execute(include_str!("../../deploy/sql/roles.sql")).await;
    let role = format!("inventoryd_reader:{}", world.tenant);
    world.execute(&format!("create role \"{role}\" login in role inventoryd_reader")).await;
    let mut variables = world.patient_variables();
    let (_, address) = world.database_url.rsplit_once('@').unwrap();
    let url = format!("postgres://{}@{address}", role.replace(':', "%3A"));
    variables.insert("INVENTORYD__DATABASE__URL".to_owned(), url);
    let tenant = world.tenant.to_string();
    let (code, out, err) = call_as(variables.clone(), &["items", "list", "--tenant", &tenant, "--json"]).await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap().as_array().unwrap().len(), 12);
    let (code, _, err) = call_as(variables, &["items", "list", "--tenant", &other.to_string(), "--json"]).await;
    assert!(code == 1 && err.contains("not registered"), "row level security hides the other tenant: {err}");
    world.execute(&format!("drop role \"{role}\"")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_diff_names_new_changed_and_missing_items_and_what_is_not_stored() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let changes = two_runs(&world).await;
    let diff = read(&world, &["runs", "diff", &changes.new, &changes.old]).await;
    assert_eq!((&diff["old_run_id"], &diff["new_run_id"]), (&json!(changes.old), &json!(changes.new)));
    let of = |change: &str| {
        let all = diff["differences"].as_array().unwrap().iter();
        let of: Vec<Value> = all.filter(|one| one["change"] == change).cloned().collect();
        json!(of)
    };
    assert_eq!(ids(&of("new")), names(&changes.added));
    assert_eq!(ids(&of("changed")), [changes.renamed.as_str()]);
    assert_eq!(ids(&of("missing")), names(&changes.deleted));
    assert_eq!((&diff["new_count"], &diff["changed_count"], &diff["missing_count"]), (&json!(1), &json!(1), &json!(2)));
    assert_eq!(diff["compared_types"], json!(["deviceShellScript", "mobileApp"]));
    assert_eq!((&diff["changed_later_count"], &diff["seen_later_count"]), (&json!(0), &json!(0)));

    world.sim.rename_object(world.tenant, APPS, Which::Index(5), "Renamed later").unwrap();
    let rule = json!({ "path": "deviceManagement/deviceShellScripts", "action": { "kind": "forbidden" } });
    world.sim.add_rule(serde_json::from_value(rule).unwrap());
    let later = world.sync("later", &["mobileApp", "deviceShellScript"]).await;
    let again = read(&world, &["runs", "diff", &changes.old, &changes.new]).await;
    assert_eq!(again["changed_later_count"], 1);
    assert_eq!(again["seen_later_count"], 10, "the apps that the old run knew and the later run found again");
    let (_, text, _) = call(&world, &["runs", "diff", &changes.new, later["id"].as_str().unwrap()]).await;
    assert!(text.contains("not compared, because one of the runs has no complete list: deviceShellScript"), "{text}");
    let alone = world.sync("alone", &["mobileApp"]).await;
    let (code, _, err) = call(&world, &["runs", "diff", &changes.old, alone["id"].as_str().unwrap()]).await;
    assert!(code == 1 && err.contains("different selections"), "{err}");
}

fn assert_fits(name: &str, document: &Value) {
    let path = format!("{}/config/schemas/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let schema = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
    compiler.add_resource("schema.json", schema).unwrap();
    let compiled = compiler.compile("schema.json", &mut schemas).unwrap();
    schemas.validate(document, compiled).unwrap_or_else(|error| panic!("{name}: {error:#}\n{document:#}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_listing_prints_json_that_fits_its_schema() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let changes = two_runs(&world).await;
    world.publish_bytes(b"{ nope", BasicProperties::default()).await;
    let tenant = world.tenant.to_string();
    let letters = eventually("a dead letter is listed", || async {
        Some(read(&world, &["dead", "list"]).await).filter(|letters| letters != &json!([]))
    })
    .await;
    let letter = letters[0]["id"].as_str().unwrap();
    let listings: [(&str, &[&str]); 11] = [
        ("runs", &["runs", "list"]),
        ("run", &["runs", "show", &changes.new]),
        ("run-diff", &["runs", "diff", &changes.old, &changes.new]),
        ("items", &["items", "list", "--tenant", &tenant]),
        ("missing", &["missing", "--tenant", &tenant]),
        ("tenants", &["tenant", "list"]),
        ("dead-letters", &["dead", "list"]),
        ("types", &["types"]),
        ("codes", &["explain"]),
        ("settings", &["check"]),
        ("doctor", &["doctor", "--tenant", &tenant, "--types", "mobileApp"]),
    ];
    for (schema, command) in listings {
        let document = read(&world, command).await;
        assert!(document != json!([]), "{command:?} lists something");
        assert_fits(schema, &document);
    }
    assert_fits("dead-letters", &json!([read(&world, &["dead", "show", letter]).await]));
    let shown = read(&world, &["runs", "show", &changes.new[..18]]).await;
    assert_eq!(shown["run_id"], changes.new, "a unique prefix of an id is enough");
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_fit_the_terminal_with_relative_times() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let changes = two_runs(&world).await;
    world.publish_bytes(b"{ nope", BasicProperties::default()).await;
    eventually("a dead letter arrives", || async { (world.depth("inventory.dead").await >= 1).then_some(()) }).await;
    let tenant = world.tenant.to_string();
    let listings: [&[&str]; 9] = [
        &["runs", "list"],
        &["runs", "show", &changes.new],
        &["runs", "diff", &changes.old, &changes.new],
        &["items", "list", "--tenant", &tenant],
        &["missing", "--tenant", &tenant],
        &["tenant", "list"],
        &["dead", "list"],
        &["types"],
        &["explain"],
    ];
    for columns in [80, 120] {
        for command in listings {
            let (code, screen) = on_terminal(&world, columns, command, "").await;
            assert_eq!(code, 0, "{screen}");
            let is_table = |line: &&str| line.starts_with(['│', '╭', '╰', '├']);
            let widest = screen.lines().filter(is_table).map(|line| line.trim_end().chars().count()).max().unwrap();
            assert!(widest <= usize::from(columns), "{command:?} needs {widest} of {columns} columns:\n{screen}");
        }
        let (_, screen) = on_terminal(&world, columns, &["runs", "list"], "").await;
        assert!(screen.contains(&changes.new) && screen.contains(" ago"), "{screen}");
    }
    let (_, piped, _) = call(&world, &["runs", "list"]).await;
    assert!(!piped.contains(" ago") && !piped.contains("hidden"), "a file gets everything: {piped}");
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_dead_letters_asks_on_a_terminal() {
    let world = World::new().await;
    Replica::start(&world).await.stop().await;
    let replica = Replica::start(&world).await;
    world.publish_bytes(b"{ nope", BasicProperties::default()).await;
    let depth = async |count: u32| {
        eventually("the dead letters are counted", || async {
            (world.depth("inventory.dead").await == count).then_some(())
        })
        .await;
    };
    depth(1).await;
    let (code, screen) = on_terminal(&world, 80, &["dead", "drop", "--all"], "n\n").await;
    assert!(
        code == 1 && screen.contains("all 1 dead letters? [y/N]") && screen.contains("nothing was changed"),
        "{screen}"
    );
    depth(1).await;
    assert_eq!(on_terminal(&world, 80, &["dead", "drop", "--all"], "yes\n").await.0, 0);
    depth(0).await;
    world.publish_bytes(b"{ nope", BasicProperties::default()).await;
    depth(1).await;
    assert_eq!(on_terminal(&world, 80, &["dead", "drop", "--all", "--yes"], "").await.0, 0);
    depth(0).await;
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrected_body_is_replayed_in_place_of_the_dead_one() {
    let world = World::new().await;
    let _replica = Replica::start(&world).await;
    let corrected = world.request("corrected", &["mobileApp"]).to_string();
    world.publish_bytes(&corrected.as_bytes()[1..], BasicProperties::default().with_correlation_id("c-1".into())).await;
    let letter = eventually("the dead letter is listed", || async {
        let letters = read(&world, &["dead", "list"]).await;
        letters.as_array().unwrap().first().cloned()
    })
    .await;
    assert_eq!(letter["reason"], "invalid_json");
    let file = std::env::temp_dir().join(format!("{}body.json", world.prefix));
    std::fs::write(&file, &corrected).unwrap();
    let id = letter["id"].as_str().unwrap();
    let replayed = read(&world, &["dead", "replay", &id[..6], "--body", file.to_str().unwrap()]).await;
    std::fs::remove_file(&file).unwrap();
    assert_eq!(replayed["replayed"], json!([id]));
    assert_eq!(world.ended("corrected").await["status"], "success");
    assert_eq!(read(&world, &["dead", "list"]).await, json!([]), "the letter is removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_without_anything_to_do_fail_with_a_sentence() {
    let world = World::new().await;
    let tenant = world.tenant.to_string();
    let nothing = ["doctor", "--tenant", &tenant, "--types", "roleScopeTag", "--no-foundations"];
    let (code, _, err) = tokio::time::timeout(Duration::from_secs(60), call(&world, &nothing)).await.unwrap();
    assert!(code == 2 && err.contains("nothing to check"), "{err}");
    let (code, _, err) = call(&world, &["tenant", "add", &Uuid::nil().to_string()]).await;
    assert!(code == 2 && err.contains("GUID of a directory"), "{err}");
    for command in [&["request", "--tenant", &tenant, "--dry-run"][..], &["hash"]] {
        let (code, _, err) = call(&world, &[command, &["--types", "roleScopeTag", "--no-foundations"]].concat()).await;
        assert!(code == 2 && err.contains("selects nothing"), "{command:?}: {err}");
    }
}
