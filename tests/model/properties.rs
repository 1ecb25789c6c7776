//! What must hold, and what must be possible so that it holds of something.

use stateright::Property;

use crate::design::{Design, MAX_ATTEMPTS, Promise};
use crate::state::{Breach, Phase, Request, Run, State, Status};

pub const ONE_WRITER: &str = "whatever is written to a run comes from its current attempt while it runs";
pub const STALE_ITEMS_REFUSED: &str = "items of a stale attempt are refused";
pub const ONE_RUN: &str = "a tenant and selection has one running run";
pub const TERMINAL_STAYS: &str = "a terminal run never changes";
pub const ONE_EVENT: &str = "a run has exactly one event once it is terminal, none before";
pub const NOTHING_FORGOTTEN: &str = "a message is gone only when its run is terminal";
pub const ATTEMPTS_BOUNDED: &str = "attempts stay within the limit and the interruptions";
pub const TRUST_JUSTIFIED: &str = "an awake worker's trust in its lease is justified";
pub const EXPIRED_STAYS: &str = "an expired lease comes alive only as a new attempt";
pub const SENT_IS_STORED: &str = "an event marked as sent was stored by the broker";
pub const LIMIT_HOLDS: &str = "live leases of a tenant stay within its limit";
pub const HANDED_BACK_GOES_ON: &str = "a run that was handed back in order makes way for no other";
pub const WAITING_GOES_ON: &str = "the janitor ends no run whose message is ready in the queue";

pub fn of(design: &Design) -> Vec<Property<Design>> {
    let mut all = vec![
        Property::always(ONE_WRITER, one_writer),
        Property::always(STALE_ITEMS_REFUSED, |_, state: &State| !state.has(Breach::StaleItems)),
        Property::always(ONE_RUN, one_run),
        Property::always(TERMINAL_STAYS, |_, state: &State| !state.has(Breach::TerminalChanged)),
        Property::always(ONE_EVENT, one_event),
        Property::always(NOTHING_FORGOTTEN, nothing_forgotten),
        Property::always(ATTEMPTS_BOUNDED, attempts_bounded),
        Property::always(TRUST_JUSTIFIED, trust_justified),
        Property::always(EXPIRED_STAYS, |_, state: &State| !state.has(Breach::Revived)),
        Property::always(SENT_IS_STORED, sent_is_stored),
    ];
    match design.also {
        Some(Promise::LimitHolds) => all.push(Property::always(LIMIT_HOLDS, limit_holds)),
        Some(Promise::HandedBackRunGoesOn) => {
            all.push(Property::always(HANDED_BACK_GOES_ON, |_, state: &State| {
                !state.has(Breach::HandedBackRunDisplaced)
            }));
        }
        Some(Promise::WaitingRunGoesOn) => {
            all.push(Property::always(WAITING_GOES_ON, |_, state: &State| !state.has(Breach::WaitingRunEnded)));
        }
        None => {}
    }
    all
}

fn one_writer(_: &Design, state: &State) -> bool {
    let writes = [Breach::StaleItems, Breach::StaleEnd, Breach::StaleRenewal, Breach::StaleHandBack];
    !writes.into_iter().any(|write| state.has(write))
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

fn nothing_forgotten(design: &Design, state: &State) -> bool {
    (0..design.requests).all(|number| {
        let request = &state.requests[number];
        request.lost || request.run.is_some_and(|run| !run.running()) || state.copies(number) > 0
    })
}

fn attempts_bounded(_: &Design, state: &State) -> bool {
    runs(state).all(|run| run.attempt <= MAX_ATTEMPTS + run.interruptions)
}

fn trust_justified(_: &Design, state: &State) -> bool {
    state.workers.iter().filter(|worker| !worker.paused).all(|worker| match worker.phase {
        Phase::Working { lease, trust: 1.. } => {
            state.run(lease.request).is_some_and(|run| run.alive() && run.belongs_to(lease))
        }
        _ => true,
    })
}

fn sent_is_stored(_: &Design, state: &State) -> bool {
    state.requests.iter().all(|request| !request.outbox.sent || request.outbox.stored)
}

fn limit_holds(design: &Design, state: &State) -> bool {
    runs(state).filter(|run| run.alive()).count() <= usize::from(design.tenant_limit)
}

/// What a search has to come past, or it proves nothing of it.
pub type Sight = (&'static str, fn(&State) -> bool);

pub const SIGHTS: &[Sight] = &[
    ("a run is taken over", |state| runs(state).any(|run| run.attempt > 1)),
    ("a worker outlives its lease", outlives_its_lease),
    ("a copy waits on the ladder", |state| state.requests.iter().any(|request| request.parked != [0, 0])),
    ("a run is done", |state| ended(state, Status::Done)),
    ("a run is given up", |state| ended(state, Status::GivenUp)),
    ("the janitor ends a run", |state| ended(state, Status::Abandoned)),
];

pub const SIGHTS_OF_TWO: &[Sight] = &[
    ("a run is skipped", |state| ended(state, Status::Skipped)),
    ("a run makes way for another", |state| ended(state, Status::Displaced)),
];

fn outlives_its_lease(state: &State) -> bool {
    state.workers.iter().filter(|worker| !worker.paused).any(|worker| match worker.phase {
        Phase::Working { lease, .. } => !state.run(lease.request).is_some_and(|run| run.belongs_to(lease)),
        _ => false,
    })
}

fn ended(state: &State, status: Status) -> bool {
    runs(state).any(|run| run.status == status)
}
