//! Backup and restore with the commands of deploy/README.md, onto a new server.

use std::collections::BTreeMap;

use inventoryd::config::Config;
use lapin::options::QueueDeleteOptions;
use lapin::{Connection, ConnectionProperties};
use serde_json::{Value, json};
use sqlx::postgres::PgPool;
use tokio::task::spawn_blocking;
use uuid::Uuid;

use crate::admission::running;
use crate::documentation::{blocks, section};
use crate::sim::SimConfig;
use crate::support::daemon::Replica;
use crate::support::events::Subscriber;
use crate::support::eventually;
use crate::support::servers::{self, Private};
use crate::support::world::World;

const APPS: &str = "deviceAppManagement/mobileApps";
const OWNER: &str = "inventory_owner";
const LOGIN: &str = "inventoryd_a";

/// The two blocks of commands: backup, and restore. `dump` is the path of the file.
fn commands(dump: &str) -> [String; 2] {
    let section = section(include_str!("../../deploy/README.md"), "Back up and restore");
    let blocks: Vec<String> =
        blocks(section, "sh").into_iter().map(|block| block.replace("inventory.dump", dump)).collect();
    blocks.try_into().expect("one block for the backup and one for the restore")
}

fn url_of(server: &str, user: &str, database: &str) -> String {
    let (_, address) = server.rsplit_once('@').unwrap();
    format!("postgres://{user}@{}/{database}", address.split('/').next().unwrap())
}

/// Configuration of a replica that connects with the login of `roles.sql`.
fn config_of(world: &World) -> Config {
    let mut config = world.config();
    let (_, database) = world.database_url.rsplit_once('/').unwrap();
    config.database.url = url_of(&world.database_url, LOGIN, database).into();
    config.run.restart_after_s = 5;
    config
}

/// Every row of every table, without the times that a working daemon moves.
async fn tables(world: &World) -> BTreeMap<String, Vec<Value>> {
    let mut tables = BTreeMap::new();
    for table in world.rows("select tablename as name from pg_tables where schemaname = 'public'").await {
        let name = table["name"].as_str().unwrap();
        let moving = "'{lease_expires_at,due_at,attempts,seen_at}'::text[]";
        let rows = world.rows(&format!("select to_jsonb(t) - {moving} as row from {name} t order by 1")).await;
        tables.insert(name.to_owned(), rows);
    }
    tables
}

/// A database of a non-superuser with the documented roles.
async fn world_with_roles(server: &Private) -> World {
    let rabbitmq = spawn_blocking(|| servers::rabbitmq().url.clone()).await.unwrap();
    let create = format!("psql -qc 'create role {OWNER} login createdb'");
    server.act(move |server| server.shell("postgres", &create)).await;
    let world = World::on(SimConfig::default(), &url_of(&server.url, OWNER, "postgres"), &rabbitmq).await;
    let roles = format!(
        "psql -qv ON_ERROR_STOP=1 -f deploy/sql/roles.sql -c 'create role {LOGIN} login in role inventoryd_daemon'"
    );
    shell(server, &world, roles).await;
    world
}

async fn shell(server: &Private, world: &World, script: String) -> String {
    let (_, database) = world.database_url.rsplit_once('/').unwrap();
    let database = database.to_owned();
    server.act(move |server| server.shell(&database, &script)).await
}

