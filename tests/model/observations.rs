//! Model of one object that two runs observe: reads and writes of the runs interleave, the object changes meanwhile, old
//! runs are deleted and the database's clock may step back.
//!
//! Implemented by `src/store/items.rs` (upsert), `migrations/0001_inventory.sql` (evidence) and `src/store/retention.rs`.

use std::collections::BTreeSet;

use stateright::{Checker, Model, Property};

const NEWEST_WINS: &str = "the stored version is the one observed last";
const CURRENT_IS_RIGHT: &str = "an item is current unless a complete listing that started later did not find it";
const OWN_ITEMS_ARE_SEEN: &str = "what a run observed is not missing from it";

/// Changes of the object: renamed, deleted, created again.
const VERSIONS: u8 = 3;

/// Mechanism that a mutant removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    /// An item carries the time of the read, not of the write.
    ObservedAt,
    /// An older observation does not overwrite a newer one.
    NotOlder,
    /// Retention keeps the latest complete listing.
    EvidenceKept,
    /// The time of a read is the start of the run plus the time elapsed since, by a monotonic clock.
    Monotonic,
}

#[derive(Clone, Copy, Debug)]
struct Observations {
    without: Option<Guard>,
    /// True if the database's clock may step back, once.
    clock_steps: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct State {
    /// Real time; each step of a run takes one unit, so that no two events coincide.
    now: i8,
    /// Time that the database clock is behind.
    behind: i8,
    /// Version of the object in Graph; none while it is deleted.
    object: Option<u8>,
    changes: u8,
    runs: [Run; 2],
    item: Option<Item>,
    /// Start of the latest complete listing, by the database's clock.
    evidence: Option<i8>,
    /// Real time and version of the latest sighting that was written.
    last_sighting: Option<(i8, u8)>,
    /// Real time at which the latest run that has ended started.
    last_start: Option<i8>,
    /// True after a run ended without an item that it had observed.
    own_item_missing: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Run {
    Waiting,
    Started(Times),
    Read(Times, Sighting),
    Ended,
}

/// Start of a run, in real time and by the database's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Times {
    real: i8,
    database: i8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Sighting {
    read_at: i8,
    version: Option<u8>,
    observed_at: i8,
}

/// Row in `inventory_items`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Item {
    version: u8,
    last_seen_at: i8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Start(usize),
    Read(usize),
    /// Writes what was read and ends the run.
    Write(usize),
    /// Renames, deletes or creates the object.
    Change(Option<u8>),
    /// Deletes runs that ended long ago.
    Retention,
    StepBack,
}

impl State {
    fn database_clock(&self) -> i8 {
        self.now - self.behind
    }

    fn is_current(&self) -> bool {
        self.item.is_some_and(|item| self.evidence.is_none_or(|start| item.last_seen_at >= start))
    }
}

impl Observations {
    fn keeps(&self, guard: Guard) -> bool {
        self.without != Some(guard)
    }

    fn read(&self, state: &State, start: Times) -> Sighting {
        let elapsed = state.now - start.real;
        let observed_at = if self.keeps(Guard::Monotonic) { start.database + elapsed } else { state.database_clock() };
        Sighting { read_at: state.now, version: state.object, observed_at }
    }

