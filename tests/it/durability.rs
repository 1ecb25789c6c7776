//! Commits that a crash of the server may undo, and those that it must not.

use serde_json::json;
use sqlx::{Connection as _, PgConnection};
use tokio::task::spawn_blocking;

use inventoryd::store::{Admission, Store};

use crate::admission::slow;
use crate::faults_database::admit;
use crate::sim::SimConfig;
use crate::support::daemon::Replica;
use crate::support::eventually;
use crate::support::servers::{self, Private};
use crate::support::world::World;

/// A private server and a world on it.
async fn private_world(name: &'static str) -> (Private, World) {
    let database = Private::start("postgres", name).await;
    delay_log_writer(&database).await;
    let rabbitmq = spawn_blocking(|| servers::rabbitmq().url.clone()).await.unwrap();
    let world = World::on(SimConfig::default(), &database.url, &rabbitmq).await;
    (database, world)
}

/// Lets a commit that does not wait stay in memory for ten seconds, unless another commit writes it. Holds until the server stops.
async fn delay_log_writer(database: &Private) {
    let connect = || async { PgConnection::connect(&database.url).await.ok() };
    let mut admin = eventually("the database is there", connect).await;
    sqlx::raw_sql("alter system set wal_writer_delay = '10s'").execute(&mut admin).await.unwrap();
    sqlx::raw_sql("select pg_reload_conf()").execute(&mut admin).await.unwrap();
    admin.close().await.unwrap();
}

async fn crash(database: &Private) {
    database.act(|server| server.command("kill")).await;
    database.act(|server| server.start_again()).await;
    delay_log_writer(database).await;
}

/// An admission does not wait for the disk: a crash of the server may undo it. Its worker, which is reading lists, leaves the run,
/// and the request is admitted again.
#[tokio::test(flavor = "multi_thread")]
async fn an_admission_that_a_crash_undoes_is_made_again() {
    let (database, world) = private_world("durability-admission").await;
    let events = world.subscribe().await;
    let _replica = Replica::start(&world).await;
    let mut undone = 0;
    // A heartbeat may write the admission to the disk: then nothing is undone.
    for number in 0..20 {
        let key = format!("k{number}");
        world.sim.add_rule(slow(5_000));
        world.publish(&world.request(&key, &["mobileApp"])).await;
        let admitted = eventually("the run begins", || async { world.runs(&key).await.pop() }).await;
        crash(&database).await;
        world.sim.remove_rules(None);
        let run = world.ended(&key).await;
        assert_eq!((&run["status"], &run["attempt"]), (&json!("success"), &json!(1)), "{run}");
        events.event_of(&run).await;
        undone += usize::from(run["id"] != admitted["id"]);
        if undone == 2 {
            break;
        }
    }
    assert_eq!(undone, 2, "admissions were undone");
    assert_eq!(world.depth("inventory.dead").await, 0);
}

/// A message is acknowledged or dead-lettered because of what its admission found: that must not be undone. Nor may a take-over,
/// whose attempt is the fencing token of a worker that is still at work.
#[tokio::test(flavor = "multi_thread")]
async fn only_the_admission_of_a_new_run_can_be_undone() {
    let (database, world) = private_world("durability-decisions").await;
    // Connections do not survive the crashes.
    let connect = || Store::connect(&world.config().database).unwrap();
    let (tenant, attempts) = (world.tenant, "select idempotency_key, attempt from inventory_sync_runs order by 1");
    let found = async || -> serde_json::Value {
        let rows = eventually("the database is back", || async { sqlx::query("select").execute(&world.db).await.ok() });
        rows.await;
        world.rows(attempts).await.into()
    };

    assert!(matches!(admit(&connect(), tenant, "undone", "first").await, Admission::Admitted(_)));
    crash(&database).await;
    assert_eq!(found().await, json!([]), "nothing rests on it");

    let store = connect();
    // Twice: the first one also writes the marks of pages that were read, which take the log writer along.
    for _ in 0..2 {
        let Admission::Admitted(taken) = admit(&store, tenant, "taken", "second").await else { panic!("refused") };
        store.hand_back_lease(&taken.lease).await.unwrap();
    }
    assert!(matches!(admit(&store, tenant, "taken", "second").await, Admission::Admitted(_)));
    crash(&database).await;
    assert_eq!(found().await, json!([{ "idempotency_key": "taken", "attempt": 3 }]), "the token is not given twice");

    let store = connect();
    assert!(matches!(admit(&store, tenant, "contested", "third").await, Admission::Admitted(_)));
    assert!(matches!(admit(&store, tenant, "contested", "other").await, Admission::IdempotencyConflict));
    crash(&database).await;
    let rest = json!([{ "idempotency_key": "contested", "attempt": 1 }, { "idempotency_key": "taken", "attempt": 3 }]);
    assert_eq!(found().await, rest, "the conflict rests on it");
}
