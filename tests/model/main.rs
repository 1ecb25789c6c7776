//! Model of the daemon, checked exhaustively: the request queue with its retry tiers, workers, runs with their leases, the
//! outbox, the janitor and the relay, under crashes, suspended processes, shutdowns, lost connections, lost messages, lost
//! responses and a running clock.
//!
//! | file | content |
//! |---|---|
//! | `state.rs` | state of the model |
//! | `actions.rs` | actions, the source file of each, and when they are enabled |
//! | `database.rs` | database transactions |
//! | `steps.rs` | effects of all other actions |
//! | `properties.rs` | safety properties, and witnesses that the search is not vacuous |
//! | `liveness.rs` | goals that must stay reachable |
//! | `state_graph.rs` | reachability search for liveness |
//! | `design.rs` | size of a model, its faults and its guards |
//! | `mutants.rs` | removes one guard at a time and names the properties that fail |
//! | `observations.rs` | separate model of the order of observations |
//! | `extra_properties.rs` | properties that have a configuration of their own |
//!
//! Not modelled: reading items, invalid requests, deferral, retention, the fleet limit and the inside of a database
//! transaction. The atomicity of the real transactions is covered by `tests/it`.

mod actions;
mod database;
mod design;
mod extra_properties;
mod liveness;
mod mutants;
mod observations;
mod properties;
mod state;
mod state_graph;
mod steps;

use std::time::Instant;

use design::{Clock, Design, Fault};
use properties::{WITNESSES, WITNESSES_OF_TWO_REQUESTS, Witness};
use state_graph::StateGraph;
use stateright::{Checker, Model};

/// One request, two workers and every fault.
const ONE_REQUEST: Design = Design {
    requests: 1,
    workers: 2,
    relays: 1,
    clock: Clock::FINE,
    faults: 2,
    kinds: Fault::ALL,
    same_selection: true,
    tenant_limit: 2,
    prompt: false,
    without: None,
    extra: None,
};

/// Two requests of one selection. A single request covers events, so there is no relay; a coarse clock bounds the number of
/// states.
const TWO_REQUESTS: Design = Design { requests: 2, relays: 0, clock: Clock::COARSE, faults: 1, ..ONE_REQUEST };

/// Checks with stateright that every safety property holds in every reachable state.
fn check_safety(name: &str, design: Design) -> usize {
    let begun = Instant::now();
    let checker = design.checker().threads(2).spawn_bfs().join();
    let (states, steps) = (checker.unique_state_count(), checker.state_count());
    println!("{name}: {states} states, {steps} steps, {:.1} s", begun.elapsed().as_secs_f64());
    checker.assert_properties();
    states
}

/// Checks on the state graph that every property holds, every goal stays reachable and every witness occurs.
fn check_liveness(name: &str, design: Design, witnesses: &[Witness]) -> usize {
    let begun = Instant::now();
    let graph = StateGraph::build(design);
    let broken = graph.failed_properties();
    println!("{name}, liveness: {} states, {:.1} s", graph.size(), begun.elapsed().as_secs_f64());
    assert!(broken.is_empty(), "{name}: {broken:#?}");
    for witness in witnesses {
        assert!(graph.reaches(witness), "{name}: no reachable state shows that {}", witness.0);
    }
    graph.size()
}

#[test]
fn one_request_with_two_workers_holds_under_two_faults() {
    check_safety("one request, two workers, two faults", ONE_REQUEST);
    // The graph is built by one thread; a coarse clock halves its states.
    let coarse = Design { clock: Clock::COARSE, ..ONE_REQUEST };
    check_liveness("one request, two workers, two faults, a coarse clock", coarse, WITNESSES);
}

#[test]
fn one_request_with_three_workers_holds_under_one_fault() {
    let design = Design { workers: 3, faults: 1, ..ONE_REQUEST };
    let searched = check_safety("one request, three workers, one fault", design);
    let built = check_liveness("one request, three workers, one fault", design, WITNESSES);
    assert_eq!(searched, built, "both searches reach the same states");
}

#[test]
fn two_requests_of_one_selection_hold() {
    check_safety("two requests, two workers, one fault", TWO_REQUESTS);
    let one_worker = Design { workers: 1, ..TWO_REQUESTS };
    check_liveness("two requests, one worker, one fault", one_worker, WITNESSES_OF_TWO_REQUESTS);
}

#[test]
fn two_requests_over_the_tenant_limit_hold() {
    let design = Design { workers: 1, same_selection: false, tenant_limit: 1, ..TWO_REQUESTS };
    check_liveness("two requests of two selections, a limit of one", design, &WITNESSES_OF_TWO_REQUESTS[..1]);
}

#[test]
fn two_relays_publish_every_event() {
    let design = Design { workers: 1, relays: 2, faults: 3, ..ONE_REQUEST };
    check_safety("one worker, two relays, three faults", design);
    // Without a second worker no lease can be taken over.
    let witnesses: Vec<Witness> =
        WITNESSES.iter().filter(|witness| !witness.0.contains("losing its lease")).copied().collect();
    check_liveness("one worker, two relays, two faults", Design { faults: 2, ..design }, &witnesses);
}

/// A renamed file leaves no stale name behind.
#[test]
fn every_source_file_that_is_named_exists() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut named = 0;
    for file in std::fs::read_dir(root.join("tests/model")).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let quoted = text.split('`').filter(|word| word.starts_with("src/") || word.starts_with("migrations/"));
        for path in quoted {
            assert!(root.join(path).exists(), "{path} does not exist");
            named += 1;
        }
    }
    assert!(named > 20, "{named} files are named");
}
