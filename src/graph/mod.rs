//! Microsoft Graph, read only: tokens, authorised GETs with their retries, and lists page by page.
//!
//! `Pages` (pages.rs) follows one list -> `GraphReader::get` (request.rs) tries one link until it is answered or given
//! up -> `Connections` (transport.rs) sends one request. What Graph says in an error is read in `answer.rs` and goes
//! no further than this room: outwards there is only a [`Failure`](crate::domain::failure::Failure).

mod answer;
mod assertion;
mod client;
mod credential;
mod crowd;
mod pace;
mod page;
mod pages;
mod probe;
mod request;
mod retry_after;
mod spending;
mod throttle;
mod token;
mod transport;
mod walk;

pub use client::{GraphClient, GraphReader};
pub use page::ObjectText;
pub use pages::{Page, PageObject, Pages};
pub use probe::ProbeFailure;
pub use spending::RunBudget;
pub use throttle::GateChange;
pub use transport::GraphError;
