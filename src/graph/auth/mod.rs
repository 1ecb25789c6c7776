//! Access tokens for Graph: credentials, client assertions and the token cache.

mod client_assertion;
mod credential;
pub(super) mod token;
