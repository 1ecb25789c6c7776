//! Integration tests against real servers, one module per behaviour.
#![expect(clippy::unwrap_used, reason = "a failed test panics")]
#![expect(clippy::disallowed_methods, reason = "faults happen at random moments")]

#[path = "../sim/mod.rs"]
mod sim;
#[path = "../support/mod.rs"]
mod support;

mod admission;
mod architecture;
mod backup;
mod batches;
mod boundaries;
mod broker;
mod commands;
mod configuration;
mod connect_failures;
mod contracts;
mod crashes;
mod dead_letters;
mod documentation;
mod durability;
mod events_replay;
mod examples;
mod faults_broker;
mod faults_database;
mod faults_wire;
mod fleet;
mod graph;
mod graph_client;
mod graph_credentials;
mod graph_facts;
mod graph_limits;
mod graph_proxy;
mod graph_tolerance;
mod growth;
mod hostile_messages;
mod http_clients;
mod inventory;
mod limits;
mod listings;
mod logs;
mod long_history;
mod lost_workers;
mod messages;
mod migrations;
mod missing;
mod not_applicable;
mod observations;
mod outcomes;
mod permissions;
mod policies;
mod reading;
mod refused_copies;
mod request_wait;
mod retention;
mod rotation;
mod schema;
mod server_settings;
mod server_versions;
mod settings;
mod slow_database;
mod stopping;
mod subscription;
mod supervision;
mod tls;
mod traces;
