//! Mutants: each removes one guard, and exactly the named properties must fail.

use std::collections::BTreeSet;

use crate::design::{Design, Fault, Guard};
use crate::extra_properties::{PROMPT, PROMPT_LINGERING};
use crate::liveness::{EVERY_EVENT_IS_PUBLISHED, EVERY_RUN_ENDS};
use crate::properties::{
    ATTEMPTS_BOUNDED, DEADLINE_IS_SAFE, DELETED_IS_STORED, EXPIRED_STAYS_EXPIRED, LOST_RUN_HAD_NO_ATTEMPTS,
    NO_MESSAGE_LOST, ONE_EVENT, ONE_RUN, ONE_WRITER, ONLY_FAULTS_COST_ATTEMPTS, STALE_ITEMS_REFUSED, TERMINAL_IS_FINAL,
};
use crate::state_graph::StateGraph;
use crate::{ONE_REQUEST, TWO_REQUESTS};

/// One fault is enough for most mutants.
const RUNS: Design = Design { relays: 0, faults: 1, ..ONE_REQUEST };
/// A slow worker loses its lease without any fault.
const WITHOUT_FAULTS: Design = Design { faults: 0, kinds: &[], ..RUNS };
const EVENTS: Design = Design { relays: 1, ..RUNS };

/// Asserts that without `guard` exactly the `expected` properties fail.
fn assert_breaks(design: Design, guard: Guard, expected: &[&str]) {
    let graph = StateGraph::build(design.without(guard));
    let broken = graph.failed_properties();
    println!("without {guard:?}: {} states", graph.size());
    for (property, path) in &broken {
        println!("  violated: {property}, after {path:?}");
    }
    let broken: BTreeSet<&str> = broken.into_keys().collect();
    assert_eq!(broken, expected.iter().copied().collect(), "without {guard:?}");
}

#[test]
fn item_writes_need_the_fence() {
    assert_breaks(RUNS, Guard::ItemFence, &[ONE_WRITER, STALE_ITEMS_REFUSED]);
}

#[test]
fn finishing_needs_the_fence() {
    // A stale worker then ends the run under a batch in flight of its successor.
    assert_breaks(RUNS, Guard::FinishFence, &[ONE_WRITER, STALE_ITEMS_REFUSED, DEADLINE_IS_SAFE]);
}

#[test]
fn finishing_needs_the_status_check() {
    assert_breaks(RUNS, Guard::FinishStatusCheck, &[ONE_WRITER, TERMINAL_IS_FINAL, ONE_EVENT]);
}

#[test]
fn renewal_needs_the_fence() {
    assert_breaks(RUNS, Guard::RenewalFence, &[ONE_WRITER, DEADLINE_IS_SAFE]);
}

#[test]
fn renewal_needs_the_expiry_check() {
    assert_breaks(RUNS, Guard::RenewalExpiryCheck, &[EXPIRED_STAYS_EXPIRED]);
}

#[test]
fn lease_release_needs_the_fence() {
    let design = Design { faults: 2, kinds: &[Fault::Pause, Fault::Shutdown], ..RUNS };
    assert_breaks(design, Guard::ReleaseFence, &[ONE_WRITER, DEADLINE_IS_SAFE]);
}

#[test]
fn take_over_needs_a_new_attempt() {
    assert_breaks(WITHOUT_FAULTS, Guard::AttemptIncrement, &[ONE_WRITER, STALE_ITEMS_REFUSED, DEADLINE_IS_SAFE]);
}

#[test]
fn attempts_need_a_limit() {
    assert_breaks(WITHOUT_FAULTS, Guard::AttemptLimit, &[ATTEMPTS_BOUNDED]);
}

#[test]
fn idempotency_key_needs_a_terminal_check() {
    assert_breaks(RUNS, Guard::IdempotencyKey, &[TERMINAL_IS_FINAL, ONE_EVENT, NO_MESSAGE_LOST]);
}

