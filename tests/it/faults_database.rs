//! Database faults: restarts, read-only mode, a full disk, an exhausted pool.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::json;
use sqlx::Connection as _;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use inventoryd::config::WhenFull;
use inventoryd::domain::request::SyncRequest;
use inventoryd::store::{Admission, AdmissionRequest, AdmissionRules, Store, StoreError};

use crate::sim::{Rule, SimConfig};
use crate::support::daemon::Replica;
use crate::support::events::Subscriber;
use crate::support::scheduler::requests;
use crate::support::servers::{self, Private, Server};
use crate::support::world::World;
use crate::support::{eventually, invariants, within};

/// Admissions that are cancelled at varying points.
const CANCELLED: usize = 600;

fn slow(delay_ms: u64) -> Rule {
    serde_json::from_value(json!({ "action": { "kind": "slow", "delay_ms": delay_ms } })).unwrap()
}

async fn world_on(database: &Server) -> World {
    let rabbitmq = spawn_blocking(|| servers::rabbitmq().url.clone()).await.unwrap();
    let world = World::on(SimConfig::default(), &database.url, &rabbitmq).await;
    invariants::record_history(&world).await;
    world
}

async fn ended_at_least(world: &World, count: i64) {
    let ended = "select count(*) from inventory_sync_runs where finished_at is not null";
    within(Duration::from_secs(90), "runs end", || async { (world.count(ended).await >= count).then_some(()) }).await;
}

async fn assert_no_dead_letter(world: &World) {
    assert_eq!(world.depth("inventory.dead").await, 0, "an outage dead-letters nothing");
}

async fn assert_no_worker_lost(world: &World) {
    let lost = "select count(*) from inventory_sync_runs where attempt - interruptions <> 1";
    assert_eq!(world.count(lost).await, 0, "an outage costs no attempt");
}