    fn write(&self, state: &mut State, start: Times, sighting: Sighting) {
        if let Some(version) = sighting.version {
            let observed_at = if self.keeps(Guard::ObservedAt) { sighting.observed_at } else { state.database_clock() };
            let newer = state.item.is_some_and(|item| item.last_seen_at > observed_at) && self.keeps(Guard::NotOlder);
            if !newer {
                let last_seen_at = state.item.map_or(observed_at, |item| item.last_seen_at.max(observed_at));
                state.item = Some(Item { version, last_seen_at });
            }
            state.last_sighting = state.last_sighting.max(Some((sighting.read_at, version)));
            state.own_item_missing |= state.item.is_some_and(|item| item.last_seen_at < start.database);
        }
        state.evidence = state.evidence.max(Some(start.database));
        state.last_start = state.last_start.max(Some(start.real));
    }
}

impl Model for Observations {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            now: 10,
            behind: 0,
            object: Some(0),
            changes: 0,
            runs: [Run::Waiting; 2],
            item: None,
            evidence: None,
            last_sighting: None,
            last_start: None,
            own_item_missing: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (number, run) in state.runs.iter().enumerate() {
            match run {
                Run::Waiting => actions.push(Action::Start(number)),
                Run::Started(_) => actions.push(Action::Read(number)),
                Run::Read(..) => actions.push(Action::Write(number)),
                // The selection is run again and again.
                Run::Ended if state.now < 20 => actions.push(Action::Start(number)),
                Run::Ended => {}
            }
        }
        if state.changes < VERSIONS {
            actions.push(Action::Change(state.object.is_none().then_some(state.changes + 1)));
            actions.push(Action::Change(Some(state.changes + 1)));
        }
        actions.push(Action::Retention);
        if self.clock_steps && state.behind == 0 {
            actions.push(Action::StepBack);
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = *state;
        match action {
            Action::Start(number) => {
                next.now += 1;
                next.runs[number] = Run::Started(Times { real: next.now, database: next.database_clock() });
            }
            Action::Read(number) => {
                let Run::Started(start) = state.runs[number] else { return None };
                next.now += 1;
                next.runs[number] = Run::Read(start, self.read(&next, start));
            }
            Action::Write(number) => {
                let Run::Read(start, sighting) = state.runs[number] else { return None };
                next.now += 1;
                self.write(&mut next, start, sighting);
                next.runs[number] = Run::Ended;
            }
            Action::Change(object) => {
                next.object = object;
                next.changes += 1;
            }
            Action::Retention if self.keeps(Guard::EvidenceKept) => return None,
            Action::Retention => next.evidence = None,
            Action::StepBack => next.behind = 5,
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = vec![Property::always(OWN_ITEMS_ARE_SEEN, |_, state: &State| !state.own_item_missing)];
        // Times of different runs can be compared only while the clock runs on.
        if !self.clock_steps {
            all.push(Property::always(NEWEST_WINS, |_, state: &State| {
                state.item.map(|item| item.version) == state.last_sighting.map(|(_, version)| version)
            }));
            all.push(Property::always(CURRENT_IS_RIGHT, |_, state: &State| {
                let seen_since = state.last_sighting.map(|(read_at, _)| read_at) >= state.last_start;
                state.is_current() == (state.item.is_some() && seen_since)
            }));
        }
        all
    }
}

/// Asserts that without `without` exactly the `expected` properties fail.
fn assert_fails(clock_steps: bool, without: Option<Guard>, expected: &[&str]) {
    let checker = Observations { without, clock_steps }.checker().threads(2).spawn_bfs().join();
    println!("without {without:?}: {} states", checker.unique_state_count());
    let failed: BTreeSet<&str> = checker.discoveries().into_keys().collect();
    assert_eq!(failed, expected.iter().copied().collect(), "without {without:?}");
}

#[test]
fn newer_observations_win_and_deleted_objects_stay_deleted() {
    assert_fails(false, None, &[]);
}

#[test]
fn clock_that_steps_back_hides_nothing_that_a_run_observed() {
    assert_fails(true, None, &[]);
}

#[test]
fn items_need_the_time_of_the_read() {
    assert_fails(false, Some(Guard::ObservedAt), &[NEWEST_WINS, CURRENT_IS_RIGHT]);
}

#[test]
fn older_observations_must_not_overwrite() {
    assert_fails(false, Some(Guard::NotOlder), &[NEWEST_WINS]);
}

#[test]
fn retention_must_keep_the_evidence() {
    assert_fails(false, Some(Guard::EvidenceKept), &[CURRENT_IS_RIGHT]);
}

#[test]
fn time_of_a_read_must_be_monotonic() {
    assert_fails(true, Some(Guard::Monotonic), &[OWN_ITEMS_ARE_SEEN]);
}
