//! What inventoryd promises, held against real servers: a module for every behaviour.

#[path = "../sim/mod.rs"]
mod sim;
#[path = "../support/mod.rs"]
mod support;

mod admission;
mod architecture;
mod crashes;
mod dead_letters;
mod graph;
mod graph_client;
mod inventory;
mod limits;
mod missing;
mod stopping;
