//! Retention: bounded batches, and nothing deleted that is still needed.

use serde_json::json;
use uuid::Uuid;

use crate::dead_letters::header;
use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::world::World;

/// Inserts finished runs, `days` old, with one type each, under the keys `{key}-1` to
/// `{key}-{count}`.
async fn old_runs(world: &World, key: &str, count: u32, days: u32) {
    let tenant = world.tenant;
    world
        .execute(&format!(
            "insert into inventory_sync_runs (tenant_id, id, idempotency_key, selection_hash, selection_payload, status,
                    daemon_version, started_at, finished_at)
             select '{tenant}', inventory_new_run_id(at), '{key}-' || n, '{key}', '{{}}', 'success', 'x', at, at
               from generate_series(1, {count}) n,
                    lateral (select clock_timestamp() - interval '{days} days' + n * interval '1 s' as at) at;
             insert into inventory_sync_run_types (tenant_id, run_id, policy_type, status, items_observed_count,
                    items_upserted_count, items_created_count, items_changed_count, errors_count)
             select tenant_id, id, 'mobileApp', 'complete', 0, 0, 0, 0, 0 from inventory_sync_runs
              where tenant_id = '{tenant}' and selection_hash = '{key}';
             insert into inventory_selections (tenant_id, selection_hash, latest_run_id, latest_success_at)
             select tenant_id, selection_hash, id, finished_at from inventory_sync_runs
              where tenant_id = '{tenant}' and idempotency_key = '{key}-{count}'"
        ))
        .await;
}

/// Records how many rows each statement deletes.
async fn count_deletions(world: &World) {
    world
        .execute(
            "create table deletions (rows bigint not null);
             create function note_deletions() returns trigger language plpgsql as $$ begin
               insert into deletions select count(*) from deleted; return null; end $$;
             create trigger note after delete on inventory_sync_runs referencing old table as deleted
               for each statement execute function note_deletions();",
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_deletes_in_batches_and_spares_what_is_needed() {
    let world = World::new().await;
    old_runs(&world, "busy", 2_500, 100).await;
    old_runs(&world, "quiet", 3, 400).await;
    old_runs(&world, "young", 1, 89).await;
    let unsent =
        "insert into outbox (tenant_id, run_id, due_at) select tenant_id, id, clock_timestamp() + interval '1 hour'
                    from inventory_sync_runs where idempotency_key = 'busy-7'";
    world.execute(unsent).await;
    world
        .execute(&format!(
            "insert into inventory_items select '{}', 'mobileApp', 'old', 'Old', 'apps', null, '{{}}', at, at, at, '{}'
               from (select clock_timestamp() - interval '3 years' as at) at",
            world.tenant,
            Uuid::nil()
        ))
        .await;
    // A trigger on a shard cannot count over all of them.
    if !world.is_distributed() {
        count_deletions(&world).await;
    }
    let mut config = world.config();
    config.retention.interval_s = 1;
    let _replica = Replica::with(config).await;

    let kept = eventually("the expired runs are deleted", || async {
        let kept = world.rows("select idempotency_key as key from inventory_sync_runs order by 1").await;
        (kept.len() <= 4).then_some(kept)
    })
    .await;
    assert_eq!(
        kept,
        [json!({"key": "busy-2500"}), json!({"key": "busy-7"}), json!({"key": "quiet-3"}), json!({"key": "young-1"})],
        "spared: the latest run of each selection, a run with an unpublished event, and a run within its days"
    );
    assert_eq!(
        world.count("select count(*) from inventory_sync_run_types").await,
        4,
        "type rows are deleted with their run"
    );
    assert_eq!(world.count("select count(*) from inventory_items where external_id = 'old'").await, 1);
    if !world.is_distributed() {
        let most = world.count("select max(rows) from deletions").await;
        assert_eq!(most, 1_000, "every statement is bounded, so that none holds locks for long");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_is_forgotten_with_its_run() {
    let world = World::new().await;
    old_runs(&world, "key", 2, 100).await;
    old_runs(&world, "fresh", 1, 1).await;
    let mut config = world.config();
    config.retention.interval_s = 1;
    let _replica = Replica::with(config).await;
    eventually("the first key's run is deleted", || async { world.runs("key-1").await.is_empty().then_some(()) }).await;
    world.publish(&world.request("key-1", &["mobileApp"])).await;
    let again = eventually("the key creates a run again", || async { world.runs("key-1").await.pop() }).await;
    assert_ne!(again["selection_hash"], json!("key"));
    world.publish(&world.request("fresh-1", &["mobileApp"])).await;
    let letter =
        eventually("a remembered key with another selection is a dead letter", || world.take("inventory.dead")).await;
    assert_eq!(header(&letter, "x-dead-reason").as_deref(), Some("idempotency_conflict"));
}
