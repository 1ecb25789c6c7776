//! Holding the daemon at a step of its recipe: the database itself waits there, so that the daemon can be killed, frozen
//! or cut off exactly then, without a line of test code in it.

use super::eventually;
use super::world::World;

/// The steps at which a worker can be held, in the order of the recipe.
pub const STEPS: &[Step] = &[
    Step { name: "admitting", table: "inventory_sync_runs", when: "before insert", condition: "" },
    Step { name: "writing items", table: "inventory_items", when: "before insert", condition: "" },
    Step { name: "finishing a type", table: "inventory_sync_run_types", when: "before insert", condition: "" },
    Step {
        name: "ending the run",
        table: "inventory_sync_runs",
        when: "before update",
        condition: "when (new.finished_at is not null)",
    },
    Step { name: "writing the event", table: "outbox_events", when: "before insert", condition: "" },
    Step {
        name: "claiming the event",
        table: "outbox_events",
        when: "before update",
        condition: "when (new.sent_at is null)",
    },
    Step {
        name: "marking the event",
        table: "outbox_events",
        when: "before update",
        condition: "when (new.sent_at is not null)",
    },
];

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
    world
        .execute(&format!(
            "create sequence hold_once;
         create function hold() returns trigger language plpgsql as $$ begin
           if nextval('hold_once') = 1 then perform pg_sleep({seconds}); end if; return new; end $$;
         create trigger hold {when} on {table} for each row {condition} execute function hold();",
        ))
        .await;
}

/// Waits until a worker is held.
pub async fn held(world: &World) {
    eventually("a worker is held", || async {
        let sleeping =
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'";
        (world.count(sleeping).await > 0).then_some(())
    })
    .await;
}
