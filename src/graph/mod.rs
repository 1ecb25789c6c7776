//! Read-only Microsoft Graph client: access tokens, authorised GETs with retries, and lists page by page.
//!
//! `listing/pages.rs` reads one list, `listing/children.rs` those below several parents; `listing/pager.rs` follows the next
//! links, which `listing/next_link.rs` validates. `listing/retry.rs` repeats a request until it succeeds or fails for good, `limits/` keeps it below Graph's quotas,
//! `auth/` adds the token and `transport.rs` sends it. Error texts of Graph are judged in `listing/error_body.rs` and never
//! leave this module: callers see only a [`Failure`](crate::domain::failure::Failure).

mod auth;
mod client;
mod limits;
mod listing;
mod problems;
mod transport;

pub use auth::token_failure::TokenFailure;
pub use client::{GraphClient, GraphReader};
pub use limits::budget::RunBudget;
pub use limits::pause::PauseNotice;
pub use limits::turns::TurnRequest;
pub use listing::page::{Page, PageObject};
pub use listing::pages::Pages;
pub use listing::probe::ProbeFailure;
pub use problems::GraphProblem;
pub use transport::GraphError;
