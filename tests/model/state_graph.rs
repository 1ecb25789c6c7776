//! State graph for liveness checks, which stateright does not support for models with cycles.
//!
//! `Property::eventually` ignores cycles, and this model has them. The graph is therefore built once and searched backwards
//! from the states that satisfy a goal. A goal that stays reachable from every state by steps that are not faults is
//! reached under fair scheduling once faults cease. Breadth-first construction also yields the shortest counterexample.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use stateright::Model;

use crate::actions::Action;
use crate::design::Design;
use crate::liveness::{LIVENESS, LivenessGoal};
use crate::properties::Witness;
use crate::state::State;

/// Reachable states and the steps between them.
pub struct StateGraph {
    design: Design,
    states: Vec<State>,
    /// Predecessor and action by which each state was first reached.
    found_by: Vec<Option<(usize, Action)>>,
    /// Predecessors of each state by steps that are not faults.
    before: Vec<Vec<u32>>,
    /// States with a step that the boundary cuts off; what they could reach is unknown.
    cut_off: Vec<usize>,
}

/// Violated properties by name, each with its shortest counterexample.
pub type Failures = BTreeMap<&'static str, Vec<Action>>;

impl StateGraph {
    pub fn build(design: Design) -> Self {
        let states = design.init_states();
        let mut numbers: HashMap<State, usize, BuildHasherDefault<FastHasher>> =
            states.iter().copied().zip(0..).collect();
        let mut graph = Self {
            design,
            found_by: vec![None; states.len()],
            before: vec![vec![]; states.len()],
            cut_off: vec![],
            states,
        };
        let mut number = 0;
        while number < graph.states.len() {
            let from = graph.states[number];
            for (action, next) in design.next_steps(&from) {
                if !design.within_boundary(&next) {
                    graph.cut_off.push(number);
                    continue;
                }
                let found = *numbers.entry(next).or_insert_with(|| graph.add(next, (number, action)));
                if is_fault_free(&design, &from, action) {
                    graph.before[found].push(number as u32);
                }
            }
            number += 1;
        }
        graph
    }

    fn add(&mut self, state: State, found_by: (usize, Action)) -> usize {
        self.states.push(state);
        self.found_by.push(Some(found_by));
        self.before.push(Vec::new());
        self.states.len() - 1
    }

    pub fn size(&self) -> usize {
        self.states.len()
    }

    /// True if any reachable state satisfies the witness.
    pub fn reaches(&self, witness: &Witness) -> bool {
        self.states.iter().any(witness.1)
    }

    /// Safety properties that some state violates and liveness goals that some state cannot reach. Events are checked only
    /// with a relay.
    pub fn failed_properties(&self) -> Failures {
        let ends =
            LIVENESS.iter().filter(|end| self.design.relays > 0 || end.0 != crate::liveness::EVERY_EVENT_IS_PUBLISHED);
        let dead = ends.filter_map(|end| Some((end.0, self.first_state_that_cannot_reach(end)?)));
        let violated = self.design.properties().into_iter().filter_map(|property| {
            let first = self.states.iter().position(|state| !(property.condition)(&self.design, state))?;
            Some((property.name, first))
        });
        violated.chain(dead).map(|(name, number)| (name, self.path_to(number))).collect()
    }

    /// First state, in breadth-first order, from which the goal is unreachable.
    fn first_state_that_cannot_reach(&self, end: &LivenessGoal) -> Option<usize> {
        let mut leads_there: Vec<bool> = self.states.iter().map(|state| end.1(&self.design, state)).collect();
        self.cut_off.iter().for_each(|number| leads_there[*number] = true);
        let mut new: Vec<usize> = (0..self.size()).filter(|number| leads_there[*number]).collect();
        while let Some(number) = new.pop() {
            for before in self.before[number].iter().map(|before| *before as usize) {
                if !leads_there[before] {
                    leads_there[before] = true;
                    new.push(before);
                }
            }
        }
        leads_there.iter().position(|leads| !leads)
    }

    fn path_to(&self, mut number: usize) -> Vec<Action> {
        let mut path = Vec::new();
        while let Some((before, action)) = self.found_by[number] {
            path.push(action);
            number = before;
        }
        path.reverse();
        path
    }
}

/// Multiplicative hasher: the keys are not attacker-controlled, and SipHash takes half of the construction time.
#[derive(Default)]
struct FastHasher(u64);

impl FastHasher {
    fn mix(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

impl Hasher for FastHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.mix(u64::from(*byte)));
    }

    fn write_u8(&mut self, value: u8) {
        self.mix(u64::from(value));
    }

    fn write_isize(&mut self, value: isize) {
        self.mix(value as u64);
    }

    fn finish(&self) -> u64 {
        self.0.rotate_left(26)
    }
}

/// True for steps that occur without a fault. A suspended worker resumes only if every worker is suspended.
fn is_fault_free(design: &Design, state: &State, action: Action) -> bool {
    let all_stopped = || state.workers[..design.workers].iter().all(|worker| worker.paused);
    !design.is_fault(state, action) && (!matches!(action, Action::Resume(_)) || all_stopped())
}
