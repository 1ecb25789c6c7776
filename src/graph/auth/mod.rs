//! Access tokens for Graph: credentials, client assertions and the token cache.

mod aadsts;
mod client_assertion;
pub(super) mod credential;
mod pkcs12;
pub(super) mod token;
pub(super) mod token_failure;
mod token_service;
