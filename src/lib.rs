//! inventoryd
pub mod backoff;
pub mod cli;
pub mod config;
pub mod domain;
pub mod graph;
pub mod http;
pub mod janitor;
pub mod run;
pub mod store;
pub mod telemetry;
