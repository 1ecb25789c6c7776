//! Admissions and ends of several runs in one statement, and what each of them owes to none of the others.

use serde_json::{Value, json};
use sqlx::Connection as _;
use tokio::task::JoinSet;
use uuid::Uuid;

use inventoryd::domain::run::{GraphUsage, Lease, RunReport};
use inventoryd::store::{Admission, RunEnd, Store, StoreError, SuspiciousDropRule};

use crate::faults_database::{admit, try_admit};
use crate::support::eventually;
use crate::support::world::World;

/// Tenants beside the one of the world.
const OTHERS: u128 = 8;

/// A world with further tenants, in which every statement that writes a run of the world's own tenant takes a second.
async fn world_with_a_slow_tenant() -> (World, Vec<Uuid>) {
    let world = World::new().await;
    let others: Vec<Uuid> = (1..=OTHERS).map(|number| Uuid::from_u128(world.tenant.as_u128() ^ number)).collect();
    for tenant in &others {
        world.register(*tenant, None).await;
    }
    world.execute(&linger(1.0)).await;
    let slow = format!(
        "create trigger linger before insert or update on inventory_sync_runs for each row
         when (new.tenant_id = '{}') execute function linger()",
        world.tenant
    );
    world.execute(&slow).await;
    (world, others)
}

fn linger(seconds: f64) -> String {
    format!(
        "create or replace function linger() returns trigger language plpgsql as $$
         begin perform pg_sleep({seconds}); return new; end $$"
    )
}

fn store_of(world: &World) -> Store {
    Store::connect(&world.config().database).unwrap()
}

/// Waits until the slow tenant's statement is under way, so that the calls that follow wait for it.
async fn under_way(world: &World, function: &str) {
    let sleeping = format!(
        "select count(*) from pg_stat_activity
          where datname = current_database() and wait_event = 'PgSleep' and query like '%{function}%'"
    );
    eventually("the slow statement is under way", || async { (world.count(&sleeping).await > 0).then_some(()) }).await;
}

/// Transactions that wrote the rows of the runs of all tenants but the slow one.
async fn transactions(world: &World) -> i64 {
    world
        .count(&format!(
            "select count(distinct xmin::text) from inventory_sync_runs where tenant_id <> '{}'",
            world.tenant
        ))
        .await
}

async fn end(store: &Store, lease: &Lease) -> Result<(), StoreError> {
    let rules = RunEnd { suspicious_drop: SuspiciousDropRule { share: 0.0, min_items: 0 }, event_due_s: 0 };
    let mut report = RunReport { outcomes: Vec::new(), usage: GraphUsage::default(), retry_after_s: None };
    store.end_run(lease, &mut report, (0, None), rules).await.map(drop)
}

/// Starts an admission of each tenant.
fn admit_each(store: &Store, tenants: &[Uuid]) -> JoinSet<Admission> {
    let mut admissions = JoinSet::new();
    for tenant in tenants.iter().copied() {
        let store = store.clone();
        admissions.spawn(async move { admit(&store, tenant, "k", "hash").await });
    }
    admissions
}

