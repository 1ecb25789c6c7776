//! Databases that this version must not work on: each is refused with its cause and its cure.

use inventoryd::store::{Store, StoreError};

use crate::support::world::World;

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

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_schema_is_refused() {
    let world = World::new().await;
    let newer = "insert into _sqlx_migrations (version, description, success, checksum, execution_time)
                 values (9999, 'newer', true, 'newer', 0)";
    world.execute(newer).await;
    let (check, migrate) = refusals(&world).await;
    assert!(check.to_string().contains("has version 9999") && check.to_string().contains("upgrade"), "{check}");
    assert!(migrate.to_string().contains("migration 9999"), "{migrate}");
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
