//! The graph of all states, for what stateright does not answer.
//!
//! Its `Property::eventually` overlooks whatever goes in a circle, and this model does. So the graph is built once and
//! searched backwards from where things have ended well. An end that stays within reach of every state, by steps that
//! are no faults, is enough: a system that does not avoid any of its possible steps for ever gets there once the faults
//! cease. Built breadth first, the graph also has the shortest way to whatever is broken.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use stateright::Model;

use crate::actions::Action;
use crate::design::Design;
use crate::ends::{ENDS, End};
use crate::properties::Sight;
use crate::state::State;

/// All states with the steps between them.
pub struct Graph {
    design: Design,
    states: Vec<State>,
    /// The state and the step by which each was found first.
    found_by: Vec<Option<(usize, Action)>>,
    /// For each state those from which a step that is no fault leads to it.
    before: Vec<Vec<u32>>,
}

/// Promises by name, with the shortest way to where each is broken.
pub type Broken = BTreeMap<&'static str, Vec<Action>>;

impl Graph {
    pub fn of(design: Design) -> Self {
        let states = design.init_states();
        let mut numbers: HashMap<State, usize, BuildHasherDefault<Mixer>> = states.iter().copied().zip(0..).collect();
        let mut graph = Self { design, found_by: vec![None; states.len()], before: vec![vec![]; states.len()], states };
        let mut number = 0;
        while number < graph.states.len() {
            let from = graph.states[number];
            for (action, next) in design.next_steps(&from) {
                if !design.within_boundary(&next) {
                    continue;
                }
                let found = *numbers.entry(next).or_insert_with(|| graph.add(next, (number, action)));
                if goes_on_by_itself(&design, &from, action) {
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

    /// Whether the search has come past a state.
    pub fn shows(&self, sight: &Sight) -> bool {
        self.states.iter().any(sight.1)
    }

    /// What always has to hold and does not, and what has to come in the end and can't. Without a relay no event is
    /// looked for.
    pub fn broken(&self) -> Broken {
        let ends = ENDS.iter().filter(|end| self.design.relays > 0 || end.0 != crate::ends::EVERY_EVENT_IS_SENT);
        let dead = ends.filter_map(|end| Some((end.0, self.dead_end(end)?)));
        let violated = self.design.properties().into_iter().filter_map(|property| {
            let first = self.states.iter().position(|state| !(property.condition)(&self.design, state))?;
            Some((property.name, first))
        });
        violated.chain(dead).map(|(name, number)| (name, self.way_to(number))).collect()
    }

    /// The first state from which `end` can't be reached any more, if there is one.
    fn dead_end(&self, end: &End) -> Option<usize> {
        let mut leads_there: Vec<bool> = self.states.iter().map(|state| end.1(&self.design, state)).collect();
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

    fn way_to(&self, mut number: usize) -> Vec<Action> {
        let mut way = Vec::new();
        while let Some((before, action)) = self.found_by[number] {
            way.push(action);
            number = before;
        }
        way.reverse();
        way
    }
}

/// The standard library's hasher keeps strangers from guessing its sums, for half of the time that a graph takes.
#[derive(Default)]
struct Mixer(u64);

impl Mixer {
    fn mix(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

impl Hasher for Mixer {
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

/// Steps that happen without a fault. A stopped worker is not waited for, unless there is no other.
fn goes_on_by_itself(design: &Design, state: &State, action: Action) -> bool {
    let all_stopped = || state.workers[..design.workers].iter().all(|worker| worker.paused);
    !design.is_fault(state, action) && (!matches!(action, Action::Resume(_)) || all_stopped())
}
