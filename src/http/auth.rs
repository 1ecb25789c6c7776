//! Bearer token of `/metrics` and `/status`.

use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};

/// Compares digests of equal length in full, so that the response time reveals nothing about the token.
pub(super) fn is_authorised(token: &SecretString, headers: &HeaderMap) -> bool {
    let expected = token.expose_secret();
    if expected.is_empty() {
        return true;
    }
    let Some((scheme, given)) =
        headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|value| value.split_once(' '))
    else {
        return false;
    };
    let (expected, given) = (Sha256::digest(expected), Sha256::digest(given.trim()));
    let difference = expected.iter().zip(given.iter()).fold(0, |sum, (a, b)| sum | (a ^ b));
    scheme.eq_ignore_ascii_case("bearer") && difference == 0
}

pub(super) fn unauthorised() -> Response {
    let hint = "send Authorization: Bearer with the value of http.token\n";
    (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, "Bearer")], hint).into_response()
}
