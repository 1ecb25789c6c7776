//! Defaults changed for the server, the database or the role: the daemon works as before, or refuses to start and names the
//! setting and the cure.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use uuid::Uuid;

use inventoryd::config::Config;
use inventoryd::daemon::Daemon;

use crate::sim::{Rule, SimConfig, Which};
use crate::support::daemon::Replica;
use crate::support::servers::{self, Private};
use crate::support::world::World;
use crate::support::{binary, eventually, within};

const APPS: &str = "deviceAppManagement/mobileApps";
const RENAMED: &str = "Zażółć 東京 \\ 'quoted'";

/// Starts a daemon on a database whose new sessions have `setting`; none if it refuses to start and names the setting.
/// The sessions of the test itself keep the setting as it was.
async fn start_with(world: &mut World, config: Config, setting: &str, value: &str) -> Option<Daemon> {
    let (_, database) = world.database_url.rsplit_once('/').unwrap();
    let before = world.rows(&format!("select current_setting('{setting}') as value")).await;
    let options: PgConnectOptions = world.database_url.parse().unwrap();
    let options = options.options([(setting, before[0]["value"].as_str().unwrap())]);
    world.db = PgPoolOptions::new().max_connections(4).connect_lazy_with(options);
    world.execute(&format!("alter database {database} set {setting} to {value}")).await;
    let started = timeout(Duration::from_secs(30), Daemon::start(config, None)).await;
    match started.unwrap_or_else(|_| panic!("with {setting} = {value} the daemon neither starts nor says why")) {
        Ok(daemon) => Some(daemon),
        Err(error) => {
            assert!(error.to_string().contains(setting), "{setting} = {value} is not named: {error}");
            world.execute(&format!("alter database {database} reset {setting}")).await;
            None
        }
    }
}

async fn stop_and_reset(world: &World, daemon: Daemon, setting: &str) {
    daemon.drain();
    daemon.stopped().await;
    let (_, database) = world.database_url.rsplit_once('/').unwrap();
    world.execute(&format!("alter database {database} reset {setting}")).await;
}

/// The runs of `keys` once all have ended.
async fn ended(world: &World, about: &str, keys: &[String]) -> Vec<Value> {
    let mut runs = Vec::new();
    for key in keys {
        let what = format!("the run of {key} ends with {about}");
        let ended = || async { world.runs(key).await.into_iter().find(|run| run["status"] != "running") };
        runs.push(within(Duration::from_secs(30), &what, ended).await);
    }
    runs
}

/// Runs that write the same objects at the same time, then a rename and a deletion, for a tenant of its own.
async fn assert_works(world: &World, about: &str) {
    let tenant = Uuid::new_v4();
    world.register(tenant, Some(10)).await;
    let others = ["deviceShellScript", "deviceHealthScript", "deviceCompliancePolicy"];
    let keys: Vec<String> = others.iter().map(|other| format!("{other}-{tenant}")).collect();
    for (key, other) in keys.iter().zip(others) {
        world.publish(&World::request_of(tenant, key, &["mobileApp", other])).await;
    }
    for run in ended(world, about, &keys).await {
        assert_eq!((&run["status"], &run["attempt"]), (&json!("success"), &json!(1)), "{about}: {run}");
        assert_eq!(run["items_observed_count"], 24, "{about}: {run}");
    }
    world.sim.rename_object(tenant, APPS, Which::Index(1), RENAMED).unwrap();
    world.sim.delete_objects(tenant, APPS, Which::Count(1)).unwrap();
    let last = [format!("last-{tenant}")];
    world.publish(&World::request_of(tenant, &last[0], &["mobileApp", others[0]])).await;
    let run = ended(world, about, &last).await.remove(0);
    assert_eq!((&run["status"], &run["items_changed_count"]), (&json!("success"), &json!(1)), "{about}: {run}");
    let missing = world.missing(&run).await;
    assert_eq!((missing.len(), &missing[0]["confidence"]), (1, &json!("high")), "{about}: {missing:?}");
    let changed = format!(
        "select display_name from inventory_items where tenant_id = '{tenant}' and last_changed_at > first_seen_at"
    );
    assert_eq!(world.rows(&changed).await, [json!({ "display_name": RENAMED })], "{about}");
}

