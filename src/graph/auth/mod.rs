//! Access tokens for Graph: credentials, client assertions and the token cache.

pub(super) mod aadsts;
mod client_assertion;
pub(super) mod credential;
pub(super) mod token;
mod token_service;
