//! Client-side limits that keep every tenant below Graph's documented quotas.
//!
//! Each request passes three stages: the pause of its tenant and family (while a `Retry-After` lasts), the tenant's
//! concurrency limit (AIMD) and the rate limiter of the family. `pause.rs` puts them together;
//! `registry.rs` keeps them by tenant and divides them by the number of replicas.

pub(super) mod budget;
pub(super) mod concurrency;
pub(super) mod family;
pub(super) mod pause;
pub(super) mod rate_limit;
pub(super) mod registry;
pub(super) mod retry_after;
pub(super) mod sliding_window;
pub(super) mod turns;
