//! Invariants of the tables and of a subscriber that must hold after every fault.

use std::collections::BTreeSet;

use super::events::Subscriber;
use super::eventually;
use super::world::World;

/// Query that counts pairs of runs of one selection that overlapped in time.
pub const OVERLAPPING_RUNS: &str = "select count(*) from
     (select selection_hash, tenant_id, id, min(at) filter (where status = 'running') as began, max(at) filter (where status <> 'running') as ended
        from run_history group by 1, 2, 3 having bool_or(status = 'running')) a
     join (select selection_hash, tenant_id, id, min(at) filter (where status = 'running') as began, max(at) filter (where status <> 'running') as ended
        from run_history group by 1, 2, 3 having bool_or(status = 'running')) b using (tenant_id, selection_hash)
     where a.id < b.id and a.began < b.ended and b.began < a.ended";

/// Records every state change of a run, so that overlaps are found even after they ended, and rejects any change of a
/// terminal run.
pub async fn record_history(world: &World) {
    world.execute(
        "create table run_history (tenant_id uuid, id uuid, selection_hash text, status text, attempt int, at timestamptz default clock_timestamp(),
           writer bigint default txid_current())",
    ).await;
    if world.is_distributed() {
        world.execute("select create_distributed_table('run_history', 'tenant_id', colocate_with => 'tenants')").await;
    }
    world.execute(
        "create function record_history() returns trigger language plpgsql as $$ begin
           insert into run_history values (new.tenant_id, new.id, new.selection_hash, new.status, new.attempt);
           if tg_op = 'UPDATE' and old.status <> 'running' and (old.status, old.finished_at, old.attempt, old.error_codes, old.items_observed_count)
                is distinct from (new.status, new.finished_at, new.attempt, new.error_codes, new.items_observed_count)
              and exists (select from run_history h where h.tenant_id = old.tenant_id and h.id = old.id and h.status <> 'running' and h.writer <> txid_current()) then
             raise exception 'terminal run % changed', old.id; end if;
           return null; end $$",
    ).await;
    // Alone: Citus sends the whole text that it got to the nodes.
    world.execute("create trigger record_history after insert or update on inventory_sync_runs for each row execute function record_history()").await;
}

/// Asserts that every accepted request ended in exactly one terminal run, that no two runs of a selection overlapped, that
/// every terminal run has its event, and that no item belongs to another tenant's run.
pub async fn assert_all(world: &World, keys: &[String], events: &Subscriber) {
    for key in keys {
        world.ended(key).await;
        assert_eq!(world.runs(key).await.len(), 1, "{key} created one run");
    }
    eventually("every event is published", || async {
        (world.count("select count(*) from outbox").await == 0).then_some(())
    })
    .await;
    assert_eq!(world.count("select count(*) from inventory_sync_runs where status = 'running'").await, 0);
    let ids: BTreeSet<String> = world
        .rows("select id from inventory_sync_runs")
        .await
        .iter()
        .map(|r| r["id"].as_str().unwrap().to_owned())
        .collect();
    eventually("every event arrives", || async {
        (events.distinct().into_keys().collect::<BTreeSet<_>>() == ids).then_some(())
    })
    .await;
    assert_eq!(world.count(OVERLAPPING_RUNS).await, 0, "two runs of one selection overlapped");
    let foreign = "select count(*) from inventory_items i where not exists
        (select from inventory_sync_runs r where r.tenant_id = i.tenant_id and r.id = i.last_seen_run_id)";
    assert_eq!(world.count(foreign).await, 0, "an item was last seen by a run of another tenant");
}

/// Asserts [`assert_all`], and that every run succeeded.
pub async fn assert_all_succeeded(world: &World, keys: &[String], events: &Subscriber) {
    assert_all(world, keys, events).await;
    let others = world.rows("select * from inventory_sync_runs where status <> 'success'").await;
    assert!(others.is_empty(), "{others:?}");
    assert_eq!(world.count("select count(*) from inventory_sync_runs").await, i64::try_from(keys.len()).unwrap());
}
