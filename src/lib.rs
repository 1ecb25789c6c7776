//! **inventoryd** keeps a last-observed inventory of Microsoft Intune tenants. It consumes sync requests from RabbitMQ,
//! reads Microsoft Graph, writes PostgreSQL, and announces every ended run. It never writes to Intune.
//!
//! # The one way through
//!
//! ```text
//! bytes on the queue
//!   -> SyncRequest       domain/request.rs      parsed and checked, or a Rejection with a reason
//!   -> Selection         domain/selection.rs    canonical form and selection_hash
//!   -> Scope             domain/catalog.rs      the Graph lists that it comes to
//!   -> Admission         store/admission.rs     a lease, or skipped, duplicate, busy, deferred, conflict
//!   -> pages of objects  graph/listing/pages.rs one list per collection, followed to its end
//!   -> InventoryItem     domain/item.rs         classified, named, whitelisted
//!   -> rows              store/items.rs         one fenced upsert per batch
//!   -> RunReport         run/collect.rs         outcomes and counters, type by type
//!   -> run and event     store/runs.rs          ONE transaction: the only truth
//!   -> ack               consumer/delivery_handler.rs only after that commit
//!   -> published event   relay.rs               outbox, publish, confirm, mark
//! ```
//!
//! `run/mod.rs` is the only place that knows this order.
//!
//! # What always holds
//!
//! * **Durable effect first, settle second.** After the commit an ack may be lost, a publish repeated, a process killed:
//!   nothing is lost and nothing done twice, because the row says that it is done.
//! * **The lock is the row.** A partial unique index lets one run of a tenant and selection be `running`. Its lease stands
//!   on the row; its `attempt` is the fence that every write checks; a worker stops itself before the database would
//!   give its lease away.
//! * **The database's clock** decides about leases and stands in every record; this process trusts its own clock for
//!   durations alone.
//! * **Missing is derived**, by SQL that every reader can call, and never stored. Nothing is deleted from the inventory.
//! * **Secrets and free text of Graph** never leave the Graph room.
//!
//! # Who knows whom
//!
//! `main > cli > daemon > {consumer, relay, janitor, fleet, http} > run > {graph, store, broker} > {backoff, telemetry, config} >
//! domain`. Imports run downward only; lapin is named in `broker` alone, sqlx in `store`, reqwest and `azure_identity` in
//! `graph`, axum in `http`, opentelemetry in `telemetry`. `tests/it/architecture.rs` holds this.

pub mod domain;

pub mod backoff;
pub mod config;
pub mod telemetry;
pub mod tls;

pub mod broker;
pub mod graph;
pub mod store;

pub mod run;

pub mod consumer;
pub mod fleet;
pub mod http;
pub mod janitor;
pub mod relay;

pub mod daemon;

pub mod cli;
