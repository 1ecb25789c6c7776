//! Properties with a configuration of their own: two that hold, and one that does not, with its shortest counterexample.

use crate::TWO_REQUESTS;
use crate::design::{Design, ExtraProperty, Fault};
use crate::properties::QUEUED_RUN_CONTINUES;
use crate::state_graph::{Failures, StateGraph};

const ONE_WORKER: Design = Design { workers: 1, kinds: &[Fault::Crash, Fault::Shutdown], ..TWO_REQUESTS };

fn broken(design: Design) -> Failures {
    let broken = StateGraph::build(design).failed_properties();
    for (property, path) in &broken {
        println!("violated: {property}, after {path:?}");
    }
    broken
}

/// A take-over does not check the limit again, so a run whose lease has expired must keep counting. Otherwise another
/// request takes its slot and the take-over exceeds `limits.tenant_max_runs`.
#[test]
fn take_over_does_not_exceed_the_tenant_limit() {
    let design = Design { same_selection: false, tenant_limit: 1, ..ONE_WORKER }.requiring(ExtraProperty::LimitHolds);
    assert!(broken(design).is_empty());
}

/// A released run must differ from one whose worker was lost: otherwise a request of the same selection that arrives
/// before its redelivery ends it as `worker_lost`.
#[test]
fn orderly_stop_ends_no_run() {
    assert!(broken(ONE_WORKER.requiring(ExtraProperty::ReleasedRunContinues)).is_empty());
}

/// `run.abandoned_after_s` outlasts the retry tiers, but not a backlog in which the message waits for longer.
#[test]
fn message_delayed_by_a_backlog_finds_its_run_ended() {
    let design = Design { requests: 1, ..ONE_WORKER }.requiring(ExtraProperty::QueuedRunContinues);
    assert_eq!(broken(design).into_keys().collect::<Vec<_>>(), [QUEUED_RUN_CONTINUES]);
}