#[test]
fn selection_needs_a_lock() {
    assert_breaks(Design { workers: 1, ..TWO_REQUESTS }, Guard::SelectionLock, &[ONE_RUN]);
}

#[test]
fn ack_must_follow_the_commit() {
    assert_breaks(RUNS, Guard::CommitBeforeAck, &[NO_MESSAGE_LOST]);
}

#[test]
fn ack_must_follow_the_retry_copy() {
    assert_breaks(RUNS, Guard::RetryCopyBeforeAck, &[NO_MESSAGE_LOST]);
}

#[test]
fn event_must_be_in_the_transaction() {
    assert_breaks(EVENTS, Guard::EventInTransaction, &[ONE_EVENT, EVERY_EVENT_IS_PUBLISHED]);
}

#[test]
fn lost_messages_need_the_republished_request() {
    assert_breaks(EVENTS, Guard::Republish, &[EVERY_RUN_ENDS, EVERY_EVENT_IS_PUBLISHED]);
}

#[test]
fn other_faults_do_not_need_the_republished_request() {
    // After any fault but a lost message the redelivery restarts the run.
    let kinds: &[Fault] = &[
        Fault::Crash,
        Fault::Pause,
        Fault::Shutdown,
        Fault::ConnectionLost,
        Fault::LostResponse,
        Fault::DatabaseUnavailable,
        Fault::LingeringLock,
    ];
    assert_breaks(Design { kinds, ..EVENTS }, Guard::Republish, &[]);
}

#[test]
fn request_republished_too_early_is_harmless() {
    // A second copy finds the run in progress or ended; the delay only spares the queue.
    assert_breaks(RUNS, Guard::RepublishDelay, &[]);
}

#[test]
fn janitor_must_not_end_runs() {
    assert_breaks(RUNS, Guard::JanitorEndsNothing, &[LOST_RUN_HAD_NO_ATTEMPTS]);
}

#[test]
fn other_requests_must_not_end_a_restartable_run() {
    assert_breaks(Design { workers: 1, ..TWO_REQUESTS }, Guard::ContendedWhileRestartable, &[LOST_RUN_HAD_NO_ATTEMPTS]);
}

#[test]
fn take_over_must_wait_for_the_batch_in_flight() {
    assert_breaks(RUNS, Guard::TakeOverLock, &[ONE_WRITER, STALE_ITEMS_REFUSED]);
}

#[test]
fn fence_must_not_block_the_renewal() {
    assert_breaks(PROMPT, Guard::KeyShareFence, &[ONLY_FAULTS_COST_ATTEMPTS]);
}

#[test]
fn release_must_not_block_the_renewal_of_other_runs() {
    assert_breaks(PROMPT_LINGERING, Guard::SeparateReleaseConnection, &[ONLY_FAULTS_COST_ATTEMPTS]);
}

#[test]
fn worker_needs_a_local_deadline() {
    assert_breaks(RUNS, Guard::LocalDeadline, &[DEADLINE_IS_SAFE]);
}

#[test]
fn local_deadline_must_count_from_the_send_time() {
    assert_breaks(RUNS, Guard::DeadlineFromSendTime, &[DEADLINE_IS_SAFE]);
}

#[test]
fn local_clock_must_count_suspended_time() {
    // The fence alone then rejects the writes of a worker that lost its run.
    assert_breaks(RUNS, Guard::ClockCountsSuspend, &[DEADLINE_IS_SAFE]);
}

#[test]
fn deletion_must_follow_the_confirm() {
    assert_breaks(EVENTS, Guard::ConfirmBeforeDelete, &[DELETED_IS_STORED, EVERY_EVENT_IS_PUBLISHED]);
}

#[test]
fn unconfirmed_events_must_become_due_again() {
    assert_breaks(EVENTS, Guard::DueAgain, &[EVERY_EVENT_IS_PUBLISHED]);
}
