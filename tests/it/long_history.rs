//! Long histories and many tenants: the cost of a read does not depend on the number of past runs or of other tenants.
//!
//! Cost is counted in pages and rows that PostgreSQL touched, which are the same on every machine.

use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use tokio::task::spawn_blocking;

use crate::sim::Which;
use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::world::World;

const APPS: &str = "deviceAppManagement/mobileApps";
const TYPES: [&str; 4] = ["mobileApp", "deviceShellScript", "deviceHealthScript", "deviceCompliancePolicy"];
/// Runs added to the history, each with four types.
const PAST_RUNS: u32 = 3_000;
/// Tenants added beside the one that is read.
const OTHER_TENANTS: u32 = 2_000;
/// Largest ratio of pages, long history to short: indexes are a level or two deeper.
const MAX_RATIO: i64 = 2;
/// Pages allowed on top, for catalog look-ups of the plan.
const FIXED_PAGES: i64 = 20;

/// A world with a complete run, a deletion, another complete run and no daemon.
async fn short_history() -> (World, Value) {
    let world = World::new().await;
    let replica = Replica::start(&world).await;
    world.sync("first", &TYPES).await;
    world.sim.delete_objects(world.tenant, APPS, Which::Count(3)).unwrap();
    let run = world.sync("second", &TYPES).await;
    assert_eq!(run["status"], "success", "{run}");
    let sent = "select count(*) from outbox";
    eventually("its events are sent", || async { (world.count(sent).await == 0).then_some(()) }).await;
    replica.stop().await;
    world.execute("vacuum analyze").await;
    (world, run)
}

/// Copies the first run and its types into the past, `PAST_RUNS` times.
async fn add_history(world: &World) {
    world
        .execute(&format!(
            "create table past as
               select r.id as original, gen_random_uuid() as id, n, r.started_at - n * interval '1 hour' as at
                 from inventory_sync_runs r, generate_series(1, {PAST_RUNS}) n where r.idempotency_key = 'first';
             insert into inventory_sync_runs
               select (jsonb_populate_record(r, jsonb_build_object('id', p.id, 'idempotency_key', 'past-' || p.n,
                         'started_at', p.at, 'finished_at', p.at + interval '1 second'))).*
                 from past p join inventory_sync_runs r on r.id = p.original;
             insert into inventory_sync_run_types
               select (jsonb_populate_record(t, jsonb_build_object('run_id', p.id, 'finished_at', p.at))).*
                 from past p join inventory_sync_run_types t on t.run_id = p.original;
             drop table past"
        ))
        .await;
    world.execute("vacuum analyze").await;
}

/// Copies the tenant, with its second run, selection, listings and items, to `OTHER_TENANTS` other tenants.
async fn add_tenants(world: &World) {
    let copy = |table: &str, condition: &str| {
        format!(
            "insert into {table}
               select (jsonb_populate_record(c, to_jsonb(o))).* from others o, {table} c
                where c.tenant_id = '{}' and {condition};",
            world.tenant
        )
    };
    let tables = [
        copy("tenants", "true"),
        copy("inventory_sync_runs", "idempotency_key = 'second'")
            .replace("to_jsonb(o)", "to_jsonb(o) || jsonb_build_object('id', latest_run_id)"),
        copy("inventory_selections", "true"),
        copy("inventory_complete_listings", "true"),
        copy("inventory_items", "true"),
    ];
    world
        .execute(&format!(
            "create table others as
               select gen_random_uuid() as tenant_id, gen_random_uuid() as latest_run_id from generate_series(1, {OTHER_TENANTS});
             {} drop table others",
            tables.concat()
        ))
        .await;
    world.execute("vacuum analyze").await;
}

