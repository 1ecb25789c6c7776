//! Pauses inside the daemon's own transactions: a trigger sleeps in the database, so that a test can kill, freeze or cut
//! off a worker at an exact step, without test code in the daemon.

use super::eventually;
use super::world::World;

/// Steps of a run at which a worker can be paused, in the order in which a run takes them.
pub const STEPS: &[Step] = &[
    Step { name: "admitting", table: "inventory_sync_runs", when: "insert", condition: "" },
    Step { name: "writing items", table: "inventory_items", when: "insert", condition: "" },
    Step { name: "finishing a type", table: "inventory_sync_run_types", when: "insert", condition: "" },
    Step {
        name: "ending the run",
        table: "inventory_sync_runs",
        when: "update",
        condition: "when (new.finished_at is not null)",
    },
    Step { name: "enqueuing the event", table: "outbox", when: "insert", condition: "" },
    Step { name: "removing the event", table: "outbox", when: "delete", condition: "" },
];

/// Step whose transaction ends the run.
pub const ENQUEUING_THE_EVENT: &Step = &STEPS[4];

/// One statement of a run, named by the table and the operation that a trigger can catch.
#[derive(Debug)]
pub struct Step {
    /// Name for failure messages.
    pub name: &'static str,
    table: &'static str,
    when: &'static str,
    condition: &'static str,
}

/// Pauses the first statement of `step` for at most `seconds`, or until its session is terminated.
pub async fn at_step(world: &World, step: &Step, seconds: f64) {
    let Step { table, when, condition, .. } = step;
    let trigger = format!("create trigger pause before {when} on {table} for each row {condition}");
    create(world, &trigger, seconds).await;
}

/// Pauses the first commit that contains `step`: its writes become visible afterwards, whether or not the worker still
/// receives the reply.
pub async fn in_commit_of(world: &World, step: &Step, seconds: f64) {
    let Step { table, when, condition, .. } = step;
    let trigger = format!(
        "create constraint trigger pause after {when} on {table} deferrable initially deferred for each row {condition}"
    );
    create(world, &trigger, seconds).await;
}

async fn create(world: &World, trigger: &str, seconds: f64) {
    world.execute("create sequence pause_once").await;
    if world.is_distributed() {
        // Each node counts for itself; the rows of a tenant lie on one.
        world.execute("select run_command_on_workers('create sequence pause_once')").await;
    }
    world
        .execute(&format!(
            "create function pause() returns trigger language plpgsql as $$ begin
               if nextval('pause_once') = 1 then perform pg_sleep({seconds}); end if; return coalesce(new, old); end $$"
        ))
        .await;
    // Alone: Citus sends the whole text that it got to the nodes.
    world.execute(&format!("{trigger} execute function pause()")).await;
}

async fn sleepers(world: &World) -> i64 {
    let asleep = "select count(*) from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'";
    world.count_on_nodes(asleep).await
}

/// Waits until a worker has reached the paused step.
pub async fn until_paused(world: &World) {
    eventually("a worker is paused", || async { (sleepers(world).await > 0).then_some(()) }).await;
}

/// Waits until no transaction is open, the paused one included.
pub async fn until_idle(world: &World) {
    let open = "select count(*) from pg_stat_activity
                 where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'
                   and query not like '%run_command_on_all_nodes%'";
    eventually("no transaction is open", || async { (world.count_on_nodes(open).await == 0).then_some(()) }).await;
}
