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
            return (advice.cause.to_owned(), with_keys(advice.cure, credential));
        }
        let code = self.failure.code;
        let cause = self.detail.as_ref().map_or_else(|| code.cause().to_owned(), |detail| format!("{detail}."));
        let cure = match code {
            ErrorCode::CredentialUnavailable => format!("Correct graph.credentials.{credential}."),
            ErrorCode::TokenServiceUnavailable if self.detail.is_some() => {
                "Check the network, graph.proxy (which must allow the host), graph.no_proxy and graph.ca_file."
                    .to_owned()
            }
            _ => code.remedy().to_owned(),
        };
        (cause, cure)
    }
}

/// Cure with the full names of the keys of a credential.
fn with_keys(cure: &str, credential: &str) -> String {
    let keys = ["client_id", "client_secret"];
    keys.iter().fold(cure.to_owned(), |cure, key| cure.replace(key, &format!("graph.credentials.{credential}.{key}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_of_the_token_service_names_the_key_to_correct() {
        for (number, expected) in [
            ("AADSTS7000215", "Set graph.credentials.main.client_secret to the value"),
            ("AADSTS7000222", "replace graph.credentials.main.client_secret"),
            ("AADSTS700016", "Check graph.credentials.main.client_id; grant admin consent"),
            ("AADSTS90002", "graph.cloud"),
            ("AADSTS65001", "Grant admin consent in the tenant"),
            ("AADSTS1", "Correct graph.credentials.main"),
        ] {
            let numbered = Failure::from_graph(ErrorCode::CredentialUnavailable, 401, Some(number), None);
            let (_, cure) =
                TokenFailure { failure: numbered, ..ErrorCode::CredentialUnavailable.into() }.explain("main");
            assert!(cure.contains(expected), "{number}: {cure}");
        }
    }

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
        let detail = Some("the proxy refused a connection to login.example".to_owned());
        let (cause, cure) = TokenFailure { detail, ..ErrorCode::TokenServiceUnavailable.into() }.explain("main");
        assert!(cause.contains("proxy refused") && cure.contains("graph.proxy"), "{cause} {cure}");
    }
}