/// Restarts the database while two replicas work on forty requests.
async fn database_restarts(name: &'static str, verb: &'static str) {
    let database = Private::start("postgres", name).await;
    let world = world_on(&database).await;
    world.sim.add_rule(slow(100));
    let events = world.subscribe().await;
    let _fleet = (Replica::start(&world).await, Replica::start(&world).await);
    let (keys, requests) = requests(&world, "k", 40, &["mobileApp", "deviceShellScript"]).await;
    for request in &requests {
        world.publish(request).await;
    }
    ended_at_least(&world, 5).await;
    database.act(move |server| server.command(verb)).await;
    database.act(|server| server.start_again()).await;
    ended_at_least(&world, 40).await;
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    assert_no_dead_letter(&world).await;
    assert_no_worker_lost(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn database_stopped_and_restarted_under_load() {
    database_restarts("faults-stopped", "stop").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn database_killed_and_restarted_under_load() {
    database_restarts("faults-pg-killed", "kill").await;
}

async fn read_only(database: &Server, yes: bool) {
    let mut admin = sqlx::PgConnection::connect(&database.url).await.unwrap();
    for statement in [
        "set default_transaction_read_only = off",
        if yes {
            "alter system set default_transaction_read_only = on"
        } else {
            "alter system reset default_transaction_read_only"
        },
        "select pg_reload_conf()",
    ] {
        sqlx::raw_sql(statement).execute(&mut admin).await.unwrap();
    }
    eventually("new transactions use the setting", || async {
        let mut other = sqlx::PgConnection::connect(&database.url).await.unwrap();
        let shown: String =
            sqlx::query_scalar("show default_transaction_read_only").fetch_one(&mut other).await.unwrap();
        (shown == if yes { "on" } else { "off" }).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_database_pauses_consumption() {
    let database = Private::start("postgres", "faults-read-only").await;
    let world = world_on(&database).await;
    world.sim.add_rule(slow(100));
    let events = world.subscribe().await;
    let replica = Replica::start(&world).await;
    let (keys, requests) = requests(&world, "k", 30, &["mobileApp"]).await;
    for request in &requests[..20] {
        world.publish(request).await;
    }
    ended_at_least(&world, 5).await;
    read_only(&database, true).await;
    let health = replica.daemon().health();
    eventually("consumption stops", || async { (!health.subscribed()).then_some(()) }).await;
    assert_eq!(health.paused(), Some("database_unavailable"));
    for request in &requests[20..] {
        world.publish(request).await;
    }
    read_only(&database, false).await;
    ended_at_least(&world, 30).await;
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    assert_no_dead_letter(&world).await;
    assert_no_worker_lost(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pool_of_one_connection_serves_eight_runs_and_their_leases() {
    let world = World::new().await;
    invariants::record_history(&world).await;
    world
        .execute(
            "create table renewals (id uuid);
         create function note_renewal() returns trigger language plpgsql as $$ begin
           insert into renewals values (new.id); return null; end $$;
         create trigger note_renewal after update of lease_expires_at on inventory_sync_runs for each row
           when (new.attempt = old.attempt) execute function note_renewal();",
        )
        .await;
    world.sim.set_size(None, None, 60).unwrap();
    world.sim.add_rule(slow(700));
    let mut config = world.config();
    config.database.max_connections = 1;
    config.database.control_connections = 1;
    config.consumer.prefetch = 8;
    config.run.lease_s = 15;
    config.run.batch_rows = 10;
    let _replica = Replica::with(config).await;
    let events = world.subscribe().await;
    let types = ["mobileApp", "deviceShellScript", "deviceHealthScript", "deviceCompliancePolicy"];
    let (keys, requests) = requests(&world, "k", 24, &types).await;
    for request in &requests {
        world.publish(request).await;
    }
    ended_at_least(&world, 24).await;
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    assert_eq!(world.count("select count(*) from inventory_sync_runs where attempt > 1").await, 0, "no lease was lost");
    assert!(world.count("select count(*) from renewals").await > 0, "leases were renewed during the work");
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_are_renewed_between_statements_that_lock_their_rows() {
    let world = World::new().await;
    world.sim.add_rule(slow(14_000));
    let mut config = world.config();
    config.run.lease_s = 6;
    let _replica = Replica::with(config).await;
    world.publish(&world.request("run", &["mobileApp"])).await;
    eventually("the run starts", || async { world.runs("run").await.pop() }).await;
    // Imitates the statements of a large run, with little time between them.
    let locking = async {
        loop {
            let mut held = world.db.begin().await.unwrap();
            sqlx::query("select from inventory_sync_runs for share").execute(&mut *held).await.unwrap();
            sleep(Duration::from_millis(800)).await;
            held.rollback().await.unwrap();
            sleep(Duration::from_millis(300)).await;
        }
    };
    let run = tokio::select! {
        run = world.ended("run") => run,
        () = locking => unreachable!("the lock loop never ends"),
    };
    assert_eq!((&run["status"], &run["attempt"]), (&json!("success"), &json!(1)), "no lease was lost: {run}");
}

#[tokio::test(flavor = "multi_thread")]
async fn full_disk_delays_requests_and_dead_letters_none() {
    let world = World::new().await;
    invariants::record_history(&world).await;
    world
        .execute(
            "create function full_disk() returns trigger language plpgsql as $$ begin
               raise exception 'could not extend file' using errcode = 'disk_full'; end $$;
             create trigger full_disk before insert on inventory_sync_runs for each row execute function full_disk();",
        )
        .await;
    let mut config = world.config();
    config.consumer.broker_timeout_s = config.run.deadline_s + 6;
    let replica = Replica::with(config).await;
    let events = world.subscribe().await;
    let (keys, requests) = requests(&world, "k", 4, &["mobileApp"]).await;
    for request in &requests {
        world.publish(request).await;
    }
    let health = replica.daemon().health();
    let failure = eventually("the health names the cause", || async { health.run_failure() }).await;
    assert_eq!(failure, "database: could not extend file; free the disk of the database");
    eventually("the requests wait on a retry tier", || async {
        (world.depth("inventory.retry.5s").await > 0).then_some(())
    })
    .await;
    world.execute("drop trigger full_disk on inventory_sync_runs").await;
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    assert_no_dead_letter(&world).await;
    eventually("the health forgets it", || async { health.run_failure().is_none().then_some(()) }).await;
}

fn rules() -> AdmissionRules {
    AdmissionRules {
        owner: "me".to_owned(),
        lease_s: 600,
        max_attempts: 5,
        tenant_max_runs: 1_000_000,
        fleet_max_runs: 1_000_000,
        when_full: WhenFull::Skip,
        defer_max_s: 0,
        event_due_s: 0,
    }
}

/// Admits a request under rules that refuse none.
pub(crate) async fn admit(store: &Store, tenant: Uuid, key: &str, selection_hash: &str) -> Admission {
    try_admit(store, tenant, key, selection_hash).await.expect("the database responds")
}

pub(crate) async fn try_admit(
    store: &Store,
    tenant: Uuid,
    key: &str,
    selection_hash: &str,
) -> Result<Admission, StoreError> {
    let request = World::request_of(tenant, key, &["mobileApp"]);
    let request = SyncRequest::parse(None, request.to_string().as_bytes()).unwrap();
    let applicant = AdmissionRequest { request: &request, selection_hash, traceparent: None, deferred_s: 0 };
    store.admit(&rules(), &applicant).await
}

/// sqlx 0.9.0 returns a connection with an open transaction to the pool when `begin` is cancelled half way; later writes on
/// it would be lost, or hold their locks for ever.
#[tokio::test(flavor = "multi_thread")]
async fn cancelled_transaction_leaves_no_open_transaction() {
    let world = World::new().await;
    let mut config = world.config();
    config.database.max_connections = 4;
    let store = Store::connect(&config.database).unwrap();
    for number in 0..20 {
        let key = format!("warm-{number}");
        admit(&store, world.tenant, &key, &key).await;
    }
    let begun = Instant::now();
    for number in 0..20 {
        let key = format!("measure-{number}");
        admit(&store, world.tenant, &key, &key).await;
    }
    let one = begun.elapsed() / 20;
    let tenants: Vec<Uuid> = (0..4).map(|_| Uuid::new_v4()).collect();
    for tenant in &tenants {
        world.register(*tenant, None).await;
    }
    let open =
        "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'inventoryd'
                and state like 'idle in transaction%'";
    let mut done: Vec<String> = Vec::new();
    // The number of cancelled admissions per round depends on the machine: rounds repeat until there are enough.
    let mut started = 0;
    while started - done.len() < CANCELLED {
        let mut storm = JoinSet::new();
        for (number, tenant) in tenants.iter().copied().enumerate() {
            let (store, key) = (store.clone(), format!("storm-{started}-{number}"));
            let limit = one.mul_f64(rand::random());
            storm.spawn(async move { timeout(limit, admit(&store, tenant, &key, &key)).await.is_ok().then_some(key) });
        }
        started += storm.len();
        while let Some(key) = storm.join_next().await {
            done.extend(key.unwrap());
        }
        // Checked before the connections are used again, which would hide an open transaction.
        within(Duration::from_secs(30), "no transaction is left open", || async {
            (world.count(open).await == 0).then_some(())
        })
        .await;
    }
    // Another connection must see every admission that was reported as done.
    let committed = world.rows("select idempotency_key from inventory_sync_runs").await;
    let committed: BTreeSet<&str> = committed.iter().filter_map(|row| row["idempotency_key"].as_str()).collect();
    let lost: Vec<&String> = done.iter().filter(|key| !committed.contains(key.as_str())).collect();
    assert!(lost.is_empty(), "{} of {} writes were lost: {lost:?}", lost.len(), done.len());
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn flapping_database_delays_runs_and_loses_none() {
    let database = Private::start("postgres", "faults-flaps").await;
    let world = world_on(&database).await;
    let events: Subscriber = world.subscribe().await;
    let _replica = Replica::start(&world).await;
    let (keys, requests) = requests(&world, "k", 40, &["mobileApp"]).await;
    for (number, request) in requests.iter().enumerate() {
        world.publish(request).await;
        if number % 10 == 9 {
            let end =
                "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = 'inventoryd'";
            for _ in 0..10 {
                world.count(end).await;
                sleep(Duration::from_millis(30)).await;
            }
        }
    }
    ended_at_least(&world, 40).await;
    invariants::assert_all_succeeded(&world, &keys, &events).await;
    assert_no_dead_letter(&world).await;
    assert_no_worker_lost(&world).await;
}
