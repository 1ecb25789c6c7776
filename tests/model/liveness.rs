//! Liveness goals: states that must stay reachable from every state.

use crate::design::Design;
use crate::state::{State, Worker};

pub const EVERY_RUN_ENDS: &str = "every accepted request reaches a terminal run";
pub const EVERY_EVENT_IS_PUBLISHED: &str = "the event of every terminal run is published";
pub const SYSTEM_QUIESCES: &str = "all messages are settled and all workers become idle";

/// Name of a goal, and the predicate of the states that satisfy it.
pub type LivenessGoal = (&'static str, fn(&Design, &State) -> bool);

pub const LIVENESS: [LivenessGoal; 3] = [
    (EVERY_RUN_ENDS, every_run_has_ended),
    (EVERY_EVENT_IS_PUBLISHED, every_event_is_sent),
    (SYSTEM_QUIESCES, system_quiescent),
];

/// True for a request whose message was lost before anything was committed: it was never accepted.
fn never_accepted(state: &State, request: usize) -> bool {
    state.requests[request].run.is_none() && state.copies(request) == 0
}

fn every_run_has_ended(design: &Design, state: &State) -> bool {
    let ended = |request: usize| state.requests[request].run.is_some_and(|run| !run.running());
    (0..design.requests).all(|request| ended(request) || never_accepted(state, request))
}

fn every_event_is_sent(design: &Design, state: &State) -> bool {
    let sent = |request: usize| {
        let outbox = &state.requests[request].outbox;
        outbox.deleted && outbox.stored.is_some()
    };
    (0..design.requests).all(|request| sent(request) || never_accepted(state, request))
}

fn system_quiescent(design: &Design, state: &State) -> bool {
    // A suspended process may never resume; without a delivery nothing waits for it.
    let quiescent = |worker: &Worker| worker.is_idle() || worker.paused && !worker.in_flight;
    (0..design.requests).all(|request| state.copies(request) == 0) && state.workers.iter().all(quiescent)
}
