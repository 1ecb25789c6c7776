//! Batches of admissions and of ends of runs: one statement for several, none of which affects another.

use std::borrow::Cow;
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::Connection as _;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use uuid::Uuid;

use inventoryd::domain::run::{GraphUsage, Lease, RunReport};
use inventoryd::store::{Admission, RunEnd, Store, StoreError, SuspiciousDropRule};

use crate::faults_database::{admit, try_admit};
use crate::support::eventually;
use crate::support::world::World;

/// Tenants beside the slow one.
const OTHERS: u128 = 8;

/// A world whose own tenant is slow, with further tenants.
struct Slow {
    world: World,
    store: Store,
    others: Vec<Uuid>,
}

impl Slow {
    /// Every statement that writes a run of the slow tenant takes a second.
    async fn new() -> Self {
        let world = World::new().await;
        let others: Vec<Uuid> = (1..=OTHERS).map(|number| Uuid::from_u128(world.tenant.as_u128() ^ number)).collect();
        for tenant in &others {
            world.register(*tenant, None).await;
        }
        let store = Store::connect(&world.config().database).unwrap();
        let slow = Self { world, store, others };
        slow.take(1).await;
        slow.trigger("trigger linger before insert or update on inventory_sync_runs").await;
        slow
    }

    /// Sets the seconds that the trigger takes.
    async fn take(&self, seconds: u32) {
        let function = format!(
            "create or replace function linger() returns trigger language plpgsql as $$
             begin perform pg_sleep({seconds}); return new; end $$"
        );
        self.world.execute(&function).await;
    }

    async fn trigger(&self, kind: &str) {
        let tenant = self.world.tenant;
        let create = format!("create {kind} for each row when (new.tenant_id = '{tenant}') execute function linger()");
        self.world.execute(&create).await;
    }

    /// Waits until a batch with the slow tenant is being executed, so that the calls that follow wait for it.
    async fn is_executing(&self, function: &str) {
        let sleeping = format!(
            "select count(*) from pg_stat_activity
              where datname = current_database() and wait_event = 'PgSleep' and query like '%{function}%'"
        );
        let executing = || async { (self.world.count(&sleeping).await > 0).then_some(()) };
        eventually("the slow batch is being executed", executing).await;
    }

    /// Transactions that last wrote the runs of the other tenants.
    async fn transactions(&self) -> i64 {
        let tenant = self.world.tenant;
        let count = "select count(distinct xmin::text) from inventory_sync_runs where tenant_id <>";
        self.world.count(&format!("{count} '{tenant}'")).await
    }

    /// Starts an admission of each tenant.
    fn admit(&self, tenants: &[Uuid]) -> JoinSet<Lease> {
        let mut admissions = JoinSet::new();
        for tenant in tenants.iter().copied() {
            let store = self.store.clone();
            admissions.spawn(async move {
                match admit(&store, tenant, "k", "hash").await {
                    Admission::Admitted(admitted) => admitted.lease,
                    other => panic!("{other:?}"),
                }
            });
        }
        admissions
    }

    /// Admits a run of each tenant: first of the slow one, then of the others.
    async fn admit_all(&self) -> (Lease, Vec<Lease>) {
        let slow = self.admit(&[self.world.tenant]).join_all().await[0];
        (slow, self.admit(&self.others).join_all().await)
    }

    /// Starts the end of a run, and waits until its batch is being executed.
    async fn end_slow(&self, lease: Lease) -> JoinHandle<Result<(), StoreError>> {
        let store = self.store.clone();
        let ending = tokio::spawn(async move { end(&store, lease).await });
        self.is_executing("inventory_end_batch").await;
        ending
    }

    /// Ends runs concurrently; returns the results.
    async fn end_each(&self, leases: impl IntoIterator<Item = Lease>) -> Vec<(Lease, Result<(), StoreError>)> {
        let mut ends = JoinSet::new();
        for lease in leases {
            let store = self.store.clone();
            ends.spawn(async move { (lease, end(&store, lease).await) });
        }
        ends.join_all().await
    }
}