async fn leases(admissions: JoinSet<Admission>) -> Vec<Lease> {
    let admitted = admissions.join_all().await.into_iter().map(|admission| match admission {
        Admission::Admitted(admitted) => admitted.lease,
        other => panic!("{other:?}"),
    });
    admitted.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_wait_are_made_by_one_statement() {
    let (world, others) = world_with_a_slow_tenant().await;
    let store = store_of(&world);
    let slow = admit_each(&store, &[world.tenant]);
    under_way(&world, "inventory_admit_group").await;
    let admitted = leases(admit_each(&store, &others)).await;
    assert_eq!(transactions(&world).await, 1, "transactions of {OTHERS} admissions");

    let slow = leases(slow).await[0];
    let ending = tokio::spawn({
        let store = store.clone();
        async move { end(&store, &slow).await }
    });
    under_way(&world, "inventory_end_group").await;
    // One has lost its lease: that is its own affair.
    let lost = Lease { attempt: 2, ..admitted[0] };
    let mut ends = JoinSet::new();
    for lease in admitted[1..].iter().copied().chain([lost]) {
        let store = store.clone();
        ends.spawn(async move { (lease, end(&store, &lease).await) });
    }
    for (lease, ended) in ends.join_all().await {
        assert_eq!(ended.is_err_and(|error| error.is_lease_lost()), lease.attempt == 2, "{lease:?}");
    }
    ending.await.unwrap().unwrap();
    assert_eq!(
        transactions(&world).await,
        2,
        "that of the ends, and that of the admission of the one that lost its lease"
    );
    assert_eq!(world.count("select count(*) from outbox").await, OTHERS as i64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_another_session_has_locked_delays_no_other() {
    let (world, others) = world_with_a_slow_tenant().await;
    let store = store_of(&world);
    let slow = admit_each(&store, &[world.tenant]);
    under_way(&world, "inventory_admit_group").await;
    let mut session = world.db.acquire().await.unwrap();
    let mut transaction = session.begin().await.unwrap();
    sqlx::query("select from tenants where tenant_id = $1 for update")
        .bind(others[0])
        .execute(&mut *transaction)
        .await
        .unwrap();
    let locked = tokio::spawn({
        let (store, tenant) = (store.clone(), others[0]);
        async move { try_admit(&store, tenant, "k", "hash").await }
    });
    // Those of the same group, and those that follow while the locked tenant waits.
    assert_eq!(leases(admit_each(&store, &others[1..])).await.len(), others.len() - 1);
    assert_eq!(leases(slow).await.len(), 1);
    let error = locked.await.unwrap().expect_err("the tenant is locked");
    assert!(error.is_lock_timeout(), "{error}");
    transaction.rollback().await.unwrap();
    assert_eq!(leases(admit_each(&store, &others[..1])).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_defect_of_one_run_is_not_that_of_the_others() {
    let (world, others) = world_with_a_slow_tenant().await;
    let store = store_of(&world);
    let slow = leases(admit_each(&store, &[world.tenant])).await[0];
    let admitted = leases(admit_each(&store, &others)).await;
    let bad = admitted[3];
    world.execute(&format!("alter table outbox add constraint good check (tenant_id <> '{}')", bad.tenant_id)).await;
    let ending = tokio::spawn({
        let store = store.clone();
        async move { end(&store, &slow).await }
    });
    under_way(&world, "inventory_end_group").await;
    let mut ends = JoinSet::new();
    for lease in admitted {
        let store = store.clone();
        ends.spawn(async move { (lease, end(&store, &lease).await) });
    }
    for (lease, ended) in ends.join_all().await {
        assert_eq!(ended.is_err_and(|error| error.is_data_rejected()), lease == bad, "{lease:?}");
    }
    ending.await.unwrap().unwrap();
    let ended =
        "select count(*) from inventory_sync_runs r join outbox o on o.run_id = r.id where r.status <> 'running'";
    assert_eq!(world.count(ended).await, OTHERS as i64, "the slow one and all others but one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_end_delays_others_for_two_seconds() {
    let (world, others) = world_with_a_slow_tenant().await;
    let store = store_of(&world);
    let slow = leases(admit_each(&store, &[world.tenant])).await[0];
    let admitted = leases(admit_each(&store, &others)).await;
    world.execute(&linger(15.0)).await;
    let ending = tokio::spawn({
        let store = store.clone();
        async move { end(&store, &slow).await }
    });
    under_way(&world, "inventory_end_group").await;
    for lease in &admitted {
        end(&store, lease).await.unwrap();
    }
    assert!(!ending.is_finished(), "the others did not wait for it");
    ending.await.unwrap().unwrap();
}

/// Every decision but that of a new run rests on the disk when it returns, whatever is admitted beside it.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_waits_for_the_disk_if_one_of_it_must() {
    let world = World::new().await;
    let request = |key: &str, hash: &str, lease_s: f64, tenant_max_runs: i64| -> Value {
        json!({
            "tenant_id": world.tenant, "idempotency_key": key, "selection_hash": hash, "selection": {}, "owner": "me",
            "lease_s": lease_s, "max_attempts": 5, "tenant_max_runs": tenant_max_runs, "fleet_max_runs": 0, "may_defer": false,
            "event_due_s": 60, "daemon_version": "0"
        })
    };
    let (new, second, expired) = (request("a", "1", 60.0, 3), request("b", "2", 60.0, 3), request("c", "3", -60.0, 3));
    let (conflict, same_selection) = (request("a", "other", 60.0, 3), request("d", "1", 60.0, 4));
    for (requests, decisions, synchronous) in [
        (json!([new, expired]), "admitted admitted", "off"),
        (json!([conflict, second]), "idempotency_conflict admitted", "on"),
        (json!([same_selection, request("e", "5", 60.0, 4)]), "skipped admitted", "on"),
        (json!([expired, request("f", "6", 60.0, 5)]), "admitted admitted", "on"),
        (json!([new, request("g", "7", 60.0, 6)]), "held_here admitted", "on"),
    ] {
        let mut transaction = world.db.begin().await.unwrap();
        let decided: String = sqlx::query_scalar("select string_agg(decision, ' ') from inventory_admit_group($1)")
            .bind(&requests)
            .fetch_one(&mut *transaction)
            .await
            .unwrap();
        let setting: String = sqlx::query_scalar("select current_setting('synchronous_commit')")
            .fetch_one(&mut *transaction)
            .await
            .unwrap();
        transaction.commit().await.unwrap();
        assert_eq!((&*decided, &*setting), (decisions, synchronous), "{requests}");
    }
}

/// A distributed database cannot make calls of several tenants together: it is asked once.
#[tokio::test(flavor = "multi_thread")]
async fn each_call_is_made_by_itself_where_groups_are_not_supported() {
    let world = World::new().await;
    world
        .execute(
            "create sequence asked;
             create or replace function inventory_admit_group(in_requests jsonb)
                 returns table (decision text, error_code text, run_id uuid, attempt integer, credential text,
                                decided_at timestamptz, started_at timestamptz, throttle_wait_ms bigint)
                 language plpgsql as $$
             begin
                 perform nextval('asked');
                 raise exception 'cannot' using errcode = 'feature_not_supported';
             end $$",
        )
        .await;
    let store = store_of(&world);
    for key in ["a", "b", "c"] {
        assert!(matches!(admit(&store, world.tenant, key, key).await, Admission::Admitted(_)));
    }
    assert_eq!(world.count("select last_value from asked where is_called").await, 1);
}
