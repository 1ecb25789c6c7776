//! **inventoryd** keeps a last-observed inventory of Microsoft Intune tenants. It consumes sync requests from RabbitMQ,
//! reads Microsoft Graph, writes PostgreSQL and publishes an event for every run that ends. It never writes to Intune.
//!
//! # Data flow
//!
//! ```text
//! bytes on the queue
//!   -> SyncRequest       domain/request.rs      parsed and validated, or a Rejection with a reason
//!   -> Selection         domain/selection.rs    canonical form and selection_hash
//!   -> Scope             domain/catalog.rs      the Graph lists to read
//!   -> Admission         store/                 a lease, or skipped, duplicate, busy, deferred, conflict
//!   -> pages of objects  graph/listing/         one list per collection, next link by next link
//!   -> InventoryItem     domain/item.rs         classified, named, sanitised
//!   -> rows              store/items.rs         one fenced upsert per batch
//!   -> RunReport         run/                   outcomes and counters per type
//!   -> run and event     store/                 one transaction
//!   -> ack               consumer/delivery_handler.rs only after that commit
//!   -> published event   relay.rs               outbox, publish, confirm, mark
//! ```
//!
//! # Invariants
//!
//! * **Durable effect before settlement.** A message is acknowledged after the commit. A lost ack, a repeated publish or a
//!   killed process loses nothing and repeats nothing, because the row records the completed work.
//! * **The lock is a row.** A partial unique index permits one `running` run per tenant and selection. The row holds the
//!   lease; its `attempt` is the fencing token checked by every write; a worker stops before its lease can expire.
//! * **The database clock** decides about leases and dates every record; this process trusts its own clock for durations.
//! * **Missing is derived** by SQL that every reader can call, and never stored. The inventory deletes nothing.
//! * **Secrets and free text of Graph** never leave the `graph` module; configuration values are shown only for known keys
//!   that hold no secret.
//!
//! # Modules
//!
//! `main > cli > daemon > {consumer, relay, janitor, fleet, http} > run > {graph, store, broker} > backoff > telemetry >
//! {config, tls} > domain`. Imports run downward only. lapin is used in `broker` alone, sqlx in `store`, reqwest and
//! `azure_identity` in `graph`, axum in `http`, opentelemetry in `telemetry`. `tests/it/architecture.rs` enforces this.
//!
//! # Glossary
//!
//! * **Admission** (`store/admission.rs`): decision about a request, serialised per tenant.
//! * **Backpressure** (`consumer/backpressure.rs`): the pause of consumption while the database is unreachable or the
//!   outbox is full.
//! * **Concurrency limit** (`graph/limits/concurrency.rs`): requests in flight per tenant, adapted by AIMD (additive
//!   increase, multiplicative decrease).
//! * **Credential** (`graph/auth/credential.rs`): a named application identity in `graph.credentials`.
//! * **Dead letter** (`domain/dead_letter.rs`, `broker/dead_letters.rs`): a message that can never be processed, moved to
//!   the dead-letter queue with a reason.
//! * **Drain** (`consumer.rs`): shutdown that accepts nothing new and lets runs in flight finish.
//! * **Fence** (`store/items.rs`, `store/run_outcome.rs`): check in every write of a run that its **fencing token** is
//!   current. The token is the `attempt` of the run, which each take-over increments (`store/admission.rs`).
//! * **Foundation** (`domain/policy_type.rs`): a type that others refer to, such as scope tags and assignment filters.
//! * **Idempotency key** (`domain/request.rs`, `store/admission.rs`): key of a request; a repeated key of a tenant never
//!   starts a second run.
//! * **In flight** (`consumer/health.rs`): delivered or sent, and not settled yet.
//! * **Lease** (`run/lease.rs`, `store/leases.rs`): time-limited permission of one worker to write for a run.
//! * **Next link** (`graph/listing/next_link.rs`): URL of a list's next page; followed only to the configured Graph host.
//! * **Outbox** (`store/outbox.rs`, `relay.rs`): table of events written in the transaction of their run, and published by
//!   the relay.
//! * **Pause** (`graph/limits/pause.rs`): time during which a tenant gets no requests, from the `Retry-After` of a 429.
//! * **Prefetch** (`broker/deliveries.rs`): maximum number of unacknowledged deliveries per replica.
//! * **Rate limiter** (`graph/limits/rate_limit.rs`): sliding window that keeps requests under Graph's documented limits.
//! * **Retry tier** (`broker/retry_tier.rs`): queue with a time to live that returns its messages to the request queue, for
//!   requests that are busy or over a limit.
//! * **Run budget** (`graph/limits/budget.rs`): total time that a run may wait because of throttling.
//! * **Selection** (`domain/selection.rs`): policy types and categories of a request; its hash identifies what is compared
//!   between runs.
//! * **Suspicious drop** (`store/run_outcome.rs`): a complete type with far fewer objects than in the previous completed
//!   run.

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
