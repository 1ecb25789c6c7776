//! Safety properties, and witnesses that the search reaches the states they are about.

use stateright::Property;

use crate::design::{Design, ExtraProperty, MAX_ATTEMPTS};
use crate::state::{Phase, Request, Run, State, Status, Violation};

pub const ONE_WRITER: &str = "only the current attempt writes to a running run";
pub const STALE_ITEMS_REFUSED: &str = "item writes of a stale attempt are rejected";
pub const ONE_RUN: &str = "a tenant and selection has at most one running run";
pub const TERMINAL_IS_FINAL: &str = "a terminal run never changes";
pub const ONE_EVENT: &str = "a terminal run has exactly one event, a running run none";
pub const NO_MESSAGE_LOST: &str = "a message is settled only once its run is terminal";
pub const ATTEMPTS_BOUNDED: &str = "attempts are bounded by the limit plus interruptions";
pub const DEADLINE_IS_SAFE: &str = "a worker before its local deadline holds a live lease";
pub const EXPIRED_STAYS_EXPIRED: &str = "an expired lease is not revived under the same attempt";
pub const DELETED_IS_STORED: &str = "an event deleted from the outbox is stored by the broker";
pub const EVENT_IS_STABLE: &str = "every repeat of an event has the same content";
pub const LOST_RUN_HAD_NO_ATTEMPTS: &str = "a run ends as lost only if it has no attempts left";
pub const LIMIT_HOLDS: &str = "live leases of a tenant stay within its limit";
pub const ONLY_FAULTS_COST_ATTEMPTS: &str = "lost attempts are bounded by the number of faults";

pub fn of(design: &Design) -> Vec<Property<Design>> {
    let mut all = vec![
        Property::always(ONE_WRITER, one_writer),
        Property::always(STALE_ITEMS_REFUSED, |_, state: &State| !state.violated(Violation::StaleItems)),
        Property::always(ONE_RUN, one_run),
        Property::always(TERMINAL_IS_FINAL, |_, state: &State| !state.violated(Violation::TerminalChanged)),
        Property::always(ONE_EVENT, one_event),
        Property::always(NO_MESSAGE_LOST, no_message_lost),
        Property::always(ATTEMPTS_BOUNDED, attempts_bounded),
        Property::always(DEADLINE_IS_SAFE, deadline_is_safe),
        Property::always(EXPIRED_STAYS_EXPIRED, |_, state: &State| !state.violated(Violation::Revived)),
        Property::always(DELETED_IS_STORED, deleted_is_stored),
        Property::always(EVENT_IS_STABLE, |_, state: &State| !state.violated(Violation::EventChanged)),
        Property::always(LOST_RUN_HAD_NO_ATTEMPTS, |_, state: &State| !state.violated(Violation::RestartableRunEnded)),
    ];
    match design.extra {
        Some(ExtraProperty::LimitHolds) => all.push(Property::always(LIMIT_HOLDS, limit_holds)),
        Some(ExtraProperty::OnlyFaultsCostAttempts) => {
            all.push(Property::always(ONLY_FAULTS_COST_ATTEMPTS, only_faults_cost_attempts));
        }
        None => {}
    }
    all
}

fn one_writer(_: &Design, state: &State) -> bool {
    let writes = [Violation::StaleItems, Violation::StaleEnd, Violation::StaleRenewal, Violation::StaleRelease];
    !writes.into_iter().any(|write| state.violated(write))
}

fn runs(state: &State) -> impl Iterator<Item = &Run> {
    state.requests.iter().filter_map(|request| request.run.as_ref())
}

fn one_run(design: &Design, state: &State) -> bool {
    !design.same_selection || runs(state).filter(|run| run.running()).count() <= 1
}

fn one_event(_: &Design, state: &State) -> bool {
    let fits = |request: &Request| {
        let terminal = request.run.is_some_and(|run| !run.running());
        request.outbox.rows == u8::from(terminal)
    };
    state.requests.iter().all(fits)
}

fn no_message_lost(design: &Design, state: &State) -> bool {
    (0..design.requests).all(|number| {
        let request = &state.requests[number];
        request.lost || request.run.is_some_and(|run| !run.running()) || state.copies(number) > 0
    })
}

fn attempts_bounded(_: &Design, state: &State) -> bool {
    runs(state).all(|run| run.attempt <= MAX_ATTEMPTS + run.interruptions)
}

fn deadline_is_safe(_: &Design, state: &State) -> bool {
    state.workers.iter().filter(|worker| !worker.paused).all(|worker| match worker.phase {
        Phase::Running { lease, deadline: 1.. } => {
            state.run(lease.request).is_some_and(|run| run.alive() && run.belongs_to(lease))
        }
        _ => true,
    })
}

fn deleted_is_stored(_: &Design, state: &State) -> bool {
    state.requests.iter().all(|request| !request.outbox.deleted || request.outbox.stored.is_some())
}

fn only_faults_cost_attempts(design: &Design, state: &State) -> bool {
    state.lost_attempts() <= design.faults - state.faults_left
}

fn limit_holds(design: &Design, state: &State) -> bool {
    runs(state).filter(|run| run.alive()).count() <= usize::from(design.tenant_limit)
}

/// State that a search must reach, so that its properties do not hold vacuously.
pub type Witness = (&'static str, fn(&State) -> bool);

pub const WITNESSES: &[Witness] = &[
    ("a run is taken over", |state| runs(state).any(|run| run.attempt > 1)),
    ("a worker runs after losing its lease", runs_without_a_lease),
    ("a copy waits in a retry tier", |state| state.requests.iter().any(|request| request.retrying != [0, 0])),
    ("a run finishes", |state| ended(state, Status::Finished)),
    ("a run exhausts its attempts", |state| ended(state, Status::AttemptsExhausted)),
    ("a request has two copies", |state| (0..2).any(|request| state.copies(request) == 2)),
    ("a batch outlives its lease", |state| runs(state).any(|run| run.batches > 0 && !run.alive())),
];

pub const WITNESSES_OF_TWO_REQUESTS: &[Witness] = &[
    ("a run is skipped", |state| ended(state, Status::Skipped)),
    ("a run is superseded", |state| ended(state, Status::Superseded)),
];

fn runs_without_a_lease(state: &State) -> bool {
    state.workers.iter().filter(|worker| !worker.paused).any(|worker| match worker.phase {
        Phase::Running { lease, .. } => !state.run(lease.request).is_some_and(|run| run.belongs_to(lease)),
        _ => false,
    })
}

fn ended(state: &State, status: Status) -> bool {
    runs(state).any(|run| run.status == status)
}
