//! Lists of Graph: pages, next links, decoding, error bodies, retries.

mod body_text;
mod children;
pub(super) mod decode;
mod error;
mod error_body;
mod next_link;
pub(super) mod page;
mod pager;
pub(super) mod pages;
mod phrases;
pub(super) mod probe;
mod retry;