async fn end(store: &Store, lease: Lease) -> Result<(), StoreError> {
    let rules = RunEnd { suspicious_drop: SuspiciousDropRule { share: 0.0, min_items: 0 }, event_due_s: 0 };
    let mut report = RunReport { outcomes: Vec::new(), usage: GraphUsage::default(), retry_after_s: None };
    store.end_run(&lease, &mut report, (0, None), rules).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_wait_are_executed_by_one_statement() {
    let slow = Slow::new().await;
    let admission = slow.admit(&[slow.world.tenant]);
    slow.is_executing("inventory_admit_batch").await;
    let admitted = slow.admit(&slow.others).join_all().await;
    assert_eq!(slow.transactions().await, 1, "transactions of {OTHERS} admissions");

    let ending = slow.end_slow(admission.join_all().await[0]).await;
    let lost = Lease { attempt: 2, ..admitted[0] };
    for (lease, ended) in slow.end_each(admitted[1..].iter().copied().chain([lost])).await {
        assert_eq!(ended.is_err_and(|error| error.is_lease_lost()), lease == lost, "{lease:?}");
    }
    ending.await.unwrap().unwrap();
    assert_eq!(slow.transactions().await, 2, "the ends, and the admission of the run whose lease was lost");
    assert_eq!(slow.world.count("select count(*) from outbox").await, OTHERS as i64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_another_session_has_locked_delays_no_other() {
    let slow = Slow::new().await;
    let admission = slow.admit(&[slow.world.tenant]);
    slow.is_executing("inventory_admit_batch").await;
    let mut session = slow.world.db.acquire().await.unwrap();
    let mut transaction = session.begin().await.unwrap();
    let lock = sqlx::query("select from tenants where tenant_id = $1 for update").bind(slow.others[0]);
    lock.execute(&mut *transaction).await.unwrap();
    let locked = tokio::spawn({
        let (store, tenant) = (slow.store.clone(), slow.others[0]);
        async move { try_admit(&store, tenant, "k", "hash").await }
    });
    slow.admit(&slow.others[1..]).join_all().await;
    assert!(!locked.is_finished(), "the others did not wait for it");
    admission.join_all().await;
    let error = locked.await.unwrap().expect_err("the tenant is locked");
    assert!(error.is_lock_timeout(), "{error}");
    transaction.rollback().await.unwrap();
    slow.admit(&slow.others[..1]).join_all().await;
}

/// Rows that another session has locked are given up early: requests of a locked tenant would slow down every batch.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_waits_for_a_lock_for_a_moment_only() {
    let world = World::new().await;
    let Admission::Admitted(admitted) =
        admit(&Store::connect(&world.config().database).unwrap(), world.tenant, "k", "hash").await
    else {
        panic!("not admitted")
    };
    let mut transaction = world.db.begin().await.unwrap();
    sqlx::query("select from tenants for update").execute(&mut *transaction).await.unwrap();
    sqlx::query("select from inventory_sync_runs for update").execute(&mut *transaction).await.unwrap();
    let run = json!([{ "tenant_id": world.tenant, "run_id": admitted.lease.run_id, "attempt": 1 }]);
    for statement in ["select inventory_admit_batch($1)", "select inventory_end_batch($1)"] {
        let waiting = sqlx::query(statement).bind(&run).execute(&world.db);
        let error = timeout(Duration::from_secs(30), waiting).await.expect(statement).unwrap_err();
        let code = error.as_database_error().and_then(|error| error.code().map(Cow::into_owned));
        assert_eq!(code.as_deref(), Some("55P03"), "{statement}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_end_does_not_affect_the_others() {
    let slow = Slow::new().await;
    let (slow_lease, admitted) = slow.admit_all().await;
    let bad = admitted[3];
    let rejecting = format!("alter table outbox add constraint good check (tenant_id <> '{}')", bad.tenant_id);
    slow.world.execute(&rejecting).await;
    let ending = slow.end_slow(slow_lease).await;
    for (lease, ended) in slow.end_each(admitted).await {
        assert_eq!(ended.is_err_and(|error| error.is_data_rejected()), lease == bad, "{lease:?}");
    }
    ending.await.unwrap().unwrap();
    let ended =
        "select count(*) from inventory_sync_runs r join outbox o on o.run_id = r.id where r.status <> 'running'";
    assert_eq!(slow.world.count(ended).await, OTHERS as i64, "the slow one and all others but one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_end_delays_no_other_end() {
    let slow = Slow::new().await;
    let (first, admitted) = slow.admit_all().await;
    let Admission::Admitted(second) = admit(&slow.store, slow.world.tenant, "second", "other").await else {
        panic!("not admitted")
    };
    let ending = slow.end_slow(first).await;
    slow.take(20).await;
    // In one batch, which is executed after that of the first.
    let slowest = tokio::spawn({
        let store = slow.store.clone();
        async move { end(&store, second.lease).await }
    });
    for (lease, ended) in slow.end_each(admitted).await {
        ended.unwrap_or_else(|error| panic!("{lease:?}: {error}"));
    }
    assert!(!slowest.is_finished(), "the others did not wait for it");
    ending.await.unwrap().unwrap();
    slowest.await.unwrap().unwrap();
}

/// The server does not limit the time of a commit.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_commit_delays_no_other_end() {
    let slow = Slow::new().await;
    let (slow_lease, admitted) = slow.admit_all().await;
    slow.world.execute("drop trigger linger on inventory_sync_runs").await;
    slow.trigger("constraint trigger linger after insert on outbox deferrable initially deferred").await;
    slow.take(20).await;
    let ending = slow.end_slow(slow_lease).await;
    for lease in admitted {
        end(&slow.store, lease).await.unwrap();
    }
    assert!(!ending.is_finished(), "the others did not wait for it");
    ending.await.unwrap().unwrap();
    assert_eq!(slow.world.count("select count(*) from outbox").await, OTHERS as i64 + 1);
}

/// Every decision but the admission of a new run is on disk when it returns, whatever is in its batch.
#[tokio::test(flavor = "multi_thread")]
async fn only_a_batch_of_new_runs_does_not_wait_for_the_disk() {
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
        let decided = "select string_agg(decision, ' ') from inventory_admit_batch($1)";
        let decided = sqlx::query_scalar::<_, String>(decided).bind(&requests);
        let decided = decided.fetch_one(&mut *transaction).await.unwrap();
        let setting = sqlx::query_scalar::<_, String>("select current_setting('synchronous_commit')");
        let setting = setting.fetch_one(&mut *transaction).await.unwrap();
        transaction.commit().await.unwrap();
        assert_eq!((&*decided, &*setting), (decisions, synchronous), "{requests}");
    }
}

/// A distributed database cannot execute them.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_without_batches_is_asked_once() {
    let world = World::new().await;
    world
        .execute(
            "create sequence asked;
             create or replace function inventory_admit_batch(in_requests jsonb)
                 returns table (decision text, error_code text, run_id uuid, attempt integer, credential text,
                                decided_at timestamptz, started_at timestamptz, throttle_wait_ms bigint)
                 language plpgsql as $$
             begin
                 perform nextval('asked');
                 raise exception 'cannot' using errcode = 'feature_not_supported';
             end $$",
        )
        .await;
    let store = Store::connect(&world.config().database).unwrap();
    for key in ["a", "b", "c"] {
        assert!(matches!(admit(&store, world.tenant, key, key).await, Admission::Admitted(_)));
    }
    assert_eq!(world.count("select last_value from asked where is_called").await, 1);
}
