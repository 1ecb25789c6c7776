//! What the design as it is does not keep, each with the shortest way there, and with what would mend it. When one is
//! mended in the daemon, the mended form becomes the model's only one.

use crate::TWO_REQUESTS;
use crate::design::{Design, Fault, Promise};
use crate::graph::{Broken, Graph};
use crate::properties::{HANDED_BACK_GOES_ON, LIMIT_HOLDS, WAITING_GOES_ON};

const ONE_WORKER: Design = Design { workers: 1, kinds: &[Fault::Crash, Fault::Stop], ..TWO_REQUESTS };

fn broken(design: Design) -> Broken {
    let broken = Graph::of(design).broken();
    for (promise, way) in &broken {
        println!("not kept: {promise}, after {way:?}");
    }
    broken
}

/// An admission counts the runs whose lease is alive, and a take-over counts nothing: a run whose worker is lost leaves
/// its place, another request takes it, and then the first run is taken over. `limits.tenant_max_runs` and
/// `limits.fleet_max_runs` are exceeded.
#[test]
fn a_take_over_may_exceed_the_limit() {
    let design = Design { same_selection: false, tenant_limit: 1, ..ONE_WORKER }.promising(Promise::LimitHolds);
    assert_eq!(broken(design).into_keys().collect::<Vec<_>>(), [LIMIT_HOLDS]);
    assert!(broken(design.mended()).is_empty());
}

/// A run that was handed back in order looks like one whose worker is lost: another request of its selection that comes
/// before its own message ends it as failed, `worker_lost`.
#[test]
fn an_orderly_stop_may_cost_a_run_its_life() {
    let design = ONE_WORKER.promising(Promise::HandedBackRunGoesOn);
    assert_eq!(broken(design).into_keys().collect::<Vec<_>>(), [HANDED_BACK_GOES_ON]);
    assert!(broken(design.mended()).is_empty());
}

/// `run.abandoned_after_s` outlasts the retry ladder, but not a queue that nobody has read for so long, as after a night
/// without replicas: the first round of the janitor may come before the message does.
#[test]
fn a_message_that_waits_too_long_finds_its_run_ended() {
    let design = Design { requests: 1, ..ONE_WORKER }.promising(Promise::WaitingRunGoesOn);
    assert_eq!(broken(design).into_keys().collect::<Vec<_>>(), [WAITING_GOES_ON]);
}
