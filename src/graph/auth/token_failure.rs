//! Failed request for a token, with its cause and cure.

use std::time::Duration;

use super::aadsts;
use crate::domain::failure::{ErrorCode, Failure};

/// Reason why there is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", failure.code)]
pub struct TokenFailure {
    /// Failure that a run would record.
    pub failure: Failure,
    /// Local reason in our own words: an unreadable file, a refused connection, a response of a proxy.
    pub detail: Option<String>,
    /// Time until a new request is worthwhile, if the token service is down or throttles.
    pub retry_after: Option<Duration>,
}

impl From<ErrorCode> for TokenFailure {
    fn from(code: ErrorCode) -> Self {
        Self { failure: code.into(), detail: None, retry_after: None }
    }
}

impl TokenFailure {
    /// Cause and cure: by the number of the token service if it is a known one, else by the local reason.
    #[must_use]
    pub fn explain(&self, credential: &str) -> (String, String) {
        if let Some(advice) = self.failure.graph_code.as_deref().and_then(aadsts::token_advice) {
            return (advice.cause.to_owned(), advice.cure.to_owned());
        }
        let code = self.failure.code;
        let cause = self.detail.as_ref().map_or_else(|| code.cause().to_owned(), |detail| format!("{detail}."));
        let cure = match code {
            ErrorCode::CredentialUnavailable => format!("Correct graph.credentials.{credential}."),
            _ => code.remedy().to_owned(),
        };
        (cause, cure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_token_is_explained_by_its_number_or_its_local_reason() {
        let numbered = Failure::from_graph(ErrorCode::CredentialUnavailable, 401, Some("AADSTS7000222"), None);
        let failed = TokenFailure { failure: numbered, ..ErrorCode::CredentialUnavailable.into() };
        assert!(failed.explain("default").0.contains("expired"));
        let detail = Some("cannot read /secret: no such file".to_owned());
        let failed = TokenFailure { detail, ..ErrorCode::CredentialUnavailable.into() };
        let (cause, cure) = failed.explain("main");
        assert!(cause.contains("/secret") && cure.contains("graph.credentials.main"), "{cause} {cure}");
        let (cause, _) = TokenFailure::from(ErrorCode::TokenServiceUnavailable).explain("main");
        assert!(cause.contains("token service"), "{cause}");
    }
}
