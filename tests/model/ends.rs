//! How everything must end.

use crate::design::Design;
use crate::state::{State, Worker};

pub const EVERY_RUN_ENDS: &str = "every accepted request ends in a terminal run";
pub const EVERY_EVENT_IS_SENT: &str = "every terminal run's event is sent";
pub const ALL_COMES_TO_REST: &str = "no message and no worker goes on for ever";

/// An end by its name, and the states that have come to it.
pub type End = (&'static str, fn(&Design, &State) -> bool);

pub const ENDS: [End; 3] =
    [(EVERY_RUN_ENDS, every_run_has_ended), (EVERY_EVENT_IS_SENT, every_event_is_sent), (ALL_COMES_TO_REST, at_rest)];

/// A request of which only a fault has destroyed the message, before anything of it was committed, was never accepted.
fn never_accepted(state: &State, request: usize) -> bool {
    state.requests[request].run.is_none() && state.copies(request) == 0
}

fn every_run_has_ended(design: &Design, state: &State) -> bool {
    let ended = |request: usize| state.requests[request].run.is_some_and(|run| !run.running());
    (0..design.requests).all(|request| ended(request) || never_accepted(state, request))
}

fn every_event_is_sent(design: &Design, state: &State) -> bool {
    let sent = |request: usize| state.requests[request].outbox.sent && state.requests[request].outbox.stored;
    (0..design.requests).all(|request| sent(request) || never_accepted(state, request))
}

fn at_rest(design: &Design, state: &State) -> bool {
    // One that is stopped may never go on; it has nothing in hand that anyone waits for.
    let resting = |worker: &Worker| worker.is_idle() || worker.paused && !worker.in_hand;
    (0..design.requests).all(|request| state.copies(request) == 0) && state.workers.iter().all(resting)
}