/// Fills a database with an ended run of two tenants each, one whose event waits, and two runs that go on.
async fn fill(world: &World, other: Uuid) -> Replica {
    world.register(other, None).await;
    let replica = Replica::with(config_of(world)).await;
    world.publish(&World::request_of(other, "other", &["mobileApp"])).await;
    world.ended("other").await;
    world.sync("finished", &["mobileApp"]).await;
    let outbox = async |count| (world.count("select count(*) from outbox").await == count).then_some(());
    eventually("both events are published", || outbox(0)).await;
    let connection = Connection::connect(&world.amqp_url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let unrouted = format!("{}inventory.unrouted", world.prefix);
    channel.queue_delete(unrouted.into(), QueueDeleteOptions::default()).await.unwrap();
    world.sync("waiting", &["deviceShellScript"]).await;
    let rule = json!({ "path": APPS, "action": { "kind": "slow", "delay_ms": 600_000 } });
    world.sim.add_rule(serde_json::from_value(rule).unwrap());
    world.publish(&world.request("interrupted", &["mobileApp", "deviceShellScript"])).await;
    world.publish(&world.request("aged", &["mobileApp", "deviceHealthScript"])).await;
    running(world, "aged").await;
    let recorded = "select count(*) from inventory_sync_run_types t join inventory_sync_runs r on r.id = t.run_id
                     where r.status = 'running'";
    eventually("a type of each is recorded", || async { (world.count(recorded).await == 2).then_some(()) }).await;
    replica
}

/// Runs `inventoryd check --connect` with the login of a daemon.
async fn assert_check_passes(world: &World) {
    let mut command = world.command(&["check", "--connect"]);
    let (_, database) = world.database_url.rsplit_once('/').unwrap();
    command.env("INVENTORYD__DATABASE__URL", url_of(&world.database_url, LOGIN, database));
    let output = spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Asserts that the login of one tenant sees what that tenant has, and nothing else.
async fn assert_reader_is_confined(world: &World, server: &Private) {
    let reader = format!("inventoryd_reader:{}", world.tenant);
    let login = format!("psql -qc 'create role \"{reader}\" login in role inventoryd_reader'");
    shell(server, world, login).await;
    let as_reader =
        async |query: &str| shell(server, world, format!("PGUSER={reader} psql -Atc '{query}' 2>&1 || true")).await;
    let tenants = as_reader("select tenant_id from tenants").await;
    assert_eq!(tenants, world.tenant.to_string());
    let items = format!("select count(*) from inventory_items where tenant_id = '{}'", world.tenant);
    let (seen, stored) = (as_reader("select count(*) from inventory_items_current").await, world.count(&items).await);
    assert_eq!(seen, stored.to_string());
    let refused = as_reader("select * from outbox").await;
    assert!(refused.contains("permission denied for table outbox"), "{refused}");
}

/// Changes the run as if the dump were three days old.
async fn age_by_three_days(world: &World, key: &str) {
    world
        .execute(&format!(
            "update inventory_sync_runs set started_at = started_at - interval '3 days', \
             lease_expires_at = lease_expires_at - interval '3 days' where idempotency_key = '{key}'"
        ))
        .await;
}

fn times_received(events: &Subscriber, run: &Value) -> usize {
    events.received().iter().filter(|event| event["id"] == run["id"]).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_dump_loses_nothing_and_repeats_no_run() {
    let dump = std::env::temp_dir().join(format!("{}.dump", Uuid::new_v4()));
    let [back_up, restore] = commands(dump.to_str().unwrap());
    let (source, target) =
        tokio::join!(Private::start("postgres", "backup-source"), Private::start("postgres", "backup-target"));
    let mut world = world_with_roles(&source).await;
    let other = Uuid::new_v4();
    let replica = fill(&world, other).await;
    let before = tables(&world).await;
    shell(&source, &world, back_up).await;

    // What happens between the dump and the loss of the server.
    let events = world.subscribe().await;
    world.sim.remove_rules(None);
    let interrupted = world.ended("interrupted").await;
    let waiting = world.ended("waiting").await;
    for run in [&interrupted, &waiting, &world.ended("aged").await, &world.sync("after", &["mobileApp"]).await] {
        events.event_of(run).await;
    }
    replica.stop().await;
    source.act(|server| server.command("kill")).await;

    shell(&target, &world, restore).await;
    std::fs::remove_file(&dump).unwrap();
    let (_, database) = world.database_url.rsplit_once('/').unwrap();
    world.database_url = url_of(&target.url, OWNER, database);
    world.db = PgPool::connect_lazy(&world.database_url).unwrap();
    let restored = tables(&world).await;
    assert_eq!(before.keys().collect::<Vec<_>>(), restored.keys().collect::<Vec<_>>());
    for (table, rows) in &before {
        assert_eq!(rows, &restored[table], "{table}");
    }
    assert_check_passes(&world).await;
    assert_reader_is_confined(&world, &target).await;

    age_by_three_days(&world, "aged").await;
    let finished = world.runs("finished").await;
    let replica = Replica::with(config_of(&world)).await;
    world.publish(&world.request("finished", &["mobileApp"])).await;
    let again = world.ended("interrupted").await;
    assert_eq!((&again["id"], &again["status"]), (&interrupted["id"], &json!("success")));
    assert_eq!(again["attempt"], 2, "it goes on");
    let kept = "select count(*) from inventory_sync_run_types t join inventory_sync_runs r on r.id = t.run_id
                 where r.idempotency_key = 'interrupted' and t.finished_at < r.finished_at - interval '1 second'
                   and t.policy_type = 'deviceShellScript'";
    assert_eq!(world.count(kept).await, 1, "the type that was recorded before the dump is kept");
    let aged = world.ended("aged").await;
    assert_eq!((&aged["status"], &aged["error_codes"]), (&json!("partial"), &json!(["deadline_exceeded"])));
    for run in [&interrupted, &waiting] {
        eventually("the event arrives again, with its id", || async {
            (times_received(&events, run) >= 2).then_some(())
        })
        .await;
    }
    assert!(world.runs("after").await.is_empty(), "it is newer than the dump");
    assert_eq!(world.sync("after", &["mobileApp"]).await["status"], "success");
    eventually("no event waits", || async { (world.count("select count(*) from outbox").await == 0).then_some(()) })
        .await;
    // Settles what is in flight.
    replica.stop().await;
    assert_eq!(world.depth("inventory.sync.requests").await, 0);
    assert_eq!(world.runs("finished").await, finished, "a key from before the dump starts no run");
    assert_eq!(world.runs("interrupted").await, [again], "it ended once");
    assert!(world.take("inventory.dead").await.is_none());
}
