//! Holding the daemon at a step of its recipe: the database itself waits there, so that the daemon can be killed, frozen
//! or cut off exactly then, without a line of test code in it.

use super::eventually;
use super::world::World;

/// The steps at which a worker can be held, in the order of the recipe.
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
    Step { name: "writing the event", table: "outbox_events", when: "insert", condition: "" },
    Step {
        name: "claiming the event",
        table: "outbox_events",
        when: "update",
        condition: "when (new.sent_at is null)",
    },
    Step {
        name: "marking the event",
        table: "outbox_events",
        when: "update",
        condition: "when (new.sent_at is not null)",
    },
];

/// The step whose transaction is the end of a run.
pub const WRITING_THE_EVENT: &Step = &STEPS[4];

/// A statement of the recipe.
#[derive(Debug)]
pub struct Step {
    /// What the worker is about to do.
    pub name: &'static str,
    table: &'static str,
    when: &'static str,
    condition: &'static str,
}

/// Makes the database wait at `step`, once, for `seconds` at most or until its session is ended.
pub async fn hold_at(world: &World, step: &Step, seconds: f64) {
    let Step { table, when, condition, .. } = step;
    let trigger = format!("create trigger hold before {when} on {table} for each row {condition}");
    hold(world, &trigger, seconds).await;
}

/// The same, in the commit of `step`: what it wrote is there afterwards, whether or not the worker hears of it.
pub async fn hold_in_the_commit_of(world: &World, step: &Step, seconds: f64) {
    let Step { table, when, condition, .. } = step;
    let trigger = format!(
        "create constraint trigger hold after {when} on {table} deferrable initially deferred for each row {condition}"
    );
    hold(world, &trigger, seconds).await;
}

async fn hold(world: &World, trigger: &str, seconds: f64) {
    world
        .execute(&format!(
            "create sequence hold_once;
             create function hold() returns trigger language plpgsql as $$ begin
               if nextval('hold_once') = 1 then perform pg_sleep({seconds}); end if; return new; end $$;
             {trigger} execute function hold();",
        ))
        .await;
}

async fn sleepers(world: &World) -> i64 {
    world
        .count("select count(*) from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'")
        .await
}

/// Waits until a worker is held.
pub async fn held(world: &World) {
    eventually("a worker is held", || async { (sleepers(world).await > 0).then_some(()) }).await;
}

/// Waits until what was held is over, and whatever it was held in with it.
pub async fn let_go(world: &World) {
    let open = "select count(*) from pg_stat_activity
                 where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'";
    eventually("nothing is under way in the database", || async { (world.count(open).await == 0).then_some(()) }).await;
}