/// The daemon works under each of these settings, or refuses to start and names the one.
async fn assert_works_under(settings: &[(&str, &str)]) {
    let mut world = World::new().await;
    world
        .execute(
            "create function slow_row() returns trigger language plpgsql as $$ begin
               perform pg_sleep(0.005); return new; end $$;
             create trigger slow_row before insert on inventory_items for each row execute function slow_row();",
        )
        .await;
    world.sim.add_rule(slow(300));
    for (setting, value) in settings {
        if world.count(&format!("select count(*) from pg_settings where lower(name) = lower('{setting}')")).await == 0 {
            println!("skipped: this PostgreSQL has no {setting}");
            continue;
        }
        let config = world.config();
        if let Some(daemon) = start_with(&mut world, config, setting, value).await {
            assert_works(&world, &format!("{setting} = {value}")).await;
            stop_and_reset(&world, daemon, setting).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn formats_and_parser_settings_change_nothing() {
    assert_works_under(&[
        ("DateStyle", "'SQL, DMY'"),
        ("IntervalStyle", "iso_8601"),
        ("TimeZone", "'Pacific/Chatham'"),
        ("bytea_output", "escape"),
        ("extra_float_digits", "-15"),
        ("standard_conforming_strings", "off"),
        ("array_nulls", "off"),
        ("transform_null_equals", "on"),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn time_limits_of_the_database_do_not_apply() {
    assert_works_under(&[
        ("statement_timeout", "'1ms'"),
        ("idle_in_transaction_session_timeout", "'1ms'"),
        ("transaction_timeout", "'1ms'"),
        ("lock_timeout", "'1ms'"),
        ("idle_session_timeout", "'100ms'"),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_default_does_not_apply_or_is_named() {
    assert_works_under(&[("default_transaction_deferrable", "on"), ("default_transaction_read_only", "on")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn search_path_without_the_tables_is_named() {
    assert_works_under(&[("search_path", "pg_catalog")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn default_isolation_level_does_not_weaken_admission() {
    for level in ["'repeatable read'", "serializable"] {
        let mut world = World::new().await;
        world.execute("update tenants set max_concurrent_runs = 1").await;
        world
            .execute(
                "create table running (n bigint not null);
                 create function note_running() returns trigger language plpgsql as $$ begin
                   insert into running select count(*) from inventory_sync_runs where status = 'running';
                   perform pg_sleep(0.2); return null; end $$;
                 create trigger note_running after insert on inventory_sync_runs for each row
                   execute function note_running();",
            )
            .await;
        world.sim.add_rule(slow(50_000));
        let mut config = world.config();
        config.consumer.prefetch = 12;
        config.database.max_connections = 12;
        let Some(daemon) = start_with(&mut world, config, "default_transaction_isolation", level).await else { return };
        let types = ["mobileApp", "deviceShellScript", "deviceHealthScript", "deviceCompliancePolicy"];
        let mut keys = Vec::new();
        // Twelve selections, so that only the tenant limit applies.
        for (number, chosen) in (1..=12_u32).map(|bits| (bits, types.iter().enumerate())) {
            let chosen: Vec<&str> = chosen.filter(|(bit, _)| number & (1 << bit) != 0).map(|(_, name)| *name).collect();
            keys.push(format!("k{number}"));
            world.publish(&world.request(&keys[keys.len() - 1], &chosen)).await;
        }
        let skipped = "select count(*) from inventory_sync_runs where status = 'skipped'";
        eventually("all others are refused", || async { (world.count(skipped).await >= 11).then_some(()) }).await;
        world.sim.remove_rules(None);
        let runs = ended(&world, level, &keys).await;
        let succeeded = runs.iter().filter(|run| run["status"] == "success").count();
        let refused = runs.iter().filter(|run| run["error_codes"] == json!(["concurrency_limit_tenant"])).count();
        assert_eq!((succeeded, refused), (1, 11), "{level}: the limit is one run");
        stop_and_reset(&world, daemon, "default_transaction_isolation").await;
    }
}

/// Acknowledged and announced runs survive a crash of the server, even if the database defaults to asynchronous commit.
#[tokio::test(flavor = "multi_thread")]
async fn asynchronous_commit_loses_no_run() {
    let database = Private::start("postgres", "settings-async").await;
    let mut admin = PgConnection::connect(&database.url).await.unwrap();
    // Longest time that a commit may wait until another process writes it.
    sqlx::raw_sql("alter system set wal_writer_delay = '10s'").execute(&mut admin).await.unwrap();
    sqlx::raw_sql("select pg_reload_conf()").execute(&mut admin).await.unwrap();
    admin.close().await.unwrap();
    let rabbitmq = spawn_blocking(|| servers::rabbitmq().url.clone()).await.unwrap();
    let mut world = World::on(SimConfig::default(), &database.url, &rabbitmq).await;
    let config = world.config();
    let Some(daemon) = start_with(&mut world, config, "synchronous_commit", "off").await else { return };
    let events = world.subscribe().await;
    for number in 0..5 {
        let run = world.sync(&format!("k{number}"), &["mobileApp"]).await;
        events.event_of(&run).await;
    }
    database.act(|server| server.command("kill")).await;
    database.act(|server| server.start_again()).await;
    let query = "select count(*) from inventory_sync_runs where status = 'success' and attempt = 1";
    let kept =
        eventually("the database is back", || async { sqlx::query_scalar(query).fetch_one(&world.db).await.ok() });
    let kept: i64 = kept.await;
    assert_eq!(kept, 5, "five runs were announced");
    daemon.drain();
    daemon.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disabled_triggers_leave_no_rows_of_deleted_runs() {
    let mut world = World::new().await;
    let replica = Replica::start(&world).await;
    for key in ["first", "second", "third"] {
        assert_eq!(world.sync(key, &["mobileApp"]).await["status"], "success");
    }
    replica.stop().await;
    let mut config = world.config();
    config.retention.runs_days = 0;
    config.retention.interval_s = 1;
    let Some(daemon) = start_with(&mut world, config, "session_replication_role", "replica").await else { return };
    eventually("retention deletes runs", || async { world.runs("first").await.is_empty().then_some(()) }).await;
    let orphans = "select count(*) from inventory_sync_run_types t where not exists
        (select from inventory_sync_runs r where r.tenant_id = t.tenant_id and r.id = t.run_id)";
    assert_eq!(world.count(orphans).await, 0, "types go with their run");
    stop_and_reset(&world, daemon, "session_replication_role").await;
}

/// An empty database on the shared server, and its address.
async fn empty_database(options: &str) -> (PgConnection, String) {
    let server = spawn_blocking(|| servers::postgres().url.clone()).await.unwrap();
    let name = format!("t{}", Uuid::new_v4().simple());
    let mut admin = PgConnection::connect(&server).await.unwrap();
    let create = format!("create database {name} {options}");
    sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut admin).await.unwrap();
    let (base, _) = server.rsplit_once('/').unwrap();
    let url = format!("{base}/{name}");
    (PgConnection::connect(&url).await.unwrap(), url)
}

/// Exit code of a command on a database of its own, and what it printed.
async fn call(url: &str, variables: &[(&str, &str)], arguments: &'static [&str]) -> (i32, String) {
    let mut command = Command::new(binary());
    command.args(arguments).env_clear().env("INVENTORYD__DATABASE__URL", url).stdin(Stdio::null());
    command.envs(variables.iter().copied());
    let output = spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8_lossy(&text).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_refuses_a_database_that_can_not_hold_every_name() {
    for encoding in ["LATIN1", "SQL_ASCII"] {
        let options = format!("encoding '{encoding}' locale 'C' template template0");
        let (_admin, url) = empty_database(&options).await;
        let (code, said) = call(&url, &[], &["migrate"]).await;
        assert_eq!(code, 1, "{encoding} was accepted: {said}");
        assert!(said.contains(encoding) && said.contains("UTF8"), "the error names it and the cure: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn migration_may_take_longer_than_any_other_statement() {
    let (mut admin, url) = empty_database("").await;
    let slow = "create function slow_ddl() returns event_trigger language plpgsql as $$ begin
          perform pg_sleep(3); end $$;
        create event trigger slow_ddl on ddl_command_start when tag in ('CREATE VIEW')
          execute function slow_ddl();";
    sqlx::raw_sql(slow).execute(&mut admin).await.unwrap();
    let (code, said) = call(&url, &[("INVENTORYD__DATABASE__STATEMENT_TIMEOUT_S", "1")], &["migrate"]).await;
    assert_eq!(code, 0, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_that_fails_does_not_advise_to_migrate() {
    let (mut admin, url) = empty_database("").await;
    sqlx::raw_sql("create table tenants (of_another_program integer)").execute(&mut admin).await.unwrap();
    let (code, said) = call(&url, &[], &["migrate"]).await;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("tenants"), "the error says what is wrong: {said}");
    assert!(!said.contains("run `inventoryd migrate`"), "it was just run: {said}");
}

fn slow(delay_ms: u64) -> Rule {
    serde_json::from_value(json!({ "action": { "kind": "slow", "delay_ms": delay_ms } })).unwrap()
}