/// Pages that a query touches, in memory or on disk.
async fn pages(world: &World, query: &str) -> i64 {
    // The first one fills the caches of the session.
    for _ in 0..2 {
        sqlx::raw_sql(AssertSqlSafe(query.to_owned())).execute(&world.db).await.unwrap();
    }
    let explain = format!("explain (analyze, buffers, format json) {query}");
    let plan: Value = sqlx::query_scalar(AssertSqlSafe(explain)).fetch_one(&world.db).await.unwrap();
    let count = |name: &str| plan[0]["Plan"][name].as_i64().unwrap();
    count("Shared Hit Blocks") + count("Shared Read Blocks")
}

fn queries(world: &World, run: &Value) -> [(&'static str, String); 5] {
    let (tenant, hash) = (world.tenant, run["selection_hash"].as_str().unwrap());
    [
        (
            "current items of a type",
            format!("select * from inventory_items_current where tenant_id = '{tenant}' and policy_type = 'mobileApp'"),
        ),
        ("current items", format!("select * from inventory_items_current where tenant_id = '{tenant}'")),
        ("latest runs", format!("select * from inventory_latest_runs where tenant_id = '{tenant}'")),
        ("latest runs of all tenants", "select * from inventory_latest_runs".to_owned()),
        ("missing items", format!("select * from inventory_missing('{tenant}', '{hash}')")),
    ]
}

/// One plan serves all calls of a statement of a run. It is made while the tables are small enough to be scanned.
#[tokio::test(flavor = "multi_thread")]
async fn statements_of_runs_scan_no_table() {
    let (world, _) = short_history().await;
    let scans = "select relname, seq_scan from pg_stat_user_tables
                  where relname in ('tenants', 'inventory_items', 'inventory_complete_listings', 'inventory_selections')
                  order by relname";
    let look_ups = "select idx_scan from pg_stat_user_tables where relname = 'inventory_selections'";
    let (before, looked_up) = (world.rows(scans).await, world.count(look_ups).await);
    let replica = Replica::start(&world).await;
    for key in ["third", "fourth", "fifth"] {
        assert_eq!(world.sync(key, &TYPES).await["status"], "success");
    }
    // A session reports its statistics when it ends.
    replica.stop().await;
    eventually("the runs are counted", || async { (world.count(look_ups).await >= looked_up + 3).then_some(()) }).await;
    assert_eq!(world.rows(scans).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_do_not_touch_the_history() {
    let (world, run) = short_history().await;
    let mut before = Vec::new();
    for (name, query) in queries(&world, &run) {
        before.push((pages(&world, &query).await, world.rows(&query).await, name, query));
    }
    assert_eq!((before[1].1.len(), before[4].1.len()), (45, 3), "there is something to read");
    add_history(&world).await;
    assert_as_cheap(&world, "a long history", &before).await;
    world.partition_items(4).await;
    world.execute("vacuum analyze").await;
    assert_as_cheap(&world, "partitioned items", &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_of_a_tenant_do_not_touch_other_tenants() {
    let (world, run) = short_history().await;
    let mut before = Vec::new();
    for (name, query) in queries(&world, &run).into_iter().filter(|(name, _)| !name.contains("all tenants")) {
        before.push((pages(&world, &query).await, world.rows(&query).await, name, query));
    }
    add_tenants(&world).await;
    let latest = world.count("select count(*) from inventory_latest_runs").await;
    assert_eq!(latest, i64::from(OTHER_TENANTS) + 1, "each has a selection with its latest run");
    assert_as_cheap(&world, "many tenants", &before).await;
}

/// Each query, with the pages that it touched before and its rows, touches about as many.
async fn assert_as_cheap(world: &World, about: &str, before: &[(i64, Vec<Value>, &str, String)]) {
    let mut slower = Vec::new();
    for (pages_before, rows, name, query) in before {
        assert_eq!(world.rows(query).await.len(), rows.len(), "{name}");
        let pages = pages(world, query).await;
        println!("{name}: {pages_before} pages, {pages} with {about}");
        if pages > pages_before * MAX_RATIO + FIXED_PAGES {
            slower.push(format!("{name}: {pages_before} pages, then {pages}"));
        }
    }
    assert!(slower.is_empty(), "{about}: {slower:?}");
}

/// Rows of runs and their types that were read by sessions which have ended.
async fn rows_read(world: &World) -> i64 {
    world
        .count(
            "select sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::bigint from pg_stat_user_tables
              where relname in ('inventory_sync_runs', 'inventory_sync_run_types')",
        )
        .await
}

async fn call(world: &World, arguments: &[&str]) -> Value {
    let mut command = world.command(arguments);
    let output = spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Counters are sent when a session ends, which the client does not wait for.
async fn settled_rows_read(world: &World) -> i64 {
    let sessions = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'inventoryd'";
    eventually("the sessions have ended", || async { (world.count(sessions).await == 0).then_some(()) }).await;
    rows_read(world).await
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_read_the_rows_that_they_show() {
    let (world, run) = short_history().await;
    add_history(&world).await;
    let id = run["id"].as_str().unwrap();
    let tenant = world.tenant.to_string();
    for arguments in [
        &["runs", "list", "--limit", "20", "--json"] as &[&str],
        &["runs", "list", "--limit", "20", "--tenant", &tenant, "--json"],
        &["runs", "show", id, "--json"],
    ] {
        let before = settled_rows_read(&world).await;
        call(&world, arguments).await;
        let read = settled_rows_read(&world).await - before;
        assert!(read <= 100, "{arguments:?} read {read} rows of {PAST_RUNS} runs");
    }
}

/// SQL statement of the documentation whose comment contains `about`.
fn documented(about: &str) -> String {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let pages = ["README.md", "migrations/README.md", "deploy/README.md"];
    let texts = pages.iter().filter_map(|page| std::fs::read_to_string(root.join(page)).ok());
    let blocks: Vec<String> =
        texts.flat_map(|text| text.split("```sql\n").skip(1).map(str::to_owned).collect::<Vec<_>>()).collect();
    let statements = blocks.iter().filter_map(|rest| rest.split("```").next()).flat_map(|block| block.split(';'));
    let found = statements.into_iter().find(|statement| statement.contains(about));
    found.unwrap_or_else(|| panic!("no SQL about {about:?}")).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn tenant_whose_latest_run_is_partial_is_not_stuck_while_its_latest_success_is_recent() {
    let (world, _) = short_history().await;
    world.execute("update tenants set created_at = now() - interval '3 days'").await;
    world
        .execute(
            "update inventory_sync_runs set status = 'partial', had_errors = true where idempotency_key = 'second';
             update inventory_selections set latest_success_at = finished_at from inventory_sync_runs
              where idempotency_key = 'first'",
        )
        .await;
    let statement = documented("Stuck tenants");
    let stuck = world.rows(&statement).await;
    assert_eq!(stuck, Vec::<Value>::new(), "its success is minutes old");
    let old = "update inventory_selections set latest_success_at = latest_success_at - interval '2 days'";
    world.execute(old).await;
    let stuck = world.rows(&statement).await;
    assert_eq!((stuck.len(), &stuck[0]["tenant_id"]), (1, &json!(world.tenant)), "its success is two days old");
    assert!(stuck[0]["last_success"].is_string(), "and is named: {stuck:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_are_listed_by_the_database_clock() {
    let (world, _) = short_history().await;
    // Made by the database, an id starts with the millisecond of the admission, whatever the clocks of the replicas say.
    let foreign = "select count(*) from inventory_sync_runs
                    where id < inventory_run_id_at(started_at)
                       or id >= inventory_run_id_at(started_at + interval '1 millisecond')";
    assert_eq!(world.count(foreign).await, 0);
    let listed = call(&world, &["runs", "list", "--json"]).await;
    let keys: Vec<&Value> = listed.as_array().unwrap().iter().map(|run| &run["idempotency_key"]).collect();
    assert_eq!(keys, [&json!("second"), &json!("first")], "newest first");
}
