//! Promises beyond the safety of single runs: two that the search once broke and the daemon has kept since, and one that
//! it does not keep, with the shortest way there.

use crate::TWO_REQUESTS;
use crate::design::{Design, Fault, Promise};
use crate::graph::{Broken, Graph};
use crate::properties::WAITING_GOES_ON;

const ONE_WORKER: Design = Design { workers: 1, kinds: &[Fault::Crash, Fault::Stop], ..TWO_REQUESTS };

fn broken(design: Design) -> Broken {
    let broken = Graph::of(design).broken();
    for (promise, way) in &broken {
        println!("not kept: {promise}, after {way:?}");
    }
    broken
}

/// A take-over asks for no place of its own: a run whose worker is lost must keep the one that it had, or another request
/// takes it and `limits.tenant_max_runs` is exceeded.
#[test]
fn a_take_over_does_not_exceed_the_limit() {
    let design = Design { same_selection: false, tenant_limit: 1, ..ONE_WORKER }.promising(Promise::LimitHolds);
    assert!(broken(design).is_empty());
}

/// A run that was handed back in order must not look like one whose worker is lost: another request of its selection that
/// comes before its own message would end it as failed, `worker_lost`.
#[test]
fn an_orderly_stop_costs_no_run_its_life() {
    assert!(broken(ONE_WORKER.promising(Promise::HandedBackRunGoesOn)).is_empty());
}

/// `run.abandoned_after_s` outlasts the retry ladder, but not a queue in which a message waits for so long. A janitor whose
/// replica has not read the queue for that time ends nothing, so that a night without replicas does no harm; this model
/// does not count how long a worker has been reading, and a queue that is read may be as long.
#[test]
fn a_message_that_waits_too_long_finds_its_run_ended() {
    let design = Design { requests: 1, ..ONE_WORKER }.promising(Promise::WaitingRunGoesOn);
    assert_eq!(broken(design).into_keys().collect::<Vec<_>>(), [WAITING_GOES_ON]);
}
