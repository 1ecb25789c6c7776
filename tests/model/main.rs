//! A model of the daemon: the queue with its retry ladder, workers, run rows with their leases, the outbox, the janitor
//! and the relay, under crashes, stops, lost connections, lost messages, lost answers and a clock that runs on.
//!
//! `state.rs` says what there is, `actions.rs` what can happen and which code it stands for, `database.rs` what
//! PostgreSQL decides, `steps.rs` the rest, `properties.rs` what always holds, `ends.rs` what must come in the end.
//! Every order of all actions is searched. `mutants.rs` takes one guard away at a time and says what breaks without it;
//! `known.rs` holds what the design as it is does not promise.
//!
//! Left out: how items are read, what a request may say wrong, deferral, retention, the fleet's limit, and that a
//! database transaction has an inside. Whether the real transactions are as atomic as these is for `tests/it`.

mod actions;
mod database;
mod design;
mod ends;
mod graph;
mod known;
mod mutants;
mod properties;
mod state;
mod steps;

use std::time::Instant;

use design::{Clock, Design, Fault};
use graph::Graph;
use properties::{SIGHTS, SIGHTS_OF_TWO, Sight};
use stateright::{Checker, Model};

/// One request that two workers can come to get, with everything that can go wrong.
const ONE_REQUEST: Design = Design {
    requests: 1,
    workers: 2,
    relays: 1,
    clock: Clock::FINE,
    faults: 2,
    kinds: Fault::ALL,
    same_selection: true,
    tenant_limit: 2,
    without: None,
    also: None,
};

/// Two requests of one selection. Of their events nothing is to be learnt that one request does not show, and a coarse
/// clock keeps the number of states down.
const TWO_REQUESTS: Design = Design { requests: 2, relays: 0, clock: Clock::COARSE, faults: 1, ..ONE_REQUEST };

/// Searches with stateright: no promise is broken in any state.
fn holds(name: &str, design: Design) -> usize {
    let begun = Instant::now();
    let checker = design.checker().threads(2).spawn_bfs().join();
    let (states, steps) = (checker.unique_state_count(), checker.state_count());
    println!("{name}: {states} states, {steps} steps, {:.1} s", begun.elapsed().as_secs_f64());
    checker.assert_properties();
    states
}

/// Searches the graph: no promise is broken, every end stays within reach, and all the sights were there to be seen.
fn ends_well(name: &str, design: Design, sights: &[Sight]) -> usize {
    let begun = Instant::now();
    let graph = Graph::of(design);
    let broken = graph.broken();
    println!("{name}, to its end: {} states, {:.1} s", graph.size(), begun.elapsed().as_secs_f64());
    assert!(broken.is_empty(), "{name}: {broken:#?}");
    for sight in sights {
        assert!(graph.shows(sight), "{name}: the search never saw that {}", sight.0);
    }
    graph.size()
}

#[test]
fn one_request_and_two_workers() {
    holds("one request, two workers, two faults", ONE_REQUEST);
    // The graph is built by one thread: a coarse clock spares it half of the states.
    let coarse = Design { clock: Clock::COARSE, ..ONE_REQUEST };
    ends_well("one request, two workers, two faults, a coarse clock", coarse, SIGHTS);
}

#[test]
fn one_request_and_three_workers() {
    let design = Design { workers: 3, faults: 1, ..ONE_REQUEST };
    let searched = holds("one request, three workers, one fault", design);
    let built = ends_well("one request, three workers, one fault", design, SIGHTS);
    assert_eq!(searched, built, "both searches come past the same states");
}

#[test]
fn two_requests_of_one_selection() {
    holds("two requests, two workers, one fault", TWO_REQUESTS);
    let one_worker = Design { workers: 1, ..TWO_REQUESTS };
    ends_well("two requests, one worker, one fault", one_worker, SIGHTS_OF_TWO);
}

#[test]
fn two_requests_over_the_limit_of_their_tenant() {
    let design = Design { workers: 1, same_selection: false, tenant_limit: 1, ..TWO_REQUESTS };
    ends_well("two requests of two selections, a limit of one", design, &SIGHTS_OF_TWO[..1]);
}

#[test]
fn two_relays() {
    let design = Design { workers: 1, relays: 2, faults: 3, ..ONE_REQUEST };
    holds("one worker, two relays, three faults", design);
    ends_well("one worker, two relays, two faults", Design { faults: 2, ..design }, SIGHTS);
}
