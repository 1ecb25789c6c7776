//! Databases that this version must not work on: each is refused with its cause and its cure.

use inventoryd::store::{Store, StoreError};

use crate::support::daemon::Replica;
use crate::support::scheduler::requests;
use crate::support::world::World;
use crate::support::{eventually, invariants};

/// Refusals of `check` and of `migrate`, on new connections to the changed database.
async fn refusals(world: &World) -> (StoreError, StoreError) {
    let store = Store::connect(&world.config().database).unwrap();
    let check = store.check_schema().await.expect_err("the check refuses");
    let migrate = store.migrate().await.expect_err("the migration refuses");
    store.close().await;
    assert!(check.is_refusal() && migrate.is_refusal(), "{check}; {migrate}");
    (check, migrate)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_of_another_program_is_refused() {
    let world = World::new().await;
    world.execute("update _sqlx_migrations set checksum = 'another program'").await;
    let (check, migrate) = refusals(&world).await;
    for error in [check, migrate] {
        assert!(error.to_string().contains("differs from the one that was applied"), "{error}");
    }
}

/// Migrates the database as newer versions would that append columns and serve daemons from `oldest` on. Each migration
/// changes one table: locks of several in one transaction would deadlock with replicas at work.
async fn migrate_further(world: &World, oldest: i64) {
    for table in ["inventory_sync_runs", "inventory_sync_run_types", "inventory_items", "tenants", "outbox"] {
        world.execute(&format!("alter table {table} add column appended text")).await;
    }
    world
        .execute(&format!(
            "begin;
             create or replace function inventory_oldest_migration() returns bigint language sql immutable return {oldest};
             insert into _sqlx_migrations (version, description, success, checksum, execution_time)
             values (9999, 'newer', true, 'newer', 0);
             commit"
        ))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_schema_that_does_not_serve_this_version_is_refused() {
    let world = World::new().await;
    migrate_further(&world, 2).await;
    let (check, migrate) = refusals(&world).await;
    assert!(check.to_string().contains("serves daemons from version 2 on, this daemon has 1"), "{check}");
    assert!(migrate.to_string().contains("migration 9999"), "{migrate}");
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_of_this_version_work_and_restart_on_a_newer_schema_under_load() {
    let world = World::new().await;
    invariants::record_history(&world).await;
    let events = world.subscribe().await;
    let (one, _two) = (Replica::start(&world).await, Replica::start(&world).await);
    let (keys, requests) = requests(&world, "k", 60, &["mobileApp"]).await;
    for request in &requests[..30] {
        world.publish(request).await;
    }
    eventually("some runs end", || async {
        (world.count("select count(*) from inventory_sync_runs where finished_at is not null").await >= 5).then_some(())
    })
    .await;
    migrate_further(&world, 1).await;
    for request in &requests[30..] {
        world.publish(request).await;
    }
    one.stop().await;
    let _restarted = Replica::start(&world).await;
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    let store = Store::connect(&world.config().database).unwrap();
    let warnings = store.check_schema().await.unwrap();
    assert!(warnings.iter().any(|warning| warning.contains("upgrade this daemon")), "{warnings:?}");
    let again = world.count("select count(*) from inventory_sync_runs where attempt > 1").await;
    assert_eq!(again, 0, "no statement failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_whose_migration_was_interrupted_is_refused() {
    let world = World::new().await;
    world.execute("update _sqlx_migrations set success = false").await;
    let (check, migrate) = refusals(&world).await;
    assert!(check.to_string().contains("has version 0"), "{check}");
    assert!(migrate.to_string().contains("was interrupted"), "{migrate}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_older_than_postgresql_15_is_refused() {
    let world = World::new().await;
    let (_, database) = world.database_url.rsplit_once('/').unwrap();
    // The version of a server cannot be set: a function that hides the built-in one reports an older server.
    world
        .execute(&format!(
            "create schema older;
             create function older.current_setting(name text) returns text language sql as $$
               select case name when 'server_version_num' then '140019' else pg_catalog.current_setting(name) end $$;
             alter database {database} set search_path = older, pg_catalog, public"
        ))
        .await;
    let (check, migrate) = refusals(&world).await;
    for error in [check, migrate] {
        assert!(error.to_string().contains("PostgreSQL 14 is too old: use version 15 or newer"), "{error}");
    }
}
