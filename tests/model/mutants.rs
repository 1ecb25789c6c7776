//! Each guard taken away, one at a time: the model has to notice, and what it notices says what the guard is for.

use std::collections::BTreeSet;

use crate::design::{Design, Fault, Guard};
use crate::ends::{EVERY_EVENT_IS_SENT, EVERY_RUN_ENDS};
use crate::graph::Graph;
use crate::properties::{
    ATTEMPTS_BOUNDED, EXPIRED_STAYS, NOTHING_FORGOTTEN, ONE_EVENT, ONE_RUN, ONE_WRITER, SENT_IS_STORED,
    STALE_ITEMS_REFUSED, TERMINAL_STAYS, TRUST_JUSTIFIED,
};
use crate::{ONE_REQUEST, TWO_REQUESTS};

/// One fault is enough for most.
const RUNS: Design = Design { relays: 0, faults: 1, ..ONE_REQUEST };
const EVENTS: Design = Design { relays: 1, ..RUNS };

/// Without `guard` exactly the promises of `expected` are broken.
fn breaks(design: Design, guard: Guard, expected: &[&str]) {
    let graph = Graph::of(design.without(guard));
    let broken = graph.broken();
    println!("without {guard:?}: {} states", graph.size());
    for (promise, way) in &broken {
        println!("  not kept: {promise}, after {way:?}");
    }
    let broken: BTreeSet<&str> = broken.into_keys().collect();
    assert_eq!(broken, expected.iter().copied().collect(), "without {guard:?}");
}

#[test]
fn items_without_a_fence() {
    breaks(RUNS, Guard::ItemFence, &[ONE_WRITER, STALE_ITEMS_REFUSED]);
}

#[test]
fn an_end_without_a_fence() {
    breaks(RUNS, Guard::EndFence, &[ONE_WRITER, TRUST_JUSTIFIED]);
}

#[test]
fn an_end_after_the_end() {
    breaks(RUNS, Guard::EndStatus, &[ONE_WRITER, TERMINAL_STAYS, ONE_EVENT]);
}

#[test]
fn a_renewal_without_a_fence() {
    breaks(RUNS, Guard::RenewalFence, &[ONE_WRITER, TRUST_JUSTIFIED]);
}

#[test]
fn a_renewal_that_takes_an_expired_lease_back() {
    breaks(RUNS, Guard::RenewalExpiry, &[EXPIRED_STAYS]);
}

#[test]
fn a_hand_back_without_a_fence() {
    let design = Design { faults: 2, kinds: &[Fault::Pause, Fault::Stop], ..RUNS };
    breaks(design, Guard::HandBackFence, &[ONE_WRITER, TRUST_JUSTIFIED]);
}

#[test]
fn a_take_over_that_is_no_new_attempt() {
    breaks(RUNS, Guard::NewAttempt, &[ONE_WRITER, STALE_ITEMS_REFUSED, TRUST_JUSTIFIED]);
}

#[test]
fn attempts_without_a_limit() {
    breaks(RUNS, Guard::AttemptLimit, &[ATTEMPTS_BOUNDED]);
}

#[test]
fn a_key_that_is_run_again() {
    breaks(RUNS, Guard::Deduplication, &[TERMINAL_STAYS, ONE_EVENT, NOTHING_FORGOTTEN]);
}

#[test]
fn a_selection_without_a_lock() {
    breaks(Design { workers: 1, ..TWO_REQUESTS }, Guard::SelectionLock, &[ONE_RUN]);
}

#[test]
fn an_ack_before_the_commit() {
    breaks(RUNS, Guard::CommitBeforeAck, &[NOTHING_FORGOTTEN]);
}

#[test]
fn an_ack_before_the_copy() {
    breaks(RUNS, Guard::ParkBeforeAck, &[NOTHING_FORGOTTEN]);
}

#[test]
fn an_event_outside_the_transaction() {
    breaks(EVENTS, Guard::EventInTransaction, &[ONE_EVENT, EVERY_EVENT_IS_SENT]);
}

#[test]
fn a_janitor_that_ends_a_live_lease() {
    breaks(RUNS, Guard::JanitorPatience, &[TRUST_JUSTIFIED]);
}

#[test]
fn no_janitor_and_a_lost_message() {
    breaks(EVENTS, Guard::Janitor, &[EVERY_RUN_ENDS, EVERY_EVENT_IS_SENT]);
}

#[test]
fn no_janitor_but_no_lost_message() {
    // The janitor is there for lost messages alone: whatever else happens, the redelivery ends the run.
    let kinds: &[Fault] = &[Fault::Crash, Fault::Pause, Fault::Stop, Fault::Cut, Fault::LostAnswer, Fault::StoreAway];
    breaks(Design { kinds, ..EVENTS }, Guard::Janitor, &[]);
}

#[test]
fn a_worker_without_a_deadline_of_its_own() {
    breaks(RUNS, Guard::OwnDeadline, &[TRUST_JUSTIFIED]);
}

#[test]
fn a_deadline_counted_from_the_answer() {
    breaks(RUNS, Guard::TrustFromAsking, &[TRUST_JUSTIFIED]);
}

#[test]
fn a_clock_that_stands_while_the_host_is_suspended() {
    // Then only the fence stands between a worker and the run that it has lost; it is enough for every row.
    breaks(RUNS, Guard::ClockRunsOn, &[TRUST_JUSTIFIED]);
}

#[test]
fn a_mark_before_the_confirm() {
    breaks(EVENTS, Guard::ConfirmBeforeMark, &[SENT_IS_STORED, EVERY_EVENT_IS_SENT]);
}

#[test]
fn a_claim_that_never_runs_out() {
    breaks(EVENTS, Guard::ClaimExpiry, &[EVERY_EVENT_IS_SENT]);
}
