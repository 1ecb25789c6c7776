//! Properties that need a configuration of their own.

use crate::design::{Clock, Design, ExtraProperty, Fault};
use crate::state_graph::{Failures, StateGraph};
use crate::{ONE_REQUEST, TWO_REQUESTS};

/// Healthy host, slow database: renewals are sent and answered at once, batches take any time and overlap.
pub const PROMPT: Design = Design {
    prompt: true,
    relays: 0,
    faults: 0,
    kinds: &[],
    extra: Some(ExtraProperty::OnlyFaultsCostAttempts),
    ..ONE_REQUEST
};

/// Two runs of different selections, and one dead session that keeps the row of a run locked.
pub const PROMPT_LINGERING: Design =
    Design { requests: 2, workers: 1, same_selection: false, faults: 1, kinds: &[Fault::LingeringLock], ..PROMPT };

fn failures(design: Design) -> Failures {
    let graph = StateGraph::build(design);
    println!("{} states", graph.size());
    let failures = graph.failed_properties();
    for (property, path) in &failures {
        println!("violated: {property}, after {path:?}");
    }
    failures
}

/// A take-over does not check the limit again, so a run whose lease has expired must keep counting. Otherwise another
/// request takes its slot and the take-over exceeds `limits.tenant_max_runs`.
#[test]
fn take_over_does_not_exceed_the_tenant_limit() {
    let kinds = &[Fault::Crash, Fault::Shutdown];
    let design = Design { workers: 1, same_selection: false, tenant_limit: 1, kinds, ..TWO_REQUESTS };
    assert!(failures(design.requiring(ExtraProperty::LimitHolds)).is_empty());
}

#[test]
fn slow_batches_cost_no_attempt() {
    assert!(failures(PROMPT).is_empty());
}

#[test]
fn lingering_lock_costs_at_most_the_attempt_of_its_own_run() {
    assert!(failures(PROMPT_LINGERING).is_empty());
}

#[test]
fn each_fault_costs_at_most_one_attempt() {
    assert!(failures(Design { faults: 1, kinds: Fault::ALL, ..PROMPT }).is_empty());
    assert!(failures(Design { faults: 2, kinds: Fault::ALL, clock: Clock::FINE, workers: 1, ..PROMPT }).is_empty());
}
